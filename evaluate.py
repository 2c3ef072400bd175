"""Evaluation as the paper did it (Sec. 4.1, App. C-G), on any Hugging Face LLaMA directory.

    python evaluate.py agieval MODEL --data agieval/ --out agieval.jsonl          the 8 English tasks, exact match (Table 5)
    python evaluate.py answers MODEL --bench mt --questions question.jsonl --out answers.jsonl        or alpaca, vicuna
    python evaluate.py judge answers.jsonl --mode single --questions question.jsonl --out requests.jsonl
    python evaluate.py judge batch_output.jsonl --requests requests.jsonl --out judgments.jsonl
    python evaluate.py report judgments.jsonl annotations.json ..                 win rates, scores, correlation of judges

Prompts and rules are the official tools', so that numbers can be set beside published ones; the judges are theirs too, or any
batch endpoint's: requests are written for it and its answers read, nothing here opens a connection. A run of `agieval` that was
killed goes on where it was; a prompt too long for the context loses its beginning, and is counted.
"""

import base64
import hashlib
import itertools
import json
import math
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversations import Conversation, Message, group_of, read, read_rows
from sample import SampleConfig, Speaker, check_sampling
from support.cli import parse_args, run

TASKS = {  # AGIEval's English tasks and their sizes; Table 5's rows
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
# of questions 81-90, 91-100, ..
MT_CATEGORIES = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)


def write_lines(path, rows):
    """One JSON object a line, whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    partial.replace(path)


def field(row, where, *names):
    """row[name] for each name; ValueError says where one is missing."""
    for name in names:
        if not isinstance(row, dict) or name not in row:
            raise ValueError(
                f"{where}: no {name!r}; give the official file, or one that this program wrote"
            )
    return [row[name] for name in names]


def rows_of(path):
    """[(where, row)] of a JSON or JSONL file; ValueError when there are none."""
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(f"{path}: empty; give the official file, or one that this program wrote")
    return rows


def turns_of(turns, where):
    """One or two texts."""
    if (
        not isinstance(turns, list)
        or not 1 <= len(turns) <= 2
        or not all(isinstance(t, str) for t in turns)
    ):
        raise ValueError(
            f"{where}: turns are one or two texts, not {str(turns)[:60]}; mend the line"
        )
    return turns


def check_out(out, *inputs):
    """ValueError when the result can't be written, or would overwrite what it is made from: before any work."""
    for path in inputs:
        if path and Path(path).resolve() == Path(out).resolve():
            raise ValueError(f"--out {out} is an input; give another name")
    if not Path(out).resolve().parent.is_dir() or Path(out).is_dir():
        raise ValueError(
            f"--out {out}: no such folder, or a folder itself; make it first, or give another name"
        )


# ---- agieval


@dataclass(frozen=True)
class AgievalConfig:
    model: tuple = ()
    data: str = ""
    out: str = ""
    template: str | None = None  # `base` for a model that was not fine-tuned: the raw prompt
    condition: str | None = None
    prompts_only: bool = False
    max_new: int = 64
    batch: int = 16


def agieval_prompt(item):
    """The official zero-shot prompt."""
    last = chr(ord("A") + len(item["options"]) - 1)
    return f"{item['passage'] or ''}Q: {item['question']} Answer Choices: {' '.join(item['options'])}\nA: Among A through {last}, the answer is"


def agieval_letter(response):
    """The leftmost character of the response that is one of A to F, anywhere in it, or None."""
    return next((c for c in response if c in "ABCDEF"), None)


def agieval_items(folder):
    """[{task, index, prompt, label}] of the official files."""
    items = []
    for task, count in TASKS.items():
        path = Path(folder) / f"{task}.jsonl"
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file; --data is the folder of AGIEval's v1 jsonl files"
            )
        rows = rows_of(path)
        for index, (where, row) in enumerate(rows):
            passage, question, options, _ = field(
                row, where, "passage", "question", "options", "label"
            )
            if (
                not isinstance(passage or "", str)
                or not isinstance(question, str)
                or not isinstance(options, list)
                or not all(isinstance(o, str) for o in options)
            ):
                raise ValueError(
                    f"{where}: passage and question are texts, options a list of them; fetch the file again"
                )
            items.append(
                {"task": task, "index": index, "prompt": agieval_prompt(row), "label": row["label"]}
            )
        if len(rows) != count:
            print(f"{path}: {len(rows)} items, the official file has {count}", file=sys.stderr)
    return items


def interval(correct, n):
    """Wilson's 95% interval of a proportion."""
    z, p = 1.96, correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def agieval_table(rows, name="this model"):
    """Accuracy per task with its interval, micro average over items (the paper's Average), macro average, Table 5 beside them."""
    lines = [
        f"| task | items | {name} | 95% interval | no letter | " + " | ".join(TABLE_5) + " |",
        "|" + "---|" * (5 + len(TABLE_5)),
    ]
    shares, count = [], [0, 0, 0]

    def line(label, n, correct, unmatched, published):
        low, high = interval(correct, n)
        lines.append(
            f"| {label} | {n} | {correct / n:.1%} | {low:.1%} to {high:.1%} | {unmatched / n:.1%} | "
            + " | ".join(f"{x}" for x in published)
            + " |"
        )

    for i, task in enumerate(TASKS):
        letters = [
            (agieval_letter(row["response"]), row["label"]) for row in rows if row["task"] == task
        ]
        if not letters:
            continue
        numbers = len(letters), sum(a == b for a, b in letters), sum(a is None for a, _ in letters)
        count = [a + b for a, b in zip(count, numbers)]
        shares.append(numbers[1] / numbers[0])
        line(task, *numbers, (cells[i] for cells in TABLE_5.values()))
    line("average over items", *count, (cells[-1] for cells in TABLE_5.values()))
    lines.append(
        f"| mean of the tasks | | {statistics.mean(shares):.1%} | | | "
        + " | ".join(f"{statistics.mean(cells[:-1]):.1f}" for cells in TABLE_5.values())
        + " |"
    )
    return "\n".join(lines)


def answered(out, items, source):
    """{(task, index): row} of an earlier run into the same file; a last line that a kill cut short is asked again.

    ValueError: the file is of another model, other settings or other questions; it stays as it is.
    """
    if not Path(out).is_file():
        return {}
    wanted, done = {(item["task"], item["index"]): item for item in items}, {}
    *whole, tail = Path(out).read_bytes().split(b"\n")
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
            item = wanted[row["task"], row["index"]]
        except (ValueError, KeyError, TypeError):
            row = item = {}
        if (
            not item
            or {key: row.get(key) for key in source} != source
            or any(row.get(key) != item[key] for key in item)
            or not isinstance(row.get("response"), str)
        ):
            raise ValueError(
                f"{out}:{number}: not an answer of this model, in this way, to these questions; give another --out"
            )
        done[row["task"], row["index"]] = row
    if tail:
        if tail[:7] != b'{"task"'[: len(tail)]:  # a kill may cut anywhere
            raise ValueError(
                f"{out}:{len(whole) + 1}: not a line of an agieval run; give another --out"
            )
        write_lines(out, done.values())
    return done


def agieval(config):
    if not config.data or not config.out:
        raise ValueError("agieval needs MODEL --data FOLDER --out FILE.jsonl")
    check_out(config.out)
    how = check_sampling(SampleConfig(temperature=0.0, max_new=config.max_new, batch=config.batch))
    items = agieval_items(config.data)
    if config.prompts_only:
        if Path(config.out).is_file() and b'"response": ' in Path(config.out).read_bytes():
            raise ValueError(f"--out {config.out} holds responses; give another name")
        write_lines(config.out, items)
        return print(f"{len(items)} prompts in {config.out}")
    speaker = load(config)
    source = {
        "model": str(Path(config.model[0]).resolve()),
        "template": speaker.template,
        "condition": speaker.condition,
        "max_new": config.max_new,
    }
    done = answered(config.out, items, source)
    todo = [item for item in items if (item["task"], item["index"]) not in done]
    ids = []
    for item in todo:
        before = speaker.cut
        ids.append(
            speaker.ids(
                [Message("user", item["prompt"])], truncate_left=True, max_new=config.max_new
            )
        )
        item["cut"] = speaker.cut > before
    with open(config.out, "a", encoding="utf-8") as file:
        for i, (answer, finish) in speaker.answer_each(ids, how):
            response = speaker.text(answer)
            row = (
                todo[i]
                | {"response": response, "letter": agieval_letter(response), "finish": finish}
                | source
            )
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            done[row["task"], row["index"]] = row
    print(agieval_table(done.values(), name_of(config.model[0])))
    print(
        f"{sum(row['cut'] for row in done.values())} prompts cut on the left; prompts and responses in {config.out}"
    )


def name_of(folder):
    """A model's name: its folder's, or that of the run whose hf/ it is."""
    folder = Path(folder).resolve()
    return folder.parent.name if folder.name == "hf" else folder.name


def load(config, seed=0):
    if len(config.model) != 1:
        raise ValueError("give one model directory: python evaluate.py agieval|answers MODEL --..")
    return Speaker(config.model[0], config.condition, config.template, seed=seed)


# ---- answers for the official judges


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


# ---- judge: requests out, verdicts in

# FastChat's judge prompts, put together from the sentences that they share; a test holds each to
# the official text by its hash.
_JUDGE = "Please act as an impartial judge and evaluate the quality of the "
_FACTORS = "Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and level of detail of "
_CORRECT = "Your evaluation should consider correctness and helpfulness. You will be given "
_MISTAKES = "Identify and correct any mistakes. "
_SHORT = "Begin your evaluation by providing a short explanation. "
_RATE = (
    "Be as objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 by strictly following this format: "
    '"[[rating]]", for example: "Rating: [[5]]".'
)
_CHOOSE = (
    "Avoid any positional biases and ensure that the order in which the responses were presented does not influence your decision. Do not allow the length of the "
    "responses to influence your evaluation. Do not favor certain names of the assistants. Be as objective as possible. After providing your explanation, output "
    'your final verdict by strictly following this format: "[[A]]" if assistant A is better, "[[B]]" if assistant B is better, and "[[C]]" for a tie.'
)
_ONE = _JUDGE + "response provided by an AI assistant to the user question"
_TWO = _JUDGE + "responses provided by two AI assistants to the user question"
_FOLLOWS = " You should choose the assistant that follows the user's instructions and answers the user's question"


def _part(name, text):
    return f"[The Start of {name}]\n{{{text}}}\n[The End of {name}]"


def _talk(title, who, text):
    turns = "\n\n".join(
        f"### User:\n{{question_{i}}}\n\n### {who}:\n{{{text}_{i}}}" for i in (1, 2)
    )
    return f"<|The Start of {title}|>\n\n{turns}\n\n<|The End of {title}|>"


_REFERENCE, _REFERENCES = (
    _part("Reference Answer", "reference_1") + "\n\n",
    _talk("Reference Answer", "Reference answer", "reference") + "\n\n\n",
)
_TALK_A, _TALK_B = (
    _talk(f"Assistant {x}'s Conversation with User", f"Assistant {x}", text)
    for x, text in (("A", "answer"), ("B", "other"))
)
_BOTH = (
    _part("Assistant A's Answer", "answer_1") + "\n\n" + _part("Assistant B's Answer", "other_1")
)
_QUESTION, _ANSWER = "\n\n[Question]\n{question_1}\n\n", _part("Assistant's Answer", "answer_1")
PROMPTS = {  # (mode, turn, with a reference answer): name, system, user
    ("single", 1, False): (
        "single-v1",
        "You are a helpful assistant.",
        "[Instruction]\n"
        + _ONE
        + " displayed below. "
        + _FACTORS
        + "the response. "
        + _SHORT
        + _RATE
        + _QUESTION
        + _ANSWER,
    ),
    ("single", 1, True): (
        "single-math-v1",
        "You are a helpful assistant.",
        "[Instruction]\n"
        + _ONE
        + " displayed below. "
        + _CORRECT
        + "a reference answer and the assistant's answer. Begin your evaluation by comparing the "
        "assistant's answer with the reference answer. "
        + _MISTAKES
        + _RATE
        + _QUESTION
        + _REFERENCE
        + _ANSWER,
    ),
    ("single", 2, False): (
        "single-v1-multi-turn",
        _ONE
        + " displayed below. "
        + _FACTORS
        + "the response. You evaluation should focus on the assistant's answer to the second "
        "user question. " + _SHORT + _RATE + "\n\n",
        _TALK_A,
    ),
    ("single", 2, True): (
        "single-math-v1-multi-turn",
        _ONE
        + ". "
        + _CORRECT
        + "a reference answer and the assistant's answer. You evaluation should focus on the assistant's "
        "answer to the second question. Begin your evaluation by comparing the assistant's answer with the reference answer. "
        + _MISTAKES
        + _RATE
        + "\n\n",
        _REFERENCES + _TALK_A,
    ),
    ("pair", 1, False): (
        "pair-v2",
        _TWO
        + " displayed below."
        + _FOLLOWS
        + " better. "
        + _FACTORS
        + "their responses. Begin your evaluation by comparing the two responses and "
        "provide a short explanation. " + _CHOOSE,
        "[User Question]\n{question_1}\n\n" + _BOTH,
    ),
    ("pair", 1, True): (
        "pair-math-v1",
        _TWO
        + " displayed below. "
        + _CORRECT
        + "a reference answer, assistant A's answer, and assistant B's answer. Your job is to evaluate which "
        "assistant's answer is better. Begin your evaluation by comparing both assistants' answers with the reference answer. "
        + _MISTAKES
        + _CHOOSE,
        "[User Question]\n{question_1}\n\n" + _REFERENCE + _BOTH,
    ),
    ("pair", 2, False): (
        "pair-v2-multi-turn",
        _TWO
        + "s."
        + _FOLLOWS
        + "s better. "
        + _FACTORS
        + "their responses. You should focus on who provides a better answer to the second "
        "user question. Begin your evaluation by comparing the responses of the two assistants and provide a short explanation. "
        + _CHOOSE,
        _TALK_A + "\n\n\n" + _TALK_B,
    ),
    ("pair", 2, True): (
        "pair-math-v1-multi-turn",
        _TWO
        + "s. "
        + _CORRECT
        + "reference answers, the assistant A's answers, the assistant B's answers. Your job is to determine which "
        "assistant provides correct and helpful answers to the second user question. Begin your evaluation by comparing both assistants' answers with the "
        "reference answers. " + _MISTAKES + _CHOOSE,
        _REFERENCES + _TALK_A + "\n\n\n" + _TALK_B,
    ),
}
NEED_REFERENCE = "math", "reasoning", "coding"  # categories judged beside a reference answer
TABLE_6 = (  # App. G: a response of a conversation, scored in the context of the turns before it
    "[Instruction] "
    + _JUDGE
    + "response provided by an AI assistant to the conversation displayed below. "
    + _FACTORS
    + "the response. "
    + _SHORT
    + 'Be as objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 by strictly following this format: "[rating]", for example: "Rating: [[5]]".\n\n'
    "[Conversation]\n{context}\n\n[The Start of Assistant's Response]\n{response}\n\n[The End of Assistant's Response]"
)


@dataclass(frozen=True)
class JudgeConfig:
    # answer files (conversation: conversation files); with --requests, a batch's output files
    files: tuple = ()
    mode: str = ""  # single, pair, conversation
    questions: str = ""
    baseline: str = ""  # pair: the answer file of the model to compare with
    references: str = ""  # FastChat's reference_answer/gpt-4.jsonl, for questions of NEED_REFERENCE
    judge: str = "gpt-4"
    count: int = 128  # conversation: of each source, drawn at random
    seed: int = 0
    requests: str = ""
    out: str = ""


def fill(template, **slots):
    """Slots filled in one pass, so that a brace in an answer stays what it is."""
    return re.sub(r"\{(\w+)\}", lambda m: slots[m[1]] if m[1] in slots else m[0], template)


def read_answers(path):
    """(model, {question_id: its turns}) of a FastChat model_answer file."""
    found, models = {}, set()
    for where, row in rows_of(path):
        question, model, choices = field(row, where, "question_id", "model_id", "choices")
        if question in found:
            raise ValueError(f"{where}: question {question} is answered twice; remove one")
        found[question] = turns_of(
            field(choices[0] if isinstance(choices, list) and choices else {}, where, "turns")[0],
            where,
        )
        models.add(model)
    if len(models) != 1:
        raise ValueError(
            f"{path}: answers of {len(models)} models; give each model a file of its own"
        )
    return models.pop(), found


def judge_requests(config):
    """[(id, system, user)]: id is what the verdict will need to be told from all others, a JSON list."""
    if config.mode == "conversation":
        by_source, rng = {}, np.random.default_rng(config.seed)
        for path in config.files:
            for n, conversation in enumerate(read(path)):
                by_source.setdefault(conversation.label, []).append((f"{path}#{n}", conversation))
        for source, found in sorted(by_source.items()):
            for at in sorted(rng.permutation(len(found))[: config.count].tolist()):
                name, conversation = found[at]
                for turn, message in enumerate(conversation.messages):
                    if message.role == "assistant":
                        context = "\n\n".join(
                            f"{m.role.capitalize()}: {m.text}" for m in conversation.messages[:turn]
                        )
                        yield (
                            ["conversation", config.judge, "table-6", name, turn, source],
                            None,
                            fill(TABLE_6, context=context, response=message.text),
                        )
        return
    questions = {
        field(row, where, "question_id", "category", "turns")[0]: (
            row["category"],
            turns_of(row["turns"], where),
        )
        for where, row in rows_of(config.questions)
    }
    other, theirs = read_answers(config.baseline) if config.mode == "pair" else (None, {})
    references = read_answers(config.references)[1] if config.references else {}
    said = lambda name, texts: {f"{name}_{i}": text for i, text in enumerate(texts, 1)}
    for path in config.files:
        model, ours = read_answers(path)
        if model == other:
            raise ValueError(
                f"{path}: answers of {other}, the baseline itself; leave it out, or give one of them another --name when answering"
            )
        for question, (category, turns) in questions.items():
            referred = category in NEED_REFERENCE
            for source, answers in (
                (path, ours),
                *[(config.baseline, theirs)] * (config.mode == "pair"),
                *[(config.references, references)] * referred,
            ):
                if not source:
                    raise ValueError(
                        f"question {question} is of category {category}: judged beside a reference answer; give --references FILE (FastChat's reference_answer)"
                    )
                if len(answers.get(question, ())) < len(turns):
                    raise ValueError(
                        f"{source}: no whole answer to question {question}; every question needs one"
                    )
            for turn in range(1, len(turns) + 1):
                name, system, user = PROMPTS[config.mode, turn, referred]
                slots = said("question", turns) | said("reference", references.get(question, ()))
                # a pair in both orders
                games = (
                    ((ours, ours),) if config.mode == "single" else ((ours, theirs), (theirs, ours))
                )
                for game, (a, b) in enumerate(games, 1):
                    key = [config.mode, config.judge, name, question, turn, model]
                    yield (
                        key + [other, game] * (config.mode == "pair"),
                        system,
                        fill(
                            user,
                            **slots,
                            **said("answer", a[question]),
                            **said("other", b[question]),
                        ),
                    )


def write_requests(config):
    if config.mode not in ("single", "pair", "conversation") or not config.files or not config.out:
        raise ValueError(
            "judge needs FILE.. --mode single|pair|conversation --out REQUESTS.jsonl (single, pair: --questions FILE; pair: --baseline FILE)"
        )
    if (
        config.mode != "conversation"
        and not config.questions
        or config.mode == "pair"
        and not config.baseline
    ):
        raise ValueError(
            f"--mode {config.mode} needs --questions FILE"
            + " and --baseline FILE" * (config.mode == "pair")
        )
    check_out(config.out, *config.files, config.questions, config.baseline, config.references)
    rows, letters = [], 0
    for key, system, user in judge_requests(config):
        messages = [{"role": "system", "content": system}] * (system is not None) + [
            {"role": "user", "content": user}
        ]
        letters += sum(len(m["content"]) for m in messages)
        rows.append(
            {
                "custom_id": json.dumps(key),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": config.judge,
                    "messages": messages,
                    "temperature": 0,
                    "max_tokens": 2048,
                },
            }
        )
    if not rows:
        raise ValueError(f"{', '.join(config.files)}: nothing to judge")
    if len({row["custom_id"] for row in rows}) < len(rows):
        raise ValueError(
            "two of the files are the same, or of the same model; leave one out, or answer with another --name"
        )
    write_lines(config.out, rows)
    print(
        f"{len(rows)} requests in {config.out}, about {letters // 4:,} tokens to read (4 characters each) and at most {2048 * len(rows):,} to write"
    )


def content_of(row):
    """The judge's text in a line of a batch's output, or None for a failed request."""
    try:
        response = row["response"]
        content = response["body"]["choices"][0]["message"]["content"]
        return (
            content
            if not row.get("error") and response["status_code"] == 200 and isinstance(content, str)
            else None
        )
    except (KeyError, IndexError, TypeError):
        return None


def rating(text):
    """The number in [[n]], else in [n]; -1 without either, as FastChat has it."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    return float(found[1]) if found else -1


def winner(text, game):
    """model_1, model_2, tie or error of one game; in the second, model_1 is assistant B."""
    verdict = next((v for v in "ABC" if f"[[{v}]]" in text), None)
    return {"A": f"model_{game}", "B": f"model_{3 - game}", "C": "tie", None: "error"}[verdict]


def read_verdicts(config):
    """Batch outputs -> FastChat's judgment rows; what is missing or failed -> a new request file."""
    if not config.files or not config.out:
        raise ValueError(
            "judge --requests REQUESTS.jsonl needs BATCH_OUTPUT.jsonl .. --out JUDGMENTS.jsonl"
        )
    retry = Path(f"{config.out}.retry.jsonl")
    check_out(config.out, *config.files, config.requests)
    if retry.resolve() in {Path(path).resolve() for path in (config.requests, *config.files)}:
        raise ValueError(
            f"{retry} would be overwritten; give the first --requests, and the outputs of all its batches: BATCH1.jsonl BATCH2.jsonl"
        )
    asked, ids = {}, {}
    for where, row in rows_of(config.requests):
        key = field(row, where, "custom_id", "body")[0]
        try:
            kind, judge, name, question, turn, *who = json.loads(key)
        except (ValueError, TypeError):
            kind, who = None, ()
        if len(who) != {"single": 1, "conversation": 1, "pair": 3}.get(str(kind)):
            raise ValueError(f"{where}: not a request that `judge --mode` wrote; give its file")
        asked[key], ids[key] = row, (kind, judge, name, question, turn, who)
    texts, count = {}, dict.fromkeys(("failed", "malformed", "doubled", "foreign", "unparsed"), 0)
    for path in config.files:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; give the output of the batch")
        # only a newline ends a line of JSONL
        for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
                known = row["custom_id"] in asked
            except (ValueError, KeyError, TypeError):
                count["malformed"] += bool(line.strip())
                continue
            key, text = row["custom_id"], content_of(row)
            if not known:
                count["foreign"] += 1
            elif text is None:
                count["failed"] += 1
            elif key in texts:
                count["doubled"] += 1  # the first answer counts
            else:
                texts[key] = text
    judgments, waiting = [], 0
    prompt = lambda key: asked[key]["body"]["messages"][-1]["content"]
    for key, text in texts.items():
        kind, judge, name, question, turn, who = ids[key]
        row = {"question_id": question, "turn": turn, "judge": [judge, name], "tstamp": time.time()}
        if kind == "pair":
            model, other, game = who
            keys = [
                json.dumps([kind, judge, name, question, turn, model, other, g]) for g in (1, 2)
            ]
            if keys[2 - game] not in texts:
                waiting += 1
            elif game == 1:
                won = {f"g{i}_winner": winner(texts[k], i) for i, k in enumerate(keys, 1)}
                count["unparsed"] += sum(w == "error" for w in won.values())
                judgments.append(
                    row
                    | {"model_1": model, "model_2": other}
                    | won
                    | {
                        f"g{i}_{what}": value
                        for i, k in enumerate(keys, 1)
                        for what, value in (("user_prompt", prompt(k)), ("judgment", texts[k]))
                    }
                )
            continue
        score = rating(text)
        count["unparsed"] += score == -1
        judgments.append(
            row | {"model": who[0], "user_prompt": prompt(key), "judgment": text, "score": score}
        )
    write_lines(config.out, judgments)
    again = [row for key, row in asked.items() if key not in texts]
    retry.unlink(missing_ok=True)
    if again:
        write_lines(retry, again)
    print(
        f"{len(texts)} of {len(asked)} requests answered, {len(judgments)} judgments in {config.out}; "
        + ", ".join(f"{n} {what}" for what, n in count.items())
        + f"; {waiting} games wait for their other order" * (waiting > 0)
        + (
            f"; {len(again)} to be asked again in {retry}: give its output beside this one, with the same --requests"
            if again
            else ""
        )
    )


# ---- report


@dataclass(frozen=True)
class ReportConfig:
    # FastChat judgments, AlpacaEval annotations, conversation scores, agieval's responses; told
    # apart by content
    files: tuple = ()
    baseline: str = "gpt-3.5-turbo"
    png: str = ""  # scatter of the first two judges (Fig. 8)


def bench_of(question):
    """FastChat numbers Vicuna-bench 1 to 80 and MT-bench 81 to 160."""
    return "MT-bench" if 81 <= int(question) <= 160 else "Vicuna-bench"


def outcome(row):
    """1, 0.5 or 0 for model_1: a tie when the two orders disagree, or either says so."""
    if row["g1_winner"] == "tie" or row["g1_winner"] != row["g2_winner"]:
        return 0.5
    return float(row["g1_winner"] == "model_1")


KINDS = {  # a row's kind by a field that only it has: the fields read from it
    "g1_winner": ("judge", "model_1", "model_2", "question_id", "turn", "g2_winner"),
    "preference": ("generator_1", "generator_2", "instruction"),
    "score": ("judge", "model", "question_id", "turn"),
}


def read_judgments(files):
    """{judge: {kind: {item: row}}} and how many rows were left out: unparsed verdicts, as the official tools do, and doubled items.

    kind: pair, single, conversation, alpaca. An item is (models, question, turn); the last row of one counts.
    """
    found, unparsed, doubled = {}, 0, 0
    for path in files:
        for where, row in rows_of(path):
            mark = next((mark for mark in KINDS if isinstance(row, dict) and mark in row), None)
            if mark is None:
                raise ValueError(
                    f"{where}: not a judgment; give FastChat judgments, AlpacaEval annotations or conversation scores"
                )
            values = field(row, where, *KINDS[mark])
            if mark == "preference":
                kind, judge, item = "alpaca", row.get("annotator") or "annotator", tuple(values)
                if row["preference"] == 0:
                    row = row | {"preference": 1.5}  # a draw, in older files
                ok = isinstance(row["preference"], (int, float)) and 1 <= row["preference"] <= 2
            else:
                judge, *item = values[:-1] if mark == "g1_winner" else values
                if not isinstance(judge, list) or len(judge) != 2:
                    raise ValueError(
                        f"{where}: judge is [its name, its prompt's name], not {judge!r}; mend the line"
                    )
                kind = (
                    "pair"
                    if mark == "g1_winner"
                    else "conversation"
                    if judge[1] == "table-6"
                    else "single"
                )
                if kind != "conversation" and not str(row["question_id"]).isdigit():
                    raise ValueError(
                        f"{where}: question_id {row['question_id']!r} is not one of FastChat's numbers; mend the line"
                    )
                judge, item = judge[0], tuple(item)
                ok = (
                    "error" not in (row["g1_winner"], row["g2_winner"])
                    if kind == "pair"
                    else isinstance(row["score"], (int, float)) and row["score"] != -1
                )
            unparsed += not ok
            if ok:
                rows = found.setdefault(judge, {}).setdefault(kind, {})
                doubled += item in rows
                rows[item] = row
    return found, unparsed, doubled


def win_rates(kinds, baseline):
    """{(bench, model): (win rate, wins, losses, ties)} of one judge, against the baseline (AlpacaEval: against generator_1)."""
    points = {}
    for row in kinds.get("pair", {}).values():
        if baseline in (row["model_1"], row["model_2"]) and row["model_1"] != row["model_2"]:
            ours = outcome(row)
            model, point = (
                (row["model_1"], ours) if row["model_2"] == baseline else (row["model_2"], 1 - ours)
            )
            points.setdefault((bench_of(row["question_id"]), model), []).append(point)
    # 2: the second is preferred, the model; 1: the first, the reference
    for row in kinds.get("alpaca", {}).values():
        points.setdefault(("AlpacaEval", row["generator_2"]), []).append(row["preference"] - 1)
    return {
        key: (
            statistics.mean(x),
            sum(p > 0.5 for p in x),
            sum(p < 0.5 for p in x),
            sum(p == 0.5 for p in x),
        )
        for key, x in points.items()
    }


def values_of(kinds):
    """{item: number} of one judge: scores, outcomes of pairs and preferences, for the correlation of judges."""
    number = {"pair": outcome, "alpaca": lambda row: row["preference"] - 1}
    return {
        (kind, *item): number.get(kind, lambda row: row["score"])(row)
        for kind, rows in kinds.items()
        for item, row in rows.items()
    }


def pearson(x, y):
    return (
        float(np.corrcoef(x, y)[0, 1])
        if len(x) > 1 and np.std(x) > 0 and np.std(y) > 0
        else math.nan
    )


def report(config):
    if not config.files:
        raise ValueError(
            "report needs FILE..: FastChat judgments, AlpacaEval annotations, conversation scores or agieval's responses"
        )
    agieval_files = [
        path
        for path in config.files
        if isinstance(first := rows_of(path)[0][1], dict) and {"task", "response"} <= first.keys()
    ]
    for path in agieval_files:  # scored again, from the responses
        rows = rows_of(path)
        for where, row in rows:
            task, _, response = field(row, where, "task", "label", "response")
            if str(task) not in TASKS or not isinstance(response, str):
                raise ValueError(
                    f"{where}: no response to one of AGIEval's English tasks; give the --out of an agieval run"
                )
        print(agieval_table([row for _, row in rows], Path(path).stem))
    judges, unparsed, doubled = read_judgments(
        [path for path in config.files if path not in agieval_files]
    )
    mean = lambda rows: f"{statistics.mean(row['score'] for row in rows):.2f}" if rows else ""
    benches = "AlpacaEval", "MT-bench", "Vicuna-bench"
    # Table 1's columns have judges of their own: the table is over all, a row per judge and model
    rates = {}
    for judge, kinds in judges.items():
        for (bench, model), cell in win_rates(kinds, config.baseline).items():
            rates.setdefault(model, {}).setdefault(bench, {})[judge] = cell
    if rates:
        print(f"| win rate (Table 1) | {' | '.join(benches)} | average |\n|---|---|---|---|---|")
        for model, columns in sorted(rates.items()):
            cells = [
                " / ".join(
                    f"{c[0]:.1%} ({c[1]} won, {c[2]} lost, {c[3]} tied; {judge})"
                    for judge, c in columns.get(bench, {}).items()
                )
                for bench in benches
            ]
            # several judges of one bench have no one average
            single = all(len(columns.get(bench, {})) == 1 for bench in benches)
            average = (
                f"{statistics.mean(c[0] for bench in benches for c in columns[bench].values()):.1%}"
                if single
                else ""
            )
            print(f"| {model} | {' | '.join(cells)} | {average} |")
    for judge, kinds in judges.items():
        singles, scores = list(kinds.get("single", {}).values()), kinds.get("conversation", {})
        for bench, categories in (("MT-bench", MT_CATEGORIES), ("Vicuna-bench", ())):
            if rows := [row for row in singles if bench_of(row["question_id"]) == bench]:
                category = lambda row: MT_CATEGORIES[(int(row["question_id"]) - 81) // 10]
                print(
                    f"| {bench} score by {judge} (Fig. 2) | turn 1 | turn 2 | average |{''.join(f' {c} |' for c in categories)}\n"
                    + "|---" * (4 + len(categories))
                    + "|"
                )
                for model in sorted({row["model"] for row in rows}):
                    mine = [row for row in rows if row["model"] == model]
                    parts = [
                        *([r for r in mine if r["turn"] == turn] for turn in (1, 2)),
                        mine,
                        *([r for r in mine if category(r) == name] for name in categories),
                    ]
                    print(f"| {model} | " + " | ".join(map(mean, parts)) + " |")
        if scores:  # a conversation's score is the mean of its turns'
            print(
                f"| conversation scores by {judge} (Fig. 3) | conversations | mean | "
                + " | ".join(f"{n}" for n in range(1, 11))
                + " |\n"
                + "|---" * 13
                + "|"
            )
            of = {}
            for (source, conversation, _), row in scores.items():
                of.setdefault(source, {}).setdefault(conversation, []).append(row["score"])
            for source, conversations in sorted(of.items()):
                means = [statistics.mean(x) for x in conversations.values()]
                print(
                    f"| {source or '(none)'} | {len(means)} | {statistics.mean(means):.2f} | "
                    + " | ".join(
                        str(sum(math.floor(x + 0.5) == n for x in means)) for n in range(1, 11)
                    )
                    + " |"
                )
    pairs = list(itertools.combinations(sorted(judges), 2))
    for one, two in pairs:
        a, b = values_of(judges[one]), values_of(judges[two])
        common = sorted(a.keys() & b.keys(), key=str)
        x, y = [a[item] for item in common], [b[item] for item in common]
        print(
            f"{one} and {two} (Fig. 8, 9): Pearson r = {pearson(x, y):.2f} over {len(common)} common judgments"
        )
        if config.png and (one, two) == pairs[0]:
            scatter(config.png, one, x, two, y)
    if judges or unparsed:
        print(
            f"{sum(len(rows) for kinds in judges.values() for rows in kinds.values())} judgments; left out: {unparsed} without a verdict, {doubled} doubled"
        )


def scatter(path, one, x, two, y):
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png: `pip install matplotlib`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4, 4))
    axes.scatter(x, y, s=8, alpha=0.5)
    axes.set(xlabel=one, ylabel=two, title=f"Pearson r = {pearson(x, y):.2f}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv):
    command, argv = (argv[0], argv[1:]) if argv else ("", [])
    if command == "agieval":
        agieval(parse_args(AgievalConfig, argv, positional="model"))
    elif command == "answers":
        answers(parse_args(AnswersConfig, argv, positional="model"))
    elif command == "judge":
        config = parse_args(JudgeConfig, argv, positional="files")
        (read_verdicts if config.requests else write_requests)(config)
    elif command == "report":
        report(parse_args(ReportConfig, argv, positional="files"))
    else:
        raise ValueError("say agieval, answers, judge or report; see the top of evaluate.py")


if __name__ == "__main__":
    run(main)
