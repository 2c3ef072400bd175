"""Fig. 7 and Table 3 in miniature: where the condition stands in the template, by turn.

    python -m paper.fig7

`beginning` says it once (`Assistant is GPT4`), the other two in every turn. The paper finds the
first much worse. By turn the score is the share of right answers where what came before is right,
so that later turns are asked of all. Equal epochs.
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
from paper.table2 import arm, scarce
from support.cli import run

SEEDS = 3
# as `--template` calls them
PLACEMENTS = "before_speaker", "before_assistant", "beginning"
TURNS = (1, 2, 3)
HEAD = [
    "placement",
    "expert's prompt, score",
    "scarce skill",
    "turn 1",
    "turn 2",
    "turn 3",
    "the other prompt: turn 1",
    "turn 2",
    "turn 3",
]


def jobs(seed: int) -> dict:
    """{placement: job}"""
    wanted = {}
    for placement in PLACEMENTS:
        wanted[placement] = arm("C-RLFT", seed, steps=None, template=placement)
    # an arm of Table 2, whose steps are as many epochs
    wanted["before_speaker"] = arm("C-RLFT", seed)
    return wanted


def report(results: dict, folder: Path) -> tuple[dict, str]:
    rows = {placement: numbers_of(group) for placement, group in results.items()}
    draw(rows, folder / "fig7.png")

    table = []
    for placement, row in rows.items():
        by_turn = [*row["by turn"], *row["other prompt, by turn"]]
        scores = row["all"], row["scarce skill"], *by_turn
        table.append([f"`{placement}`", *map(cell, scores)])
    return rows, markdown(HEAD, table)


def numbers_of(group: list[dict]) -> dict:
    """A placement's score and the scarce skill's, [a value per seed]; by turn, under both prompts,
    a list of such.
    """
    expert = [result["scores"]["GPT4"]["sampled"] for result in group]
    other = [result["scores"]["GPT3"]["sampled"] for result in group]
    return {
        "all": [score["all"] for score in expert],
        "scarce skill": [scarce(result) for result in group],
        "by turn": turns_of(expert),
        "other prompt, by turn": turns_of(other),
    }


def turns_of(scores: list[dict]) -> list[list[float]]:
    """[turn][seed]: the scores have them the other way round."""
    by_seed = [score["by_turn"] for score in scores]
    return [list(values) for values in zip(*by_seed)]


def draw(rows: dict, path: Path) -> None:
    groups = {}
    for placement, row in rows.items():
        groups[f"{placement}, GPT4"] = row["by turn"]
        groups[f"{placement}, GPT3"] = row["other prompt, by turn"]
    figure, axes = open_figure(height=4.6)
    lines(axes, TURNS, groups)
    axes.set(xlabel="turn", ylabel="right answers, sampled", xticks=TURNS, ylim=(0, 1))
    legend_above(axes, columns=2)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("fig7", argv)


if __name__ == "__main__":
    run(main)
