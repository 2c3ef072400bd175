"""How batches are formed: our step plan beside padding, length-grouped padding and the public trainer's kind of multipack.

    python -m paper.packing                               70,000 ShareGPT-like lengths, 8 and 64 ranks of 16,384 tokens, and
                                                          what dividing a step's loss by the step's own weights does
    python -m paper.packing --data train.safetensors      and the lengths of a prepared file

What is compared, per optimizer step of `ranks` x 16,384 tokens:
    fill     real tokens / tokens computed            dropped   conversations left out of the epoch
    FLOPs    the busiest rank's / the mean rank's     share     the expert's part of a step's loss weight, lowest and highest
"""

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import Prepared
from packing import COST_7B, flat, plan
from support.cli import parse_args, run

CAPACITY = 16_384


@dataclass(frozen=True)
class PackingConfig:
    data: str | None = None
    conversations: int = 70_000  # of ShareGPT-like lengths
    out: str = "results/packing.json"


def sharegpt_like(n, seed, mean=1500, sigma=0.8, low=16, high=4096):
    """(lengths, class ids, weight sums): log-normal lengths cut at `high`; 6 in 70 are the expert's (class 0), weights 1 and 0.1."""
    z = np.random.default_rng(seed).standard_normal(n)
    mu_low, mu_high = 4.0, 10.0
    for _ in range(60):  # the mu whose cut distribution has this mean
        mu = (mu_low + mu_high) / 2
        below = np.clip(np.exp(mu + sigma * z), low, high).mean() < mean
        mu_low, mu_high = (mu, mu_high) if below else (mu_low, mu)
    lengths = np.clip(np.exp(mu + sigma * z), low, high).astype(np.int64)
    class_ids = (np.random.default_rng(seed + 9).random(n) >= 6 / 70).astype(np.int64)
    return lengths, class_ids, np.where(class_ids == 0, 1.0, 0.1) * lengths


def padded(lengths, ranks, grouped):
    """[step][rank] conversations in rows of one length, so many rows that the longest fits: shuffled, or sorted within 50 batches."""
    order = np.random.default_rng(0).permutation(len(lengths))
    if grouped:
        window = 50 * ranks * (CAPACITY // int(lengths.mean()))
        order = np.concatenate(
            [
                w[np.argsort(-lengths[w], kind="stable")]
                for w in np.split(order, range(window, len(order), window))
            ]
        )
    batches, start, longest = [], 0, 0
    for i, n in enumerate(lengths[order].tolist()):
        if (i - start + 1) * max(longest, n) > CAPACITY:
            batches.append(order[start:i])
            start, longest = i, 0
        longest = max(longest, n)
    batches.append(order[start:])
    return [batches[i : i + ranks] for i in range(0, len(batches), ranks)]


def multipack(lengths, ranks):
    """[step][rank]: as many conversations of the shuffled row as first-fit decreasing gets into a step's bins; the last step,
    incomplete, is dropped."""
    order = np.random.default_rng(0).permutation(len(lengths))

    def first_fit(window):
        room, bins = np.full(ranks, CAPACITY), [[] for _ in range(ranks)]
        for i in window[np.argsort(-lengths[window], kind="stable")]:
            b = int(np.argmax(room >= lengths[i]))
            if room[b] < lengths[i]:
                return None
            room[b] -= lengths[i]
            bins[b].append(i)
        return bins

    steps, start, total = [], 0, np.cumsum(lengths[order])
    while True:
        done = total[start - 1] if start else 0
        low, high = 1, int(np.searchsorted(total, done + ranks * CAPACITY, "right")) - start
        while low < high:  # the longest window that fits, by bisection
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if first_fit(order[start : start + middle]) else (low, middle - 1)
            )
        if start + low >= len(order):
            return steps
        steps.append([np.array(b, np.int64) for b in first_fit(order[start : start + low])])
        start += low


def measure(steps, seconds, lengths, class_ids, weight_sums, ranks, pad):
    """One row of the table."""
    flops, computed = np.zeros((len(steps), ranks)), 0
    for s, step in enumerate(steps):
        for r, rows in enumerate(step):
            if len(rows):
                n = np.full(len(rows), lengths[rows].max()) if pad else lengths[rows]
                computed += n.sum() if pad else CAPACITY
                flops[s, r % ranks] += (
                    COST_7B[0] * n.sum() + COST_7B[1] * (n.astype(np.float64) ** 2).sum()
                )
    used = flat(steps)
    share = [
        weight_sums[i[class_ids[i] == 0]].sum() / weight_sums[i].sum()
        for i in (flat([s]) for s in steps)
    ]
    uneven = flops.max(1) / flops.mean(1)
    return {
        "steps": len(steps),
        "fill": lengths[used].sum() / computed,
        "dropped": len(lengths) - len(used),
        "flops_mean": uneven.mean(),
        "flops_worst": uneven.max(),
        "share_low": min(share),
        "share_high": max(share),
        "seconds": seconds,
    }


def compare(name, lengths, class_ids, weight_sums, ranks):
    ways = {
        "padded, shuffled": (lambda: padded(lengths, ranks, False), True),
        "padded, grouped by length": (lambda: padded(lengths, ranks, True), True),
        "multipack, first-fit decreasing": (lambda: multipack(lengths, ranks), False),
        "ours": (
            lambda: plan(lengths, class_ids, weight_sums, 0, 0, ranks * CAPACITY, CAPACITY),
            False,
        ),
    }
    print(
        f"\n{name}, {ranks} ranks\n{'':34}{'steps':>6} {'fill':>7} {'dropped':>8} {'FLOPs':>7} {'worst':>7} {'share':>14} {'seconds':>8}"
    )
    results = {}
    for way, (form, pad) in ways.items():
        began = time.perf_counter()
        steps = form()
        if not steps:  # multipack drops the last, incomplete step, and there was no other
            print(f"{way:34}     0")
            continue
        r = results[way] = measure(
            steps, time.perf_counter() - began, lengths, class_ids, weight_sums, ranks, pad
        )
        print(
            f"{way:34}{r['steps']:6} {r['fill']:7.4f} {r['dropped']:8} {r['flops_mean']:7.4f} {r['flops_worst']:7.4f} "
            f"{r['share_low']:6.3f} {r['share_high']:6.3f} {r['seconds']:8.2f}",
            flush=True,
        )
    return {key: {k: float(v) for k, v in value.items()} for key, value in results.items()}


def small_steps(lengths, class_ids, weight_sums, draws=2000):
    """The expert's mean part of the weight of a step of n shuffled conversations, and what it is over all data.

    A step's loss is divided by the step's own weight sum, so this part, not the one over the data, is what training sees: the
    mean of a ratio is not the ratio of the means.
    """
    expert, rng = np.where(class_ids == 0, weight_sums, 0.0), np.random.default_rng(0)
    shares = {}
    for n in (8, 64, 175):
        step = rng.integers(len(lengths), size=(draws, n))
        shares[str(n)] = (expert[step].sum(1) / weight_sums[step].sum(1)).mean()
    shares["all"] = expert.sum() / weight_sums.sum()
    print(
        "the expert's part of a step's weight, mean over steps of n shuffled conversations: "
        + ", ".join(f"{n}: {x:.3f}" for n, x in shares.items())
    )
    return shares


def main(argv):
    config = parse_args(PackingConfig, argv)
    data = Prepared(config.data) if config.data else None
    kinds = {
        f"{config.conversations:,} ShareGPT-like lengths": sharegpt_like(config.conversations, 0)
    }
    if data:
        kinds[f"{len(data):,} conversations of {Path(config.data).name}"] = (
            data.lengths,
            (data.class_ids != 0).astype(np.int64),
            data.weight_sums,
        )
    results = {
        "command": " ".join(["python -m paper.packing", *argv]),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "plans": {
            name: {ranks: compare(name, *kind, ranks) for ranks in (8, 64)}
            for name, kind in kinds.items()
        },
        "expert_share_of_steps": {name: small_steps(*kind) for name, kind in kinds.items()},
    }
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run(main)
