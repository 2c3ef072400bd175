"""Answers to the questions of a benchmark, for a judge to read (Table 1, Fig. 2).

What the paper did: models answer open questions, and a stronger model judges the answers.
AlpacaEval has 805 single instructions; Vicuna-bench 80 questions; MT-bench 80 questions of two
turns in eight categories, the second turn building on the first answer.

What you get: the answer file that the official judges read. That is AlpacaEval's model outputs
for `--bench alpaca`, FastChat's model_answer for `mt` and `vicuna`.

The rules are the official ones: the whole conversation so far is in the prompt of a second turn,
and in MT-bench and Vicuna-bench the category decides the temperature. One check is ours: a model
that was trained on a question has an answer by heart, so crlft.json carries hashes of the prompts
that a model was trained on, and a warning counts the questions among them.
"""

import base64
import dataclasses
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversations import Conversation, Message, prompt_hash
from evaluation.rows import name_or_number, require, require_turns, rows_of, write_lines
from sample import SampleConfig, Speaker, check_sampling, model_folder, read_training
from support.fields import FETCH
from support.files import written_whole
from support.kept import KeptAnswers, check_out, rows_sha256

# FastChat's temperatures by category: the colder, the more there is one right answer
TEMPERATURE = {
    "writing": 0.7,
    "roleplay": 0.7,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
# .. and of any other category: Vicuna-bench has more, AlpacaEval none
OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class AnswersConfig:
    """The flags of `evaluate.py answers`."""

    # the model's directory, one
    model: tuple = ()
    # alpaca, mt or vicuna
    bench: str = ""
    # the bench's file of questions
    questions: str = ""
    # where the answers go; FastChat takes a model's name from its file's
    # default: NAME.jsonl, for alpaca NAME.json
    out: str = ""
    # what the file calls the model
    # default: its folder's name
    name: str | None = None
    # another model's prompt, or `base`, the raw text: see prompts.py
    # default: the one trained with
    template: str | None = None
    # under which class's prompt
    # default: the expert's
    condition: str | None = None
    # what the logits are divided by
    # default: 0.7; in mt and vicuna by category
    temperature: float | None = None
    # tokens of an answer, at most
    max_new: int = 1024
    # prompts that are answered side by side
    batch: int = 16
    # of the random numbers
    seed: int = 0


def answers(config: AnswersConfig) -> None:
    """Every question answered, and the answers written as the bench's judges read them."""
    if config.bench not in ("alpaca", "mt", "vicuna") or not config.questions:
        raise ValueError("answers needs MODEL --bench alpaca|mt|vicuna --questions FILE")
    one_model(config)
    name = config.name or name_of(config.model[0])
    out = config.out or default_out(name, config.bench)
    check_out(out, config.questions)
    rows, questions = read_questions(config.questions, config.bench)
    temperatures = temperatures_of(rows, config)
    sampling = {}
    for temperature in sorted(set(temperatures)):
        sampling[temperature] = sampling_of(temperature, config)

    speaker = load_speaker(config, config.seed)
    warn_of_training_data(config.model[0], questions)
    with KeptAnswers(out, run_of(speaker, rows, config), speaker.vocab_size) as kept:
        responses = converse(speaker, questions, temperatures, sampling, kept)
        if config.bench == "alpaca":
            write_alpaca(out, name, rows, responses)
        else:
            write_fastchat(out, name, rows, responses, kept.began)
    print(f"{len(rows)} answers of {name} in {out}; {speaker.cut} prompts cut on the left")
    if config.bench != "alpaca" and Path(out).stem != name:
        print(f"FastChat will call this model {Path(out).stem}, as its file is named")


def run_of(speaker: Speaker, rows: list[dict], config: AnswersConfig) -> dict:
    """What the answers depend on: another command is not continued as this one."""
    flags = dataclasses.asdict(config)
    for name in ("model", "questions", "out", "name"):
        del flags[name]
    return flags | speaker.identity | {"prompts": rows_sha256(rows)}


def name_of(folder: str | Path) -> str:
    """A model's name: its folder's, or that of the run whose hf/ it is."""
    folder = Path(os.path.realpath(folder))
    return folder.parent.name if folder.name == "hf" else folder.name


def default_out(name: str, bench: str) -> str:
    """The file that is written without --out. ValueError when there is one: it may be another
    benchmark's, and took hours."""
    out = f"{name}.json" if bench == "alpaca" else f"{name}.jsonl"
    if Path(out).exists():
        raise ValueError(f"{out} is there already; give --out, the same or another name")
    return out


def one_model(config) -> None:
    """ValueError when an `answers` or `agieval` command does not have one model."""
    if len(config.model) != 1:
        raise ValueError("give one model directory: python evaluate.py agieval|answers MODEL --..")


def load_speaker(config, seed: int = 0) -> Speaker:
    """The one model of an `answers` or `agieval` command. ValueError when it is not one."""
    one_model(config)
    return Speaker(config.model[0], config.condition, config.template, seed=seed)


# ---- the questions


def read_questions(path: str, bench: str) -> tuple[list[dict], list[list[str]]]:
    """(rows, the one or two turns of each) of a benchmark's question file."""
    rows = []
    questions = []
    for where, row in rows_of(path):
        if bench == "alpaca":
            fields = require(row, where, "instruction", "dataset")
            turns = [fields.text("instruction")]
        else:
            fields = require(row, where, "turns", "question_id", "category")
            name_or_number(fields, "question_id")
            fields.text("category")
            turns = row["turns"]
        rows.append(row)
        questions.append(require_turns(turns, where))
    return rows, questions


def temperatures_of(rows: list[dict], config: AnswersConfig) -> list[float]:
    """The temperature at which each question is answered."""
    if config.temperature is not None:
        return [config.temperature] * len(rows)
    return [TEMPERATURE.get(row.get("category"), OTHER_TEMPERATURE) for row in rows]


def sampling_of(temperature: float, config: AnswersConfig) -> SampleConfig:
    """How answers at a temperature are drawn. ValueError: numbers that make no sense."""
    return check_sampling(
        SampleConfig(
            temperature=temperature,
            max_new=config.max_new,
            batch=config.batch,
            seed=config.seed,
        )
    )


def warn_of_training_data(folder: str, questions: list[list[str]]) -> None:
    """One line on stderr when the model was trained on some of the questions."""
    known = trained_on(folder, [turns[0] for turns in questions])
    if known:
        print(
            f"warning: {known} of the {len(questions)} questions are prompts that this model "
            "was trained on; its score would not count",
            file=sys.stderr,
        )


def trained_on(folder: str | Path, questions: list[str]) -> int:
    """How many of these first messages the model was trained on; 0 when crlft.json says nothing."""
    folder = model_folder(folder)
    training = read_training(folder)
    if training is None:
        return 0
    # "prompts" is base64 of uint32: 32 bits are left of each first message's hash
    try:
        hashes = base64.b64decode(training.get("prompts") or "", validate=True)
        seen = set(np.frombuffer(hashes, np.uint32).tolist())
    except ValueError:
        raise ValueError(
            f"{folder / 'crlft.json'}: prompts is no base64 of 32-bit numbers; {FETCH}"
        ) from None
    known = 0
    for question in questions:
        group = prompt_hash(Conversation((Message("user", question),)))
        known += group & 0xFFFFFFFF in seen
    return known


# ---- the conversations


def converse(
    speaker: Speaker,
    questions: list[list[str]],
    temperatures: list[float],
    sampling: dict[float, SampleConfig],
    kept: KeptAnswers,
) -> list[list[str]]:
    """The answers to each question's turns.

    All first turns are answered before any second one: so they share batches, and a second turn
    has its first answer in its prompt.
    """
    conversations = [[] for _ in questions]
    responses = [[] for _ in questions]
    most_turns = max(len(turns) for turns in questions)
    for turn in range(most_turns):
        for temperature, how in sampling.items():
            asked = []
            for i, turns in enumerate(questions):
                if turn < len(turns) and temperatures[i] == temperature:
                    asked.append(i)
                    conversations[i].append(Message("user", turns[turn]))

            ids = []
            for i in asked:
                ids.append(speaker.ids(conversations[i], truncate_left=True, max_new=how.max_new))
            part = kept.part(f"turn {turn + 1} at temperature {temperature:g}")
            for at, answer in speaker.answer_each(ids, how, part):
                i = asked[at]
                text = speaker.text(answer.ids).strip()
                conversations[i].append(Message("assistant", text))
                responses[i].append(text)
    return responses


# ---- the files that the official judges read


def write_alpaca(out: str, name: str, rows: list[dict], responses: list[list[str]]) -> None:
    """AlpacaEval's model outputs: one JSON array."""
    outputs = []
    for row, (response,) in zip(rows, responses):
        outputs.append(
            {
                "dataset": row["dataset"],
                "instruction": row["instruction"],
                "output": response,
                "generator": name,
            }
        )
    with written_whole(out) as partial:
        partial.write_text(json.dumps(outputs, indent=2, ensure_ascii=False), encoding="utf-8")


def write_fastchat(
    out: str, name: str, rows: list[dict], responses: list[list[str]], began: float
) -> None:
    """FastChat's model_answer: a line for each question, all its turns in one choice.

    began: when the run began, in seconds since 1970.
    """
    lines = []
    for row, turns in zip(rows, responses):
        question = row["question_id"]
        # 22 characters, as FastChat's own ids have; a hash, so that the same answer has the same id
        answer_id = hashlib.sha256(f"{name}/{question}/{turns}".encode()).hexdigest()[:22]
        lines.append(
            {
                "question_id": question,
                "answer_id": answer_id,
                "model_id": name,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": began,
            }
        )
    write_lines(out, lines)
