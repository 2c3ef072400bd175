"""What a run prints and writes down about itself: the terminal, metrics.jsonl, loss.png."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.cli import on_one_line
from support.files import naming, written_whole
from support.ranks import rank


# Numbers from here on are taken for damage: no picture can show them, and no run has so many steps.
HUGE = 10**18


def has_bar() -> bool:
    """Is there a terminal, and wide enough for a bar? Some say that they have 0 columns."""
    if not sys.stderr.isatty():
        return False
    return os.get_terminal_size(sys.stderr.fileno()).columns > 0


def log(text: str) -> None:
    """Print a line, on rank 0, above the progress bar."""
    # The ranks may not have met yet, so torchrun's variable tells.
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(on_one_line(text))


@contextmanager
def planning(epochs: int, conversations: int) -> Iterator[Callable[[int], None]]:
    """Yields say(k), which tells that epoch k, from 1, is planned: by a bar, where all of them take
    over two seconds and somebody looks. epochs: how many there are, or about so many."""
    unit = "epoch" if epochs == 1 else "epochs"
    log(f"planning {epochs:,} {unit} of {conversations:,} conversations")
    is_quiet = rank() != 0 or not has_bar()
    with tqdm(total=epochs, unit="epoch", disable=is_quiet, delay=2, leave=False) as bar:

        def say(k: int) -> None:
            bar.set_description(f"planning epoch {k} of {epochs}", refresh=False)
            bar.update(k - 1 - bar.n)

        yield say


def read_metrics(path: Path, until: float = math.inf) -> list[dict]:
    """The lines of a metrics.jsonl, up to a step.

    What is none of ours is read past, whatever bytes it holds: a line that a crash has torn, or
    that somebody else wrote. A log is a record; nothing that stands in it may stop a run.
    """
    if not path.is_file():
        return []
    lines = []
    for raw in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(raw)
        # no UTF-8 and no JSON are both a ValueError
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and is_step(line.get("step")) and line["step"] <= until:
            lines.append(line)
    return lines


def is_step(value: object) -> bool:
    # not isinstance: a bool is an int, too
    return type(value) is int and 0 < value < HUGE


def means_of(line: dict, key: str) -> dict[str, float | None]:
    """{class: mean} under this key of a line, without what is no number; {} where there is none."""
    found = line.get(key)
    if not isinstance(found, dict):
        return {}
    means = {}
    for name, mean in found.items():
        is_number = type(mean) in (int, float) and abs(mean) < HUGE
        means[name] = float(mean) if is_number else None
    return means


class Log:
    """metrics.jsonl, and a progress bar or, off a terminal, a line now and then; on rank 0.

    start: the step of the checkpoint that the run goes on from, or 0. steps: of the whole run.
    """

    def __init__(self, out: Path, start: int, steps: int):
        self.is_first = rank() == 0
        # the steps that have a validation
        self.validated = set()
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
        self.validated = {line["step"] for line in kept if "val_loss" in line}
        with written_whole(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        # a line reaches the file as soon as it is whole
        self.path = path
        self.file = open(path, "a", buffering=1)
        self.bar = tqdm(
            total=steps, initial=start, unit="step", disable=not has_bar(), dynamic_ncols=True
        )

    def write(self, line: dict, tail: str = "") -> None:
        """Add a line to metrics.jsonl and show it. tail: what only the terminal shows."""
        if "loss" in line:
            self.in_a_row = 0
        if not self.is_first:
            return
        with naming(self.path):
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
        self.bar.set_postfix_str(on_one_line(text), refresh=False)
        self.bar.update()
        is_due = step % self.every == 0 or step in (1, self.steps)
        if self.bar.disable and is_due:
            print(on_one_line(f"step {step}/{self.steps} {text}"), flush=True)

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


def plot(folder: str | Path) -> Path:
    """loss.png from metrics.jsonl; returns its path."""
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
        drawn = []
        for line in lines:
            means = means_of(line, key)
            if means:
                drawn.append((line["step"], means))
        names = drawn[0][1] if drawn else []
        for name in names:
            steps = [step for step, _ in drawn]
            values = [means.get(name) for _, means in drawn]
            label = f"{name}, {where}"
            axes.plot(steps, values, style, linewidth=1, markersize=3, label=label)
    axes.set(xlabel="optimizer step", ylabel="nll per supervised token")
    # names are no formulas, whatever dollar signs they have
    axes.set_title(str(folder), parse_math=False)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    figure.tight_layout()
    picture = Path(folder) / "loss.png"
    with written_whole(picture) as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
    return picture
