"""Table 2 in miniature: what the condition and the reward each are worth, and what expert data or more data alone would do.

    python -m paper.table2

Seven arms, each a `--classes` table; nothing else differs. The arms without a condition put all data under the expert's prompt, so that
every arm has the same tokens and is asked the same way (the paper does not give their template). Two budgets where they part: equal
epochs, as we read the paper, and equal optimizer steps.
"""

from paper.runs import Run, bars, cell, command, figure, markdown
from paper.toy import Task
from support.cli import run

SEEDS = 5
ARMS = {  # name: (--classes, Table 2's average)
    "C-RLFT": ("GPT-4=GPT4:1,*=GPT3:0.1", 77.3),
    "without reward": ("GPT-4=GPT4:1,*=GPT3:1", 74.0),
    "without condition": ("GPT-4=GPT4:1,*=GPT4:0.1", 60.5),
    "SFT on all": ("*=GPT4:1", 52.7),
    "expert only": ("GPT-4=GPT4:1,*=GPT3:0", 64.5),
    "sub-optimal only": ("GPT-4=GPT3:0,*=GPT4:1", 42.8),
    "1.8 x sub-optimal": ("GPT-4=GPT3:0,*=GPT4:1", 54.4),
}
# the epochs of the others are EPOCHS at STEPS
PARTIAL = "expert only", "sub-optimal only", "1.8 x sub-optimal"
MORE = (("GPT-4", 300, 1.0), ("GPT-3.5", 5940, 0.4))


def arm(name, seed, **changes):
    task = Task(sources=MORE, seed=seed) if name.startswith("1.8") else Task(seed=seed)
    return Run(name, seed, **{"task": task, "classes": ARMS[name][0]} | changes)


def runs(seed):
    steps = {(name, "steps"): arm(name, seed) for name in ARMS}
    return steps | {
        (name, "epochs"): arm(name, seed, steps=None) if name in PARTIAL else steps[name, "steps"]
        for name in ARMS
    }


def expert_score(result, how="sampled", part="all"):
    """Under the prompt of inference, the expert's."""
    return result["scores"]["GPT4"][how][part]


def scarce(result):
    return expert_score(result, part="by_skill")["shift"]


def report(results, folder):
    rows, table = {}, []
    for name, (_, paper) in ARMS.items():
        row = rows[name] = {
            f"{budget}, {how}": [expert_score(r, how) for r in results[name, budget]]
            for budget in ("steps", "epochs")
            for how in ("sampled", "greedy")
        }
        for how in ("sampled", "greedy"):  # seed by seed: the same data, the same held-out prompts
            row[f"below C-RLFT, {how}"] = [
                a - b for a, b in zip(rows["C-RLFT"][f"steps, {how}"], row[f"steps, {how}"])
            ]
        row |= {
            "shift": list(map(scarce, results[name, "steps"])),
            "unseen": [expert_score(r, part="unseen") for r in results[name, "steps"]],
        }
        row["optimizer steps of equal epochs"] = [r["steps"] for r in results[name, "epochs"]]
        shown = (
            "steps, sampled",
            "steps, greedy",
            "epochs, sampled",
            "epochs, greedy",
            "shift",
            "below C-RLFT, sampled",
            "below C-RLFT, greedy",
        )
        printed = f"{paper} (its columns: 67.9)" if name == "expert only" else paper
        table.append([name, printed, *(cell(row[key]) for key in shown)])
    draw = lambda axes: (
        bars(
            axes,
            rows,
            {
                f"equal {b}, {h}": [row[f"{b}, {h}"] for row in rows.values()]
                for b, h in (("steps", "sampled"), ("epochs", "sampled"), ("steps", "greedy"))
            },
        ),
        axes.set(ylabel="right answers"),
    )
    figure(folder / "table2.png", draw, width=8)
    head = [
        "arm",
        "paper, %",
        "equal steps: sampled",
        "greedy",
        "equal epochs: sampled",
        "greedy",
        "scarce skill, sampled",
        "below C-RLFT, sampled",
        "greedy",
    ]
    return rows, markdown(head, table)


if __name__ == "__main__":
    run(command("table2"))
