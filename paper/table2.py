"""Table 2 in miniature: what the condition and the reward are worth, and what data alone would do.

    python -m paper.table2

Seven arms, each a `--classes` table; all else is the same. The arms without a condition put all
data under the expert's prompt, so that every arm has the same tokens and is asked the same way
(the paper does not give their template). Two budgets where they part: equal epochs, as we read the
paper, and equal optimizer steps.
"""

from pathlib import Path
from typing import NamedTuple

from paper.commands import bars, cell, command, markdown, open_figure, save_figure
from paper.runs import FineTune
from paper.toy import Task
from support.cli import run

SEEDS = 5


class Arm(NamedTuple):
    """Its --classes, and its average in the paper's Table 2, in %."""

    classes: str
    average: float


ARMS = {
    "C-RLFT": Arm("GPT-4=GPT4:1,*=GPT3:0.1", 77.3),
    "without reward": Arm("GPT-4=GPT4:1,*=GPT3:1", 74.0),
    "without condition": Arm("GPT-4=GPT4:1,*=GPT4:0.1", 60.5),
    "SFT on all": Arm("*=GPT4:1", 52.7),
    "expert only": Arm("GPT-4=GPT4:1,*=GPT3:0", 64.5),
    "sub-optimal only": Arm("GPT-4=GPT3:0,*=GPT4:1", 42.8),
    "1.8 x sub-optimal": Arm("GPT-4=GPT3:0,*=GPT4:1", 54.4),
}
# These train on other tokens than all data's, so that EPOCHS epochs are not STEPS steps.
PARTIAL = "expert only", "sub-optimal only", "1.8 x sub-optimal"
# sources of "1.8 x sub-optimal"
MORE = (("GPT-4", 300, 1.0), ("GPT-3.5", 5940, 0.4))
HOW = "sampled", "greedy"
# A column's head, and which of an arm's numbers it shows.
COLUMNS = (
    ("equal steps: sampled", "steps, sampled"),
    ("greedy", "steps, greedy"),
    ("equal epochs: sampled", "epochs, sampled"),
    ("greedy", "epochs, greedy"),
    ("scarce skill, sampled", "shift"),
    ("below C-RLFT, sampled", "below C-RLFT, sampled"),
    ("greedy", "below C-RLFT, greedy"),
)
BARS = "steps, sampled", "epochs, sampled", "steps, greedy"


def arm(name: str, seed: int, **changes) -> FineTune:
    """The job of an arm, with some of its fields changed."""
    task = Task(seed=seed)
    if name == "1.8 x sub-optimal":
        task = Task(sources=MORE, seed=seed)
    fields = {"task": task, "classes": ARMS[name].classes, **changes}
    return FineTune(name, seed, **fields)


def jobs(seed: int) -> dict:
    """{(arm, budget): job}"""
    wanted = {(name, "steps"): arm(name, seed) for name in ARMS}
    for name in ARMS:
        job = wanted[name, "steps"]
        if name in PARTIAL:
            job = arm(name, seed, steps=None)
        wanted[name, "epochs"] = job
    return wanted


def expert_score(result: dict, how: str = "sampled", part: str = "all"):
    """Under the prompt of inference, the expert's."""
    return result["scores"]["GPT4"][how][part]


def scarce(result: dict) -> float:
    """The same of the skill that the expert's data cannot teach."""
    return expert_score(result, part="by_skill")["shift"]


def report(results: dict, folder: Path) -> tuple[dict, str]:
    rows = {name: numbers_of(name, results) for name in ARMS}
    draw(rows, folder / "table2.png")

    table = []
    for name, row in rows.items():
        average = str(ARMS[name].average)
        if name == "expert only":
            average += " (its columns: 67.9)"
        table.append([name, average, *(cell(row[key]) for _, key in COLUMNS)])
    head = ["arm", "paper, %", *(title for title, _ in COLUMNS)]
    return rows, markdown(head, table)


def numbers_of(name: str, results: dict) -> dict[str, list]:
    """{what: [a value per seed]} of an arm."""
    equal_steps = results[name, "steps"]
    equal_epochs = results[name, "epochs"]
    row = {}
    for budget, group in (("steps", equal_steps), ("epochs", equal_epochs)):
        for how in HOW:
            row[f"{budget}, {how}"] = [expert_score(result, how) for result in group]

    # seed by seed: the same data, the same held-out prompts
    for how in HOW:
        best = [expert_score(result, how) for result in results["C-RLFT", "steps"]]
        pairs = zip(best, row[f"steps, {how}"])
        row[f"below C-RLFT, {how}"] = [a - b for a, b in pairs]

    row["shift"] = [scarce(result) for result in equal_steps]
    row["unseen"] = [expert_score(result, part="unseen") for result in equal_steps]
    row["optimizer steps of equal epochs"] = [result["steps"] for result in equal_epochs]
    return row


def draw(rows: dict, path: Path) -> None:
    groups = {}
    for key in BARS:
        groups[f"equal {key}"] = [row[key] for row in rows.values()]
    figure, axes = open_figure(width=8)
    bars(axes, list(rows), groups)
    axes.set(ylabel="right answers")
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("table2", argv)


if __name__ == "__main__":
    run(main)
