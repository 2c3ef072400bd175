"""Table 2 in miniature: what the condition and the reward each are worth, and what expert data or more data alone would do.

    python -m paper.table2

Seven arms, each a `data.py prepare` line; nothing else differs. Two budgets where they part: equal epochs, as we read the
paper, and equal optimizer steps.
"""

from data import run
from paper.runs import TABLE, Run, cell, command, figure, interval, markdown
from paper.toy import Task

SEEDS = 5
ARMS = {  # name: (--classes, --template, Table 2's average)
    "C-RLFT": (TABLE.format(1, 0.1), "before_speaker", 77.3),
    "without reward": (TABLE.format(1, 1), "before_speaker", 74.0),
    "without condition": (TABLE.format(1, 0.1), "none", 60.5),
    "SFT on all": ("*=SFT:1", "none", 52.7),
    "expert only": (TABLE.format(1, 0), "none", 64.5),
    "sub-optimal only": (TABLE.format(0, 1), "none", 42.8),
    "1.8 x sub-optimal": (TABLE.format(0, 1), "none", 54.4),
}
PARTIAL = "expert only", "sub-optimal only", "1.8 x sub-optimal"  # an epoch of theirs is not an epoch of all
MORE = (("GPT-4", 600, 1.0), ("GPT-3.5", 5940, 0.4))


def arm(name, seed, **changes):
    classes, template, _ = ARMS[name]
    task = Task(sources=MORE, seed=seed) if name.startswith("1.8") else Task(seed=seed)
    return Run(name, seed, task=task, classes=classes, template=template, **changes)


def runs(seed):
    steps = {(name, "steps"): arm(name, seed) for name in ARMS}
    return steps | {(name, "epochs"): arm(name, seed, steps=None) if name in PARTIAL else steps[name, "steps"] for name in ARMS}


def expert_score(result, how="sampled", part="all"):
    """Under the prompt of inference: the expert's, or the only one there is."""
    scores = result["scores"]
    return scores.get("GPT4", next(iter(scores.values())))[how][part]


def report(results, folder):
    rows, table = {}, []
    for name, (*_, paper) in ARMS.items():
        row = {budget: {how: [expert_score(r, how) for r in results[name, budget]] for how in ("sampled", "greedy")} for budget in ("steps", "epochs")}
        scarce = [expert_score(r, part="by_skill")["shift"] for r in results[name, "steps"]]
        rows[name] = row | {"shift": scarce, "steps_of_equal_epochs": [r["steps"] for r in results[name, "epochs"]]}
        printed = f"{paper} (its columns: 67.9)" if name == "expert only" else paper
        table.append([name, printed, *(cell(row[budget][how]) for budget in ("steps", "epochs") for how in ("sampled", "greedy")), cell(scarce)])
    first = rows["C-RLFT"]["steps"]["sampled"]
    for name in rows:  # seed by seed: the same data, the same held-out prompts
        rows[name]["below_crlft"] = [a - b for a, b in zip(first, rows[name]["steps"]["sampled"])]
    for line, name in zip(table, rows):
        line.append("" if name == "C-RLFT" else cell(rows[name]["below_crlft"]))

    def draw(axes):
        for k, budget in enumerate(("steps", "epochs")):
            means, halves = zip(*(interval(row[budget]["sampled"]) for row in rows.values()))
            axes.bar([i + 0.4 * k for i in range(len(rows))], means, 0.38, yerr=[half or 0 for half in halves], capsize=2, label=f"equal {budget}")
        axes.set(ylabel="right answers, temperature 1", ylim=(0, 1))
        axes.set_xticks([i + 0.2 for i in range(len(rows))], [name.replace(" ", "\n") for name in rows], fontsize=8)
        axes.legend()

    figure(folder / "table2.png", draw, width=7.5)
    head = ["arm", "paper, %", "equal steps: sampled", "greedy", "equal epochs: sampled", "greedy", "the scarce skill, sampled", "below C-RLFT"]
    return rows, markdown(head, table)


if __name__ == "__main__":
    run(command("table2"))
