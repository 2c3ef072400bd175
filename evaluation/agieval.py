"""AGIEval: what does the model know, and can it reason? (Table 5)

What the paper did: tuning on chats could cost a model knowledge that it had. So the paper asks the
eight English exams of AGIEval, 2,546 multiple-choice items, without an example before them, and
counts the right letters. openchat-13b has 36.4%, its base model 35.0%, and the other tuned models
32.8% and less.

What you get: the official prompts to the letter, greedy answers, and a table beside the paper's.
The 95% interval of such a share is almost 2 points wide to each side: read it before you compare.
Every prompt and response stays in --out, from which `evaluate.py report` counts again. The same
command goes on with a run that was stopped (support/kept.py).

Three rules decide the numbers. The leftmost letter from A to F in the response is its answer,
whatever else it says: AGIEval's rule. A response may go on to the end of the context: OpenChat's
own runs set no other limit. The average is over the items, not over the eight tasks: so all five
averages of Table 5 come out (openchat-13b's would else be 37.2); the paper does not say it.
"""

import math
import os
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from conversations import Message
from evaluation.answers import load_speaker, name_of
from evaluation.rows import require, rows_of, table_head, table_row, write_lines
from sample import Answer, SampleConfig, Speaker, check_sampling
from support.kept import KeptAnswers, check_out, rows_sha256

# AGIEval's English tasks and how many items each has; the rows of Table 5
TASKS = {
    "aqua-rat": 254,
    "logiqa-en": 651,
    "lsat-ar": 230,
    "lsat-lr": 510,
    "lsat-rc": 269,
    "sat-en-without-passage": 206,
    "sat-en": 206,
    "sat-math": 220,
}
# the paper's accuracies in %, in the order of TASKS, then its average: correct items / 2,546
TABLE_5 = {
    "openchat-13b": (19.3, 34.9, 19.1, 37.5, 45.0, 44.7, 66.0, 30.9, 36.4),
    "llama-2-13b": (20.1, 32.6, 21.3, 33.3, 46.1, 41.3, 65.5, 29.1, 35.0),
    "wizardlm-v1.2-13b": (28.3, 27.2, 21.7, 32.4, 43.5, 33.5, 65.5, 22.7, 32.8),
    "llama-2-chat-13b": (22.4, 27.3, 19.6, 27.6, 25.3, 25.2, 25.7, 28.6, 25.8),
    "vicuna-v1.5-13b": (21.7, 19.0, 20.0, 16.7, 19.0, 26.7, 28.2, 24.5, 20.7),
}
# A letter among so many tokens is the leftmost, whatever follows. Only a response without one is
# made to its end: the same letters as in the official runs, for a fraction of the tokens.
FIRST_TOKENS = 64
# a whole context of keys and values is large: so many times fewer prompts share a batch
SMALLER_BATCH = 4


@dataclass(frozen=True)
class AgievalConfig:
    """The flags of `evaluate.py agieval`."""

    # the model's directory, one
    model: tuple = ()
    # the folder of AGIEval's v1 jsonl files
    data: str = ""
    # where prompts and responses go, a JSONL file
    out: str = ""
    # `base` for a model that was not fine-tuned: the raw prompt
    # default: the one trained with
    template: str | None = None
    # under which class's prompt
    # default: the expert's
    condition: str | None = None
    # write the prompts, ask nobody
    prompts_only: bool = False
    # tokens of a response, at most
    # default: until the context ends
    max_new: int | None = None
    # prompts that are answered side by side
    batch: int = 16


# ---- the official rules


def agieval_prompt(item: dict) -> str:
    """The official zero-shot prompt of an item."""
    passage = item["passage"] or ""
    choices = " ".join(item["options"])
    last = chr(ord("A") + len(item["options"]) - 1)
    return (
        f"{passage}Q: {item['question']} Answer Choices: {choices}\n"
        f"A: Among A through {last}, the answer is"
    )


def agieval_letter(response: str) -> str | None:
    """The leftmost character of the response that is one of A to F, anywhere in it, or None."""
    for character in response:
        if character in "ABCDEF":
            return character
    return None


def agieval_items(folder: str | Path) -> list[dict]:
    """[{task, index, prompt, label}] of the official files. ValueError: a file that is not one."""
    items = []
    for task, count in TASKS.items():
        path = Path(folder) / f"{task}.jsonl"
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file; --data is the folder of AGIEval's v1 jsonl files"
            )
        rows = rows_of(path)
        for index, (where, row) in enumerate(rows):
            check_item(row, where)
            prompt = agieval_prompt(row)
            items.append({"task": task, "index": index, "prompt": prompt, "label": row["label"]})
        if len(rows) != count:
            print(f"{path}: {len(rows)} items, the official file has {count}", file=sys.stderr)
    return items


def check_item(row: object, where: str) -> None:
    """ValueError when a row is not an item of AGIEval's files."""
    fields = require(row, where, "passage", "question", "options", "label")
    fields.text("label")
    options = row["options"]
    has_texts = isinstance(row["passage"] or "", str) and isinstance(row["question"], str)
    has_options = isinstance(options, list) and all(isinstance(text, str) for text in options)
    if not has_texts or not has_options:
        raise ValueError(
            f"{where}: passage and question are texts, options a list of them; fetch the file again"
        )


# ---- the run


def agieval(config: AgievalConfig) -> None:
    """Ask every item, then print the table."""
    if not config.data or not config.out:
        raise ValueError("agieval needs MODEL --data FOLDER --out FILE.jsonl")
    check_out(config.out)
    first_tokens = FIRST_TOKENS if config.max_new is None else config.max_new
    sampling = SampleConfig(temperature=0.0, max_new=first_tokens, batch=config.batch)
    check_sampling(sampling)
    items = agieval_items(config.data)
    if config.prompts_only:
        write_prompts(config.out, items)
        return

    if Path(config.out).exists():
        raise ValueError(
            f"--out {config.out} is there already; `report` counts a run's file again; "
            "give another name for a new run"
        )
    speaker = load_speaker(config)
    # in every row, so that a file says how it was made
    settings = {
        "model": os.path.realpath(config.model[0]),
        "template": speaker.template,
        "condition": speaker.condition,
        "max_new": config.max_new,
    }
    ids = []
    for item in items:
        cut_before = speaker.cut
        question = [Message("user", item["prompt"])]
        ids.append(speaker.ids(question, truncate_left=True, max_new=first_tokens))
        item["cut"] = speaker.cut > cut_before

    run = settings | speaker.identity | {"batch": config.batch, "prompts": rows_sha256(items)}
    with KeptAnswers(config.out, run, speaker.vocab_size) as kept:
        answers = respond(speaker, ids, sampling, kept, to_the_end=config.max_new is None)
        rows = []
        for item, answer in zip(items, answers):
            response = speaker.text(answer.ids)
            letter = agieval_letter(response)
            found = {"response": response, "letter": letter, "finish": answer.finish}
            rows.append(item | found | settings)
        write_lines(config.out, rows)

    print(agieval_table(rows, name_of(config.model[0])))
    cut = sum(row["cut"] for row in rows)
    print(f"{cut} prompts cut on the left; prompts and responses in {config.out}")


def respond(
    speaker: Speaker,
    prompts: list[list[int]],
    sampling: SampleConfig,
    kept: KeptAnswers,
    to_the_end: bool,
) -> list[Answer]:
    """The greedy answer to each prompt; with to_the_end those that have no letter yet are asked
    again, and may fill the context."""
    answers = speaker.answer_all(prompts, sampling, kept.part("first tokens"))
    unfinished = []
    for i, answer in enumerate(answers):
        if answer.finish == "length" and agieval_letter(speaker.text(answer.ids)) is None:
            unfinished.append(i)
    if not to_the_end or not unfinished:
        return answers

    whole = replace(
        sampling,
        max_new=speaker.context,
        batch=max(1, sampling.batch // SMALLER_BATCH),
    )
    again = [prompts[i] for i in unfinished]
    for i, answer in zip(unfinished, speaker.answer_all(again, whole, kept.part("to the end"))):
        answers[i] = answer
    return answers


def write_prompts(out: str, items: list[dict]) -> None:
    """--prompts_only: the items to a file. ValueError rather than replace a run's answers."""
    if Path(out).is_file() and b'"response": ' in Path(out).read_bytes():
        raise ValueError(f"--out {out} holds responses; give another name")
    write_lines(out, items)
    print(f"{len(items)} prompts in {out}")


# ---- the table


class Score(NamedTuple):
    """Counts of a task, or of all: items, right letters, responses without any letter."""

    items: int
    correct: int
    no_letter: int


def score_of(rows: list[dict]) -> Score:
    """Counted from the responses, not from the letters in the file: the rule is applied again."""
    letters = [agieval_letter(row["response"]) for row in rows]
    correct = sum(letter == row["label"] for letter, row in zip(letters, rows))
    return Score(len(rows), correct, letters.count(None))


def interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of the share correct / n: unlike p +- 2 sigma it stays in 0 to 1."""
    # 95% of a normal distribution lie within so many standard deviations
    z = 1.96
    share = correct / n
    variance = share * (1 - share) / n + z * z / (4 * n * n)
    half = z * math.sqrt(variance)
    middle = share + z * z / (2 * n)
    scale = 1 + z * z / n
    low = (middle - half) / scale
    high = (middle + half) / scale
    return max(0.0, low), min(1.0, high)


def agieval_table(rows: Iterable[dict], name: str = "this model") -> str:
    """Accuracy per task with its interval, both averages, and Table 5 beside them, in markdown."""
    rows = list(rows)
    lines = [table_head(["task", "items", name, "95% interval", "no letter", *TABLE_5])]

    # a task that nobody was asked has no row
    scores = []
    for i, task in enumerate(TASKS):
        score = score_of([row for row in rows if row["task"] == task])
        if score.items:
            scores.append(score)
            lines.append(score_row(task, score, [paper[i] for paper in TABLE_5.values()]))

    # the paper's Average counts every item once, whichever task it is of
    items = sum(score.items for score in scores)
    correct = sum(score.correct for score in scores)
    no_letter = sum(score.no_letter for score in scores)
    total = Score(items, correct, no_letter)
    averages = [paper[-1] for paper in TABLE_5.values()]
    lines.append(score_row("average over items", total, averages))

    # ours besides: every task counts once, whatever its size
    mean = statistics.mean(score.correct / score.items for score in scores)
    published = [f"{statistics.mean(paper[:-1]):.1f}" for paper in TABLE_5.values()]
    lines.append(f"| mean of the tasks | | {mean:.1%} | | | " + " | ".join(published) + " |")
    return "\n".join(lines)


def score_row(label: str, score: Score, published: list[float]) -> str:
    """A line of the table: our counts, then the paper's accuracies."""
    low, high = interval(score.correct, score.items)
    cells = [
        label,
        str(score.items),
        f"{score.correct / score.items:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{score.no_letter / score.items:.1%}",
        *(str(accuracy) for accuracy in published),
    ]
    return table_row(cells)
