"""Eq. 3-6 on one axis: the weight of the sub-optimal class, from 0 (expert only) to 1 (no reward).

    python -m paper.alpha

The weight is w = exp((alpha - 1) / beta); alpha and beta enter only through it. The condition
stays, every point uses both templates and takes the same number of steps. At w = 0 the other class
has no token with a weight and is left out, so that a step holds twelve times the experts: not the
limit of a small w.
"""

from pathlib import Path

from paper.commands import (
    cell,
    command,
    legend_above,
    lines,
    markdown,
    open_figure,
    save_figure,
)
from paper.runs import TABLE
from paper.table2 import arm, expert_score, scarce
from support.cli import run

SEEDS = 3
WEIGHTS = (0, 0.01, 0.03, 0.1, 0.3, 1)
# these are arms of Table 2
ARM_OF = {0: "expert only", 0.1: "C-RLFT", 1: "without reward"}


def jobs(seed: int) -> dict:
    """{w: job}"""
    wanted = {}
    for w in WEIGHTS:
        if w in ARM_OF:
            wanted[w] = arm(ARM_OF[w], seed)
        else:
            wanted[w] = arm("C-RLFT", seed, classes=TABLE.format(1, w))
    return wanted


def report(results: dict, folder: Path) -> tuple[dict, str]:
    rows = {"sampled": {}, "greedy": {}, "scarce skill, sampled": {}}
    for w, group in results.items():
        rows["sampled"][w] = [expert_score(result) for result in group]
        rows["greedy"][w] = [expert_score(result, "greedy") for result in group]
        rows["scarce skill, sampled"][w] = [scarce(result) for result in group]
    draw(rows, folder / "alpha.png")
    table = []
    for label, row in rows.items():
        table.append([label, *map(cell, row.values())])
    return rows, markdown(["w", *WEIGHTS], table)


def draw(rows: dict, path: Path) -> None:
    # at equal distances: a logarithmic axis has no place for 0
    places = range(len(WEIGHTS))
    groups = {label: list(row.values()) for label, row in rows.items()}
    figure, axes = open_figure()
    lines(axes, places, groups)
    axes.set(xlabel="weight of the sub-optimal class", ylabel="right answers", ylim=(0, 1))
    axes.set_xticks(places, map(str, WEIGHTS))
    legend_above(axes, columns=3)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("alpha", argv)


if __name__ == "__main__":
    run(main)
