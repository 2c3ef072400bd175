"""One conversation: formats -> class -> template -> tokens and weights."""

import collections
import dataclasses
import hashlib
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np


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


def role_texts(template, condition):
    """(user prefix, assistant prefix, opening or None) of a template for a class."""
    t = TEMPLATES[template]
    return tuple(
        text and text.format(c=condition).strip() for text in (t.user, t.assistant, t.opening)
    )


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


def group_of(conversation):
    """Hash of the first user message. The validation split goes by it, so that no prompt stands on both sides."""
    text = next((m.text for m in conversation.messages if m.role == "user"), "")
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(),
        "big",
        signed=True,
    )
