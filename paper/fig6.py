"""Fig. 6 in miniature: C-RLFT on 60 to 100% of one class and all of the other.

    python -m paper.fig6

Equal epochs, as in the paper, so that less data is also fewer steps: 60% of the sub-optimal class is two thirds of them, 60% of the
expert's nearly all.
"""

from paper.runs import Run, cell, command, figure, lines, markdown
from paper.table2 import arm, expert_score
from paper.toy import Task
from support.cli import run

SEEDS = 3
SHARES = (0.6, 0.7, 0.8, 0.9, 1.0)
SIDES = "expert", "sub-optimal"


def runs(seed):
    keep = {("expert", x): (x, 1.0) for x in SHARES} | {
        ("sub-optimal", x): (1.0, x) for x in SHARES
    }
    return {
        key: arm("C-RLFT", seed)
        if pair == (1, 1)
        else Run(
            f"{key[1]:.0%} of the {key[0]} class", seed, steps=None, task=Task(keep=pair, seed=seed)
        )
        for key, pair in keep.items()
    }


def report(results, folder):
    values = {key: [expert_score(r) for r in group] for key, group in results.items()}

    def draw(axes):
        lines(
            axes,
            [100 * x for x in SHARES],
            {f"of the {side} class": [values[side, x] for x in SHARES] for side in SIDES},
        )
        axes.set(xlabel="% of one class", ylabel="right answers, temperature 1", ylim=(0, 1))

    figure(folder / "fig6.png", draw)
    table = [[f"of the {side} class", *(cell(values[side, x]) for x in SHARES)] for side in SIDES]
    return {f"{side}, {x}": v for (side, x), v in values.items()}, markdown(
        ["", *(f"{x:.0%}" for x in SHARES)], table
    )


if __name__ == "__main__":
    run(command("fig6"))
