"""Ways to form batches: our step plan beside padding, padding by length, and the public trainer's
multipack. That one is plain Python here: it forms the public steps, but takes longer than the
original, which numba compiles.

    python -m paper.packing                             70,000 ShareGPT-like lengths
    python -m paper.packing --data train.safetensors    and the lengths of a prepared file

A step is `ranks` x 16,384 tokens, with 8 ranks and with 64. What is compared:

    steps     of an epoch
    fill      real tokens / tokens computed, padding included
    dropped   conversations that the epoch leaves out
    FLOPs     the busiest rank's / the mean rank's: mean over the steps, and the worst step
    share     the expert's part of a step's loss weight, lowest and highest

Then comes what dividing a step's loss by the step's own weights does to small steps, and how long
`plan` takes on lengths of other kinds.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import Prepared
from packing import COST_7B, Steps, flat, plan
from support.cli import parse_args, run

# tokens of a micro-batch
CAPACITY = 16_384

# how often each way is timed
RUNS = 5


@dataclass(frozen=True)
class PackingConfig:
    """The flags of `python -m paper.packing`."""

    # a prepared file, to compare the ways on its lengths, too
    data: str | None = None
    # number of ShareGPT-like lengths
    conversations: int = 70_000
    # the file of the results
    out: str = "results/packing.json"


class Corpus(NamedTuple):
    """What is packed, all [N]. Class 0 is the expert's."""

    lengths: np.ndarray  # int64
    class_ids: np.ndarray  # int64
    weight_sums: np.ndarray  # fp64, of each conversation's loss weights


def sharegpt_like(
    n: int,
    seed: int,
    mean: float = 1500,
    sigma: float = 0.8,
    low: int = 16,
    high: int = 4096,
) -> Corpus:
    """n log-normal lengths, cut at low and high so that their mean is `mean`.

    6 conversations in 70 are the expert's, with weight 1 for a token; the others have 0.1.
    """
    z = np.random.default_rng(seed).standard_normal(n)

    def cut_lengths(mu: float) -> np.ndarray:
        return np.clip(np.exp(mu + sigma * z), low, high)

    # The mu that gives this mean, by bisection: the mean rises with mu. 60 halvings reach the last
    # bit of a float.
    mu_low = 4.0
    mu_high = 10.0
    for _ in range(60):
        mu = (mu_low + mu_high) / 2
        if cut_lengths(mu).mean() < mean:
            mu_low = mu
        else:
            mu_high = mu
    lengths = cut_lengths(mu).astype(np.int64)

    is_other = np.random.default_rng(seed + 9).random(n) >= 6 / 70
    token_weight = np.where(is_other, 0.1, 1.0)
    return Corpus(lengths, is_other.astype(np.int64), token_weight * lengths)


# of `lengths_of`, beside the log-normal lengths of `sharegpt_like`
KINDS = "log-normal", "bimodal", "bimodal, with gaps", "constant"


def lengths_of(kind: str, n: int) -> Corpus:
    """n conversations whose lengths are of one of KINDS, 6 in 70 of them the expert's."""
    if kind == "log-normal":
        return sharegpt_like(n, 0)
    rng = np.random.default_rng(0)
    if kind == "bimodal":
        lengths = np.where(rng.random(n) < 0.5, rng.normal(4000, 60, n), rng.normal(100, 20, n))
        lengths = np.clip(lengths, 16, 4096).astype(np.int64)
    elif kind == "bimodal, with gaps":
        lengths = np.where(rng.random(n) < 0.5, 3900, 100)
    else:
        lengths = np.full(n, 2500)
    is_other = rng.random(n) >= 6 / 70
    token_weight = np.where(is_other, 0.1, 1.0)
    return Corpus(lengths, is_other.astype(np.int64), token_weight * lengths)


# ---- the ways


WAYS = (
    "padded, shuffled",
    "padded, grouped by length",
    "multipack, first-fit decreasing",
    "ours",
)


def form(way: str, corpus: Corpus, ranks: int) -> Steps:
    """The steps of an epoch, formed in one of WAYS; each step has a micro-batch for each rank."""
    if way == "padded, shuffled":
        return padded(corpus.lengths, ranks, grouped=False)
    if way == "padded, grouped by length":
        return padded(corpus.lengths, ranks, grouped=True)
    if way == "multipack, first-fit decreasing":
        return multipack(corpus.lengths, ranks)
    return plan(*corpus, 0, 0, ranks * CAPACITY, CAPACITY)


def padded(lengths: np.ndarray, ranks: int, grouped: bool) -> Steps:
    """[step][rank]: rows that are all padded to their longest, as many as fit a micro-batch.

    grouped: the shuffled conversations are sorted by length within windows of 50 steps, so that
    rows of a micro-batch are nearly equal.
    """
    order = np.random.default_rng(0).permutation(len(lengths))
    if grouped:
        window = 50 * ranks * (CAPACITY // int(lengths.mean()))
        order = sorted_in_windows(order, lengths, window)

    batches = []
    start = 0
    longest = 0
    for i, length in enumerate(lengths[order].tolist()):
        rows = i - start + 1
        if rows * max(longest, length) > CAPACITY:
            batches.append(order[start:i])
            start = i
            longest = 0
        longest = max(longest, length)
    batches.append(order[start:])
    return [batches[i : i + ranks] for i in range(0, len(batches), ranks)]


def sorted_in_windows(order: np.ndarray, lengths: np.ndarray, window: int) -> np.ndarray:
    """The same order in windows of so many conversations, the longest first within each."""
    parts = []
    for part in np.split(order, range(window, len(order), window)):
        longest_first = np.argsort(-lengths[part], kind="stable")
        parts.append(part[longest_first])
    return np.concatenate(parts)


def multipack(lengths: np.ndarray, ranks: int) -> Steps:
    """[step][rank], as the public trainer's sampler does it (ochat/training_deepspeed/
    multipack_sampler.py). A step takes as many conversations of the shuffled row as first-fit
    decreasing gets into its micro-batches. The first step that leaves a micro-batch empty ends the
    epoch: that is the last one, where the rest is too little for all of them.
    """
    order = np.random.default_rng(0).permutation(len(lengths))
    total = np.cumsum(lengths[order])
    steps = []
    start = 0
    while start < len(order):
        done = total[start - 1] if start else 0
        # the most conversations that first-fit takes, by bisection between 1 and what has no gaps
        low = 1
        high = int(np.searchsorted(total, done + ranks * CAPACITY, "right")) - start
        while low < high:
            middle = (low + high + 1) // 2
            if first_fit(lengths, order[start : start + middle], ranks):
                low = middle
            else:
                high = middle - 1
        step = first_fit(lengths, order[start : start + low], ranks)
        # None: a conversation is longer than a micro-batch. That ends the epoch, too.
        if step is None or not all(map(len, step)):
            break
        steps.append(step)
        start += low
    return steps


def first_fit(lengths: np.ndarray, window: np.ndarray, ranks: int) -> list[np.ndarray] | None:
    """The conversations of the window in a micro-batch for each rank: the longest first, each into
    the first that has room. None where one fits nowhere.
    """
    room = np.full(ranks, CAPACITY)
    members = [[] for _ in range(ranks)]
    longest_first = np.argsort(-lengths[window], kind="stable")
    for i in window[longest_first]:
        # argmax finds the first True, or 0 where there is none
        rank = int(np.argmax(room >= lengths[i]))
        if room[rank] < lengths[i]:
            return None
        room[rank] -= lengths[i]
        members[rank].append(i)
    return [np.array(conversations, np.int64) for conversations in members]


# ---- what they come to


def timed(form: Callable[[], Steps]) -> tuple[Steps, float, float]:
    """(what form returns, the seconds that it took, the seconds of CPU), the least of RUNS times
    each: other programs of the machine only make it longer.
    """
    seconds = []
    cpu_seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        cpu_began = time.process_time()
        steps = form()
        cpu_seconds.append(time.process_time() - cpu_began)
        seconds.append(time.perf_counter() - began)
    return steps, min(seconds), min(cpu_seconds)


def measure(steps: Steps, corpus: Corpus, ranks: int, is_padded: bool) -> dict[str, float]:
    """One row of the table, without the time."""
    linear, quadratic = COST_7B
    flops_SR = np.zeros((len(steps), ranks))
    computed = 0
    for s, step in enumerate(steps):
        for number, micro in enumerate(step):
            if len(micro) == 0:
                continue
            lengths = corpus.lengths[micro]
            # A padded row is computed to its end; a packed micro-batch always is of CAPACITY.
            if is_padded:
                lengths = np.full(len(micro), lengths.max())
                computed += lengths.sum()
            else:
                computed += CAPACITY
            squares = lengths.astype(np.float64) ** 2
            rank = number % ranks
            flops_SR[s, rank] += linear * lengths.sum() + quadratic * squares.sum()

    used = flat(steps)
    uneven = flops_SR.max(1) / flops_SR.mean(1)
    shares = [expert_share(corpus, flat([step])) for step in steps]
    fill = corpus.lengths[used].sum() / computed
    row = {
        "steps": len(steps),
        "fill": fill,
        "dropped": len(corpus.lengths) - len(used),
        "flops_mean": uneven.mean(),
        "flops_worst": uneven.max(),
        "share_low": min(shares),
        "share_high": max(shares),
    }
    return {key: float(value) for key, value in row.items()}


def expert_share(corpus: Corpus, conversations: np.ndarray) -> float:
    """The expert's part of the loss weight of these conversations."""
    weights = corpus.weight_sums[conversations]
    is_expert = corpus.class_ids[conversations] == 0
    return weights[is_expert].sum() / weights.sum()


def compare(name: str, corpus: Corpus, ranks: int) -> dict[str, dict[str, float]]:
    """{way: its row}, printed as a table on the way."""
    print(f"\n{name}, {ranks} ranks")
    print(
        f"{'':34}{'steps':>6} {'fill':>7} {'dropped':>8} {'FLOPs':>7} {'worst':>7} "
        f"{'share':>14} {'seconds':>8} {'of CPU':>7}"
    )
    rows = {}
    for way in WAYS:
        steps, seconds, cpu_seconds = timed(partial(form, way, corpus, ranks))
        # multipack may drop the last step, which may be the only one
        if not steps:
            print(f"{way:34}     0")
            continue
        row = measure(steps, corpus, ranks, way.startswith("padded"))
        row |= {"seconds": seconds, "cpu_seconds": cpu_seconds}
        rows[way] = row
        used = f"{row['steps']:6.0f} {row['fill']:7.4f} {row['dropped']:8.0f}"
        flops = f"{row['flops_mean']:7.4f} {row['flops_worst']:7.4f}"
        share = f"{row['share_low']:6.3f} {row['share_high']:6.3f}"
        print(f"{way:34}{used} {flops} {share} {seconds:8.2f} {cpu_seconds:7.2f}", flush=True)
    return rows


def small_steps(corpus: Corpus, draws: int = 2000) -> dict[str, float]:
    """{n: the expert's mean part of the weight of a step of n shuffled conversations}, and "all".

    A step's loss is divided by the step's own weight sum. So this part is what training sees, and
    not the part in all data: the mean of a ratio is not the ratio of the means.
    """
    is_expert = corpus.class_ids == 0
    expert_sums = np.where(is_expert, corpus.weight_sums, 0.0)
    rng = np.random.default_rng(0)
    shares = {}
    for n in (8, 64, 175):
        # n conversations for each of the steps
        drawn = rng.integers(len(corpus.lengths), size=(draws, n))
        share = expert_sums[drawn].sum(1) / corpus.weight_sums[drawn].sum(1)
        shares[str(n)] = share.mean()
    shares["all"] = expert_sums.sum() / corpus.weight_sums.sum()

    listed = ", ".join(f"{n}: {share:.3f}" for n, share in shares.items())
    print(
        "the expert's part of a step's weight, mean over steps of n shuffled conversations: "
        + listed
    )
    return shares


def plan_times(conversations: int) -> list[dict]:
    """How long `plan` takes on each of KINDS, for steps of 131,072 tokens in micro-batches of
    16,384 and in those as long as the longest conversation."""
    print(f"\n{'plan':28}{'steps':>6} {'fill':>7} {'seconds':>8} {'of CPU':>7}")
    rows = []
    for kind in KINDS:
        corpus = lengths_of(kind, conversations)
        for micro_tokens in (CAPACITY, 4096):
            of = partial(plan, *corpus, 0, 0, 8 * CAPACITY, micro_tokens)
            steps, seconds, cpu_seconds = timed(of)
            fill = float(corpus.lengths.sum() / (len(steps) * 8 * CAPACITY))
            name = f"{kind}, {micro_tokens:,}"
            print(f"{name:28}{len(steps):6} {fill:7.4f} {seconds:8.2f} {cpu_seconds:7.2f}")
            row = {"kind": kind, "micro_tokens": micro_tokens, "steps": len(steps), "fill": fill}
            rows.append(row | {"seconds": seconds, "cpu_seconds": cpu_seconds})
    return rows


def main(argv: list[str]) -> None:
    config = parse_args(PackingConfig, argv)
    data = Prepared(config.data) if config.data else None
    name = f"{config.conversations:,} ShareGPT-like lengths"
    corpora = {name: sharegpt_like(config.conversations, 0)}
    if data:
        name = f"{len(data):,} conversations of {Path(config.data).name}"
        is_other = (data.class_ids != 0).astype(np.int64)
        corpora[name] = Corpus(data.lengths, is_other, data.weight_sums)

    plans = {}
    for name, corpus in corpora.items():
        plans[name] = {ranks: compare(name, corpus, ranks) for ranks in (8, 64)}
    shares = {name: small_steps(corpus) for name, corpus in corpora.items()}
    results = {
        "command": " ".join(["python -m paper.packing", *argv]),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "plans": plans,
        "expert_share_of_steps": shares,
        "plan_times": plan_times(config.conversations),
    }
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
