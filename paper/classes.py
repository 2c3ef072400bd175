"""Beyond the paper: three classes instead of two, and a reward for each answer instead of its source.

    python -m paper.classes        and then paper.seven, where --assets names a folder with its data

The paper's future work (Sec. 7) asks for finer rewards. The expert's data are as everywhere; the others are two sources, right 6
and 2 times in 10, so 4 in 10 together. A weight per answer needs a judge; here it is the task's own check.
"""

from data import run
from paper.runs import TABLE, Run, cell, command, figure, interval, markdown
from paper.toy import Task

SEEDS = 3
SOURCES = (("GPT-4", 300, 1.0), ("GPT-3.5", 1650, 0.6), ("GPT-2", 1650, 0.2))
THREE = "GPT-4=GPT4:1,GPT-3.5=GPT3:0.3162,*=GPT2:0.1"  # rewards 1, 0.5, 0 with beta = 1 / ln 10
ARMS = {
    "three classes": {"classes": THREE},
    "two classes, the others as one": {"classes": TABLE.format(1, 0.1)},
    "three classes, and a weight for each answer": {"classes": THREE, "wrong": 0.1},
    "a weight for each answer, no condition": {"classes": "*=SFT:1", "template": "none", "wrong": 0.1},
}


def runs(seed):
    return {name: Run(name, seed, task=Task(sources=SOURCES, seed=seed), **flags) for name, flags in ARMS.items()}


def report(results, folder):
    rows = {name: {prompt: [r["scores"][prompt]["sampled"]["all"] for r in group] for prompt in group[0]["scores"]} for name, group in results.items()}
    prompts = "GPT4", "GPT3", "GPT2", ""

    def draw(axes):
        for k, prompt in enumerate(prompts):
            points = [(i + 0.2 * k, *interval(row[prompt])) for i, row in enumerate(rows.values()) if prompt in row]
            axes.bar(*list(zip(*points))[:2], 0.18, yerr=[half or 0 for *_, half in points], capsize=2, label=f"{prompt} User:".strip())
        axes.set(ylabel="right answers, temperature 1", ylim=(0, 1))
        axes.set_xticks([i + 0.2 for i in range(len(rows))], [name.replace(", ", ",\n").replace("and a", "and\na") for name in rows], fontsize=7)
        axes.legend(fontsize=7)

    figure(folder / "classes.png", draw, width=7.5)
    head = ["arm", *(f"`{prompt} User:`".replace("` ", "`") for prompt in prompts)]
    return rows, markdown(head, [[name, *(cell(row[p]) if p in row else "" for p in prompts)] for name, row in rows.items()])


if __name__ == "__main__":
    run(lambda argv: [command(name)(argv) for name in ("classes", "seven")])
