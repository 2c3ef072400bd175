"""The judges: requests out, verdicts in."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversations import read
from evaluation.rows import check_out, field, rows_of, turns_of, write_lines
from support.files import read_json

_DATA = read_json(Path(__file__).with_name("judge_prompts.json"))

# (mode, turn, with a reference answer): name, system, user; a test holds each to the official text
# by its hash
PROMPTS = {
    (p["mode"], p["turn"], p["reference"]): (p["name"], p["system"], p["user"])
    for p in _DATA["prompts"]
}
NEED_REFERENCE = "math", "reasoning", "coding"  # categories judged beside a reference answer
# App. G: a response of a conversation, scored in the context of the turns before it
TABLE_6 = _DATA["conversation"]


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
