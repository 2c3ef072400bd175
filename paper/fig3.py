"""Fig. 3 in miniature: the scores of the two sources' own answers. No model is asked: the task can be scored exactly.

    python -m paper.fig3

As in App. G: 128 conversations of each source, every answer scored from 1 to 10 in its conversation, a conversation's score
the mean. Here the score is 1 + 9 times the share of the letters that stand where the right answer has them.
"""

from data import run
from paper.runs import cell, command, figure, interval, markdown
from paper.toy import Task, answer, make_task

SEEDS = 3


def runs(seed):
    return {}


def scores(turns):
    """The score of each answer of a conversation."""
    result, last = [], []
    for words, reply, _ in turns:
        skill, *letters = words.replace("then ", "").split()
        right, given = answer(" ".join([skill, *(letters or last)])).split(), reply.split()
        result.append(1 + 9 * sum(a == b for a, b in zip(right, given)) / max(len(right), len(given)))
        last = given
    return result


def report(_, folder):
    rows = {}
    for seed in range(SEEDS):
        for label, conversations in make_task(Task(seed=seed))[0].items():
            rows.setdefault(label, []).append([sum(s) / len(s) for s in map(scores, conversations[:128])])

    def draw(axes):
        for label, by_seed in rows.items():
            axes.hist([x for values in by_seed for x in values], bins=18, range=(1, 10), alpha=0.6, density=True, label=label)
        axes.set(xlabel="score of a conversation, 1 to 10", ylabel="density")
        axes.legend()

    figure(folder / "fig3.png", draw)
    table = [[label, cell([sum(v) / len(v) for v in by_seed], 2), cell([sum(x > 9.99 for x in v) / len(v) for v in by_seed], 2)] for label, by_seed in rows.items()]
    return rows, markdown(["source", "mean score", "conversations without an error"], table)


if __name__ == "__main__":
    run(command("fig3"))
