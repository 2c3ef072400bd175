"""Fig. 7 and Table 3 in miniature: where the condition stands in the template, by turn.

    python -m paper.fig7

`beginning` says it once (`Assistant is GPT4`), the other two in every turn. The paper finds the first much worse.
"""

from data import run
from paper.runs import Run, cell, command, figure, interval, markdown
from paper.table2 import arm, expert_score
from paper.toy import Task

SEEDS = 3
PLACEMENTS = "before_speaker", "before_assistant", "beginning"


def runs(seed):
    return {p: arm("C-RLFT", seed) if p == "before_speaker" else Run(p, seed, task=Task(seed=seed), template=p) for p in PLACEMENTS}


def report(results, folder):
    rows, table = {}, []
    for placement, group in results.items():
        expert, other = ([r["scores"][name]["sampled"] for r in group] for name in ("GPT4", "GPT3"))
        turns = [list(x) for x in zip(*(r["by_turn"] for r in expert))]
        rows[placement] = {"all": [r["all"] for r in expert], "by_turn": turns, "other prompt, by turn": [list(x) for x in zip(*(r["by_turn"] for r in other))]}
        table.append([f"`{placement}`", cell(rows[placement]["all"]), *map(cell, turns), cell([r["all"] for r in other])])

    def draw(axes):
        for placement, row in rows.items():
            for prompt, style in (("by_turn", "o-"), ("other prompt, by turn", "s:")):
                means, halves = zip(*map(interval, row[prompt]))
                label = placement + ("" if prompt == "by_turn" else ", GPT3 prompt")
                axes.errorbar(range(1, len(means) + 1), means, [half or 0 for half in halves], fmt=style, capsize=3, label=label)
        axes.set(xlabel="turn", ylabel="right answers, temperature 1", xticks=(1, 2, 3))
        axes.legend(fontsize=7)

    figure(folder / "fig7.png", draw)
    return rows, markdown(["placement", "expert's prompt, all turns", "turn 1", "turn 2", "turn 3", "the other prompt, all turns"], table)


if __name__ == "__main__":
    run(command("fig7"))
