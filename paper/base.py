"""What moves Table 2's order: a pre-trained base, as in the paper, and three times the steps.

    python -m paper.base        its own target, `make paper_base`, beside `make paper`

The base is pre-trained on unlabelled text: lines like `reverse a c b d : d b c a then shift : e c d b` that are right 4 times in 10,
without prompts, classes or weights. It knows the skills, then, and the other source's errors, but no template. Fine-tuning takes the
same data and steps as everywhere and a third of the learning rate, in all arms.
"""

import random
from dataclasses import dataclass, replace

from data import run
from paper.runs import BATCH_TOKENS, LR, STEPS, Job, cell, command, figure, fine_tune, interval, markdown
from paper.table2 import ARMS, arm, expert_score, runs as table2
from paper.toy import Task, make_conversation, make_task

SEEDS = 3
LONGER = "C-RLFT", "without reward"


@dataclass(frozen=True)
class Pretrain(Job):
    """The base: 13,200 documents, none of which has a prompt that is held out for any seed."""

    steps: int = 2 * STEPS

    def do(self, folder):
        rng, documents = random.Random("base"), []
        held_out = {words[0] for seed in range(5) for words in make_task(Task(seed=seed))[1]}
        while len(documents) < 13_200:
            turns = make_conversation(rng, 0.4, [1, 1, 1])
            if turns[0][0] not in held_out:
                text = " ".join(f"{words} : {reply}" for words, reply, _ in turns)
                documents.append({"conversations": [{"from": "gpt", "value": text}]})  # an answer to nothing: after <s>, all of it is learned
        fine_tune(folder, documents, "*=text:1", "none", {"model": "toy", "seed": self.seed, "steps": self.steps, "lr": LR, "batch_tokens": BATCH_TOKENS})
        return {}


def runs(seed):
    base = Pretrain("pre-training")
    scratch = {("random weights", *key): one for key, one in table2(seed).items()}
    tuned = {("pre-trained", *key[1:]): replace(one, base=base, lr=LR / 3) for key, one in scratch.items() if "1.8" not in key[1]}
    longer = {("random weights, 3 x the steps", name, "steps"): arm(name, seed, steps=3 * STEPS) for name in LONGER}
    return scratch | tuned | longer


def report(results, folder):
    rows = {}
    for (start, name, budget), group in results.items():
        rows.setdefault(name, {})[f"{start}, equal {budget}"] = [expert_score(r) for r in group]
    columns = ["random weights, equal steps", "random weights, 3 x the steps, equal steps", "pre-trained, equal steps", "pre-trained, equal epochs"]

    def draw(axes):
        for k, column in enumerate(columns):
            points = [(i + 0.2 * k, *interval(row[column])) for i, row in enumerate(rows.values()) if column in row]
            axes.bar(*list(zip(*points))[:2], 0.18, yerr=[half or 0 for *_, half in points], capsize=2, label=column)
        axes.set(ylabel="right answers, temperature 1", ylim=(0, 1.25))
        axes.set_xticks([i + 0.3 for i in range(len(rows))], [name.replace(" ", "\n") for name in rows], fontsize=8)
        axes.legend(fontsize=7, ncols=2)

    figure(folder / "base.png", draw, width=8)
    table = [[name, ARMS[name][2], *(cell(row[c]) if c in row else "" for c in columns)] for name, row in rows.items()]
    return rows, markdown(["arm", "paper, %", *(c.replace("steps, equal steps", "steps") for c in columns)], table)


if __name__ == "__main__":
    run(command("base"))
