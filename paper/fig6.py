"""Fig. 6 in miniature: C-RLFT on 60 to 100% of one class and all of the other; and four times the experts.

    python -m paper.fig6

Equal epochs, as in the paper, so that less data is also fewer steps: 60% of the sub-optimal class is two thirds of them, 60% of the
expert's nearly all. Hence 60% once more with all steps. The second table asks what expert data alone would need.
"""

from data import run
from paper.runs import STEPS, Run, cell, command, figure, lines, markdown
from paper.table2 import arm, expert_score
from paper.toy import Task

SEEDS = 3
SHARES = (0.6, 0.7, 0.8, 0.9, 1.0)
SIDES = "expert", "sub-optimal"
EXPERTS = (300, 1200)


def runs(seed):
    keep = {("expert", x): (x, 1.0) for x in SHARES} | {("sub-optimal", x): (1.0, x) for x in SHARES}
    less = lambda side, pair, steps: Run(f"{min(pair):.0%} of the {side} class", seed, steps=steps, task=Task(keep=pair, seed=seed))
    shares = {key: arm("C-RLFT", seed) if pair == (1, 1) else less(key[0], pair, None) for key, pair in keep.items()}
    all_steps = {(side, "all steps"): less(side, keep[side, 0.6], STEPS) for side in SIDES}
    task = lambda n: Task(sources=(("GPT-4", n, 1.0), ("GPT-3.5", 3300, 0.4)), seed=seed)
    return shares | all_steps | {(name, n): arm(name, seed, task=task(n)) for name in ("C-RLFT", "expert only") for n in EXPERTS}


def report(results, folder):
    values = {key: [expert_score(r) for r in group] for key, group in results.items()}

    def draw(axes):
        lines(axes, [100 * x for x in SHARES], {f"of the {side} class": [values[side, x] for x in SHARES] for side in SIDES})
        axes.set(xlabel="% of one class", ylabel="right answers, temperature 1", ylim=(0, 1))

    figure(folder / "fig6.png", draw)
    table = markdown(["", *(f"{x:.0%}" for x in SHARES), "60%, all steps"], [[f"of the {side} class", *(cell(values[side, x]) for x in (*SHARES, "all steps"))] for side in SIDES])
    experts = markdown(["", *(f"{n:,} expert conversations" for n in EXPERTS)], [[name, *(cell(values[name, n]) for n in EXPERTS)] for name in ("C-RLFT", "expert only")])
    return {f"{a}, {b}": v for (a, b), v in values.items()}, table + "\n\n" + experts


if __name__ == "__main__":
    run(command("fig6"))
