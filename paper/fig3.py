"""Fig. 3 in miniature: the scores of the two sources' own answers. No model is asked: the task can be scored exactly.

    python -m paper.fig3

As in App. G: 128 conversations of each source, every answer scored from 1 to 10 in its conversation, a conversation's score
the mean. Here the score is 1 + 9 times the share of the letters that stand where the right answer has them.
"""

from dataclasses import dataclass

from paper.runs import Job, cell, command, figure, markdown, share
from paper.toy import Task, answer, full_questions, make_task
from support.cli import run

SEEDS = 3


@dataclass(frozen=True)
class Sources(Job):
    def do(self, folder):
        """{source: [the score of each of its first 128 conversations]}"""
        return {
            "scores": {
                label: [conversation_score(turns) for turns in chats[:128]]
                for label, chats in make_task(Task(seed=self.seed))[0].items()
            }
        }


def conversation_score(turns):
    asked, replies, _ = zip(*turns)
    scores = []
    for question, reply in zip(full_questions(asked, replies), replies):
        right, given = answer(question).split(), reply.split()
        scores.append(
            1 + 9 * sum(a == b for a, b in zip(right, given)) / max(len(right), len(given))
        )
    return sum(scores) / len(scores)


def runs(seed):
    return {"sources": Sources("the sources' scores", seed, 1)}


def report(results, folder):
    rows = {
        label: [r["scores"][label] for r in results["sources"]] for label in ("GPT-4", "GPT-3.5")
    }

    def draw(axes):
        for label, by_seed in rows.items():
            axes.hist(
                [x for values in by_seed for x in values],
                bins=18,
                range=(1, 10),
                alpha=0.6,
                density=True,
                label=label,
            )
        axes.set(xlabel="score of a conversation, 1 to 10", ylabel="density")
        axes.legend()

    figure(folder / "fig3.png", draw)
    perfect = lambda scores: share(x > 9.99 for x in scores)
    table = [
        [label, cell([sum(v) / len(v) for v in by_seed], 2), cell(map(perfect, by_seed), 2)]
        for label, by_seed in rows.items()
    ]
    return rows, markdown(["source", "mean score", "conversations without an error"], table)


if __name__ == "__main__":
    run(command("fig3"))
