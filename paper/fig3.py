"""Fig. 3 in miniature: the scores of the two sources' own answers.

    python -m paper.fig3

No model is asked: the task can be scored exactly. As in Sec. 5.1 and App. G: 128 conversations of
each source, every answer scored from 1 to 10 in its conversation, a conversation's score the mean.
Here the score is 1 + 9 times the share of the letters that stand where the right answer has them.
The weaker source errs by habit or at random, as in Table 2.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

from paper.commands import LOOKS, cell, command, markdown, open_figure, save_figure
from paper.runs import Job, share
from paper.table2 import HABITS, NOISE
from paper.toy import Task, answer, full_questions, make_task
from support.cli import run

SEEDS = 3
CONVERSATIONS = 128
EXPERT, OTHER = "GPT-4", "GPT-3.5"
# 10, but for rounding
PERFECT = 9.99


@dataclass(frozen=True)
class Sources(Job):
    """The scores of the data themselves."""

    # as in Task
    habits: float = 0.0

    def do(self, folder: Path) -> dict:
        """{"scores": {source: [the score of each of its first conversations]}}"""
        sources, _ = make_task(Task(habits=self.habits, seed=self.seed))
        scores = {}
        for label, chats in sources.items():
            scores[label] = [conversation_score(turns) for turns in chats[:CONVERSATIONS]]
        return {"scores": scores}


def conversation_score(turns: list[tuple]) -> float:
    asked, replies, _ = zip(*turns)
    scores = []
    for question, reply in zip(full_questions(asked, replies), replies):
        right = answer(question).split()
        given = reply.split()
        same = sum(a == b for a, b in zip(right, given))
        # letters too many and letters too few are errors alike
        scores.append(1 + 9 * same / max(len(right), len(given)))
    return sum(scores) / len(scores)


def jobs(seed: int) -> dict:
    """{kind of errors: job}"""
    wanted = {}
    for kind, habits in (("habits", HABITS), ("noise", NOISE)):
        # one step: it takes no time
        wanted[kind] = Sources("the sources' scores", seed, steps=1, habits=habits)
    return wanted


def report(results: dict, folder: Path) -> tuple[dict, str]:
    # the expert makes no errors of either kind
    rows = {EXPERT: [result["scores"][EXPERT] for result in results["habits"]]}
    for kind, group in results.items():
        rows[f"{OTHER}, {kind}"] = [result["scores"][OTHER] for result in group]
    draw(rows, folder / "fig3.png")

    table = []
    for label, by_seed in rows.items():
        means = [sum(scores) / len(scores) for scores in by_seed]
        perfect = [share_perfect(scores) for scores in by_seed]
        table.append([label, cell(means, 2), cell(perfect, 2)])
    return rows, markdown(["source", "mean score", "conversations without an error"], table)


def share_perfect(scores: list[float]) -> float:
    return share(score > PERFECT for score in scores)


def draw(rows: dict[str, list], path: Path) -> None:
    figure, axes = open_figure()
    for (colour, _, line), (label, by_seed) in zip(LOOKS, rows.items()):
        scores = list(itertools.chain(*by_seed))
        # each conversation counts as its share of all
        shares = [1 / len(scores)] * len(scores)
        axes.hist(
            scores,
            bins=18,
            range=(1, 10),
            weights=shares,
            histtype="step",
            linewidth=2,
            color=colour,
            linestyle=line,
            label=label,
        )
    axes.set(xlabel="score of a conversation, 1 to 10", ylabel="share of conversations")
    axes.legend(loc="upper left")
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("fig3", argv)


if __name__ == "__main__":
    run(main)
