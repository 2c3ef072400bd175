"""What moves Table 2's order: a pre-trained base, as in the paper, the learning rate, and twice the steps.

    python -m paper.base        its own target, `make paper_base`, beside `make paper`

The base is pre-trained on unlabelled text: lines like `reverse a c b d : d b c a then shift : e c d b` that are right 4 times in 10,
without classes or weights. It knows the skills, then, and the other source's errors. (data.py has no way to train on bare text: a line
stands behind `Assistant:`, which is no arm's prompt, and ends with `<|end_of_turn|>`.) Fine-tuning takes the same data and steps as
everywhere and a third of the learning rate, in all arms; the same third from random weights stands beside it.
"""

import random
from dataclasses import dataclass

from data import run
from paper.runs import BATCH_TOKENS, LR, STEPS, T_95, Job, bars, cell, command, figure, fine_tune, markdown
from paper.table2 import ARMS, arm, expert_score
from paper.toy import Task, make_conversation, make_task

SEEDS = 3
STARTS = {  # name: (arms, what differs)
    "random weights": (("C-RLFT", "without reward", "without condition", "SFT on all", "expert only"), {}),
    "random weights, 2 x the steps": (("without reward",), {"steps": 2 * STEPS}),
    "random weights, lr / 3": (("C-RLFT", "without reward"), {"lr": LR / 3}),
    "pre-trained, lr / 3": (("C-RLFT", "without reward", "without condition", "SFT on all", "expert only"), {"lr": LR / 3}),
    "pre-trained, lr / 3, equal epochs": (("expert only",), {"lr": LR / 3, "steps": None}),
}


@dataclass(frozen=True)
class Pretrain(Job):
    """The base: 13,200 documents, none of which has a prompt that is held out for any seed."""

    steps: int = 2 * STEPS

    def do(self, folder):
        rng, documents = random.Random("base"), []
        held_out = {words[0] for seed in range(max(T_95)) for words in make_task(Task(seed=seed))[1]}
        while len(documents) < 13_200:
            turns = make_conversation(rng, 0.4, [1, 1, 1])
            if turns[0][0] not in held_out:
                text = " ".join(f"{words} : {reply}" for words, reply, _ in turns)
                documents.append({"conversations": [{"from": "gpt", "value": text}]})  # an answer to nothing: after <s>, all of it is learned
        fine_tune(folder, documents, "*=text:1", "none", {"model": "toy", "seed": self.seed, "steps": self.steps, "lr": LR, "batch_tokens": BATCH_TOKENS})
        return {}


def runs(seed):
    base = {"base": Pretrain("pre-training")}
    return {(start, name): arm(name, seed, **flags, **(base if start.startswith("pre") else {})) for start, (names, flags) in STARTS.items() for name in names}


def report(results, folder):
    scores = {how: {key: [expert_score(r, how) for r in group] for key, group in results.items()} for how in ("sampled", "greedy")}
    names = STARTS["random weights"][0]
    figure(folder / "base.png", lambda axes: bars(axes, names, {start: [scores["sampled"].get((start, name), ()) for name in names] for start in STARTS}), width=8)
    table = [[name, ARMS[name][1], *(cell(scores["sampled"][start, name]) if (start, name) in results else "" for start in STARTS),
              cell(scores["greedy"]["pre-trained, lr / 3", name])] for name in names]
    head = ["arm", "paper, %", *STARTS, "greedy: pre-trained, lr / 3"]
    return {how: {f"{start}: {name}": values for (start, name), values in rows.items()} for how, rows in scores.items()}, markdown(head, table)


if __name__ == "__main__":
    run(command("base"))
