"""What moves Table 2's order: the pre-trained base, the learning rate, and time.

    python -m paper.base        its own target, `make paper_base`, beside `make paper`

Everything else on paper/README.md is fine-tuned from a base (`Pretrain` in runs.py), as in the paper. Here the same arms start from
random weights, with twice the steps and a higher learning rate; or from the base with half the learning rate, or three times the steps.
"""

from paper.runs import BASE_LR, LR, STEPS, bars, cell, command, figure, markdown
from paper.table2 import ARMS, arm, expert_score
from support.cli import run

SEEDS = 3
NAMES = "C-RLFT", "without reward", "expert only"
STARTS = {  # name: what differs
    "pre-trained": {},
    "pre-trained, half the lr": {"lr": LR / 2},
    "pre-trained, 3 x the steps": {"steps": 3 * STEPS},
    "random weights, 2 x the steps": {"base": "toy", "lr": BASE_LR, "steps": 2 * STEPS},
}


def runs(seed):
    return {
        (start, name): arm(name, seed, **flags) for start, flags in STARTS.items() for name in NAMES
    }


def report(results, folder):
    scores = {
        how: {key: [expert_score(r, how) for r in group] for key, group in results.items()}
        for how in ("sampled", "greedy")
    }
    figure(
        folder / "base.png",
        lambda axes: bars(
            axes,
            NAMES,
            {start: [scores["sampled"][start, name] for name in NAMES] for start in STARTS},
        ),
        width=8,
    )
    table = [
        [name, ARMS[name][1], *(cell(scores["sampled"][start, name]) for start in STARTS)]
        for name in NAMES
    ]
    head = ["arm", "paper, %", *STARTS]
    return {
        how: {f"{start}: {name}": values for (start, name), values in rows.items()}
        for how, rows in scores.items()
    }, markdown(head, table)


if __name__ == "__main__":
    run(command("base"))
