"""Fig. 7 and Table 3 in miniature: where the condition stands in the template, by turn.

    python -m paper.fig7

`beginning` says it once (`Assistant is GPT4`), the other two in every turn. The paper finds the first much worse. By turn the score
is the share of right answers where what came before is right, so that later turns are asked of all. Equal epochs.
"""

from paper.runs import Run, cell, command, figure, lines, markdown
from paper.table2 import arm
from paper.toy import Task
from support.cli import run

SEEDS = 3
PLACEMENTS = "before_speaker", "before_assistant", "beginning"


def runs(seed):
    return {
        p: arm("C-RLFT", seed)
        if p == "before_speaker"
        else Run(p, seed, steps=None, task=Task(seed=seed), template=p)
        for p in PLACEMENTS
    }


def report(results, folder):
    rows, table = {}, []
    for placement, group in results.items():
        expert, other = ([r["scores"][name]["sampled"] for r in group] for name in ("GPT4", "GPT3"))
        turns = [list(map(list, zip(*(r["by_turn"] for r in side)))) for side in (expert, other)]
        rows[placement] = {
            "all": [r["all"] for r in expert],
            "by turn": turns[0],
            "other prompt, by turn": turns[1],
        }
        table.append(
            [
                f"`{placement}`",
                cell(rows[placement]["all"]),
                *map(cell, turns[0]),
                *map(cell, turns[1]),
            ]
        )

    def draw(axes):
        lines(
            axes,
            (1, 2, 3),
            {
                f"{p}, {prompt} prompt": row[key]
                for p, row in rows.items()
                for prompt, key in (("expert's", "by turn"), ("other", "other prompt, by turn"))
            },
        )
        axes.set(
            xlabel="turn", ylabel="right answers, temperature 1", xticks=(1, 2, 3), ylim=(0, 1)
        )

    figure(folder / "fig7.png", draw)
    return rows, markdown(
        [
            "placement",
            "expert's prompt, score",
            "turn 1",
            "turn 2",
            "turn 3",
            "the other prompt: turn 1",
            "turn 2",
            "turn 3",
        ],
        table,
    )


if __name__ == "__main__":
    run(command("fig7"))
