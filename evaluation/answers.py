"""Answers to the questions of a benchmark, for the official judges."""

import base64
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversations import Conversation, Message, group_of
from evaluation.rows import check_out, field, rows_of, turns_of, write_lines
from sample import SampleConfig, Speaker, check_sampling

TEMPERATURE = {  # FastChat's, by category; 0.7 for any other
    "writing": 0.7,
    "roleplay": 0.7,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


@dataclass(frozen=True)
class AnswersConfig:
    model: tuple = ()
    bench: str = ""  # alpaca, mt or vicuna
    questions: str = ""
    out: str = ""
    name: str | None = None  # of the model in the file; default: its folder's
    template: str | None = None
    condition: str | None = None
    temperature: float | None = None  # default: 0.7; in mt and vicuna by category
    max_new: int = 1024
    batch: int = 16
    seed: int = 0


def name_of(folder):
    """A model's name: its folder's, or that of the run whose hf/ it is."""
    folder = Path(folder).resolve()
    return folder.parent.name if folder.name == "hf" else folder.name


def load(config, seed=0):
    if len(config.model) != 1:
        raise ValueError("give one model directory: python evaluate.py agieval|answers MODEL --..")
    return Speaker(config.model[0], config.condition, config.template, seed=seed)


def trained_on(folder, questions):
    """How many of these first messages the model was trained on, by crlft.json; 0 when it does not say."""
    path = Path(folder) / "crlft.json"
    path = path if path.is_file() else Path(folder) / "hf" / "crlft.json"
    seen = json.loads(path.read_text(encoding="utf-8")).get("prompts", "") if path.is_file() else ""
    seen = set(np.frombuffer(base64.b64decode(seen), np.uint32).tolist())
    return sum(
        group_of(Conversation((Message("user", q),))) & 0xFFFFFFFF in seen for q in questions
    )


def answers(config):
    if config.bench not in ("alpaca", "mt", "vicuna") or not config.questions or not config.out:
        raise ValueError("answers needs MODEL --bench alpaca|mt|vicuna --questions FILE --out FILE")
    check_out(config.out, config.questions)
    rows = rows_of(config.questions)
    if config.bench == "alpaca":
        questions = [
            turns_of([field(row, where, "instruction", "dataset")[0]], where) for where, row in rows
        ]
    else:
        questions = [
            turns_of(field(row, where, "turns", "question_id", "category")[0], where)
            for where, row in rows
        ]
    heats = [
        config.temperature
        if config.temperature is not None
        else TEMPERATURE.get(row.get("category"), 0.7)
        for _, row in rows
    ]
    how = {
        heat: check_sampling(
            SampleConfig(
                temperature=heat, max_new=config.max_new, batch=config.batch, seed=config.seed
            )
        )
        for heat in heats
    }
    speaker = load(config, config.seed)
    if known := trained_on(config.model[0], [turns[0] for turns in questions]):
        print(
            f"warning: {known} of the {len(questions)} questions are prompts that this model was trained on; its score would not count",
            file=sys.stderr,
        )
    told = [[] for _ in questions]
    for turn in range(max(map(len, questions))):
        for heat in sorted(how):
            mine = [
                i for i, turns in enumerate(questions) if turn < len(turns) and heats[i] == heat
            ]
            for i in mine:
                told[i].append(Message("user", questions[i][turn]))
            ids = [speaker.ids(told[i], truncate_left=True, max_new=config.max_new) for i in mine]
            for at, (answer, _) in speaker.answer_each(ids, how[heat]):
                told[mine[at]].append(Message("assistant", speaker.text(answer).strip()))
    name = config.name or name_of(config.model[0])
    said = [[m.text for m in messages if m.role == "assistant"] for messages in told]
    if config.bench == "alpaca":
        outputs = [
            {
                "dataset": row["dataset"],
                "instruction": row["instruction"],
                "output": turns[0],
                "generator": name,
            }
            for (_, row), turns in zip(rows, said)
        ]
        partial = Path(f"{config.out}.partial")
        partial.write_text(json.dumps(outputs, indent=2, ensure_ascii=False), encoding="utf-8")
        partial.replace(config.out)
    else:
        write_lines(
            config.out,
            (
                {
                    "question_id": row["question_id"],
                    "answer_id": hashlib.sha256(
                        f"{name}/{row['question_id']}/{turns}".encode()
                    ).hexdigest()[:22],
                    "model_id": name,
                    "choices": [{"index": 0, "turns": turns}],
                    "tstamp": time.time(),
                }
                for (_, row), turns in zip(rows, said)
            ),
        )
    print(f"{len(rows)} answers of {name} in {config.out}; {speaker.cut} prompts cut on the left")
