"""Table 2 in miniature: what the condition and the reward are worth, and what data alone would do.

    python -m paper.table2

Seven arms, each a `--classes` table; all else is the same. The arms without a condition put all
data under the expert's prompt, so that every arm has the same tokens and is asked the same way
(the paper does not give their template). Two budgets where they part: equal optimizer steps, and
equal epochs, as we read the paper.

Each arm twice: where every error of the weaker source follows a habit, and where its errors are
noise. The base was pre-trained on text of the same kind.
"""

from pathlib import Path
from typing import NamedTuple

from paper.commands import (
    cell,
    command,
    legend_above,
    markdown,
    open_figure,
    paired_dots,
    save_figure,
)
from paper.runs import FineTune, base_of
from paper.toy import Task
from support.cli import run

SEEDS = 5


class Arm(NamedTuple):
    """Its --classes, and its average in the paper's Table 2, in %."""

    classes: str
    average: float


# The first five in the paper's order, which is the claim.
ARMS = {
    "C-RLFT": Arm("GPT-4=GPT4:1,*=GPT3:0.1", 77.3),
    "without reward": Arm("GPT-4=GPT4:1,*=GPT3:1", 74.0),
    "expert only": Arm("GPT-4=GPT4:1,*=GPT3:0", 64.5),
    "without condition": Arm("GPT-4=GPT4:1,*=GPT4:0.1", 60.5),
    "SFT on all": Arm("*=GPT4:1", 52.7),
    "sub-optimal only": Arm("GPT-4=GPT3:0,*=GPT4:1", 42.8),
    "1.8 x sub-optimal": Arm("GPT-4=GPT3:0,*=GPT4:1", 54.4),
}
ORDERED = tuple(ARMS)[:5]
# These train on other tokens than all data's, so that EPOCHS epochs are not STEPS steps.
PARTIAL = "expert only", "sub-optimal only", "1.8 x sub-optimal"
# sources of "1.8 x sub-optimal"
MORE = (("GPT-4", 300, 1.0), ("GPT-3.5", 5940, 0.4))

# How many of the wrong answers follow a habit. Every other command asks about the first kind.
KINDS = {"habits": 1.0, "noise": 0.0}
HABITS = KINDS["habits"]
HOW = "sampled", "greedy"


# ---- the jobs


def arm(name: str, seed: int, habits: float = HABITS, **changes) -> FineTune:
    """The job of an arm on a task and a base with so many habits, with some fields changed."""
    task = Task(habits=habits, seed=seed)
    if name == "1.8 x sub-optimal":
        task = Task(sources=MORE, habits=habits, seed=seed)
    fields = {"task": task, "classes": ARMS[name].classes, "base": base_of(habits), **changes}
    return FineTune(name, seed, **fields)


def jobs(seed: int) -> dict:
    """{(kind, arm, budget): job}"""
    wanted = {}
    for kind, habits in KINDS.items():
        for name in ARMS:
            wanted[kind, name, "steps"] = arm(name, seed, habits)
    for name in PARTIAL:
        wanted["habits", name, "epochs"] = arm(name, seed, steps=None)
    return wanted


# ---- the numbers


def expert_score(result: dict, how: str = "sampled", part: str = "all"):
    """Under the prompt of inference, the expert's."""
    return result["scores"]["GPT4"][how][part]


def scarce(result: dict) -> float:
    """The same of the skill that the expert's data cannot teach."""
    return expert_score(result, part="by_skill")["shift"]


def numbers_of(group: list[dict], best: list[dict]) -> dict[str, list]:
    """{what: [a value per seed]} of an arm; best: the results of C-RLFT."""
    row = {}
    for how in HOW:
        row[how] = [expert_score(result, how) for result in group]
        # seed by seed: the same data, the same held-out prompts
        of_best = [expert_score(result, how) for result in best]
        row[f"below C-RLFT, {how}"] = [a - b for a, b in zip(of_best, row[how])]
    row["scarce skill"] = [scarce(result) for result in group]
    row["unseen"] = [expert_score(result, part="unseen") for result in group]
    return row


def in_order(scores: dict[str, list]) -> int:
    """In how many seeds the arms of ORDERED have the paper's order, each above the next."""
    by_seed = zip(*(scores[name] for name in ORDERED))
    return sum(is_falling(values) for values in by_seed)


def is_falling(values: tuple[float, ...]) -> bool:
    return all(a > b for a, b in zip(values, values[1:]))


# ---- the page


def report(results: dict, folder: Path) -> tuple[dict, str]:
    numbers = {}
    for kind in KINDS:
        best = results[kind, "C-RLFT", "steps"]
        rows = {name: numbers_of(results[kind, name, "steps"], best) for name in ARMS}
        numbers[kind] = rows
    numbers["equal epochs"] = {}
    for name in PARTIAL:
        group = results["habits", name, "epochs"]
        numbers["equal epochs"][name] = {
            "sampled": [expert_score(result) for result in group],
            "greedy": [expert_score(result, "greedy") for result in group],
            "steps": [result["steps"] for result in group],
        }
    numbers["seeds in the paper's order"] = orders(numbers)
    draw(numbers, folder / "table2.png")
    tables = scores_table(numbers), differences_table(numbers), epochs_table(numbers)
    return numbers, "\n\n".join(tables)


def orders(numbers: dict) -> dict[str, dict[str, int]]:
    """{kind: {how: the seeds that have the whole order}}"""
    counts = {}
    for kind in KINDS:
        counts[kind] = {}
        for how in HOW:
            scores = {name: row[how] for name, row in numbers[kind].items()}
            counts[kind][how] = in_order(scores)
    return counts


def scores_table(numbers: dict) -> str:
    head = ["arm", "paper, %"]
    for kind in KINDS:
        head += [f"{kind}: sampled", "greedy", "scarce skill"]
    table = []
    for name in ARMS:
        line = [name, average_of(name)]
        for kind in KINDS:
            row = numbers[kind][name]
            line += [cell(row["sampled"]), cell(row["greedy"]), cell(row["scarce skill"])]
        table.append(line)

    seeds = len(numbers["habits"]["C-RLFT"]["sampled"])
    line = ["seeds with the order of the first five", ""]
    for kind in KINDS:
        count = numbers["seeds in the paper's order"][kind]
        line += [f"{count[how]} of {seeds}" for how in HOW] + [""]
    return markdown(head, [*table, line])


def average_of(name: str) -> str:
    average = str(ARMS[name].average)
    return f"{average} (its columns: 67.9)" if name == "expert only" else average


def differences_table(numbers: dict) -> str:
    """How far each arm is below C-RLFT with the same seed."""
    head = ["below C-RLFT, seed by seed"]
    for kind in KINDS:
        head += [f"{kind}: sampled", "greedy"]
    table = []
    for name in list(ARMS)[1:]:
        line = [name]
        for kind in KINDS:
            row = numbers[kind][name]
            line += [cell(row[f"below C-RLFT, {how}"]) for how in HOW]
        table.append(line)
    return markdown(head, table)


def epochs_table(numbers: dict) -> str:
    table = []
    for name, row in numbers["equal epochs"].items():
        steps = max(row["steps"])
        table.append([name, f"{steps:,}", cell(row["sampled"]), cell(row["greedy"])])
    return markdown(["equal epochs instead, habits", "steps", "sampled", "greedy"], table)


def draw(numbers: dict, path: Path) -> None:
    """The sampled score of every arm, with habits and with noise."""
    figure, axes = open_figure()
    groups = {}
    for kind in KINDS:
        groups[f"errors are {kind}"] = {name: row["sampled"] for name, row in numbers[kind].items()}
    paired_dots(axes, list(ARMS), groups)
    axes.set(xlabel="right answers, sampled", xlim=(0, 1))
    legend_above(axes, columns=2)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("table2", argv)


if __name__ == "__main__":
    run(main)
