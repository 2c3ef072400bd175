"""What moves Table 2's order: the pre-trained base, the learning rate, and time.

    python -m paper.base        its own target, `make paper_base`, beside `make paper`

Everything else on paper/README.md is fine-tuned from a base (`Pretrain` in runs.py), as in the
paper. Here the same arms start from random weights, with twice the steps and a higher learning
rate; or from the base with half the learning rate, or three times the steps.
"""

from pathlib import Path

from paper.commands import (
    cell,
    command,
    legend_above,
    markdown,
    open_figure,
    paired_dots,
    save_figure,
)
from paper.runs import BASE_LR, LR, STEPS
from paper.table2 import ARMS, HOW, KINDS, arm, expert_score
from support.cli import run

SEEDS = 3
NOISE = KINDS["noise"]
NAMES = "C-RLFT", "without reward", "expert only"
# A way to start, and how its jobs differ from Table 2's.
STARTS = {
    "pre-trained": {},
    "pre-trained, half the lr": {"lr": LR / 2},
    "pre-trained, 3 x the steps": {"steps": 3 * STEPS},
    "random weights, 2 x the steps": {"base": "toy", "lr": BASE_LR, "steps": 2 * STEPS},
}


def jobs(seed: int) -> dict:
    """{(start, arm): job}"""
    wanted = {}
    for start, changes in STARTS.items():
        for name in NAMES:
            wanted[start, name] = arm(name, seed, NOISE, **changes)
    return wanted


def report(results: dict, folder: Path) -> tuple[dict, str]:
    numbers = {}
    for how in HOW:
        numbers[how] = {}
        for (start, name), group in results.items():
            numbers[how][f"{start}: {name}"] = [expert_score(result, how) for result in group]
    sampled = numbers["sampled"]
    draw(sampled, folder / "base.png")

    table = []
    for name in NAMES:
        cells = [cell(sampled[f"{start}: {name}"]) for start in STARTS]
        table.append([name, ARMS[name].average, *cells])
    return numbers, markdown(["arm", "paper, %", *STARTS], table)


def draw(sampled: dict[str, list], path: Path) -> None:
    groups = {}
    for start in STARTS:
        groups[start] = {name: sampled[f"{start}: {name}"] for name in NAMES}
    figure, axes = open_figure()
    paired_dots(axes, NAMES, groups)
    axes.set(xlabel="right answers, sampled", xlim=(0, 1))
    legend_above(axes, columns=2)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("base", argv)


if __name__ == "__main__":
    run(main)
