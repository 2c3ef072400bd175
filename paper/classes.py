"""Beyond the paper: three classes instead of two, and a reward for each answer, not its source.

    python -m paper.classes        and then paper.seven, where --assets names a folder with its data

The paper's future work (Sec. 7) asks for finer rewards. The expert's data are as everywhere; the
others are two sources, right 6 and 2 times in 10, so 4 in 10 together. A weight per answer needs a
judge; here it is the task's own check. It takes the place of the class's weight, so it says nothing
of the source: that is left to the condition.
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
from paper.runs import TABLE
from paper.table2 import HABITS, HOW, arm
from paper.toy import Task
from support.cli import run

SEEDS = 3
# label, conversations, probability that an answer is right
SOURCES = (("GPT-4", 300, 1.0), ("GPT-3.5", 1650, 0.6), ("GPT-2", 1650, 0.2))
THREE = "GPT-4=GPT4:1,GPT-3.5=GPT3:{},*=GPT2:0.1"
# Rewards 1, 0.5 and 0 have the weights 1, 0.32 and 0.1 when beta = 1 / ln 10.
MIDDLE = 0.3162
ARMS = {
    "two classes, the others as one (0.1)": {"classes": TABLE.format(1, 0.1)},
    "three classes (0.1, 0.1)": {"classes": THREE.format(0.1)},
    "three classes (0.32, 0.1)": {"classes": THREE.format(MIDDLE)},
    "three conditions, a weight for each answer": {"classes": THREE.format(MIDDLE), "wrong": 0.1},
    "no condition, a weight for each answer": {"classes": "*=GPT4:1", "wrong": 0.1},
}
CONDITIONS = "GPT4", "GPT3", "GPT2"


def jobs(seed: int) -> dict:
    """{arm: job}"""
    task = Task(sources=SOURCES, habits=HABITS, seed=seed)
    return {name: arm("C-RLFT", seed, task=task, **fields) for name, fields in ARMS.items()}


def report(results: dict, folder: Path) -> tuple[dict, str]:
    rows = {name: numbers_of(group) for name, group in results.items()}
    draw(rows, folder / "classes.png")

    table = []
    for name, row in rows.items():
        cells = []
        for values in by_condition(row):
            # an arm is asked only under the conditions it was trained with
            cells.append(cell(values) if values else "")
        table.append([name, *cells, cell(row["greedy"]["GPT4"])])
    asked = [f"`{condition} User:`" for condition in CONDITIONS]
    return rows, markdown(["arm", *asked, "`GPT4 User:`, greedy"], table)


def numbers_of(group: list[dict]) -> dict:
    """{"sampled", "greedy": {condition: [the score of each seed]}} of an arm."""
    row = {}
    for how in HOW:
        row[how] = {}
        for condition in group[0]["scores"]:
            scores = [result["scores"][condition][how]["all"] for result in group]
            row[how][condition] = scores
    return row


def by_condition(row: dict) -> list:
    """An arm's sampled scores, in the order of CONDITIONS; () where it was not asked."""
    return [row["sampled"].get(condition, ()) for condition in CONDITIONS]


def draw(rows: dict, path: Path) -> None:
    groups = {f"{condition} User:": {} for condition in CONDITIONS}
    for name, row in rows.items():
        for condition, values in row["sampled"].items():
            groups[f"{condition} User:"][name] = values
    figure, axes = open_figure()
    paired_dots(axes, list(rows), groups)
    axes.set(xlabel="right answers, sampled", xlim=(0, 1))
    legend_above(axes, columns=3)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("classes", argv)
    command("seven", argv)


if __name__ == "__main__":
    run(main)
