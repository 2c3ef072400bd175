"""Table 2 in miniature: what the condition and the reward are worth, and what data alone would do.

    python -m paper.table2

Five arms, each a `--classes` table; all else is the same. The arms without a condition put all
data under the expert's prompt, so that every arm has the same tokens and is asked the same way
(the paper does not give their template).

Each arm in two worlds: where every error of the weaker source follows a habit, and where its errors
are noise. The base was pre-trained on text of the same kind. Two arms more, with fewer seeds, on
the weaker source alone, where it has habits.
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


# In the paper's order, which is the claim.
ARMS = {
    "C-RLFT": Arm("GPT-4=GPT4:1,*=GPT3:0.1", 77.3),
    "without reward": Arm("GPT-4=GPT4:1,*=GPT3:1", 74.0),
    "expert only": Arm("GPT-4=GPT4:1,*=GPT3:0", 64.5),
    "without condition": Arm("GPT-4=GPT4:1,*=GPT4:0.1", 60.5),
    "SFT on all": Arm("*=GPT4:1", 52.7),
}
# Of the others' data alone; the second has 1.8 times as much of it.
OTHERS = {
    "sub-optimal only": Arm("GPT-4=GPT3:0,*=GPT4:1", 42.8),
    "1.8 x sub-optimal": Arm("GPT-4=GPT3:0,*=GPT4:1", 54.4),
}
SEEDS_OF_OTHERS = 3
MORE = (("GPT-4", 300, 1.0), ("GPT-3.5", 5940, 0.4))


# How many of the weaker source's errors follow a habit.
NOISE = 0.0
HABITS = 1.0
WORLDS = {"habits": HABITS, "noise": NOISE}
HOW = "sampled", "greedy"


# ---- the jobs


def arm(name: str, seed: int, habits: float = HABITS, **changes) -> FineTune:
    """The job of an arm on a task and a base with so many habits, with some fields changed."""
    task = Task(habits=habits, seed=seed)
    if name == "1.8 x sub-optimal":
        task = Task(sources=MORE, habits=habits, seed=seed)
    classes = (ARMS | OTHERS)[name].classes
    fields = {"task": task, "classes": classes, "base": base_of(habits), **changes}
    return FineTune(name, seed, **fields)


def jobs(seed: int) -> dict:
    """{(world, arm): job}"""
    wanted = {}
    for world, habits in WORLDS.items():
        for name in ARMS:
            wanted[world, name] = arm(name, seed, habits)
    if seed < SEEDS_OF_OTHERS:
        wanted["habits", "sub-optimal only"] = arm("sub-optimal only", seed)
        # as many epochs as the others: more data, more steps
        wanted["habits", "1.8 x sub-optimal"] = arm("1.8 x sub-optimal", seed, steps=None)
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
    row["steps"] = [result["steps"] for result in group]
    return row


def in_order(scores: dict[str, list]) -> int:
    """In how many seeds the arms have the paper's order, each above the next."""
    by_seed = zip(*(scores[name] for name in ARMS))
    return sum(is_falling(values) for values in by_seed)


def is_falling(values: tuple[float, ...]) -> bool:
    return all(a > b for a, b in zip(values, values[1:]))


# ---- the page


def report(results: dict, folder: Path) -> tuple[dict, str]:
    numbers = {}
    for (world, name), group in results.items():
        row = numbers_of(group, results[world, "C-RLFT"])
        numbers.setdefault(world, {})[name] = row
    draw(numbers, folder / "table2.png")
    tables = scores_table(numbers), differences_table(numbers), others_table(numbers)
    return numbers, "\n\n".join(tables)


def scores_table(numbers: dict) -> str:
    head = ["arm", "paper, %"]
    for world in WORLDS:
        head += [f"{world}: sampled", "greedy", "scarce skill"]
    table = []
    for name in ARMS:
        line = [name, average_of(name)]
        for world in WORLDS:
            row = numbers[world][name]
            line += [cell(row["sampled"]), cell(row["greedy"]), cell(row["scarce skill"])]
        table.append(line)

    # of 120 orders one comes by chance
    line = ["seeds in this order", ""]
    for world in WORLDS:
        for how in HOW:
            scores = {name: numbers[world][name][how] for name in ARMS}
            line.append(f"{in_order(scores)} of {len(scores['C-RLFT'])}")
        line.append("")
    return markdown(head, [*table, line])


def average_of(name: str) -> str:
    average = str(ARMS[name].average)
    return f"{average} (its columns: 67.9)" if name == "expert only" else average


def differences_table(numbers: dict) -> str:
    """How far each arm is below C-RLFT with the same seed."""
    head = ["below C-RLFT, seed by seed"]
    for world in WORLDS:
        head += [f"{world}: sampled", "greedy"]
    table = []
    for name in list(ARMS)[1:]:
        line = [name]
        for world in WORLDS:
            row = numbers[world][name]
            line += [cell(row[f"below C-RLFT, {how}"]) for how in HOW]
        table.append(line)
    return markdown(head, table)


def others_table(numbers: dict) -> str:
    table = []
    for name, (_, average) in OTHERS.items():
        row = numbers["habits"][name]
        steps = f"{max(row['steps']):,}"
        table.append([name, average, steps, cell(row["sampled"]), cell(row["greedy"])])
    return markdown(["the others' data, habits", "paper, %", "steps", "sampled", "greedy"], table)


def draw(numbers: dict, path: Path) -> None:
    """The sampled score of every arm, in every world."""
    groups = {}
    for world in WORLDS:
        groups[world] = {name: numbers[world][name]["sampled"] for name in ARMS}
    figure, axes = open_figure()
    paired_dots(axes, list(ARMS), groups)
    axes.set(xlabel="right answers, sampled", xlim=(0, 1))
    legend_above(axes, columns=2)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("table2", argv)


if __name__ == "__main__":
    run(main)
