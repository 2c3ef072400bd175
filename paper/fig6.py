"""Fig. 6 in miniature: C-RLFT on 60 to 100% of one class, all of the other, equal epochs as in the paper.

    python -m paper.fig6
"""

from data import run
from paper.runs import Run, cell, command, figure, interval, markdown
from paper.table2 import arm, expert_score
from paper.toy import Task

SEEDS = 3
SHARES = (0.6, 0.7, 0.8, 0.9, 1.0)


def runs(seed):
    keep = {("expert", x): (x, 1.0) for x in SHARES} | {("sub-optimal", x): (1.0, x) for x in SHARES}
    return {key: arm("C-RLFT", seed) if pair == (1, 1) else Run(f"{key[1]:.0%} of the {key[0]} class", seed, steps=None, task=Task(keep=pair, seed=seed))
            for key, pair in keep.items()}


def report(results, folder):
    values = {key: [expert_score(r) for r in group] for key, group in results.items()}
    sides = "expert", "sub-optimal"

    def draw(axes):
        for side in sides:
            means, halves = zip(*(interval(values[side, x]) for x in SHARES))
            axes.errorbar([100 * x for x in SHARES], means, [half or 0 for half in halves], marker="o", capsize=3, label=f"of the {side} class")
        axes.set(xlabel="% of one class", ylabel="right answers, temperature 1")
        axes.legend()

    figure(folder / "fig6.png", draw)
    table = [[f"of the {side} class", *(cell(values[side, x]) for x in SHARES)] for side in sides]
    return {side: {str(x): values[side, x] for x in SHARES} for side in sides}, markdown(["", *(f"{x:.0%}" for x in SHARES)], table)


if __name__ == "__main__":
    run(command("fig6"))
