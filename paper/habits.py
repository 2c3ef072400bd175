"""Where does the paper's order turn? Table 2's arms by the share of errors that are habits.

    python -m paper.habits

At 0 the weaker source errs at random, at 1 each skill has one wrong rule. The base is pre-trained
on text with the same share; at both ends the arms are fine-tuned from the other end's base, too,
with one seed.
"""

from pathlib import Path

from paper.commands import cell, command, lines, markdown, open_figure, save_figure
from paper.runs import base_of
from paper.table2 import ARMS, HOW, arm, expert_score, in_order
from support.cli import run

SEEDS = 3
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
ENDS = (0.0, 1.0)
OWN = "its own base"
OTHER = "the other end's base"
# of the arms from there
SEEDS_OF_OTHER = 1


def jobs(seed: int) -> dict:
    """{(share of habits, base, arm): job}"""
    wanted = {}
    for name in ARMS:
        for share in SHARES:
            wanted[share, OWN, name] = arm(name, seed, share)
        if seed < SEEDS_OF_OTHER:
            for share in ENDS:
                wanted[share, OTHER, name] = arm(name, seed, share, base=base_of(1 - share))
    return wanted


def report(results: dict, folder: Path) -> tuple[dict, str]:
    numbers = {}
    for (share, base, name), group in results.items():
        row = numbers.setdefault(f"{share:g}, {base}", {})
        row[name] = {}
        for how in HOW:
            row[name][how] = [expert_score(result, how) for result in group]
    draw(numbers, folder / "habits.png")

    # a column for each share, and then for each end with the other's base
    columns = {f"{share:g}, {OWN}": f"{share:.0%} habits" for share in SHARES}
    columns |= {f"{share:g}, {OTHER}": f"{share:.0%}, {OTHER}" for share in ENDS}
    tables = []
    for how in HOW:
        table = []
        for name in ARMS:
            cells = [cell(numbers[key][name][how]) for key in columns]
            table.append([name, *cells])
        table.append([f"seeds in this order, {how}", *seeds_in_order(numbers, columns, how)])
        tables.append(markdown([how, *columns.values()], table))
    return numbers, "\n\n".join(tables)


def seeds_in_order(numbers: dict, columns: dict, how: str) -> list[str]:
    """A cell for each column: in how many of its seeds the arms have the paper's order."""
    cells = []
    for key in columns:
        scores = {name: row[how] for name, row in numbers[key].items()}
        cells.append(f"{in_order(scores)} of {len(scores['C-RLFT'])}")
    return cells


def draw(numbers: dict, path: Path) -> None:
    """Sampled and greedy scores by the share of habits, side by side."""
    figure, panels = open_figure(width=7.2, shape=(1, 2))
    for axes, how in zip(panels, HOW):
        groups = {}
        for name in ARMS:
            groups[name] = [numbers[f"{share:g}, {OWN}"][name][how] for share in SHARES]
        percent = [100 * share for share in SHARES]
        lines(axes, percent, groups)
        axes.set(xlabel="% of errors that are habits", ylim=(0, 1), title=how)
    panels[0].set(ylabel="right answers")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("habits", argv)


if __name__ == "__main__":
    run(main)
