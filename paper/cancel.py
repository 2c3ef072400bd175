"""Weights that cancel: the expert's share of a step's loss, by what that loss is divided by.

    python -m paper.cancel                             ShareGPT-like lengths, and the toy's data
    python -m paper.cancel --data train.safetensors    and a prepared file instead of the toy's

Only the ratio of the weights in one sum matters. A micro-batch that is divided by its own sum of
weights has the same size whether its weights are 1 or 0.1: if all of its answers are the others',
they count in full. Then a weight of 0.1 is no longer 0.1, and C-RLFT is nearly SFT. Ours divides
by the whole step's sum, and `plan` of packing.py deals the classes to the steps in proportion.

This counts on the plans of real lengths what each way makes of a weight of 0.1. It trains nothing.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Prepared
from packing import Steps, flat, plan
from paper.packing import CAPACITY, sharegpt_like
from paper.toy import ToyConfig, make
from support.cli import parse_args, run

# tokens of a step and of a micro-batch: as in paper.packing, and four micro-batches of the toy's
SIZES = 8 * CAPACITY, CAPACITY
TOY_SIZES = 1536, 384


@dataclass(frozen=True)
class CancelConfig:
    """The flags of `python -m paper.cancel`."""

    # a prepared file, instead of the toy's data
    data: str | None = None
    # number of ShareGPT-like lengths
    conversations: int = 70_000
    # the file of the results
    out: str = "results/cancel.json"


class Corpus(NamedTuple):
    """What is trained on, all [N]."""

    lengths: np.ndarray  # int64
    is_expert: np.ndarray  # bool
    weight_sums: np.ndarray  # fp64, of each conversation's loss weights
    supervised: np.ndarray  # int64, its tokens that have a weight


def paper_like(conversations: int) -> Corpus:
    """The paper's proportions: 6 in 70 are the expert's. All tokens have a weight."""
    lengths, class_ids, weight_sums = sharegpt_like(conversations, 0)
    return Corpus(lengths, class_ids == 0, weight_sums, lengths)


def corpus_of(path: str | Path) -> Corpus:
    """A prepared file. ValueError: its conversations are all the expert's, or none is."""
    data = Prepared(path)
    names = [class_.name for class_ in data.classes]
    is_expert = data.class_ids == names.index(data.meta["expert"])
    if is_expert.all() or not is_expert.any():
        raise ValueError(
            f"{path}: all conversations are of one side, so no share can be told; prepare it with "
            "an expert's class and another"
        )
    return Corpus(data.lengths, is_expert, data.weight_sums, data.supervised)


# ---- the ways to divide


def pulls(way: str, micro_batches: list[np.ndarray], corpus: Corpus) -> list[np.ndarray]:
    """How much each conversation of a step pulls on its gradient, [n] for each micro-batch; all
    together 1. It is the sum of what the way multiplies the nll of the conversation's tokens by.
    """
    step = np.concatenate(micro_batches)
    pulled = []
    for micro in micro_batches:
        weights = corpus.weight_sums[micro]
        tokens = corpus.supervised[micro]
        step_tokens = corpus.supervised[step].sum()
        if way == "step":
            # the sum of w * nll / the step's sum of w
            pull = weights / corpus.weight_sums[step].sum()
        elif way == "micro-batch, by tokens":
            # each micro-batch's weighted mean; of these the mean, by their numbers of tokens
            pull = weights / weights.sum() * tokens.sum() / step_tokens
        elif way == "micro-batch":
            # each micro-batch's weighted mean; of these the mean
            pull = weights / weights.sum() / len(micro_batches)
        elif way == "conversation":
            # w * the mean nll of a conversation / the sum of w over the step's conversations
            mean_weights = corpus.weight_sums[step] / corpus.supervised[step]
            pull = weights / tokens / mean_weights.sum()
        else:
            # no weights: the mean nll of the step's tokens
            pull = tokens / step_tokens
        pulled.append(pull)
    return pulled


# (way, conversations of a micro-batch: None is as many as `plan` packs into it)
ROWS = (
    ("step", None),
    ("micro-batch, by tokens", None),
    ("micro-batch, by tokens", 4),
    ("micro-batch, by tokens", 1),
    ("micro-batch", None),
    ("micro-batch", 4),
    ("micro-batch", 1),
    ("conversation", None),
    ("tokens", None),
)


def regrouped(step: list[np.ndarray], size: int | None) -> list[np.ndarray]:
    """The step's conversations, shuffled, in micro-batches of `size`. None: as they are planned."""
    if size is None:
        return step
    conversations = np.random.default_rng(0).permutation(flat([step]))
    return np.split(conversations, range(size, len(conversations), size))


def shares(way: str, size: int | None, steps: Steps, corpus: Corpus) -> dict[str, float]:
    """{share: the expert's mean share of a step's pulls, low, high: of the lowest and the highest
    step, counts_as: what a token of the others counts, where one of the expert's counts 1}.
    """
    share_S = np.zeros(len(steps))
    for s, step in enumerate(steps):
        micro_batches = regrouped(step, size)
        pull = np.concatenate(pulls(way, micro_batches, corpus))
        is_expert = corpus.is_expert[np.concatenate(micro_batches)]
        share_S[s] = pull[is_expert].sum()
    share = share_S.mean()
    of_expert = share / corpus.supervised[corpus.is_expert].sum()
    of_others = (1 - share) / corpus.supervised[~corpus.is_expert].sum()
    row = {
        "share": share,
        "low": share_S.min(),
        "high": share_S.max(),
        "counts_as": of_others / of_expert,
    }
    return {key: float(value) for key, value in row.items()}


def compare(name: str, corpus: Corpus, sizes: tuple[int, int]) -> list[dict]:
    """A row for each of ROWS, printed on the way."""
    class_ids = (~corpus.is_expert).astype(np.int64)
    steps = plan(corpus.lengths, class_ids, corpus.weight_sums, 0, 0, *sizes)
    print(f"\n{name}: {len(steps)} steps of {sizes[0]:,} tokens")
    print(f"{'divided by':24}{'micro-batches':>16}{'share':>8}{'low':>8}{'high':>8}{'0.1 is':>8}")
    rows = []
    for way, size in ROWS:
        row = shares(way, size, steps, corpus)
        of = "packed" if size is None else f"of {size}"
        numbers = "".join(f"{row[key]:8.3f}" for key in ("share", "low", "high", "counts_as"))
        print(f"{way:24}{of:>16}{numbers}", flush=True)
        rows.append({"way": way, "size": size} | row)
    return rows


def main(argv: list[str]) -> None:
    config = parse_args(CancelConfig, argv)
    if config.data:
        corpus = corpus_of(config.data)
        name = f"{len(corpus.lengths):,} conversations of {Path(config.data).name}"
        sizes = SIZES
    else:
        with tempfile.TemporaryDirectory() as folder:
            make(ToyConfig(out=folder))
            corpus = corpus_of(Path(folder) / "train.safetensors")
        name = f"{len(corpus.lengths):,} conversations of the toy"
        sizes = TOY_SIZES

    lengths = f"{config.conversations:,} ShareGPT-like lengths"
    rows = {
        lengths: compare(lengths, paper_like(config.conversations), SIZES),
        name: compare(name, corpus, sizes),
    }
    results = {"command": " ".join(["python -m paper.cancel", *argv]), "rows": rows}
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
