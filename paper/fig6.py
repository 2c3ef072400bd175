"""Fig. 6 in miniature: C-RLFT on 60 to 100% of one class and all of the other.

    python -m paper.fig6

Equal epochs, so that less data is also fewer steps: 60% of the sub-optimal class is two thirds of
them, 60% of the expert's nearly all. The paper does not say what it kept equal.
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
from paper.runs import FineTune
from paper.table2 import HABITS, arm, expert_score
from paper.toy import Task
from support.cli import run

SEEDS = 3
SHARES = (0.6, 0.8, 1.0)
SIDES = "expert", "sub-optimal"


def jobs(seed: int) -> dict:
    """{(side, share of it that is kept): job}"""
    wanted = {}
    for side in SIDES:
        for share in SHARES:
            wanted[side, share] = job_of(side, share, seed)
    return wanted


def job_of(side: str, share: float, seed: int) -> FineTune:
    if share == 1:
        return arm("C-RLFT", seed)
    keep = (share, 1.0) if side == "expert" else (1.0, share)
    task = Task(keep=keep, habits=HABITS, seed=seed)
    return arm("C-RLFT", seed, steps=None, task=task)


def report(results: dict, folder: Path) -> tuple[dict, str]:
    rows = {}
    for side in SIDES:
        rows[side] = {}
        for share in SHARES:
            rows[side][share] = [expert_score(result) for result in results[side, share]]
    draw(rows, folder / "fig6.png")

    numbers = {}
    table = []
    for side, row in rows.items():
        for share, scores in row.items():
            numbers[f"{side}, {share}"] = scores
        table.append([f"of the {side} class", *map(cell, row.values())])
    return numbers, markdown(["", *(f"{share:.0%}" for share in SHARES)], table)


def draw(rows: dict, path: Path) -> None:
    percent = [100 * share for share in SHARES]
    groups = {f"of the {side} class": list(row.values()) for side, row in rows.items()}
    figure, axes = open_figure()
    lines(axes, percent, groups)
    axes.set(xlabel="% of one class", ylabel="right answers, sampled", ylim=(0, 1))
    legend_above(axes, columns=2)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("fig6", argv)


if __name__ == "__main__":
    run(main)
