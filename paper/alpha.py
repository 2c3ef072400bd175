"""Eq. 3-6 on one axis: the sub-optimal class's weight w = exp((alpha - 1) / beta), from 0 (expert only) to 1 (without reward).

    python -m paper.alpha

alpha and beta enter only through w. The condition stays, every point uses both templates and takes the same number of steps. At w = 0
the other class has no token with a weight and is left out, so that a step holds twelve times the experts: not the limit of a small w.
"""

from paper.runs import TABLE, Run, cell, command, figure, lines, markdown
from paper.table2 import arm, expert_score, scarce
from paper.toy import Task
from support.cli import run

SEEDS = 3
WEIGHTS = (0, 0.01, 0.03, 0.1, 0.3, 1)


def runs(seed):
    known = {0: arm("expert only", seed), 0.1: arm("C-RLFT", seed), 1: arm("without reward", seed)}
    return {
        w: known.get(w) or Run(f"w = {w}", seed, task=Task(seed=seed), classes=TABLE.format(1, w))
        for w in WEIGHTS
    }


def report(results, folder):
    rows = {
        "sampled": {w: [expert_score(r) for r in group] for w, group in results.items()},
        "greedy": {w: [expert_score(r, "greedy") for r in group] for w, group in results.items()},
        "scarce skill, sampled": {w: list(map(scarce, group)) for w, group in results.items()},
    }

    def draw(axes):
        lines(axes, range(len(WEIGHTS)), {label: list(row.values()) for label, row in rows.items()})
        axes.set(xlabel="weight of the sub-optimal class", ylabel="right answers", ylim=(0, 1))
        axes.set_xticks(range(len(WEIGHTS)), map(str, WEIGHTS))

    figure(folder / "alpha.png", draw)
    return rows, markdown(
        ["w", *map(str, WEIGHTS)],
        [[label, *map(cell, row.values())] for label, row in rows.items()],
    )


if __name__ == "__main__":
    run(command("alpha"))
