"""The judge: what it is asked, and what it said (Sec. 4.1, App. G).

What the paper did: gpt-4 reads a question and the answers of two models, and says which is better
(Table 1: MT-bench and Vicuna-bench, against gpt-3.5-turbo). Or it reads one answer and gives it a
score from 1 to 10 (Fig. 2, MT-bench). App. G lets it score the training data itself, to show how
far the sources differ in quality (Fig. 3).

What you get, in two steps with your judge between them:

    answers  -- judge --mode single|pair|conversation -->  requests.jsonl
    requests -- OpenAI's batch interface, vllm run-batch, .. -->  batch_output.jsonl
    outputs  -- judge --requests requests.jsonl -->  judgments.jsonl, read by `report` and FastChat

A judge whose name begins with `claude` is asked as FastChat asks claude, in lines that Anthropic's
message batches take. What each request is about stands beside them, in requests.jsonl.ids.jsonl:
keep the two together.

Three official rules protect the verdict. A judge prefers the answer that it reads first, so a pair
is played twice, in both orders. A judge is poor at arithmetic, so questions of math, reasoning and
coding come with a reference answer. And a verdict is what stands in [[..]], or there is none.

A part of every large batch fails. A line that is broken, refused or missing costs only itself: it
is counted, and OUT.retry.jsonl asks it again.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conversations import Conversation, read
from evaluation.rows import name_or_number, require, require_turns, rows_of, write_lines
from support.fields import read_fields
from support.kept import check_out

JUDGE_TEXTS = read_fields(Path(__file__).with_name("judge_prompts.json")).content
# (mode, turn, with a reference answer): (name, system, user), FastChat's texts; a test holds each
# to the official one by its hash
JUDGE_PROMPTS = {
    (entry["mode"], entry["turn"], entry["reference"]): (
        entry["name"],
        entry["system"],
        entry["user"],
    )
    for entry in JUDGE_TEXTS["prompts"]
}
# App. G: a response of a conversation, scored in the context of the turns before it
TABLE_6 = JUDGE_TEXTS["conversation"]
# categories that FastChat judges beside a reference answer
NEED_REFERENCE = "math", "reasoning", "coding"

# FastChat's limits for a verdict, its explanation included
MAX_VERDICT_TOKENS = 2048
MAX_CLAUDE_TOKENS = 1024
# FastChat ends claude's verdict where it begins to speak for the user
CLAUDE_STOP = "\n\nHuman:"
# of English, roughly; only for the estimate of what a batch costs
CHARACTERS_PER_TOKEN = 4
# FastChat's score where a judge gave none; `report` leaves these rows out
NO_SCORE = -1


@dataclass(frozen=True)
class JudgeConfig:
    """The flags of `evaluate.py judge`."""

    # answer files (conversation: conversation files); with --requests, a batch's output files
    files: tuple = ()
    # single, pair or conversation
    mode: str = ""
    # single, pair: the bench's file of questions
    questions: str = ""
    # pair: the answer file of the model to compare with
    baseline: str = ""
    # FastChat's reference_answer/gpt-4.jsonl, for questions of math, reasoning and coding
    references: str = ""
    # the judge's name; one that begins with `claude` is asked as FastChat asks claude
    judge: str = "gpt-4"
    # conversation: so many of each source, drawn at random
    count: int = 128
    # of that draw
    seed: int = 0
    # the requests that the files answer; without it, requests are written
    requests: str = ""
    # the file of requests; with --requests, of judgments
    out: str = ""


class RequestId(NamedTuple):
    """What a verdict is about."""

    mode: str
    judge: str
    # the prompt's name: "pair-v2"
    prompt: str
    # its question_id; of a conversation FILE#N
    question: int | str
    turn: int
    # who is judged; of a conversation its source
    model: str
    # pairs only: the other model, and game 1 (the model is assistant A) or 2 (it is assistant B)
    baseline: str | None = None
    game: int | None = None

    def custom_id(self) -> str:
        """What goes out with the request and comes back with its verdict: nothing else ties the
        two together. Anthropic takes 64 letters, digits, `_` and `-`, so it is a hash."""
        digest = hashlib.sha256(json.dumps(self).encode()).hexdigest()
        return f"{self.prompt}-{digest[:32]}"


def ids_file(requests: str) -> str:
    """The file that says what each custom_id of a request file is about."""
    return f"{requests}.ids.jsonl"


# ---- requests out


class Request(NamedTuple):
    """One question to the judge; system is None where the prompt has no system text."""

    id: RequestId
    system: str | None
    user: str


def write_requests(config: JudgeConfig) -> None:
    """Answers -> a file of requests that a batch endpoint takes, and what it will cost to read."""
    check_request_flags(config)
    check_out(config.out, *config.files, config.questions, config.baseline, config.references)
    if config.mode == "conversation":
        requests = conversation_requests(config)
    else:
        requests = question_requests(config)

    is_claude = config.judge.startswith("claude")
    rows = []
    ids = []
    characters = 0
    for request in requests:
        rows.append(claude_request(request) if is_claude else openai_request(request))
        ids.append({"custom_id": request.id.custom_id()} | request.id._asdict())
        characters += len(request.system or "") + len(request.user)
    if not rows:
        raise ValueError(f"{', '.join(config.files)}: nothing to judge")
    if len({row["custom_id"] for row in rows}) < len(rows):
        raise ValueError(
            "two of the files are the same, or of the same model; leave one out, "
            "or answer with another --name"
        )
    write_lines(ids_file(config.out), ids)
    write_lines(config.out, rows)
    most = MAX_CLAUDE_TOKENS if is_claude else MAX_VERDICT_TOKENS
    print(
        f"{len(rows)} requests in {config.out}, "
        f"about {characters // CHARACTERS_PER_TOKEN:,} tokens to read "
        f"({CHARACTERS_PER_TOKEN} characters each) "
        f"and at most {most * len(rows):,} to write"
    )


def openai_request(request: Request) -> dict:
    """A line for OpenAI's batch interface and for `vllm run-batch`."""
    messages = [{"role": "user", "content": request.user}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    body = {
        "model": request.id.judge,
        "messages": messages,
        "temperature": 0,
        "max_tokens": MAX_VERDICT_TOKENS,
    }
    return {
        "custom_id": request.id.custom_id(),
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    }


def claude_request(request: Request) -> dict:
    """One of the `requests` of Anthropic's message batches, in FastChat's form for claude."""
    system, user = request.system, request.user
    # FastChat tells claude as the user how to compare two answers
    if request.id.mode == "pair":
        user = f"[Instruction]\n{system}\n\n{user}"
        system = None
    params = {
        "model": request.id.judge,
        "messages": [{"role": "user", "content": user}],
        "temperature": 0,
        "max_tokens": MAX_CLAUDE_TOKENS,
        "stop_sequences": [CLAUDE_STOP],
    }
    if system is not None:
        params["system"] = system
    return {"custom_id": request.id.custom_id(), "params": params}


def check_request_flags(config: JudgeConfig) -> None:
    """ValueError when a flag is missing that the mode needs."""
    modes = "single", "pair", "conversation"
    if config.mode not in modes or not config.files or not config.out:
        raise ValueError(
            "judge needs FILE.. --mode single|pair|conversation --out REQUESTS.jsonl "
            "(single, pair: --questions FILE; pair: --baseline FILE)"
        )
    if config.mode == "single" and not config.questions:
        raise ValueError("--mode single needs --questions FILE")
    if config.mode == "pair" and not (config.questions and config.baseline):
        raise ValueError("--mode pair needs --questions FILE and --baseline FILE")
    if config.count < 1 or not 0 <= config.seed < 2**63:
        raise ValueError("--count is at least 1, --seed is from 0 to 2^63 - 1")


def conversation_requests(config: JudgeConfig) -> Iterator[Request]:
    """App. G: each answer of the drawn conversations by itself, with what was said before it."""
    for source, name, conversation in drawn_conversations(config):
        for turn, message in enumerate(conversation.messages):
            if message.role == "user":
                continue
            before = conversation.messages[:turn]
            context = "\n\n".join(f"{m.role.capitalize()}: {m.text}" for m in before)
            user = fill(TABLE_6, {"context": context, "response": message.text})
            request_id = RequestId("conversation", config.judge, "table-6", name, turn, source)
            yield Request(request_id, None, user)


def drawn_conversations(config: JudgeConfig) -> Iterator[tuple[str, str, Conversation]]:
    """(source, FILE#N, conversation): of each source --count of them, drawn at random."""
    by_source = {}
    for path in config.files:
        for n, conversation in enumerate(read(path)):
            found = by_source.setdefault(conversation.label, [])
            found.append((f"{path}#{n}", conversation))

    rng = np.random.default_rng(config.seed)
    for source, found in sorted(by_source.items()):
        drawn = rng.permutation(len(found))[: config.count]
        for at in sorted(drawn.tolist()):
            name, conversation = found[at]
            yield source, name, conversation


def question_requests(config: JudgeConfig) -> Iterator[Request]:
    """A benchmark's questions: each turn of each model's answers, alone or against the baseline."""
    questions = read_judged_questions(config.questions)
    baseline = None
    baseline_answers = {}
    if config.mode == "pair":
        baseline, baseline_answers = read_answers(config.baseline)
    references = {}
    if config.references:
        _, references = read_answers(config.references)

    for path in config.files:
        model, answers = read_answers(path)
        if model == baseline:
            raise ValueError(
                f"{path}: answers of {baseline}, the baseline itself; leave it out, "
                "or give one of them another --name when answering"
            )
        for question, (category, turns) in questions.items():
            # everything that the judge will read of this question must be there, to the last turn
            referred = category in NEED_REFERENCE
            need_answer(path, answers, question, turns)
            if config.mode == "pair":
                need_answer(config.baseline, baseline_answers, question, turns)
            if referred and not config.references:
                raise ValueError(
                    f"question {question} is of category {category}: judged beside a reference "
                    "answer; give --references FILE (FastChat's reference_answer)"
                )
            if referred:
                need_answer(config.references, references, question, turns)

            given = slots("question", turns) | slots("reference", references.get(question, ()))
            ours = answers[question]
            for turn in range(1, len(turns) + 1):
                name, system, user = JUDGE_PROMPTS[config.mode, turn, referred]
                request_id = RequestId(config.mode, config.judge, name, question, turn, model)
                if config.mode == "single":
                    yield Request(request_id, system, fill(user, given | slots("answer", ours)))
                    continue
                # both orders: in game 1 the model speaks as assistant A, in game 2 as B
                theirs = baseline_answers[question]
                as_a = given | slots("answer", ours) | slots("other", theirs)
                as_b = given | slots("answer", theirs) | slots("other", ours)
                game_1 = request_id._replace(baseline=baseline, game=1)
                game_2 = request_id._replace(baseline=baseline, game=2)
                yield Request(game_1, system, fill(user, as_a))
                yield Request(game_2, system, fill(user, as_b))


def read_judged_questions(path: str) -> dict[int, tuple[str, list[str]]]:
    """{question_id: (category, turns)} of a FastChat question file."""
    questions = {}
    for where, row in rows_of(path):
        fields = require(row, where, "question_id", "category", "turns")
        question = name_or_number(fields, "question_id")
        questions[question] = fields.text("category"), require_turns(row["turns"], where)
    return questions


def read_answers(path: str) -> tuple[str, dict[int, list[str]]]:
    """(model, {question_id: its turns}) of a FastChat model_answer file."""
    found = {}
    models = set()
    for where, row in rows_of(path):
        fields = require(row, where, "question_id", "model_id", "choices")
        question = name_or_number(fields, "question_id")
        if question in found:
            raise ValueError(f"{where}: question {question} is answered twice; remove one")
        choices = row["choices"]
        choice = choices[0] if isinstance(choices, list) and choices else {}
        require(choice, where, "turns")
        found[question] = require_turns(choice["turns"], where)
        models.add(fields.text("model_id"))
    if len(models) != 1:
        raise ValueError(
            f"{path}: answers of {len(models)} models; give each model a file of its own"
        )
    return models.pop(), found


def need_answer(path: str, answers: dict[int, list[str]], question: int, turns: list[str]) -> None:
    """ValueError unless a file answers every turn of a question."""
    if len(answers.get(question, ())) < len(turns):
        raise ValueError(
            f"{path}: no whole answer to question {question}; every question needs one"
        )


def slots(name: str, texts: list[str]) -> dict[str, str]:
    """{name_1: first text, name_2: second}: what a prompt's slots are filled with."""
    return {f"{name}_{turn}": text for turn, text in enumerate(texts, 1)}


def fill(template: str, texts: dict[str, str]) -> str:
    """The {slots} filled in one pass, so that a brace in an answer stays what it is."""
    return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), template)


# ---- verdicts in


def read_verdicts(config: JudgeConfig) -> None:
    """Batch outputs -> FastChat's judgment rows; what is missing or failed -> new requests."""
    if not config.files or not config.out:
        raise ValueError(
            "judge --requests REQUESTS.jsonl needs BATCH_OUTPUT.jsonl .. --out JUDGMENTS.jsonl"
        )
    retry = Path(f"{config.out}.retry.jsonl")
    check_out(config.out, *config.files, config.requests)
    inputs = {os.path.realpath(path) for path in (config.requests, *config.files)}
    if os.path.realpath(retry) in inputs:
        raise ValueError(
            f"{retry} would be overwritten; give the first --requests, "
            "and the outputs of all its batches: BATCH1.jsonl BATCH2.jsonl"
        )
    asked = read_requests(config.requests)
    ids = read_ids(config.requests, asked)
    texts, faults = read_outputs(config.files, asked)
    judgments, waiting = judgments_of(asked, ids, texts)
    faults["unparsed"] = sum(unparsed_verdicts(judgment) for judgment in judgments)
    write_lines(config.out, judgments)

    # an old retry file would ask again what has been answered since
    again = [row for custom_id, row in asked.items() if custom_id not in texts]
    retry.unlink(missing_ok=True)
    if again:
        write_lines(retry, again)

    summary = (
        f"{len(texts)} of {len(asked)} requests answered, "
        f"{len(judgments)} judgments in {config.out}; "
    )
    summary += ", ".join(f"{count} {fault}" for fault, count in faults.items())
    if waiting:
        summary += f"; {waiting} games wait for their other order"
    if again:
        summary += (
            f"; {len(again)} to be asked again in {retry}: "
            "give its output beside this one, with the same --requests"
        )
    print(summary)


def read_requests(path: str) -> dict[str, dict]:
    """{custom_id: request row} of a file that write_requests wrote."""
    asked = {}
    for where, row in rows_of(path):
        custom_id = require(row, where, "custom_id").text("custom_id")
        if user_prompt(row) is None:
            raise ValueError(f"{where}: not a request that `judge --mode` wrote; give its file")
        asked[custom_id] = row
    return asked


def read_ids(requests: str, asked: Iterable[str]) -> dict[str, RequestId]:
    """{custom_id: what it is about}. ValueError: a request of which that is not known."""
    path = ids_file(requests)
    if not Path(path).is_file():
        raise ValueError(
            f"{path}: no such file; `judge --mode` wrote it beside the requests, "
            "keep the two together"
        )
    ids = {}
    for where, row in rows_of(path):
        custom_id = require(row, where, "custom_id", *RequestId._fields).text("custom_id")
        found = RequestId(*(row[field] for field in RequestId._fields))
        # the id is a hash of the rest, so it tells whether the line is as it was written
        if found.custom_id() != custom_id:
            raise ValueError(
                f"{where}: the line is not as `judge --mode` wrote it; write both files again"
            )
        ids[custom_id] = found
    for custom_id in asked:
        if custom_id not in ids:
            raise ValueError(
                f"{requests}: {custom_id[:60]!r} is not a request of {path}; "
                "write both again with `judge --mode`"
            )
    return ids


def read_outputs(files: tuple, asked: dict[str, dict]) -> tuple[dict[str, str], dict[str, int]]:
    """({custom_id: the judge's text}, {fault: how many lines}) of a batch's output files."""
    texts = {}
    faults = dict.fromkeys(("failed", "malformed", "doubled", "foreign"), 0)
    for path in files:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; give the output of the batch")
        # Only a newline ends a line of JSONL: splitlines would also cut at characters that a judge
        # may write.
        for line in Path(path).read_bytes().split(b"\n"):
            if not line.strip():
                continue
            try:
                # what is no UTF-8 is a ValueError, too
                row = json.loads(line.decode())
                custom_id = row["custom_id"]
                known = custom_id in asked
            except (ValueError, KeyError, TypeError, RecursionError):
                faults["malformed"] += 1
                continue
            text = verdict_text(row)
            if not known:
                faults["foreign"] += 1
            elif text is None:
                faults["failed"] += 1
            elif custom_id in texts:
                # the first answer counts
                faults["doubled"] += 1
            else:
                texts[custom_id] = text
    return texts, faults


def verdict_text(row: dict) -> str | None:
    """The judge's text in a line of a batch's output, or None for a failed request."""
    if "result" in row:
        return claude_text(row)
    try:
        response = row["response"]
        content = response["body"]["choices"][0]["message"]["content"]
        failed = row.get("error") or response["status_code"] != 200
    except (KeyError, IndexError, TypeError):
        return None
    return content if not failed and isinstance(content, str) else None


def claude_text(row: dict) -> str | None:
    """The same, in a line of the results of Anthropic's message batches."""
    try:
        result = row["result"]
        content = result["message"]["content"][0]["text"]
        failed = result["type"] != "succeeded"
    except (KeyError, IndexError, TypeError):
        return None
    # without the blanks around it, as FastChat keeps it
    return content.strip() if not failed and isinstance(content, str) else None


def judgments_of(
    asked: dict[str, dict], ids: dict[str, RequestId], texts: dict[str, str]
) -> tuple[list[dict], int]:
    """(FastChat's judgment rows, how many games still lack the verdict in the other order)."""
    judgments = []
    waiting = 0
    for custom_id, text in texts.items():
        request_id = ids[custom_id]
        judgment = {
            "question_id": request_id.question,
            "turn": request_id.turn,
            "judge": [request_id.judge, request_id.prompt],
            "tstamp": time.time(),
        }
        if request_id.mode != "pair":
            judgment["model"] = request_id.model
            judgment["user_prompt"] = user_prompt(asked[custom_id])
            judgment["judgment"] = text
            judgment["score"] = rating(text)
            judgments.append(judgment)
            continue

        # a pair is judged when both games are, and its row is made where its first game is met
        games = [request_id._replace(game=game).custom_id() for game in (1, 2)]
        if not all(game in texts for game in games):
            waiting += 1
        elif request_id.game == 1:
            judgment |= {"model_1": request_id.model, "model_2": request_id.baseline}
            for number, game in enumerate(games, 1):
                judgment[f"g{number}_winner"] = winner(texts[game], number)
            for number, game in enumerate(games, 1):
                judgment[f"g{number}_user_prompt"] = user_prompt(asked[game])
                judgment[f"g{number}_judgment"] = texts[game]
            judgments.append(judgment)
    return judgments, waiting


def user_prompt(request: dict) -> str | None:
    """What the judge was asked; FastChat keeps it in the judgment. None: it is no request."""
    try:
        sent = request["params"] if "params" in request else request["body"]
        content = sent["messages"][-1]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None


def unparsed_verdicts(judgment: dict) -> int:
    """How many of a judgment's verdicts could not be read."""
    if "score" in judgment:
        return int(judgment["score"] == NO_SCORE)
    winners = [judgment["g1_winner"], judgment["g2_winner"]]
    return winners.count("error")


def rating(text: str) -> float:
    """The number in [[n]], else in [n]; without either NO_SCORE, as FastChat has it."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    # as many digits as make it infinite are no score
    score = float(found[1]) if found else NO_SCORE
    return score if math.isfinite(score) else NO_SCORE


def winner(text: str, game: int) -> str:
    """model_1, model_2, tie or error of one game; in the second, model_1 is assistant B."""
    if "[[A]]" in text:
        return "model_1" if game == 1 else "model_2"
    if "[[B]]" in text:
        return "model_2" if game == 1 else "model_1"
    return "tie" if "[[C]]" in text else "error"
