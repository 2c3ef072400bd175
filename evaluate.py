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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import Conversation, Message, group_of, parse_args, read, read_rows, run
from sample import SampleConfig, Speaker

TASKS = {  # AGIEval's English tasks and their sizes; Table 5's rows
    "aqua-rat": 254, "logiqa-en": 651, "lsat-ar": 230, "lsat-lr": 510, "lsat-rc": 269, "sat-en-without-passage": 206, "sat-en": 206, "sat-math": 220,
}
TABLE_5 = {  # the paper's accuracies in %, in the order of TASKS, then its average: correct items / 2,546
    "openchat-13b": (19.3, 34.9, 19.1, 37.5, 45.0, 44.7, 66.0, 30.9, 36.4),
    "llama-2-13b": (20.1, 32.6, 21.3, 33.3, 46.1, 41.3, 65.5, 29.1, 35.0),
    "wizardlm-v1.2-13b": (28.3, 27.2, 21.7, 32.4, 43.5, 33.5, 65.5, 22.7, 32.8),
    "llama-2-chat-13b": (22.4, 27.3, 19.6, 27.6, 25.3, 25.2, 25.7, 28.6, 25.8),
    "vicuna-v1.5-13b": (21.7, 19.0, 20.0, 16.7, 19.0, 26.7, 28.2, 24.5, 20.7),
}
TEMPERATURE = {  # FastChat's, by category; 0.7 for any other
    "writing": 0.7, "roleplay": 0.7, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "extraction": 0.0, "stem": 0.1, "humanities": 0.1,
}
MT_CATEGORIES = "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"  # of questions 81-90, 91-100, ..


def write_lines(path, rows):
    """One JSON object a line, whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def field(row, where, *names):
    """row[name] for each name; ValueError says where one is missing."""
    for name in names:
        if not isinstance(row, dict) or name not in row:
            raise ValueError(f"{where}: no {name!r}; is this the right file?")
    return [row[name] for name in names]


# ---- agieval ------------------------------------------------------------------------------------------------------------


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
            raise ValueError(f"{path}: no such file; --data is the folder of AGIEval's v1 jsonl files")
        rows = list(read_rows(path))
        for index, (where, row) in enumerate(rows):
            field(row, where, "passage", "question", "options", "label")
            items.append({"task": task, "index": index, "prompt": agieval_prompt(row), "label": row["label"]})
        if len(rows) != count:
            print(f"{path}: {len(rows)} items, the official file has {count}", file=sys.stderr)
    return items


def interval(correct, n):
    """Wilson's 95% interval of a proportion."""
    z, p = 1.96, correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def agieval_table(rows, name="this model"):
    """Accuracy per task with its interval, micro average over items (the paper's Average), macro average, Table 5 beside them."""
    lines = [f"| task | items | {name} | 95% interval | no letter | " + " | ".join(TABLE_5) + " |", "|" + "---|" * (5 + len(TABLE_5))]
    shares, count = [], [0, 0, 0]

    def line(label, n, correct, unmatched, published):
        low, high = interval(correct, n)
        lines.append(f"| {label} | {n} | {correct / n:.1%} | {low:.1%} to {high:.1%} | {unmatched / n:.1%} | " + " | ".join(f"{x}" for x in published) + " |")

    for i, task in enumerate(TASKS):
        letters = [(agieval_letter(row["response"]), row["label"]) for row in rows if row["task"] == task]
        if not letters:
            continue
        numbers = len(letters), sum(a == b for a, b in letters), sum(a is None for a, _ in letters)
        count = [a + b for a, b in zip(count, numbers)]
        shares.append(numbers[1] / numbers[0])
        line(task, *numbers, (cells[i] for cells in TABLE_5.values()))
    line("average over items", *count, (cells[-1] for cells in TABLE_5.values()))
    lines.append(f"| mean of the tasks | | {statistics.mean(shares):.1%} | | | " + " | ".join(f"{statistics.mean(cells[:-1]):.1f}" for cells in TABLE_5.values()) + " |")
    return "\n".join(lines)


def agieval(config):
    if not config.data or not config.out:
        raise ValueError("agieval needs MODEL --data FOLDER --out FILE.jsonl")
    items = agieval_items(config.data)
    if config.prompts_only:
        write_lines(config.out, items)
        return print(f"{len(items)} prompts in {config.out}")
    speaker = load(config)
    source = {"model": config.model[0], "template": speaker.template, "condition": speaker.condition, "max_new": config.max_new}
    out, done = Path(config.out), {}
    if out.is_file():
        text = out.read_bytes()
        text = text[: text.rfind(b"\n") + 1]  # a line cut short by a kill is asked again
        out.write_bytes(text)
        for line, row in enumerate(map(json.loads, text.decode("utf-8").splitlines()), 1):
            if {key: row.get(key) for key in source} != source:
                raise ValueError(f"{out}:{line}: answered by {row.get('model')} in another way than {source}; give another --out")
            done[row["task"], row["index"]] = row
    todo = [item for item in items if (item["task"], item["index"]) not in done]
    ids = [speaker.ids([Message("user", item["prompt"])], truncate_left=True, max_new=config.max_new) for item in todo]
    with open(out, "a", encoding="utf-8") as file:
        for i, (answer, finish) in speaker.answer_each(ids, SampleConfig(temperature=0.0, max_new=config.max_new, batch=config.batch)):
            response = speaker.text(answer)
            row = todo[i] | {"response": response, "letter": agieval_letter(response), "finish": finish} | source
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            done[row["task"], row["index"]] = row
    print(agieval_table(done.values(), Path(config.model[0]).name))
    print(f"{speaker.cut} prompts cut on the left; prompts and responses in {out}")


def load(config, seed=0):
    if len(config.model) != 1:
        raise ValueError("give one model directory: python evaluate.py agieval|answers MODEL --..")
    return Speaker(config.model[0], config.condition, config.template, seed=seed)


# ---- answers for the official judges ------------------------------------------------------------------------------------


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
    return sum(group_of(Conversation((Message("user", q),))) & 0xFFFFFFFF in seen for q in questions)


def answers(config):
    if config.bench not in ("alpaca", "mt", "vicuna") or not config.questions or not config.out:
        raise ValueError("answers needs MODEL --bench alpaca|mt|vicuna --questions FILE --out FILE")
    rows = list(read_rows(config.questions))
    if config.bench == "alpaca":
        questions = [(field(row, where, "instruction", "dataset")[0],) for where, row in rows]
    else:
        questions = [tuple(field(row, where, "turns", "question_id", "category")[0]) for where, row in rows]
    temperature = [config.temperature if config.temperature is not None else TEMPERATURE.get(row.get("category"), 0.7) for _, row in rows]
    speaker = load(config, config.seed)
    if known := trained_on(config.model[0], [turns[0] for turns in questions]):
        print(f"warning: {known} of the {len(questions)} questions are prompts that this model was trained on; its score would not count", file=sys.stderr)
    told = [[] for _ in questions]
    for turn in range(max(map(len, questions))):
        for heat in sorted(set(temperature)):
            mine = [i for i, turns in enumerate(questions) if turn < len(turns) and temperature[i] == heat]
            for i in mine:
                told[i].append(Message("user", questions[i][turn]))
            ids = [speaker.ids(told[i], truncate_left=True, max_new=config.max_new) for i in mine]
            for at, (answer, _) in speaker.answer_each(ids, SampleConfig(temperature=heat, max_new=config.max_new, batch=config.batch)):
                told[mine[at]].append(Message("assistant", speaker.text(answer)))
    name = config.name or Path(config.model[0]).resolve().name
    said = [[m.text for m in messages if m.role == "assistant"] for messages in told]
    if config.bench == "alpaca":
        outputs = [{"dataset": row["dataset"], "instruction": row["instruction"], "output": turns[0], "generator": name} for (_, row), turns in zip(rows, said)]
        Path(config.out).write_text(json.dumps(outputs, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        write_lines(config.out, ({
            "question_id": row["question_id"], "answer_id": hashlib.sha256(f"{name}/{row['question_id']}/{turns}".encode()).hexdigest()[:22],
            "model_id": name, "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()} for (_, row), turns in zip(rows, said)))
    print(f"{len(rows)} answers of {name} in {config.out}; {speaker.cut} prompts cut on the left")


# ---- judge: requests out, verdicts in -----------------------------------------------------------------------------------

_FACTORS = "helpfulness, relevance, accuracy, depth, creativity, and level of detail of "
_RATE = ('Begin your evaluation by providing a short explanation. Be as objective as possible. After providing your explanation, you must rate the response '
         'on a scale of 1 to 10 by strictly following this format: "[[rating]]", for example: "Rating: [[5]]".')
_PAIR = ("Your evaluation should consider factors such as the " + _FACTORS + "their responses. {begin} Avoid any position biases and ensure that the order in which "
         "the responses were presented does not influence your decision. Do not allow the length of the responses to influence your evaluation. Do not favor certain "
         "names of the assistants. Be as objective as possible. After providing your explanation, output your final verdict by strictly following this format: "
         '"[[A]]" if assistant A is better, "[[B]]" if assistant B is better, and "[[C]]" for a tie.')
_TURNS = "### User:\n{question_1}\n\n### Assistant{name}:\n{answer_1}\n\n### User:\n{question_2}\n\n### Assistant{name}:\n{answer_2}"
# FastChat's judge prompts under its names: (system, user message of turn 1), and of turn 2 with the first in view.
SINGLE = (
    ("single-v1", "You are a helpful assistant.",
     "[Instruction]\nPlease act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user question displayed below. "
     "Your evaluation should consider factors such as the " + _FACTORS + "the response. " + _RATE +
     "\n\n[Question]\n{question_1}\n\n[The Start of Assistant's Answer]\n{answer_1}\n[The End of Assistant's Answer]"),
    ("single-v1-multi-turn",
     "Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user question displayed below. "
     "Your evaluation should consider factors such as the " + _FACTORS + "the response. You evaluation should focus on the assistant's answer to the second user "
     "question. " + _RATE + "\n\n",
     "<|The Start of Assistant A's Conversation with User|>\n\n" + _TURNS.replace("{name}", " A") + "\n\n<|The End of Assistant A's Conversation with User|>"),
)
PAIR = (
    ("pair-v2",
     "Please act as an impartial judge and evaluate the quality of the responses provided by two AI assistants to the user question displayed below. You should choose "
     "the assistant that follows the user's instructions and answers the user's question better. "
     + _PAIR.replace("{begin}", "Begin your evaluation by comparing the two responses and provide a short explanation."),
     "[User Question]\n{question_1}\n\n[The Start of Assistant A's Answer]\n{answer_1}\n[The End of Assistant A's Answer]\n\n"
     "[The Start of Assistant B's Answer]\n{other_1}\n[The End of Assistant B's Answer]"),
    ("pair-v2-multi-turn",
     "Please act as an impartial judge and evaluate the quality of the responses provided by two AI assistants to the user questions. You should choose the assistant "
     "that follows the user's instructions and answers the user's questions better. "
     + _PAIR.replace("{begin}", "You should focus on who provides a better answer to the second user question. Begin your evaluation by comparing the responses of "
                                "the two assistants and provide a short explanation."),
     "<|The Start of Assistant A's Conversation with User|>\n\n" + _TURNS.replace("{name}", " A") + "\n\n<|The End of Assistant A's Conversation with User|>\n\n\n"
     "<|The Start of Assistant B's Conversation with User|>\n\n" + _TURNS.replace("{name}", " B").replace("answer_", "other_")
     + "\n\n<|The End of Assistant B's Conversation with User|>"),
)
TABLE_6 = (  # App. G: a response of a conversation, scored in the context of the turns before it
    "[Instruction] Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the conversation displayed below. Your "
    "evaluation should consider factors such as the " + _FACTORS + "the response. Begin your evaluation by providing a short explanation. Be as objective as possible. "
    'After providing your explanation, you must rate the response on a scale of 1 to 10 by strictly following this format: "[rating]", for example: "Rating: [[5]]".\n\n'
    "[Conversation]\n{context}\n\n[The Start of Assistant's Response]\n{response}\n\n[The End of Assistant's Response]")


@dataclass(frozen=True)
class JudgeConfig:
    files: tuple = ()  # answer files (conversation: conversation files); with --requests, a batch's output files
    mode: str = ""  # single, pair, conversation
    questions: str = ""
    baseline: str = ""  # pair: the answer file of the model to compare with
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
    for where, row in read_rows(path):
        question, model, choices = field(row, where, "question_id", "model_id", "choices")
        if question in found:
            raise ValueError(f"{where}: question {question} is answered twice; remove one")
        found[question] = field(choices[0] if choices else {}, where, "turns")[0]
        models.add(model)
    if len(models) != 1:
        raise ValueError(f"{path}: answers of {len(models)} models; give each model a file of its own")
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
                        context = "\n\n".join(f"{m.role.capitalize()}: {m.text}" for m in conversation.messages[:turn])
                        yield ["conversation", config.judge, name, turn, source], None, fill(TABLE_6, context=context, response=message.text)
        return
    questions = {field(row, where, "question_id", "turns")[0]: row["turns"] for where, row in read_rows(config.questions)}
    other, theirs = read_answers(config.baseline) if config.mode == "pair" else (None, {})
    for path in config.files:
        model, ours = read_answers(path)
        for question, turns in questions.items():
            for answers in (ours, theirs) if config.mode == "pair" else (ours,):
                if len(answers.get(question, ())) < len(turns):
                    raise ValueError(f"{path if answers is ours else config.baseline}: no whole answer to question {question}; answer all questions first")
            for turn in range(len(turns)):
                slots = {f"question_{i + 1}": text for i, text in enumerate(turns)}
                said = lambda name, texts: {f"{name}_{i + 1}": text for i, text in enumerate(texts)}
                if config.mode == "single":
                    name, system, user = SINGLE[turn]
                    yield ["single", config.judge, question, turn + 1, model], system, fill(user, **slots, **said("answer", ours[question]))
                else:
                    name, system, user = PAIR[turn]
                    for game, (a, b) in enumerate(((ours, theirs), (theirs, ours)), 1):  # both orders
                        yield (["pair", config.judge, question, turn + 1, model, other, game], system,
                               fill(user, **slots, **said("answer", a[question]), **said("other", b[question])))


def write_requests(config):
    if config.mode not in ("single", "pair", "conversation") or not config.files or not config.out:
        raise ValueError("judge needs FILE.. --mode single|pair|conversation --out REQUESTS.jsonl (single, pair: --questions FILE; pair: --baseline FILE)")
    if config.mode != "conversation" and not config.questions or config.mode == "pair" and not config.baseline:
        raise ValueError(f"--mode {config.mode} needs --questions FILE" + " and --baseline FILE" * (config.mode == "pair"))
    rows, letters = [], 0
    for key, system, user in judge_requests(config):
        messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": user}]
        letters += sum(len(m["content"]) for m in messages)
        rows.append({"custom_id": json.dumps(key), "method": "POST", "url": "/v1/chat/completions",
                     "body": {"model": config.judge, "messages": messages, "temperature": 0, "max_tokens": 2048}})
    if len({row["custom_id"] for row in rows}) < len(rows):
        raise ValueError("two of the files are of the same model; give --name other names when answering")
    write_lines(config.out, rows)
    print(f"{len(rows)} requests in {config.out}, about {letters // 4:,} tokens to read (4 characters each) and at most {2048 * len(rows):,} to write")


def content_of(row):
    """The judge's text in a line of a batch's output, or None for a failed request."""
    response = row.get("response") or {}
    if row.get("error") or response.get("status_code") != 200:
        return None
    try:
        content = response["body"]["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None


def rating(text):
    """The number in [[n]], else in [n]; -1 without either, as FastChat has it."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    return float(found[1]) if found else -1


def winner(text, game):
    """model_1, model_2, tie or error of one game; in the second, model_1 is assistant B."""
    verdict = next((v for v in "ABC" if f"[[{v}]]" in text), None)
    return {"A": f"model_{game}", "B": f"model_{3 - game}", "C": "tie", None: "error"}[verdict]


def read_verdicts(config):
    """Batch output -> FastChat's judgment rows; what is missing or failed -> a new request file."""
    if not config.files or not config.out:
        raise ValueError("judge --requests REQUESTS.jsonl needs BATCH_OUTPUT.jsonl .. --out JUDGMENTS.jsonl")
    asked = {field(row, where, "custom_id", "body")[0]: row for where, row in read_rows(config.requests)}
    texts, count = {}, dict.fromkeys(("failed", "malformed", "doubled", "foreign", "unparsed"), 0)
    for path in config.files:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; give the output of the batch")
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                key = row["custom_id"]
            except (ValueError, KeyError, TypeError):
                count["malformed"] += bool(line.strip())
                continue
            text = content_of(row)
            if key not in asked:
                count["foreign"] += 1
            elif text is None:
                count["failed"] += 1
            elif key in texts:
                count["doubled"] += 1  # the first answer counts
            else:
                texts[key] = text
    judgments = []
    prompt = lambda key: asked[key]["body"]["messages"][-1]["content"]
    for key, text in texts.items():
        kind, judge, question, turn, *who = json.loads(key)
        row = {"question_id": question, "turn": turn, "tstamp": time.time()}
        if kind == "pair":
            model, other, game = who
            second = json.dumps(["pair", judge, question, turn, model, other, 2])
            if game == 1 and second in texts:
                games = {1: text, 2: texts[second]}
                won = {f"g{i}_winner": winner(t, i) for i, t in games.items()}
                count["unparsed"] += sum(w == "error" for w in won.values())
                judgments.append(row | won | {"model_1": model, "model_2": other, "judge": [judge, PAIR[turn - 1][0]]} | {
                    f"g{i}_{name}": value for i, t in games.items() for name, value in (("user_prompt", prompt(key if i == 1 else second)), ("judgment", t))})
            continue
        score = rating(text)
        count["unparsed"] += score == -1
        name = SINGLE[turn - 1][0] if kind == "single" else "table-6"
        judgments.append(row | {"model": who[0], "judge": [judge, name], "user_prompt": prompt(key), "judgment": text, "score": score})
    write_lines(config.out, judgments)
    again = [row for key, row in asked.items() if key not in texts]
    retry = Path(f"{config.out}.retry.jsonl")
    retry.unlink(missing_ok=True)
    if again:
        write_lines(retry, again)
    print(f"{len(texts)} of {len(asked)} requests answered, {len(judgments)} judgments in {config.out}; " + ", ".join(f"{n} {what}" for what, n in count.items())
          + (f"; {len(again)} to be asked again in {retry}, give its output beside this one" if again else ""))


# ---- report -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportConfig:
    files: tuple = ()  # FastChat judgments, AlpacaEval annotations, conversation scores; told apart by content
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


def read_judgments(files):
    """{pairs, singles, scores, alpaca}: rows by kind. Verdicts that could not be parsed are left out, as the official tools do."""
    found = {"pairs": [], "singles": [], "scores": [], "alpaca": []}
    for path in files:
        for where, row in read_rows(path):
            if not isinstance(row, dict):
                raise ValueError(f"{where}: not a judgment; give FastChat judgments, AlpacaEval annotations or conversation scores")
            if "g1_winner" in row:
                kind, ok = "pairs", "error" not in (row["g1_winner"], row["g2_winner"])
            elif "preference" in row:
                kind, ok = "alpaca", row["preference"] is not None
            elif "score" in row and "judge" in row:
                kind, ok = "scores" if row["judge"][1] == "table-6" else "singles", row["score"] != -1
            else:
                raise ValueError(f"{where}: not a judgment; give FastChat judgments, AlpacaEval annotations or conversation scores")
            if ok:
                found[kind].append(row)
    return found


def win_rates(judgments, baseline):
    """{(bench, model): (win rate, wins, losses, ties)} against the baseline; the last judge of a question and turn counts once each."""
    tally = {}
    for row in judgments["pairs"]:
        if baseline not in (row["model_1"], row["model_2"]):
            continue
        ours = outcome(row)
        model, points = (row["model_1"], ours) if row["model_2"] == baseline else (row["model_2"], 1 - ours)
        tally.setdefault((bench_of(row["question_id"]), model), []).append(points)
    for row in judgments["alpaca"]:  # preference 2: the second, the model's; 1: the reference's
        tally.setdefault(("AlpacaEval", row["generator_2"]), []).append(row["preference"] - 1)
    return {key: (statistics.mean(points), sum(p == 1 for p in points), sum(p == 0 for p in points), sum(0 < p < 1 for p in points)) for key, points in tally.items()}


def by_judge(judgments):
    """{judge: {item: value}}: scores, pair outcomes and preferences, for the correlation of judges."""
    values = {}
    for row in (*judgments["singles"], *judgments["scores"]):
        values.setdefault(row["judge"][0], {})[row["model"], row["question_id"], row["turn"]] = row["score"]
    for row in judgments["pairs"]:
        values.setdefault(row["judge"][0], {})[row["model_1"], row["model_2"], row["question_id"], row["turn"]] = outcome(row)
    for row in judgments["alpaca"]:
        values.setdefault(row.get("annotator", "annotator"), {})[row["generator_2"], row["instruction"]] = row["preference"]
    return values


def pearson(x, y):
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and np.std(x) > 0 and np.std(y) > 0 else math.nan


def report(config):
    if not config.files:
        raise ValueError("report needs FILE..: FastChat judgments, AlpacaEval annotations or conversation scores")
    judgments = read_judgments(config.files)
    mean = lambda rows: f"{statistics.mean(row['score'] for row in rows):.2f}" if rows else ""
    if rates := win_rates(judgments, config.baseline):
        benches = ("AlpacaEval", "MT-bench", "Vicuna-bench")
        print(f"| win rate (Table 1) | {' | '.join(benches)} | average |\n|---|---|---|---|---|")
        for model in sorted({model for _, model in rates}):
            cells = [rates.get((bench, model)) for bench in benches]
            average = f"{statistics.mean(c[0] for c in cells):.1%}" if all(cells) else ""
            print(f"| {model} | " + " | ".join(f"{c[0]:.1%} ({c[1]} won, {c[2]} lost, {c[3]} tied)" if c else "" for c in cells) + f" | {average} |")
    if singles := [row for row in judgments["singles"] if bench_of(row["question_id"]) == "MT-bench"]:
        category = lambda row: MT_CATEGORIES[(int(row["question_id"]) - 81) // 10]
        print(f"| MT-bench score (Fig. 2) | turn 1 | turn 2 | average | {' | '.join(MT_CATEGORIES)} |\n" + "|---" * (4 + len(MT_CATEGORIES)) + "|")
        for model in sorted({row["model"] for row in singles}):
            mine = [row for row in singles if row["model"] == model]
            parts = [*([r for r in mine if r["turn"] == turn] for turn in (1, 2)), mine, *([r for r in mine if category(r) == name] for name in MT_CATEGORIES)]
            print(f"| {model} | " + " | ".join(map(mean, parts)) + " |")
    if judgments["scores"]:  # Fig. 3: a conversation's score is the mean of its turns'
        print("| conversation scores (Fig. 3) | conversations | mean | " + " | ".join(f"{n}" for n in range(1, 11)) + " |\n" + "|---" * 13 + "|")
        key = lambda row: (row["model"], row["question_id"])
        means = [(who[0], statistics.mean(r["score"] for r in rows)) for who, rows in itertools.groupby(sorted(judgments["scores"], key=key), key)]
        for source in sorted({source for source, _ in means}):
            mine = [score for name, score in means if name == source]
            print(f"| {source or '(none)'} | {len(mine)} | {statistics.mean(mine):.2f} | " + " | ".join(str(sum(math.floor(s + 0.5) == n for s in mine)) for n in range(1, 11)) + " |")
    judges = by_judge(judgments)
    for one, two in itertools.combinations(sorted(judges), 2):
        common = sorted(judges[one].keys() & judges[two].keys(), key=str)
        x, y = ([judges[j][item] for item in common] for j in (one, two))
        print(f"{one} and {two} (Fig. 8, 9): Pearson r = {pearson(x, y):.2f} over {len(common)} common judgments")
        if config.png and common:
            scatter(config.png, one, x, two, y)
            config = replace(config, png="")  # of the first pair


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
