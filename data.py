"""What C-RLFT does to data: conversations of mixed quality -> class-conditioned tokens and loss weights -> packed batches.

Every conversation has a source, and the source is its class c, with a condition ("GPT4") and a coarse reward r_c (Eq. 3).
The condition goes into the prompt (`GPT4 User: ..`), so that the model learns one policy per class, pi(y|x,c); the reward
becomes the weight exp(r_c / beta) of each assistant token's loss (Eq. 6). That is all of C-RLFT that touches data:

    read(file)                    -> Conversation      one of three formats, told apart by content
    Classes(table).assign(..)     -> Conversation      its class's condition and weights
    tokenize(conversation, ..)    -> tokens, weights   weight of a token = weight of predicting it
    plan(lengths, ..)             -> steps             which conversations form a step, whatever the number of GPUs
    pack([(tokens, weights), ..]) -> Batch             what model.py takes

    python data.py prepare FILE.. --tokenizer tokenizer.model --out train.safetensors --classes "Model: GPT-4=GPT4:1.0,*=GPT3:0.1"
    python data.py show train.safetensors         tokens coloured by weight
    python data.py stats train.safetensors        classes, weights, and how the steps come out

Shapes: T packed tokens, N conversations, R supervised rows, S all tokens of a prepared file.
"""

import bisect
import collections
import dataclasses
import difflib
import hashlib
import heapq
import io
import json
import math
import multiprocessing
import os
import queue
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

# ends every utterance; its id is the size of the sentencepiece model (32000 for Llama-2)
EOT = "<|end_of_turn|>"


# ---- conversations


@dataclass(frozen=True)
class Message:
    role: str  # user or assistant
    text: str
    weight: float | None = None  # loss weight of the text; None: its class's


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    label: str = ""  # the source, as the file has it: "Model: GPT-4"
    system: str | None = None
    condition: str | None = None  # what the prompt says: "GPT4"
    class_id: int | None = None
    where: str = "?"  # file:line, for errors


ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
MAX_WEIGHT = 1e6  # sums of weights stay far inside fp32


def read_rows(path):
    """[(file:line, JSON value)] of a .jsonl file or a .json array."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    text = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if text[:1024].lstrip().startswith(b"["):
        try:
            return [(f"{path}: conversation {i}", row) for i, row in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}:{getattr(error, 'lineno', '?')}: not JSON ({error}); fix the file"
            ) from None
    rows = []
    # by bytes: str.splitlines would cut at characters that JSON allows
    for number, line in enumerate(io.BytesIO(text), 1):
        if line.strip():
            try:
                rows.append((f"{path}:{number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}:{number}: not JSON ({error}); fix or remove the line"
                ) from None
    return rows


def read(path):
    """All conversations of a .json array or .jsonl file: ShareGPT, OpenAI `messages` or OpenChat rows, in any mixture."""
    return [parse(row, where) for where, row in read_rows(path)]


def parse(row, where):
    """One JSON object -> Conversation, without a class yet unless the row names its own condition."""

    def need(condition, problem):
        if not condition:
            raise ValueError(f"{where}: {problem}")

    def need_text(value, name):
        need(isinstance(value, str), f"{name} {value!r} is not a text; fix the line")
        need(
            value.isascii() or value == value.encode("utf-8", "replace").decode(),
            f"{name} has half of a surrogate pair (\\ud800..); fix the line",
        )

    need(
        isinstance(row, dict),
        f'a {type(row).__name__} where a conversation object belongs; see README, "Your own data"',
    )
    turns = next((row[key] for key in ("conversations", "items", "messages") if key in row), None)
    need(
        isinstance(turns, list) and turns,
        "no messages in `conversations`, `items` or `messages`; fill or remove it",
    )
    for key in ("system", "model", "condition"):
        if row.get(key) is not None:
            need_text(row[key], key)
    system, messages = row.get("system") or None, []
    for turn in turns:
        need(
            isinstance(turn, dict),
            "a message is not an object with role and content (or from and value)",
        )
        name, text, weight = (
            turn.get("role", turn.get("from")),
            turn.get("content", turn.get("value")),
            turn.get("weight"),
        )
        need(
            isinstance(name, str) and name in ROLES,
            f"role {name!r} is not one of {', '.join(ROLES)}; fix the line or map it",
        )
        need(text is not None, f"the {name} message has no text (content or value); fix the line")
        need_text(text, f"the {name} message's text")
        ok = weight is None or (
            isinstance(weight, (int, float))
            and not isinstance(weight, bool)
            and 0 <= weight <= MAX_WEIGHT
        )
        need(
            ok, f"message weight {weight!r} is not a number from 0 to {MAX_WEIGHT:g}; fix the line"
        )
        need(
            ROLES[name] == "assistant" or not weight,
            f"weight {weight} on a {name} message; only assistant text is trained on",
        )
        if ROLES[name] == "system":
            need(
                not messages and system is None,
                "a system message that does not stand first, or a second one; join or move it",
            )
            system = text
            continue
        messages.append(Message(ROLES[name], text, weight))
    need(messages, "only a system message; add turns or remove it")
    return Conversation(
        tuple(messages), row.get("model") or "", system, row.get("condition"), where=where
    )


# ---- classes


@dataclass(frozen=True)
class Class:
    name: str
    condition: str
    # exp(r_c / beta) up to a common factor; None until the rows that carry their own have said it
    weight: float | None


def parse_classes(text, beta=None):
    """[(label glob, Class)] of "Model: GPT-4=GPT4:1.0,*=GPT3:0.1". With beta the numbers are rewards r_c and the weight is
    exp((r_c - 1) / beta): the factor between pi* and pi_c of Eq. 5, which Eq. 6 makes a loss weight, up to the common
    exp(1 / beta), which the division by the weight sum cancels."""
    if beta is not None and not beta > 0:
        raise ValueError(f"--beta {beta}: the KL coefficient of Eq. 4 is above 0")
    table = []
    for entry in text.split(",") if text else ():
        glob, equals, right = entry.rpartition("=")
        condition, colon, number = right.rpartition(":")
        try:
            number = float(number)
        except ValueError:
            number = math.nan
        if not (equals and colon and condition.strip() and math.isfinite(number)):
            raise ValueError(
                f'--classes: {entry!r} is not `label glob=condition:number`, such as "Model: GPT-4=GPT4:1.0"'
            )
        weight = math.exp(min((number - 1) / beta, 700)) if beta else number
        if not 0 <= weight <= MAX_WEIGHT:
            raise ValueError(
                f"--classes: {entry!r} gives the weight {weight:g}; weights are from 0 to {MAX_WEIGHT:g}"
            )
        table.append((glob.strip(), condition.strip(), weight))
    weights_of = collections.defaultdict(set)
    for _, condition, weight in table:
        weights_of[condition].add(weight)
    name = lambda condition, weight: (
        condition if len(weights_of[condition]) == 1 else f"{condition}:{weight}"
    )
    return [
        (glob, Class(name(condition, weight), condition, weight))
        for glob, condition, weight in table
    ]


def glob_match(glob, label):
    """Case-sensitive; * is any text, ? any character, nothing else is special."""
    return (
        re.fullmatch(re.escape(glob).replace(r"\*", ".*").replace(r"\?", "."), label, re.DOTALL)
        is not None
    )


class Classes:
    """The classes of one prepared file, in the order of their ids: the table's first, then the rows' own conditions.

    A class is a source of data. Eq. 4 keeps the model near the source's own policy pi_c, not near the base model's.
    """

    def __init__(self, table=()):
        self.table, self.all = list(table), list(dict.fromkeys(c for _, c in table))

    def assign(self, conversation):
        """The conversation with class, condition and every message's weight filled in.

        A row's own condition goes before the table's globs, a message's own weight before its class's. OpenChat's empty
        condition names no class: the table decides, and without a table the class is `none`, its prompt `User:`.
        """
        if conversation.condition is None or (conversation.condition == "" and self.table):
            label = conversation.label
            found = next((c for glob, c in self.table if glob_match(glob, label)), None)
            if found is None:
                raise ValueError(
                    f"{conversation.where}: label {label!r} matches no class; add it (or *=..) to --classes"
                )
        else:
            found = next((c for c in self.all if c.condition == conversation.condition), None)
            if found is None:
                name = conversation.condition or "none"
                while name in {c.name for c in self.all}:
                    name += "_"
                found = Class(name, conversation.condition, None)
                self.all.append(found)
        class_id, messages = self.all.index(found), []
        for m in conversation.messages:
            weight = 0.0 if m.role == "user" else found.weight if m.weight is None else m.weight
            if weight is None or (
                found.weight is None and m.role == "assistant" and m.weight is None
            ):
                raise ValueError(
                    f"{conversation.where}: an answer without weight in class {found.name!r}; give one, or --classes"
                )
            messages.append(dataclasses.replace(m, weight=float(weight)))
        return dataclasses.replace(
            conversation, messages=tuple(messages), condition=found.condition, class_id=class_id
        )


def expert_of(classes):
    """The class of the highest weight, the first named where weights tie; its template is the one used at inference."""
    return max(classes, key=lambda c: c.weight)


# ---- templates


@dataclass(frozen=True)
class Template:
    user: str
    assistant: str
    opening: str | None = None  # an utterance before the first turn


TEMPLATES = {  # Table 3; {c} is the condition
    "before_speaker": Template("{c} User:", "{c} Assistant:"),
    "before_assistant": Template("User:", "{c} Assistant:"),
    "beginning": Template("User:", "Assistant:", opening="Assistant is {c}"),
    # with one class plain SFT (Eq. 1); ours, the paper does not give its arms' without a condition
    "none": Template("User:", "Assistant:"),
}


@dataclass(frozen=True)
class Baseline:
    """How another model of the paper's comparisons is spoken to. `<s>` and `</s>` are those tokens, {text} and {system} slots.

    first: the first user turn where there is a system text; user: any other, up to where the assistant speaks; answer: one of its.
    """

    user: str
    answer: str
    first: str | None = None
    system: str | None = None  # what the model was trained with
    stop: str | None = None  # text, not a token, that ends an answer
    strip: bool = False  # spaces around a text


_ASSISTANT = "The assistant gives helpful, detailed, and polite answers to the user's questions."
BASELINES = {
    # v1.1, v1.5; wizardlm v1.2 too
    "vicuna": Baseline(
        "USER: {text} ASSISTANT:",
        " {text}</s>",
        "{system} USER: {text} ASSISTANT:",
        f"A chat between a curious user and an artificial intelligence assistant. {_ASSISTANT}",
    ),
    "llama-2-chat": Baseline(
        "[INST] {text} [/INST]",
        " {text} </s><s>",
        "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]",
        strip=True,
    ),
    "guanaco": Baseline(
        "### Human: {text}\n### Assistant:",
        " {text}\n",
        "{system}\n### Human: {text}\n### Assistant:",
        f"A chat between a curious human and an artificial intelligence assistant. {_ASSISTANT}",
        stop="### Human:",
    ),
    "ultralm": Baseline("User: {text}</s>\nAssistant:", " {text}</s>\n"),
}
# openchat: v3.2, the GPT4 prompt; base: the raw text
PROMPTS = (*TEMPLATES, *BASELINES, "openchat", "base")


def role_texts(template, condition):
    """(user prefix, assistant prefix, opening or None) of a template for a class."""
    t = TEMPLATES[template]
    return tuple(
        text and text.format(c=condition).strip() for text in (t.user, t.assistant, t.opening)
    )


class Tokenizer:
    """A sentencepiece model and the one token that C-RLFT adds. Text never becomes a special token: `</s>` typed by a user
    is encoded as the characters it is."""

    def __init__(self, model):
        """model: path of tokenizer.model, or its bytes."""
        if not isinstance(model, bytes):
            if not Path(model).is_file():
                raise ValueError(
                    f"{model}: no such tokenizer; give the path of a sentencepiece tokenizer.model"
                )
            model = Path(model).read_bytes()
        self.bytes = model
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError(
                "tokenizer.model is not a sentencepiece model; fetch the file again"
            ) from None
        self.bos, self.eos, self.eot = self.sp.bos_id(), self.sp.eos_id(), self.sp.get_piece_size()
        if self.bos < 0 or self.eos < 0:
            raise ValueError(
                "tokenizer.model has no <s> or </s>; C-RLFT starts every conversation with <s>"
            )
        # BPE's are ranks, unigram's log-probs
        whole_scores = all(self.sp.get_score(i).is_integer() for i in range(self.eot))
        if not whole_scores or self.sp.decode(self.sp.encode("  a  b ")) != "  a  b ":
            raise ValueError(
                "tokenizer.model is no BPE model that keeps spaces, Llama-2's kind; use the base model's own"
            )

    def __reduce__(self):
        return Tokenizer, (self.bytes,)

    def encode(self, text):
        return self.sp.encode(text)

    def decode(self, ids):
        return self.sp.decode([i for i in ids if i < self.eot])

    def piece(self, i):
        """The token as text for a reader: _ for the space that a word carries."""
        return EOT if i == self.eot else self.sp.id_to_piece(i) if i < self.eot else f"<{i}>"


def encode(conversation, tokenizer, template):
    """(head, turns): ids before the first turn, and per message (ids of the role prefix, ids of the text).

    Pieces are tokenized one by one and joined, as the public trainer does: `<s>` [system EOT] [opening EOT] then per message
    prefix text EOT. `GPT4 User:` is the same ids whatever follows.
    """
    user, assistant, opening = role_texts(template, conversation.condition)
    head = [tokenizer.bos]
    for text in (conversation.system, opening):
        if text is not None:
            head += [*tokenizer.encode(text), tokenizer.eot]
    prefix = {"user": tokenizer.encode(user), "assistant": tokenizer.encode(assistant)}
    return head, [
        (prefix[m.role], [*tokenizer.encode(m.text), tokenizer.eot]) for m in conversation.messages
    ]


def tokenize(conversation, tokenizer, template="before_speaker"):
    """tokens int32, weights fp32, of one length: a token's weight is the weight of predicting it.

    Only what the assistant says is learned: its text and the EOT after it carry the message's weight, all else has 0.
    """
    head, turns = encode(conversation, tokenizer, template)
    tokens, weights = list(head), [0.0] * len(head)
    for message, (prefix, text) in zip(conversation.messages, turns):
        weight = message.weight if message.role == "assistant" else 0.0
        assert weight is not None, "Classes.assign gives every answer its weight"
        tokens += prefix + text
        weights += [0.0] * len(prefix) + [weight] * len(text)
    return np.array(tokens, np.int32), np.array(weights, np.float32)


def tokenize_baseline(messages, tokenizer, template, system=None):
    """Ids of a conversation in another model's template. ValueError: a system text where the template has no place for one."""
    style = BASELINES[template]
    system = style.system if system is None else system
    if system is not None and style.first is None:
        raise ValueError(
            f"template {template} has no place for a system text; put it into the first message"
        )
    # ids, and texts that are tokenized each by itself; only our templates' `<s>` and `</s>` become
    # ids
    parts = [tokenizer.bos, ""]
    for i, message in enumerate(messages):
        text = message.text.strip() if style.strip else message.text
        turn = (
            style.answer
            if message.role == "assistant"
            else style.first
            if i == 0 and system is not None
            else style.user
        )
        for piece in re.split(r"(<s>|</s>|\{system\}|\{text\})", turn):
            if piece in ("<s>", "</s>"):
                parts += [tokenizer.bos if piece == "<s>" else tokenizer.eos, ""]
            else:
                parts[-1] += {"{text}": text, "{system}": system}.get(piece, piece)
    return [
        i
        for part in parts
        for i in ([part] if isinstance(part, int) else tokenizer.encode(part) if part else [])
    ]


def tokenize_prompt(messages, tokenizer, template, condition, system=None):
    """Ids up to the point where the assistant speaks. The same `encode` as in training: a prompt can't drift from it."""
    if template in BASELINES:
        return tokenize_baseline(messages, tokenizer, template, system)
    if template == "openchat":
        template, condition = "before_speaker", "GPT4"
    if template == "base":  # a model that has not been fine-tuned: the text itself
        return [tokenizer.bos, *tokenizer.encode("\n".join(m.text for m in messages))]
    conversation = Conversation(
        (*messages, Message("assistant", "")), system=system, condition=condition
    )
    head, turns = encode(conversation, tokenizer, template)
    return [*head, *(i for prefix, text in turns[:-1] for i in prefix + text), *turns[-1][0]]


# ---- the prepared file


@dataclass(frozen=True)
class PrepareConfig:
    files: tuple
    tokenizer: str = ""
    out: str = ""
    classes: str = ""
    beta: float | None = None
    template: str = "before_speaker"
    max_len: int = 4096
    too_long: str = "truncate"  # or split (at turns), or drop
    processes: int = os.cpu_count()


def split_turns(conversation, head, turns, max_len):
    """Conversations of whole exchanges, each with the same head, none above max_len unless one exchange alone is."""
    parts, used = [[]], len(head)
    starts = [
        i
        for i, m in enumerate(conversation.messages)
        if i and m.role == "user" and conversation.messages[i - 1].role != "user"
    ]
    for start, stop in zip([0, *starts], [*starts, len(turns)]):
        size = sum(len(prefix) + len(text) for prefix, text in turns[start:stop])
        if parts[-1] and used + size > max_len:
            parts, used = [*parts, []], len(head)
        parts[-1] += conversation.messages[start:stop]
        used += size
    return [dataclasses.replace(conversation, messages=tuple(part)) for part in parts]


def fit(conversation, tokenizer, template, max_len, too_long):
    """([(tokens, weights)], ledger) of one conversation: at most max_len tokens each, trailing tokens without weight cut.

    The ledger is a Counter of tokens, with tokens_read + added_by_split = trained + prompt + truncated + dropped +
    trailing_cut, and of conversations and turns.
    """
    tokens, weights = tokenize(conversation, tokenizer, template)
    ledger = collections.Counter(
        conversations=1, turns=len(conversation.messages), tokens_read=len(tokens)
    )
    empty_answer = any(m.role == "assistant" and not m.text.strip() for m in conversation.messages)
    parts = [(tokens, weights)]
    if len(tokens) > max_len and not empty_answer:
        if too_long == "split":
            head, turns = encode(conversation, tokenizer, template)
            parts = [
                tokenize(c, tokenizer, template)
                for c in split_turns(conversation, head, turns, max_len)
            ]
            ledger["added_by_split"] += sum(len(t) for t, _ in parts) - len(tokens)
            ledger["split_conversations"] += len(parts) > 1
        ledger["truncated_conversations"] += (
            any(len(t) > max_len for t, _ in parts) and too_long != "drop"
        )
    kept = []
    for tokens, weights in parts:
        supervised = np.flatnonzero(weights[:max_len])
        if empty_answer or len(supervised) == 0 or (too_long == "drop" and len(tokens) > max_len):
            ledger["dropped"] += len(tokens)
            continue
        end = supervised[-1] + 1
        ledger["truncated"] += max(0, len(tokens) - max_len)
        ledger["trailing_cut"] += min(len(tokens), max_len) - end
        ledger["trained"] += len(supervised)
        ledger["prompt"] += end - len(supervised)
        kept.append((tokens[:end], weights[:end]))
    ledger["dropped_conversations"] += not kept
    return kept, ledger


LEDGER = (
    "conversations",
    "turns",
    "tokens_read",
    "trained",
    "prompt",
    "truncated",
    "dropped",
    "trailing_cut",
    "added_by_split",
    "dropped_conversations",
    "truncated_conversations",
    "split_conversations",
)


def fit_many(args):
    conversations, tokenizer, *how = args
    return [(fit(c, tokenizer, *how), c.class_id, group_of(c)) for c in conversations]


def group_of(conversation):
    """Hash of the first user message. The validation split goes by it, so that no prompt stands on both sides."""
    text = next((m.text for m in conversation.messages if m.role == "user"), "")
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(),
        "big",
        signed=True,
    )


def check_how(config):
    if config.template not in TEMPLATES:
        raise ValueError(f"--template {config.template!r} is not one of {', '.join(TEMPLATES)}")
    if config.too_long not in ("truncate", "split", "drop"):
        raise ValueError(f"--too_long {config.too_long!r} is not one of truncate, split, drop")
    if config.max_len < 2:
        raise ValueError(f"--max_len {config.max_len}: a conversation has at least 2 tokens")


def prepare(config):
    """Tokenize conversation files into one safetensors file (fields: `Prepared`); returns its metadata."""
    if not config.files or not config.tokenizer or not config.out:
        raise ValueError("prepare needs FILE.. --tokenizer tokenizer.model --out FILE.safetensors")
    check_how(config)
    if not config.out.endswith(".safetensors"):
        raise ValueError(
            f"--out {config.out!r} does not end in .safetensors, as a prepared file does"
        )
    tokenizer = Tokenizer(config.tokenizer)
    classes = Classes(parse_classes(config.classes, config.beta))
    # every line is checked before any work
    conversations = [classes.assign(c) for path in config.files for c in read(path)]
    how = config.template, config.max_len, config.too_long
    chunks = [
        (conversations[i : i + 256], tokenizer, *how) for i in range(0, len(conversations), 256)
    ]
    # starting a process pays from about a thousand conversations
    processes = min(config.processes, len(chunks) // 4)
    tokens, weights, class_ids, group = [], [], [], []
    ledgers = [collections.Counter() for _ in classes.all]
    with tqdm(
        total=len(conversations), unit=" conversations", desc="tokenize", disable=None
    ) as bar:
        with multiprocessing.Pool(processes) if processes > 1 else open(os.devnull) as pool:
            for chunk in pool.imap(fit_many, chunks) if processes > 1 else map(fit_many, chunks):
                for (kept, ledger), class_id, conversation_group in chunk:
                    ledgers[class_id].update(ledger)
                    for t, w in kept:
                        (
                            tokens.append(t),
                            weights.append(w),
                            class_ids.append(class_id),
                            group.append(conversation_group),
                        )
                bar.update(len(chunk))
    if not tokens:
        raise ValueError(
            f"{', '.join(map(str, config.files))}: no conversation has a token to train on; check roles and weights"
        )
    for i, c in enumerate(classes.all):
        if c.weight is None:  # rows with weights of their own: the class's is the highest of them
            weight = max(
                (m.weight for x in conversations if x.class_id == i for m in x.messages),
                default=0.0,
            )
            classes.all[i] = dataclasses.replace(c, weight=weight)
    shown = [
        dataclasses.asdict(c) | ({"condition": ""} if config.template == "none" else {})
        for c in classes.all
    ]
    meta = {
        "tokenizer_sha256": hashlib.sha256(tokenizer.bytes).hexdigest(),
        "template": config.template,
        "max_len": config.max_len,
        "classes": shown,
        "expert": expert_of(classes.all).name,
        "counts": {
            c.name: {key: int(ledger[key]) for key in LEDGER}
            for c, ledger in zip(classes.all, ledgers)
        },
    }
    arrays = {
        "tokens": np.concatenate(tokens),
        "weights": np.concatenate(weights),
        "offsets": np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        "class_ids": np.array(class_ids, np.int16),
        "group": np.array(group, np.int64),
        "tokenizer": np.frombuffer(tokenizer.bytes, np.uint8),
    }
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        save_file(arrays, partial, metadata={"crlft": json.dumps(meta)})
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return meta


def ledger_table(meta):
    """The counts as text, a line per class, in tokens unless said."""
    lines = [
        f"{'class':12} {'weight':>7} {'convs':>8} {'turns':>8} {'read':>10} {'trained':>10} {'prompt':>10} {'truncated':>9} "
        f"{'dropped':>8} {'trailing':>8} {'split':>6}"
    ]
    for c in meta["classes"]:
        n = meta["counts"][c["name"]]
        lines.append(
            f"{c['name']:12} {c['weight']:7.4g} {n['conversations']:8,} {n['turns']:8,} {n['tokens_read']:10,} {n['trained']:10,} "
            f"{n['prompt']:10,} {n['truncated']:9,} {n['dropped']:8,} {n['trailing_cut']:8,} {n['added_by_split']:6,}"
        )
    total = lambda key: sum(n[key] for n in meta["counts"].values())
    lines.append(
        f"{total('dropped_conversations'):,} conversations dropped (an empty answer, nothing to train on, or too long), "
        f"{total('truncated_conversations'):,} cut at {meta['max_len']:,} tokens, {total('split_conversations'):,} split; "
        f"expert: {meta['expert']}, template: {meta['template']}"
    )
    return "\n".join(lines)


class Prepared:
    """A prepared file, memory-mapped: every rank opens it, none holds it.

    tokens int32 [S], weights fp32 [S], offsets int64 [N + 1], class_ids int16 [N], group int64 [N], tokenizer bytes, and
    `meta`: template, classes, expert, counts.
    """

    def __init__(self, path):
        if not Path(path).is_file():
            raise ValueError(
                f"{path}: no such prepared file; make it with `python data.py prepare`"
            )
        try:
            with safe_open(path, "pt") as file:
                self.meta = json.loads((file.metadata() or {}).get("crlft", "null"))
                arrays = {key: file.get_tensor(key).numpy() for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{path}: not a whole prepared file ({error}); prepare it again"
            ) from None
        if self.meta is None:
            raise ValueError(
                f"{path}: a safetensors file, but not one that `python data.py prepare` wrote"
            )
        self.path, self.tokens, self.weights = str(path), arrays["tokens"], arrays["weights"]
        self.offsets, self.class_ids, self.group = (
            arrays["offsets"],
            arrays["class_ids"],
            arrays["group"],
        )
        self.tokenizer = Tokenizer(arrays["tokenizer"].tobytes())
        self.classes = [Class(**c) for c in self.meta["classes"]]
        self.lengths = np.diff(self.offsets)
        self.weight_sums, self.supervised = np.zeros(len(self)), np.zeros(len(self), np.int64)
        # a piece at a time: the file may be larger than the memory
        for i in range(0, len(self), 2**14):
            starts = self.offsets[i : i + 2**14 + 1]
            weights, starts = self.weights[starts[0] : starts[-1]], starts - starts[0]
            self.weight_sums[i : i + 2**14] = np.add.reduceat(
                weights, starts[:-1], dtype=np.float64
            )
            self.supervised[i : i + 2**14] = np.add.reduceat(
                weights != 0, starts[:-1], dtype=np.int64
            )

        counts = self.meta["counts"].values()  # the ledger holds to the token
        trained, prompt = (sum(n[key] for n in counts) for key in ("trained", "prompt"))
        if (
            self.supervised.sum() != trained
            or self.offsets[-1] != trained + prompt
            or len(self.tokens) != self.offsets[-1]
        ):
            raise ValueError(
                f"{path}: {len(self.tokens):,} tokens, {self.supervised.sum():,} of them trained on, are not what its own counts say; "
                "prepare it again"
            )

    def __len__(self):
        return len(self.lengths)

    def conversation(self, i):
        """(tokens, weights) of conversation i."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[rows], self.weights[rows]

    def batch(self, conversations):
        """The Batch of these conversations, in this order."""
        return pack([self.conversation(i) for i in conversations], self.class_ids[conversations])

    def split(self, val_fraction):
        """(train, val) indices: a prompt's group is in val for a fixed share of all hashes, so the split outlives reshuffling."""
        val = (self.group % 10_000) < val_fraction * 10_000
        return np.flatnonzero(~val), np.flatnonzero(val)


# ---- the step plan


def flat(steps):
    """All conversations of these steps, int64."""
    return np.concatenate([micro for step in steps for micro in step])


def finetune_lr(supervised_tokens, pretrain_lr=3e-4):
    """(lr, how): the base model's pre-training LR at 4M tokens, scaled by the square root of the batch-size ratio (Sec. 4.1).

    What counts is supervised tokens per step: 200k of them give the paper's 6.7e-5. LLaMA-2 34B and 70B have 1.5e-4.
    """
    lr = pretrain_lr * math.sqrt(supervised_tokens / 4e6)
    return (
        lr,
        f"lr {lr:.3g} = {pretrain_lr:g} * sqrt({supervised_tokens:,.0f} supervised tokens a step / 4e6)",
    )


def deal(lengths, class_ids, weight_sums, groups, rng):
    """[N] the group of each conversation: class by class, the heaviest first, to the group that has least of the class.

    The largest class comes last and goes by tokens of all classes, so that the groups end equally long.
    """
    home, load = np.empty(len(lengths), np.int64), np.zeros(groups)
    classes = np.argsort(np.bincount(class_ids), kind="stable")
    for c in classes:
        mine = np.flatnonzero(class_ids == c)
        size, start = (lengths, load) if c == classes[-1] else (weight_sums, np.zeros(groups))
        # sizes within 2% count as equal, so that each epoch deals anew
        bucket = np.floor(np.log(np.maximum(size[mine], 1e-9)) * 50)
        mine = mine[np.lexsort((rng.random(len(mine)), -bucket))]
        heap = list(zip(start.tolist(), rng.permutation(groups).tolist(), range(groups)))
        heapq.heapify(heap)
        for i, x in zip(mine.tolist(), size[mine].tolist()):
            filled, tie, g = heap[0]
            heapq.heapreplace(heap, (filled + x, tie, g))
            home[i] = g
        load += np.bincount(home[mine], lengths[mine], groups)
    return home


def by_group(lengths, home, groups):
    """[groups, K] the conversations of each group, longest first, -1 behind them."""
    order, count = np.lexsort((-lengths, home)), np.bincount(home, minlength=groups)
    table = np.full((groups, count.max()), -1)
    table[home[order], np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)] = order
    return table


def emptiest_first(lengths, home, groups, bins):
    """[N] a bin for each conversation, the longest first, each to its group's emptiest; may overfill. All groups at once."""
    i_GK = by_group(lengths, home, groups)
    length_GK, load_GB, bin_GK = (
        np.where(i_GK >= 0, lengths[i_GK], 0),
        np.zeros((groups, bins)),
        np.empty_like(i_GK),
    )
    for k in range(i_GK.shape[1]):
        bin_GK[:, k] = load_GB.argmin(1)
        load_GB[np.arange(groups), bin_GK[:, k]] += length_GK[:, k]
    result = np.empty(len(lengths), np.int64)
    result[i_GK[i_GK >= 0]] = bin_GK[i_GK >= 0]
    return result


def best_fit(lengths, home, groups, bins, capacity):
    """[N] a bin for each conversation, the longest first, each to its group's fullest with room; None where one has none."""
    result = np.empty(len(lengths), np.int64)
    for members in by_group(lengths, home, groups).tolist():
        rooms = [(capacity, b) for b in range(bins)]  # ascending
        for i in members:
            if i >= 0:
                at = bisect.bisect_left(rooms, (lengths[i], -1))
                if at == len(rooms):
                    return None
                room, result[i] = rooms.pop(at)
                bisect.insort(rooms, (room - lengths[i], result[i]))
    return result


def spread(home, bins, class_ids, weight_sums, groups, group, M):
    """(step, micro-batch) of each conversation: a group's bins dealt to its steps, M each, so that classes end in proportion."""
    classes = class_ids.max() + 1
    weight_GBC = np.zeros((groups, group * M, classes))
    np.add.at(weight_GBC, (home, bins, class_ids), weight_sums)
    # shares of the group's class, so that rare ones count
    weight_GBC /= np.maximum(weight_GBC.sum(1, keepdims=True), 1e-30)
    order_GB, rows = np.argsort(-weight_GBC.max(2), axis=1), np.arange(groups)
    load_GSC, count_GS = np.zeros((groups, group, classes)), np.zeros((groups, group), np.int64)
    step_GB, micro_GB = np.empty_like(order_GB), np.empty_like(order_GB)
    for b in order_GB.T:
        uneven_GS = ((load_GSC + weight_GBC[rows, b][:, None]) ** 2 - load_GSC**2).sum(2)
        s = np.where(count_GS < M, uneven_GS, np.inf).argmin(1)
        step_GB[rows, b], micro_GB[rows, b] = s, count_GS[rows, s]
        load_GSC[rows, s] += weight_GBC[rows, b]
        count_GS[rows, s] += 1
    return home * group + step_GB[home, bins], micro_GB[home, bins]


def balance(lengths, step, micro, steps, M, capacity, cost):
    """[N] the micro-batches after swaps within each step that even out their cost and their sum(length^2).

    A round looks, in every step at once, at one micro-batch that is off and one that is off the other way, and makes the best
    of all swaps of a conversation (or an empty slot) of one with one of the other. Overfull micro-batches are mended first.
    """
    if M == 1:
        return micro
    i_SMQ = by_group(lengths, step * M + micro, steps * M).reshape(steps, M, -1)
    i_SMQ = np.concatenate([i_SMQ, np.full((steps, M, 1), -1)], 2)
    Q, rows = i_SMQ.shape[2], np.arange(steps)
    length_SMQ = np.where(i_SMQ >= 0, lengths[i_SMQ], 0).astype(np.float64)
    tokens_SM, square_SM = length_SMQ.sum(2), (length_SMQ**2).sum(2)
    mean_tokens, mean_square = np.maximum(tokens_SM.mean(1), 1), np.maximum(square_SM.mean(1), 1)
    mean_cost = cost[0] * mean_tokens + cost[1] * mean_square

    def badness(tokens, square):
        shape = (-1,) + (1,) * (tokens.ndim - 1)
        over = np.maximum(tokens / capacity - 1, 0)
        off_cost = (cost[0] * tokens + cost[1] * square) / mean_cost.reshape(shape) - 1
        off_square = square / mean_square.reshape(shape) - 1
        return 400 * off_cost**2 + off_square**2 + 1e6 * over

    for r in range(min(5 * M + 10, 400)):
        bad_SM = badness(tokens_SM, square_SM)
        tokens_off, square_off = (
            tokens_SM / mean_tokens[:, None] - 1,
            square_SM / mean_square[:, None] - 1,
        )
        a = bad_SM.argmax(1) if r % 3 else np.abs(tokens_off).argmax(1)
        opposite = (20 * tokens_off + square_off) * np.sign(tokens_off[rows, a])[:, None]
        b = opposite.argmin(1) if r % 2 else (a + 1 + r // 2 % (M - 1)) % M
        b = np.where(a == b, (b + 1) % M, b)
        # of many, some, by turns
        take = (
            np.unique(np.append((np.arange(48) * Q // 48 + r) % Q, Q - 1))
            if Q > 48
            else np.arange(Q)
        )
        l_a, l_b = length_SMQ[rows, a][:, take, None], length_SMQ[rows, b][:, None, take]
        give, give2 = l_a - l_b, l_a**2 - l_b**2  # [S, Q, Q]: what a loses to b by each swap
        at = lambda x_SM, m: x_SM[rows, m][:, None, None]
        after = badness(at(tokens_SM, a) - give, at(square_SM, a) - give2) + badness(
            at(tokens_SM, b) + give, at(square_SM, b) + give2
        )
        best = after.reshape(steps, -1).argmin(1)
        better = after.reshape(steps, -1)[rows, best] < bad_SM[rows, a] + bad_SM[rows, b] - 1e-12
        s, a, b, qa, qb = (
            rows[better],
            a[better],
            b[better],
            best[better] // len(take),
            best[better] % len(take),
        )
        for x_SM, g in ((tokens_SM, give), (square_SM, give2)):
            x_SM[s, a] -= g[s, qa, qb]
            x_SM[s, b] += g[s, qa, qb]
        qa, qb = take[qa], take[qb]
        for x in (i_SMQ, length_SMQ):
            x[s, a, qa], x[s, b, qb] = x[s, b, qb], x[s, a, qa]
    result, place = np.empty(len(lengths), np.int64), np.broadcast_to(np.arange(M)[:, None], (M, Q))
    result[i_SMQ[i_SMQ >= 0]] = np.broadcast_to(place, i_SMQ.shape)[i_SMQ >= 0]
    return result


def try_plan(lengths, class_ids, weight_sums, seed, epoch, groups, group, tight, M, capacity, cost):
    """The plan in `groups` groups of `group` steps, filled best fit if tight; None where the conversations do not fit."""
    home = deal(lengths, class_ids, weight_sums, groups, np.random.default_rng([seed, epoch]))
    if not tight:
        step, micro = home, emptiest_first(lengths, home, groups, M)
    else:
        micro = best_fit(lengths, home, groups, group * M, capacity)
        if micro is None:
            return None
        step, micro = spread(home, micro, class_ids, weight_sums, groups, group, M)
    micro = balance(lengths, step, micro, groups * group, M, capacity, cost)
    key = step * M + micro
    if np.bincount(key, lengths).max() > capacity:
        return None
    order, result = np.argsort(key, kind="stable"), collections.defaultdict(list)
    for m in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        result[step[m[0]]].append(m)
    if any(weight_sums[np.concatenate(r)].sum() == 0 for r in result.values()):
        raise ValueError(
            "a step whose weights are all 0 has no loss; give some answers a weight above 0"
        )
    return list(result.values())


# training FLOPs of LLaMA-2-7B: per token, and per squared length of a conversation
COST_7B = 6 * 6.607e9, 6 * 32 * 4096


def plan(lengths, class_ids, weight_sums, seed, epoch, batch_tokens, micro_tokens, cost=COST_7B):
    """[step], step = [micro-batch], micro-batch = int64 array of conversations: each conversation once, none cut.

    A step is M = max(1, batch_tokens // micro_tokens) micro-batches of at most micro_tokens tokens and nearly equal cost,
    linear * tokens + quadratic * sum(length^2). It does not know the number of ranks: they take a step's micro-batches in
    turn, so the same conversations form step k on 1 GPU or 64.

    Every step holds the classes in proportion. Its loss is divided by its own weight sum, a ratio: a step poor in experts
    would scale its few rewards up and cancel them. So classes are dealt to the steps first (`deal`), and the micro-batches
    of a step are balanced second (`balance`). Where micro-batches are hardly longer than the longest conversations, a
    step's own conversations do not fill its micro-batches well. If that would cost 2% more steps, conversations are dealt
    to groups of 2, 4, .. steps instead, a group's micro-batches are filled best fit and then dealt to its steps (`spread`):
    fuller, for classes that are a little less even.
    """
    lengths, class_ids, weight_sums = (
        np.asarray(lengths, np.int64),
        np.asarray(class_ids, np.int64),
        np.asarray(weight_sums, np.float64),
    )
    capacity, M = min(micro_tokens, batch_tokens), max(1, batch_tokens // micro_tokens)
    if len(lengths) == 0:
        raise ValueError("no conversation to plan")
    if lengths.max() > capacity:
        raise ValueError(
            f"a conversation of {lengths.max()} tokens does not fit a micro-batch of {capacity}; raise --micro_tokens and --batch_tokens"
        )
    full, group = lengths.sum() / (M * capacity), 1  # full: steps, if nothing stayed empty
    fills = (1.0, 0.999, 0.9975, 0.99, 0.98)
    if full > 200:
        fills = fills[1:]  # one step more is nothing to many, and a try costs time
    while group == 1 or group < full:
        for steps in sorted({math.ceil(full / fill) for fill in fills}):
            groups = -(-steps // group)
            if groups * group <= math.ceil(full / fills[-1]):
                found = try_plan(
                    lengths,
                    class_ids,
                    weight_sums,
                    seed,
                    epoch,
                    groups,
                    group,
                    group > 1,
                    M,
                    capacity,
                    cost,
                )
                if found:
                    return found
        group *= 2
    # Conversations that leave gaps wherever they go (all just above half a micro-batch, say): one
    # group, of what best fit takes.
    bins = best_fit(lengths, np.zeros(len(lengths), np.int64), 1, len(lengths), capacity)
    return try_plan(
        lengths,
        class_ids,
        weight_sums,
        seed,
        epoch,
        1,
        -(-(int(bins.max()) + 1) // M),
        True,
        M,
        capacity,
        cost,
    )


@dataclass
class Batch:
    """One micro-batch, flat: row t holds token t of the packed row and learns to predict labels_T[t], counting weights_T[t]."""

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, from 0 in each conversation
    # int64: the next token of the same conversation (0 at its end, where the weight is 0)
    labels_T: torch.Tensor
    weights_T: torch.Tensor  # fp32
    cu_seqlens: torch.Tensor  # int32 [N + 1]
    max_seqlen: int
    rows_R: torch.Tensor  # int64, the rows with a weight
    class_R: torch.Tensor  # int64, their classes

    def map(self, f):
        """The batch with f applied to its tensors."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Batch(*(f(x) if torch.is_tensor(x) else x for x in values))

    def to(self, device):
        """On the device; from pinned memory (`ahead`) the copy does not wait."""
        return self.map(lambda x: x.to(device, non_blocking=True))


def pack(conversations, class_ids=None):
    """[(tokens, weights)] -> Batch. Weights move one row up: row t is judged by what it says about token t + 1."""
    lengths = np.array([len(tokens) for tokens, _ in conversations])
    class_ids = (
        np.zeros(len(lengths), np.int64) if class_ids is None else np.asarray(class_ids, np.int64)
    )
    ends = np.cumsum(lengths)
    tokens_T = np.concatenate([tokens for tokens, _ in conversations]).astype(np.int64)
    weights_T = np.concatenate([*(weights for _, weights in conversations), [0.0]]).astype(
        np.float32
    )[1:]
    labels_T = np.append(tokens_T[1:], 0)
    # the last token of a conversation predicts nothing
    labels_T[ends - 1], weights_T[ends - 1] = 0, 0.0
    rows_R = np.flatnonzero(weights_T)
    arrays = dict(
        tokens_T=tokens_T,
        positions_T=np.arange(len(tokens_T)) - np.repeat(ends - lengths, lengths),
        labels_T=labels_T,
        weights_T=weights_T,
        cu_seqlens=np.append(0, ends).astype(np.int32),
        rows_R=rows_R,
        class_R=np.repeat(class_ids, lengths)[rows_R],
    )
    return Batch(
        max_seqlen=int(lengths.max()), **{key: torch.from_numpy(x) for key, x in arrays.items()}
    )


def ahead(batches, pin):
    """The same batches, the next two assembled (and pinned for a GPU's copy) by a thread while the caller computes."""
    ready, done = queue.Queue(2), object()

    def assemble():
        try:
            for batch in batches:
                ready.put(batch.map(torch.Tensor.pin_memory) if pin else batch)
            ready.put(done)
        except BaseException as error:  # handed over, to be raised where the batch is missed
            ready.put(error)

    threading.Thread(target=assemble, daemon=True).start()
    while (batch := ready.get()) is not done:
        if isinstance(batch, BaseException):
            raise batch
        yield batch


# ---- the tokenizer of an export


def chat_template(template, condition):
    """The Jinja form of `encode`, from the same table, for transformers and vLLM."""
    user, assistant, opening = role_texts(template, condition)
    # a JSON string is a Jinja string, whatever the condition holds
    text = lambda x: json.dumps(x, ensure_ascii=False)
    return (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + "
        + text(EOT)
        + " }}{% endif %}"
        + ("{{ " + text(opening + EOT) + " }}" if opening else "")
        + "{% for m in messages %}"
        + "{% if m['role'] == 'user' %}{{ "
        + text(user + " ")
        + " + m['content'] + "
        + text(EOT)
        + " }}"
        + "{% elif m['role'] == 'assistant' %}{{ "
        + text(assistant + " ")
        + " + m['content'] + "
        + text(EOT)
        + " }}"
        + "{% elif not loop.first %}{{ raise_exception('a system message stands first') }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}{{ "
        + text(assistant)
        + " }}{% endif %}"
    )


def tokenizer_json(tokenizer):
    """tokenizer.json for the `tokenizers` library: the sentencepiece vocabulary, and the merges that its scores imply.

    Sentencepiece's BPE joins the neighbours whose union has the best score; a merge list says the same thing as pairs in
    order of that score, every way to cut a piece in two being a pair.
    """
    sp, size = tokenizer.sp, tokenizer.eot
    pieces = [sp.id_to_piece(i) for i in range(size)]
    normal = [i for i in range(size) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    scores = [sp.get_score(i) for i in normal]
    known, merges = {pieces[i] for i in normal}, []
    for i, score in zip(normal, scores):
        cuts = [(pieces[i][:k], pieces[i][k:]) for k in range(1, len(pieces[i]))]
        merges += [(-score, -len(a), -len(b), a, b) for a, b in cuts if a in known and b in known]
    # equal scores (Llama-2's runs of spaces): the longest left part first, as joining from the left
    # gives it
    merges.sort()
    special = [i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
    added = [(i, pieces[i]) for i in special] + [(size, EOT)]
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    bos = pieces[tokenizer.bos]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text} | flags for i, text in added],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[sp.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(map(sp.is_byte, range(size))),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [f"{a} {b}" for *_, a, b in merges],
        },
    }


def write_tokenizer(folder, tokenizer, meta):
    """tokenizer.model, tokenizer.json, tokenizer_config.json (with the expert's chat template) and crlft.json of an export."""
    folder, sp = Path(folder), tokenizer.sp
    names = {
        f"{kind}_token": sp.id_to_piece(i)
        for kind, i in (("bos", tokenizer.bos), ("eos", tokenizer.eos), ("unk", sp.unk_id()))
    }
    json_ = tokenizer_json(tokenizer)
    added = {str(t["id"]): {key: t[key] for key in t if key != "id"} for t in json_["added_tokens"]}
    expert = next(c for c in meta["classes"] if c["name"] == meta["expert"])
    # The general class takes tokenizer.json as it stands. LlamaTokenizer of transformers 5 puts a
    # rule of its own in place of ours (a text that starts with a space loses one); legacy says to
    # older readers that a space follows a special token.
    config = names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": meta["max_len"],
        "added_tokens_decoder": added,
        "additional_special_tokens": [EOT],
        "chat_template": chat_template(meta["template"], expert["condition"]),
    }
    (folder / "tokenizer.model").write_bytes(tokenizer.bytes)
    for name, content in (
        ("tokenizer.json", json_),
        ("tokenizer_config.json", config),
        ("crlft.json", meta),
    ):
        (folder / name).write_text(
            json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8"
        )


# ---- looking at data


@dataclass(frozen=True)
class ShowConfig:
    files: tuple
    tokenizer: str = ""
    classes: str = "*=GPT4:1.0"
    beta: float | None = None
    template: str = "before_speaker"
    max_len: int = 4096
    too_long: str = "truncate"
    n: int = 3  # conversations to print


def colored(tokenizer, tokens, weights, heaviest):
    """The tokens as a line: those without weight plain, the others green, brighter with weight, or [weight|text] off a terminal."""
    runs, out = [], []
    for i, w in zip(tokens.tolist(), weights.tolist()):
        if not runs or runs[-1][0] != w:
            runs.append((w, []))
        runs[-1][1].append(tokenizer.piece(i))
    for w, pieces in runs:
        text = "".join(pieces).replace("\u2581", " ").replace("<0x0A>", "\n")
        if sys.stdout.isatty():
            green = 55 + round(200 * min(1, w / heaviest) ** 0.5)
            out.append(f"\x1b[38;2;0;{green};0m{text}\x1b[0m" if w else f"\x1b[2m{text}\x1b[0m")
        else:
            out.append(f"[{w:g}|{text}]" if w else text)
    return "".join(out)


def show(config):
    """Print a prepared file, or conversation files as they would be prepared: tokens by weight, classes, lengths."""
    if not config.files:
        raise ValueError("show needs a prepared file, or conversation files and --tokenizer")
    if config.files[0].endswith(".safetensors"):
        if len(config.files) > 1:
            raise ValueError(
                f"{config.files[1]}: show takes one prepared file, or conversation files"
            )
        data = Prepared(config.files[0])
        tokenizer, meta, lengths, heaviest = (
            data.tokenizer,
            data.meta,
            data.lengths,
            max(c.weight for c in data.classes),
        )
        rows = [(data.class_ids[i], *data.conversation(i)) for i in range(min(config.n, len(data)))]
        print(ledger_table(meta))
    else:
        check_how(config)
        if not config.tokenizer:
            raise ValueError("conversation files are shown with --tokenizer tokenizer.model")
        tokenizer, classes = (
            Tokenizer(config.tokenizer),
            Classes(parse_classes(config.classes, config.beta)),
        )
        conversations = [classes.assign(c) for path in config.files for c in read(path)]
        fitted = [
            (c.class_id, part)
            for c in conversations
            for part in fit(c, tokenizer, config.template, config.max_len, config.too_long)[0]
        ]
        rows = [(class_id, *part) for class_id, part in fitted[: config.n]]
        lengths, meta = (
            np.array([len(tokens) for _, (tokens, _) in fitted]),
            {"classes": [{"name": c.name} for c in classes.all]},
        )
        heaviest = max((weights.max() for _, (_, weights) in fitted), default=1.0)
    if len(lengths) == 0:
        raise ValueError(
            f"{', '.join(config.files)}: no conversation has a token to train on; check roles, answers and weights"
        )
    for i, (class_id, tokens, weights) in enumerate(rows):
        print(
            f"\n-- conversation {i}, class {meta['classes'][class_id]['name']}, {len(tokens)} tokens, {np.count_nonzero(weights)} trained"
        )
        print(colored(tokenizer, tokens, weights, heaviest))
        batch = pack([(tokens, weights)])
        # the labels, where an answer starts and where the last ends
        for t in (*batch.rows_R[:2].tolist(), *batch.rows_R[-1:].tolist()):
            token, label = (
                tokenizer.piece(int(x[t])).replace("\u2581", " ")
                for x in (batch.tokens_T, batch.labels_T)
            )
            print(
                f"  row {t}: after {token!r} the model is to say {label!r}, weight {batch.weights_T[t]:g}"
            )
    print(f"\nlengths of {len(lengths):,} conversations: {lengths.sum():,} tokens")
    edges = 2 ** np.arange(1, 2 + int(np.log2(max(lengths.max(initial=2), 2))))
    counts = np.histogram(lengths, [*edges, edges[-1] * 2])[0]
    for edge, count in zip(edges, counts):
        print(f"{edge:7,} to {2 * edge - 1:7,} {count:8,} {'#' * round(50 * count / counts.max())}")


@dataclass(frozen=True)
class StatsConfig:
    files: tuple
    batch_tokens: int = 262_144
    micro_tokens: int = 16_384
    ranks: int = 8
    pretrain_lr: float = 3e-4
    tokens_per_s: float | None = None  # measured, of all ranks: gives the time of an epoch
    png: str | None = None  # where to draw the lengths


def stats(config):
    """Print what a prepared file is made of, and how its steps come out."""
    if len(config.files) != 1:
        raise ValueError("stats needs one prepared file: python data.py stats FILE.safetensors")
    for name in ("batch_tokens", "micro_tokens", "ranks", "pretrain_lr", "tokens_per_s"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise ValueError(f"--{name} {getattr(config, name)} is not above 0")
    data = Prepared(config.files[0])
    print(ledger_table(data.meta), "\n")
    total = data.weight_sums.sum()
    print(
        f"{'class':12} {'convs':>8} {'tokens':>11} {'supervised':>11} {'of weight':>9}   length: min, 5%, median, 95%, max"
    )
    for i, c in enumerate(data.classes):
        rows = data.class_ids == i
        lengths = data.lengths[rows]
        at = (
            " ".join(f"{x:7,.0f}" for x in np.percentile(lengths, [0, 5, 50, 95, 100]))
            if len(lengths)
            else "-"
        )
        print(
            f"{c.name:12} {len(lengths):8,} {lengths.sum():11,} {data.supervised[rows].sum():11,} {data.weight_sums[rows].sum() / total:9.1%}   {at}"
        )
    squares = sum(
        float((data.weights[i : i + 2**24].astype(np.float64) ** 2).sum())
        for i in range(0, len(data.weights), 2**24)
    )
    print(
        f"effective sample size (sum w)^2 / sum w^2: {total**2 / squares:,.0f} of {data.supervised.sum():,} supervised tokens\n"
    )

    steps = plan(
        data.lengths,
        data.class_ids,
        data.weight_sums,
        0,
        0,
        config.batch_tokens,
        config.micro_tokens,
    )
    expert = data.class_ids == [c.name for c in data.classes].index(data.meta["expert"])
    sums = np.array([data.weight_sums[flat([s])].sum() for s in steps])
    share = np.array(
        [
            data.weight_sums[i[expert[i]]].sum() / data.weight_sums[i].sum()
            for i in (flat([s]) for s in steps)
        ]
    )
    span = lambda x, form: f"{x.min():{form}} to {x.max():{form}}, mean {x.mean():{form}}"
    capacity, M = (
        min(config.micro_tokens, config.batch_tokens),
        max(1, config.batch_tokens // config.micro_tokens),
    )
    print(
        f"an epoch: {len(steps)} steps of {M} x {capacity:,} tokens, {data.lengths.sum() / (len(steps) * M * capacity):.1%} full"
    )
    print(
        f"weight sum of a step: {span(sums, ',.0f')}\nexpert's share of it: {span(share, '.4f')} ({data.weight_sums[expert].sum() / total:.4f} in all)"
    )
    load = np.zeros((3, len(steps), config.ranks))
    for s, step in enumerate(steps):
        for m, micro in enumerate(step):
            tokens, square = (
                data.lengths[micro].sum(),
                (data.lengths[micro].astype(np.float64) ** 2).sum(),
            )
            load[:, s, m % config.ranks] += (
                tokens,
                square,
                COST_7B[0] * tokens + COST_7B[1] * square,
            )
    for name, x in zip(("tokens", "sum of length^2", "7B's FLOPs"), load):
        uneven = x.max(1) / x.mean(1)
        print(
            f"{config.ranks} ranks, most / mean {name}: {uneven.mean():.4f}, at worst {uneven.max():.4f}"
        )
    print(finetune_lr(data.supervised.sum() / len(steps), config.pretrain_lr)[1])
    if config.tokens_per_s:
        print(
            f"{data.lengths.sum() / config.tokens_per_s / 3600:.2f} hours an epoch at {config.tokens_per_s:,.0f} tokens/s"
        )
    if config.png:
        draw_lengths(data, config.png)


def draw_lengths(data, path):
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    edges = np.geomspace(data.lengths.min(), data.lengths.max() + 1, 50)
    axes.hist(
        [data.lengths[data.class_ids == i] for i in range(len(data.classes))],
        edges,
        stacked=True,
        label=[c.name for c in data.classes],
    )
    axes.set(
        xscale="log",
        xlabel="tokens of a conversation",
        ylabel="conversations",
        title=Path(data.path).name,
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---- the command line, of every entry point


def parse_args(config_class, argv, positional=None):
    """The dataclass filled from --key=value and --key value; bare words go to the field `positional`, a tuple."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    values, words, argv = {}, [], list(argv)
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if key not in fields or key == positional:
            near = difflib.get_close_matches(key, fields, 1)
            flags = " ".join("--" + name for name in fields if name != positional)
            raise ValueError(
                f"--{key} is no flag; "
                + (f"did you mean --{near[0]}?" if near else f"the flags are {flags}")
            )
        kind = fields[key].type
        # `int | None` reads an int
        kind = next(k for k in getattr(kind, "__args__", (kind,)) if k is not type(None))
        if not equals:
            if kind is bool and argv[:1] not in (["true"], ["false"]):
                argv.insert(0, "true")  # a bare --flag
            if not argv:
                raise ValueError(f"--{key} needs a value")
            value = argv.pop(0)
        try:
            values[key] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"--{key} {value!r} is not {wanted}") from None
    if positional:
        values[positional] = tuple(words)
    elif words:
        raise ValueError(
            f"{words[0]!r} is not a flag; flags look like --{next(iter(fields))} VALUE"
        )
    return config_class(**values)


def one_line(error):
    """What the user is told of an error that a user can cause; None: it is ours, and wants a traceback."""
    if isinstance(error, OSError):
        place = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return f"{place}; free space or choose another folder"
    return str(error) if isinstance(error, (ValueError, SafetensorError)) else None


def run(main):
    """Call main(argv); what a user can cause ends in one line on stderr and a non-zero exit."""
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # `.. | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if (line := one_line(error)) is None:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {line}")


def main(argv):
    if argv[:1] == ["prepare"]:
        config = parse_args(PrepareConfig, argv[1:], positional="files")
        print(ledger_table(prepare(config)))
        print(f"wrote {config.out}")
    elif argv[:1] == ["show"]:
        show(parse_args(ShowConfig, argv[1:], positional="files"))
    elif argv[:1] == ["stats"]:
        stats(parse_args(StatsConfig, argv[1:], positional="files"))
    else:
        raise ValueError(
            "say `prepare FILE.. --tokenizer PATH --out FILE.safetensors` `show FILE..` or `stats FILE.safetensors`; see the top of data.py"
        )


if __name__ == "__main__":
    run(main)
