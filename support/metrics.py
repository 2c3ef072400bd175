"""What a run says of itself: the terminal, metrics.jsonl, loss.png."""

import json
import math
import os
from pathlib import Path

from tqdm import tqdm

from support.ranks import rank


def log(text):
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text)


def read_metrics(path, until=math.inf):
    """The whole lines of a metrics.jsonl, up to a step; a crash may have torn the last."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [
        line
        for line in lines
        if isinstance(line, dict) and "step" in line and line["step"] <= until
    ]


class Log:
    """metrics.jsonl, and a progress bar or, off a terminal, a line now and then; on rank 0."""

    def __init__(self, out, start, steps):
        self.first, self.every, self.steps, self.skipped, self.in_a_row = (
            rank() == 0,
            max(1, steps // 20),
            steps,
            0,
            0,
        )
        if self.first:
            path = Path(out) / "metrics.jsonl"
            unfinished = path.with_name("metrics.partial")
            kept = read_metrics(path, until=start)  # steps after the checkpoint are taken again
            self.skipped = sum("skipped" in line for line in kept)
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
            unfinished.replace(path)
            self.file = open(path, "a", buffering=1)
            self.bar = tqdm(
                total=steps, initial=start, unit="step", disable=None, dynamic_ncols=True
            )

    def write(self, line, tail=""):
        if "loss" in line:
            self.in_a_row = 0
        if not self.first:
            return
        self.file.write(json.dumps(line) + "\n")
        if "skipped" in line:
            self.bar.update()
            return log(
                f"step {line['step']} skipped, {line['skipped']} so far: {line['nonfinite']}"
            )
        if "nonfinite" in line:
            return
        classes = lambda key: " ".join(
            f"{name} {x:.3f}" for name, x in line[key].items() if x is not None
        )
        if "val_loss" in line:
            return log(
                f"step {line['step']}: validation loss {line['val_loss']:.4f} ({classes('val_loss_by_class')})"
            )
        text = (
            f"loss {line['loss']:.4f} ({classes('loss_by_class')}) lr {line['lr']:.2e} {line['tokens_per_s']:,.0f} tokens/s "
            f"{line['supervised_tokens'] / line['tokens']:.0%} supervised{tail}"
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and (line["step"] % self.every == 0 or line["step"] in (1, self.steps)):
            print(f"step {line['step']}/{self.steps} {text}", flush=True)

    def nonfinite(self, step, error, conversations, config):
        """Log a step that was not taken. Returns why the run must stop, or None where such steps are skipped; the tenth in a row stops it."""
        self.in_a_row += 1
        stop = config.nonfinite == "stop" or self.in_a_row == 10
        self.skipped += not stop
        self.write(
            {"step": step, "nonfinite": str(error), "conversations": conversations.tolist()}
            | ({} if stop else {"skipped": self.skipped})
        )
        if stop:
            return (
                f"step {step}: {error}, the run stops{' after 10 such steps in a row' * (self.in_a_row == 10)}; look at conversations "
                f"{conversations[:8].tolist()}.. of {config.data} (all {len(conversations)} in metrics.jsonl); --nonfinite skip leaves such "
                "steps out, or begin another --out with a lower --lr"
            )


def ledger(data, train_on, held_out):
    trained, held = data.lengths[train_on].sum(), data.lengths[held_out].sum()
    return (
        f"{len(train_on):,} conversations once each, {trained:,} tokens ({data.supervised[train_on].sum():,} supervised) "
        f"+ {held:,} held out = {trained + held:,} of the file"
    )


def log_line(step, data, conversations, tally, norm, lr, seconds):
    """The line of metrics.jsonl of an optimizer step."""
    tokens, supervised, weight_sum = (
        x[conversations].sum().item() for x in (data.lengths, data.supervised, data.weight_sums)
    )
    assert sum(tally.count) == supervised, "the step trained on other tokens than were planned"
    return {
        "step": step,
        "loss": tally.loss_sum / weight_sum,
        "loss_by_class": tally.by_class(data.classes, tally.nll),
        "accuracy_by_class": tally.by_class(data.classes, tally.correct),
        "lr": lr,
        "grad_norm": norm,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "weight_sum": weight_sum,
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
    }


def plot(folder):
    """loss.png from metrics.jsonl."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "no loss.png: `pip install matplotlib`, then `python train.py plot DIR`"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the --out of a run")
    lines = read_metrics(path)
    if not lines:
        raise ValueError(f"{path}: no step in it yet")
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for prefix, style in (("", "-"), ("val_", "o--")):
        for name in next(
            (line[prefix + "loss_by_class"] for line in lines if prefix + "loss_by_class" in line),
            (),
        ):
            points = [
                (line["step"], line[prefix + "loss_by_class"][name])
                for line in lines
                if prefix + "loss_by_class" in line
            ]
            axes.plot(
                *zip(*points),
                style,
                linewidth=1,
                markersize=3,
                label=f"{name}, {'held-out prompts' if prefix else 'training'}",
            )
    axes.set(xlabel="optimizer step", ylabel="nll per supervised token", title=str(folder))
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(folder) / "loss.png", dpi=120)
