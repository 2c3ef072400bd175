"""Beyond the paper: three classes instead of two, and a reward for each answer instead of its source.

    python -m paper.classes        and then paper.seven, where --assets names a folder with its data

The paper's future work (Sec. 7) asks for finer rewards. The expert's data are as everywhere; the others are two sources, right 6
and 2 times in 10, so 4 in 10 together. A weight per answer needs a judge; here it is the task's own check. It takes the place of the
class's weight, so it says nothing of the source: that is left to the condition.
"""

from paper.runs import TABLE, Run, bars, cell, command, figure, markdown
from paper.toy import Task
from support.cli import run

SEEDS = 3
SOURCES = (("GPT-4", 300, 1.0), ("GPT-3.5", 1650, 0.6), ("GPT-2", 1650, 0.2))
THREE = "GPT-4=GPT4:1,GPT-3.5=GPT3:{},*=GPT2:0.1"
ARMS = {
    "two classes, the others as one (0.1)": {"classes": TABLE.format(1, 0.1)},
    "three classes (0.1, 0.1)": {"classes": THREE.format(0.1)},
    # rewards 1, 0.5, 0 with beta = 1 / ln 10
    "three classes (0.32, 0.1)": {"classes": THREE.format(0.3162)},
    "three conditions, a weight for each answer": {"classes": THREE.format(0.3162), "wrong": 0.1},
    "no condition, a weight for each answer": {"classes": "*=GPT4:1", "wrong": 0.1},
}
PROMPTS = "GPT4", "GPT3", "GPT2"


def runs(seed):
    return {
        name: Run(name, seed, task=Task(sources=SOURCES, seed=seed), **flags)
        for name, flags in ARMS.items()
    }


def report(results, folder):
    rows = {
        name: {
            how: {
                prompt: [r["scores"][prompt][how]["all"] for r in group]
                for prompt in group[0]["scores"]
            }
            for how in ("sampled", "greedy")
        }
        for name, group in results.items()
    }
    figure(
        folder / "classes.png",
        lambda axes: bars(
            axes,
            rows,
            {f"{p} User:": [row["sampled"].get(p, ()) for row in rows.values()] for p in PROMPTS},
            7,
        ),
        width=8,
    )
    table = [
        [
            name,
            *(cell(row["sampled"][p]) if p in row["sampled"] else "" for p in PROMPTS),
            cell(row["greedy"]["GPT4"]),
        ]
        for name, row in rows.items()
    ]
    return rows, markdown(
        ["arm", *(f"`{p} User:`" for p in PROMPTS), "`GPT4 User:`, greedy"], table
    )


if __name__ == "__main__":
    run(lambda argv: [command(name)(argv) for name in ("classes", "seven")])
