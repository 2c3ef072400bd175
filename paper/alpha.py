"""Eq. 3-6 on one axis: the sub-optimal class's weight w = exp((alpha - 1) / beta), from 0 (expert only) to 1 (without reward).

    python -m paper.alpha

alpha and beta enter only through w. The condition stays: every point uses both templates (at w = 0 the other class has no
weight, so it is left out), and every point takes the same number of steps.
"""

from data import run
from paper.runs import TABLE, Run, cell, command, figure, interval, markdown
from paper.table2 import arm, expert_score
from paper.toy import Task

SEEDS = 3
WEIGHTS = (0, 0.01, 0.03, 0.1, 0.3, 1)


def runs(seed):
    known = {0.1: arm("C-RLFT", seed), 1: arm("without reward", seed)}
    return {w: known.get(w) or Run(f"w = {w}", seed, task=Task(seed=seed), classes=TABLE.format(1, w)) for w in WEIGHTS}


def report(results, folder):
    rows = {w: {"all": [expert_score(r) for r in group], "greedy": [expert_score(r, "greedy") for r in group],
                "shift": [expert_score(r, part="by_skill")["shift"] for r in group]} for w, group in results.items()}

    def draw(axes):
        for key, label in (("all", "all skills, sampled"), ("greedy", "all skills, greedy"), ("shift", "the scarce skill, sampled")):
            means, halves = zip(*(interval(row[key]) for row in rows.values()))
            axes.errorbar(range(len(rows)), means, [half or 0 for half in halves], marker="o", capsize=3, label=label)
        axes.set(xlabel="weight of the sub-optimal class", ylabel="right answers", ylim=(0, 1))
        axes.set_xticks(range(len(rows)), [str(w) for w in rows])
        axes.legend()

    figure(folder / "alpha.png", draw)
    table = [[label, *(cell(rows[w][key]) for w in WEIGHTS)] for key, label in (("all", "sampled"), ("greedy", "greedy"), ("shift", "the scarce skill, sampled"))]
    return {str(w): row for w, row in rows.items()}, markdown(["w", *map(str, WEIGHTS)], table)


if __name__ == "__main__":
    run(command("alpha"))
