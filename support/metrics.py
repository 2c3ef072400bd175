"""What a run prints and writes down about itself: the terminal, metrics.jsonl, loss.png."""

import json
import math
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.files import written_whole
from support.ranks import rank


def log(text: str) -> None:
    """Print a line, on rank 0, above the progress bar."""
    # The ranks may not have met yet, so torchrun's variable tells.
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text)


def read_metrics(path: Path, until: float = math.inf) -> list[dict]:
    """The lines of a metrics.jsonl, up to a step; without the last where a crash has torn it."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line and line["step"] <= until:
            lines.append(line)
    return lines


class Log:
    """metrics.jsonl, and a progress bar or, off a terminal, a line now and then; on rank 0.

    start: the step of the checkpoint that the run goes on from, or 0. steps: of the whole run.
    """

    def __init__(self, out: Path, start: int, steps: int):
        self.is_first = rank() == 0
        self.steps = steps
        # off a terminal: some twenty lines a run
        self.every = max(1, steps // 20)
        # Steps whose loss or gradient was not finite: `skipped` in the whole run, `in_a_row` since
        # the last step that was taken.
        self.skipped = 0
        self.in_a_row = 0
        if not self.is_first:
            return
        path = Path(out) / "metrics.jsonl"
        # Steps after the checkpoint are taken again, so their lines go.
        kept = read_metrics(path, until=start)
        self.skipped = sum("skipped" in line for line in kept)
        with written_whole(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        # a line reaches the file as soon as it is whole
        self.file = open(path, "a", buffering=1)
        # disable=None: no bar where the output is no terminal
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None, dynamic_ncols=True)

    def write(self, line: dict, tail: str = "") -> None:
        """Add a line to metrics.jsonl and show it. tail: what only the terminal shows."""
        if "loss" in line:
            self.in_a_row = 0
        if not self.is_first:
            return
        self.file.write(json.dumps(line) + "\n")
        step = line["step"]
        if "loss" in line:
            self.show_step(line, tail)
        elif "val_loss" in line:
            of_classes = class_means(line["val_loss_by_class"])
            log(f"step {step}: validation loss {line['val_loss']:.4f} ({of_classes})")
        elif "skipped" in line:
            self.bar.update()
            log(f"step {step} skipped, {line['skipped']} so far: {line['nonfinite']}")

    def show_step(self, line: dict, tail: str) -> None:
        """The bar, or off a terminal the first line, the last, and every so many."""
        step = line["step"]
        of_classes = class_means(line["loss_by_class"])
        supervised = line["supervised_tokens"] / line["tokens"]
        text = (
            f"loss {line['loss']:.4f} ({of_classes}) lr {line['lr']:.2e} "
            f"{line['tokens_per_s']:,.0f} tokens/s {supervised:.0%} supervised{tail}"
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        is_due = step % self.every == 0 or step in (1, self.steps)
        if self.bar.disable and is_due:
            print(f"step {step}/{self.steps} {text}", flush=True)

    def write_nonfinite(
        self, step: int, error: Exception, conversations: list[int], skipped: bool
    ) -> None:
        """Write down a step that was not taken because its loss or gradient is not finite.

        skipped: the run goes on without the step. If False, the run stops at it.
        """
        self.in_a_row += 1
        line = {"step": step, "nonfinite": str(error), "conversations": conversations}
        if skipped:
            self.skipped += 1
            line["skipped"] = self.skipped
        self.write(line)


def class_means(means: dict[str, float | None]) -> str:
    """`GPT4 1.234 GPT3 2.345`: the classes that a step had tokens of."""
    return " ".join(f"{name} {mean:.3f}" for name, mean in means.items() if mean is not None)


def ledger(data, train_on: np.ndarray, held_out: np.ndarray) -> str:
    """A line that accounts for every token of the prepared file in an epoch."""
    trained = data.lengths[train_on].sum()
    supervised = data.supervised[train_on].sum()
    held = data.lengths[held_out].sum()
    return (
        f"{len(train_on):,} conversations once each, {trained:,} tokens ({supervised:,} "
        f"supervised) + {held:,} held out = {trained + held:,} of the file"
    )


def log_line(step, data, conversations, tally, norm, lr, seconds) -> dict:
    """The line of metrics.jsonl of an optimizer step that used these conversations of the data."""
    tokens = data.lengths[conversations].sum().item()
    supervised = data.supervised[conversations].sum().item()
    weight_sum = data.weight_sums[conversations].sum().item()
    assert tally.supervised() == supervised, "the step trained on other tokens than were planned"
    return {
        "step": step,
        "loss": tally.loss_sum / weight_sum,
        **tally.by_class(data.classes),
        "lr": lr,
        "grad_norm": norm,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "weight_sum": weight_sum,
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
    }


def plot(folder: str | Path) -> None:
    """loss.png from metrics.jsonl."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "no loss.png: `pip install matplotlib`, then `python train.py plot DIR`"
        ) from None
    # a backend that draws into files, so that no display is needed
    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the --out of a run")
    lines = read_metrics(path)
    if not lines:
        raise ValueError(f"{path}: no step in it yet")

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    curves = ("loss_by_class", "-", "training"), ("val_loss_by_class", "o--", "held-out prompts")
    for key, style, where in curves:
        drawn = [line for line in lines if key in line]
        names = drawn[0][key] if drawn else []
        for name in names:
            steps = [line["step"] for line in drawn]
            means = [line[key][name] for line in drawn]
            label = f"{name}, {where}"
            axes.plot(steps, means, style, linewidth=1, markersize=3, label=label)
    axes.set(xlabel="optimizer step", ylabel="nll per supervised token", title=str(folder))
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(folder) / "loss.png", dpi=120)
