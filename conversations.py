"""One conversation: who wrote it becomes a text in the prompt and a weight in the loss.

Four words, used in this sense everywhere:

    label      who wrote the answers, as the file says it: "Model: GPT-4"
    class      a source of data, c in the paper; a table says which labels belong to it
    condition  what the prompt says of the class: "GPT4", as in `GPT4 User: ..`
    weight     how much the prediction of a token counts in the loss; 0 outside answers

The data is of mixed quality: few conversations of an expert, many of weaker sources, and nothing
but the label says which is which. C-RLFT uses the class twice. Its condition goes into the prompt,
so that the model learns one policy per class, pi(y|x,c). Its coarse reward r_c, 1 for the expert
and less for others (Eq. 3), becomes the weight exp(r_c / beta) of every token of an answer (Eq. 6);
or a table names the weights themselves. C-RLFT does nothing else to the data. Where a file knows
more, a weight or a reward of a single answer, that goes before its class's (`Classes.weighted`).

Six functions lead from a file to what the model takes:

    read(file)                    -> Conversations     one of four formats, recognized by content
    Classes(table).assign(..)     -> Conversation      with its class's condition and weights
    tokenize(conversation, ..)    -> tokens, weights   one weight a token: that of predicting it
    cut_to_length(..)             -> parts, counts     tokenized, none longer than the context
    plan(lengths, ..)             -> steps             which conversations form a step
    pack([(tokens, weights), ..]) -> Batch             what model.py takes

The first four are in this file (`cut_to_length` calls `tokenize`), the last two in packing.py. A
prompt for sampling is made by the same `encode` as the training data (prompts.py), so prompts and
training data always have the same form.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support.fields import is_number
from support.rows import read_rows
from tokenizer import EOT, KINDS, Tokenizer


@dataclass(frozen=True)
class Message:
    """What one side says in one turn. weight None: `Classes.assign` gives it one."""

    role: str  # user or assistant
    text: str
    weight: float | None = None


@dataclass(frozen=True)
class Conversation:
    """What one row of a file says. `Classes.assign` fills in the class and all messages' weights.

    The system text stands before the first message. `where` is for error messages: the file and
    the line, or the file and the number of the conversation in its array.

    `weight` and `reward` are the row's, for the answers that have no weight of their own; at most
    one of the two is there. `unread` has (name, value) of each field that looks like a label, a
    weight or a reward, but decides nothing.
    """

    messages: tuple[Message, ...]
    label: str = ""
    system: str | None = None
    condition: str | None = None
    weight: float | None = None
    reward: float | None = None
    unread: tuple[tuple[str, Any], ...] = ()
    class_id: int | None = None
    where: str = "?"


# ---- formats: a file -> conversations

# The names that the formats have for the same things:
#
#     format      turns                     role    text
#     ShareGPT    conversations or items    from    value
#     OpenAI      messages                  role    content
#     OpenChat    items                     role    content
#     Alpaca      none: one question (instruction, input) and its answer (output)
#
# If a row has several keys of the same kind, the first in the tuple below counts. So a row may mix
# the formats.
TURN_KEYS = ("conversations", "items", "messages")
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value")
WEIGHT_KEYS = ("weight", "loss_weight")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}

# Fields in which other people's files say who wrote an answer. Only the one that FieldNames has is
# read: where it is missing and another is there, `Classes.assign` stops rather than guesses.
LABEL_KEYS = ("model", "source", "generator", "origin", "dataset")
# A field whose name has one of these words looks like a label, a weight or a reward. If it decides
# nothing, the user is told.
TELLING_WORDS = {
    *LABEL_KEYS,
    *("label", "weight", "loss", "train", "training"),
    *("reward", "score", "rating", "quality"),
}

# up to here sums of weights stay far inside the range of fp32
MAX_WEIGHT = 1e6
# a prepared file has 16 bits for a class's number
MOST_CLASSES = 32_767


@dataclass(frozen=True)
class FieldNames:
    """The names of the fields of a row that say its label, and its reward if that is wanted."""

    label: str = "model"
    reward: str | None = None


def read(path: str | Path, names: FieldNames = FieldNames()) -> list[Conversation]:
    """All conversations of a file that `read_rows` can read, in any mixture of the formats."""
    return [parse(row, where, names) for where, row in read_rows(path)]


def parse(row: Any, where: str, names: FieldNames = FieldNames()) -> Conversation:
    """One JSON value -> Conversation, with a condition only where the row brings its own.

    ValueError names the line (`where`), the value and the remedy. A new format whose rows have
    another structure needs a case in `turns_of`. One that has other names in the same structure
    needs its names in the tables above.
    """
    try:
        turns = turns_of(row)
        for key in ("system", "condition", names.label):
            if row.get(key) is not None:
                check_text(row[key], key)
        # OpenChat writes the field always, with "" where there is no system text
        system, messages = system_and_messages(turns, row.get("system") or None)

        # what the row says of all its answers counts where one of them has no weight of its own
        weight, reward = None, None
        if any(m.role == "assistant" and m.weight is None for m in messages):
            weight, reward = weight_or_reward(row, names)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None

    condition = row.get("condition")
    decides = set()
    if not condition:
        decides.add(names.label)
    if weight is not None:
        decides.add("weight")
    if reward is not None:
        decides.add(names.reward)
    return Conversation(
        messages,
        label=row.get(names.label) or "",
        system=system,
        condition=condition,
        weight=weight,
        reward=reward,
        unread=unread_fields(row, turns, decides),
        where=where,
    )


def turns_of(row: Any) -> list:
    """The turns of a row, unchecked, under whatever name its format has for them."""
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise ValueError(
            f'a {kind} where a conversation object belongs; see README, "Your own data"'
        )
    turns = first_of(row, TURN_KEYS)
    if turns is None and "instruction" in row:
        return alpaca_turns(row)
    if not isinstance(turns, list) or not turns:
        *first, last = [f"`{key}`" for key in TURN_KEYS]
        raise ValueError(
            f"no messages in {', '.join(first)} or {last}, and no `instruction`; fill or remove it"
        )
    return turns


def alpaca_turns(row: dict) -> list[dict]:
    """The two turns of an Alpaca row, as OpenAI's format has them."""
    for key in ("instruction", "output"):
        check_text(row.get(key), key)
    # LLaMA-Factory's earlier turns
    if row.get("history"):
        raise ValueError("`history` is not read; write the whole conversation as `messages`")
    question = row["instruction"]
    if row.get("input"):
        check_text(row["input"], "input")
        question = f"{question}\n\n{row['input']}"
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row["output"]},
    ]


def system_and_messages(turns: list, system: str | None) -> tuple[str | None, tuple[Message, ...]]:
    """(system text, messages) of turns; `system` is the row's own field, or None.

    The system text is that field or the first turn. An empty system turn is kept: someone wrote it.
    """
    messages = []
    for turn in turns:
        message = message_of(turn)
        if message.role != "system":
            messages.append(message)
            continue
        if messages or system is not None:
            raise ValueError(
                "a system message that does not stand first, or a second one; join or move it"
            )
        if message.weight:
            raise ValueError(
                f"weight {message.weight} on a system message, which is never trained on; "
                "remove it or write 0"
            )
        system = message.text
    if not messages:
        raise ValueError("only a system message; add turns or remove it")
    return system, tuple(messages)


def message_of(turn: Any) -> Message:
    """One turn -> Message, whose role may here be system, too."""
    if not isinstance(turn, dict):
        raise ValueError("a message is not an object with role and content (or from and value)")

    # the role as the file calls it: "human", say
    role_name = first_of(turn, ROLE_KEYS)
    if not isinstance(role_name, str) or role_name not in ROLES:
        raise ValueError(
            f"role {role_name!r} is not one of {', '.join(ROLES)}; "
            "fix the line, or add the role to ROLES in conversations.py"
        )

    text = first_of(turn, TEXT_KEYS)
    if text is None:
        raise ValueError(f"the {role_name} message has no text (content or value); fix the line")
    if isinstance(text, list):
        # as vLLM and llama.cpp join them where a template takes a text
        text = "\n".join(part_text(part, role_name) for part in text)
    check_text(text, f"the {role_name} message's text")
    return Message(ROLES[role_name], text, own_weight(turn))


def part_text(part: Any, role_name: str) -> str:
    """The text of one of the parts that OpenAI's format may have instead of a text."""
    kind = part.get("type") if isinstance(part, dict) else part
    if kind != "text":
        raise ValueError(
            f"the {role_name} message has a part of type {kind!r}; only text can be trained on"
        )
    check_text(part.get("text"), f"a part of the {role_name} message")
    return part["text"]


def own_weight(turn: dict) -> float | None:
    """The weight that a message brings, or None."""
    weights = []
    for key in WEIGHT_KEYS:
        if turn.get(key) is not None:
            check_weight(turn[key], f"message {key}")
            weights.append(turn[key])
    if len(set(weights)) > 1:
        both = " and ".join(f"{key} {turn[key]}" for key in WEIGHT_KEYS)
        raise ValueError(f"a message with {both}; keep one of them")
    return weights[0] if weights else None


def weight_or_reward(row: dict, names: FieldNames) -> tuple[float | None, float | None]:
    """(weight, reward) that a row has for all its answers: one of them, or neither."""
    weight = row.get("weight")
    if names.reward is None:
        if weight is not None:
            check_weight(weight, "row weight")
        return weight, None

    reward = row.get(names.reward)
    if not is_number(reward):
        raise ValueError(
            f"--reward {names.reward}: {reward!r} is not a finite number; fix or remove the line"
        )
    if weight is not None and names.reward != "weight":
        raise ValueError(
            f"a row with weight {weight!r} and {names.reward} {reward!r}; keep one of them, "
            "or leave out --reward"
        )
    return None, float(reward)


def unread_fields(row: dict, turns: list, decides: set[str]) -> tuple[tuple[str, Any], ...]:
    """(name, value) of the row's fields, then of its messages', that look like a label, a weight or
    a reward, but are not among those that decide something. A message's name says that it is."""
    unread = {}
    for name, value in row.items():
        if value is not None and name not in decides and is_telling(name):
            unread[name] = value
    for turn in turns:
        for name, value in turn.items():
            if value is not None and name not in WEIGHT_KEYS and is_telling(name):
                unread[f"a message's {name}"] = value
    return tuple(unread.items())


# the names of fields are few, but a file may make one up in each row
@functools.lru_cache(10_000)
def is_telling(name: str) -> bool:
    """Whether the name of a field has one of TELLING_WORDS: "loss_scale", "scores"."""
    words = re.split("[^a-z]+", name.lower())
    return any(word in TELLING_WORDS or word.removesuffix("s") in TELLING_WORDS for word in words)


def first_of(row: dict, keys: tuple[str, ...]) -> Any:
    """The value under the first of these keys that the row has; None if it has none of them."""
    for key in keys:
        # parquet writes None where a row lacks a field that others have
        if row.get(key) is not None:
            return row[key]
    return None


def check_text(value: Any, value_name: str) -> None:
    """ValueError, which calls the value `value_name`, unless it is a text that can be tokenized."""
    if not isinstance(value, str):
        raise ValueError(f"{value_name} {value!r} is not a text; fix the line")
    # JSON writes some characters as two escapes. Half of such a pair is valid JSON, but no text.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{value_name} has half of a surrogate pair (\\ud800..); fix the line"
        ) from None


def check_weight(weight: Any, weight_name: str) -> None:
    """ValueError, which calls the weight `weight_name`, unless it is a number that can be one."""
    if not is_number(weight) or not 0 <= weight <= MAX_WEIGHT:
        raise ValueError(
            f"{weight_name} {weight!r} is not a number from 0 to {MAX_WEIGHT:g}; fix the line"
        )


# ---- classes: label -> class -> condition and weight

# math.exp fails above 709. So a larger exponent counts as 700: exp(700) is far above MAX_WEIGHT,
# too, and is refused with an error that names the entry of the table.
MAX_EXPONENT = 700.0


@dataclass(frozen=True)
class Class:
    """One source of data, c in the paper.

    The weight is the table's number itself; with --beta that number is the reward r_c, and the
    weight is made of it (`weight_of_reward`). The weight is None for a class that the table does
    not have, but the rows name: their answers must have weights or rewards of their own.
    """

    name: str
    condition: str
    weight: float | None
    # the table's number; the highest is the expert's
    number: float | None = field(default=None, compare=False)


def parse_classes(
    text: str, beta: float | None = None, answers_have_rewards: bool = False
) -> list[tuple[str, Class]]:
    """[(label glob, Class)] of a table such as "Model: GPT-4=GPT4:1.0,*=GPT3:0.1".

    A glob is a label in which * stands for any text and ? for any character. The number is the
    class's weight; if beta is given, the number is the reward r_c (`weight_of_reward`). Where
    every answer has a reward of its own, the numbers only say which class is the expert's.

    ValueError: the text is not such a table, a weight is out of range, beta is not above 0, two
    classes would have one name, or there are more than MOST_CLASSES.
    """
    if beta is not None and not 0 < beta < math.inf:
        raise ValueError(f"--beta {beta}: the KL coefficient of Eq. 4 must be above 0, and finite")
    if not text:
        return []
    entries = []
    weights_of = collections.defaultdict(set)
    for entry in text.split(","):
        glob, condition, number = parse_entry(entry)
        weight = weight_of_reward(number, beta) if beta else number
        if answers_have_rewards:
            # no answer takes it
            weight = min(weight, MAX_WEIGHT)
        if not 0 <= weight <= MAX_WEIGHT:
            raise ValueError(
                f"--classes: {entry!r} gives the weight {weight:g}; "
                f"weights are from 0 to {MAX_WEIGHT:g}"
            )
        entries.append((glob, condition, weight, number))
        weights_of[condition].add(weight)

    # A class has the name of its condition. Where classes of different weights share a condition,
    # the name has the weight, too.
    table = []
    for glob, condition, weight, number in entries:
        name = condition
        if len(weights_of[condition]) > 1:
            name = f"{condition}:{weight}"
        table.append((glob, Class(name, condition, weight, number)))
    classes = {class_ for _, class_ in table}
    check_number_of_classes(len(classes))
    # `X:0.1` may also be a condition; a prepared file counts each class under its name
    names = collections.Counter(class_.name for class_ in classes)
    for name, number_of_classes in names.items():
        if number_of_classes > 1:
            raise ValueError(
                f"--classes: two classes would have the name {name!r}; rename the condition"
            )
    return table


def check_number_of_classes(number: int) -> None:
    """ValueError: more than MOST_CLASSES."""
    if number > MOST_CLASSES:
        raise ValueError(
            f"{number:,} classes, and at most {MOST_CLASSES:,} can be told apart; give several "
            "labels one condition (--classes), or take the conditions out of the rows"
        )


def parse_entry(entry: str) -> tuple[str, str, float]:
    """(label glob, condition, number) of one entry of the table."""
    # cut at the last = and the last :, since a label may hold them, too, as "Model: GPT-4" does
    glob, equals, right = entry.rpartition("=")
    condition, _, number = right.rpartition(":")
    try:
        number = float(number)
    except ValueError:
        # nan is refused below, like every other number that is not finite
        number = math.nan
    if not (equals and condition.strip() and math.isfinite(number)):
        raise ValueError(
            f"--classes: {entry!r} is not `label glob=condition:number`, "
            'such as "Model: GPT-4=GPT4:1.0"'
        )
    return glob.strip(), condition.strip(), number


def weight_of_reward(reward: float, beta: float, highest: float = 1.0) -> float:
    """exp((r_c - 1) / beta), which is 1 for the expert's r_c = 1, the highest reward of Eq. 3.

    The paper gets from a reward to a weight in three steps. pi_c(y|x,c) is the policy by which
    class c wrote its answers, and pi* the policy that is looked for:

        Eq. 4   pi* is the pi with the largest  E[r_c] - beta KL(pi, pi_c)
        Eq. 5   so pi* = pi_c exp(r_c / beta) / Z
        Eq. 6   the model pi with the least KL(pi*, pi) has the largest
                sum of exp(r_c / beta) log pi(y|x,c)  over the data, since pi_c wrote them

    So exp(r_c / beta) is a weight of log pi. Strictly, the Z of a class is exp(r_c / beta), too,
    and would cancel it. Eq. 6 leaves Z out, and that is what weighs the classes against each other
    (docs/method.md).

    This function divides the weight by exp(1 / beta). That is the same number for all classes, and
    the division of the loss by the sum of weights cancels it. (A weight that a message has of its
    own is not divided: it is read beside the expert's 1.) The smaller beta, the further the weights
    are apart.

    The same holds where every answer has a reward r(x, y) of its own, which the paper leaves to
    future work (`--reward`). `highest` is then the highest reward in the files.
    """
    return math.exp(min((reward - highest) / beta, MAX_EXPONENT))


class Classes:
    """The classes of a data set: first those of the table, then those that only the rows name.

    A class's id is its index in the list `all`. beta and highest_reward are for rows that have a
    reward of their own. `decided_by` counts the answers whose weight comes from the message, the
    row's reward, the row's weight or the class.
    """

    def __init__(
        self,
        table: list[tuple[str, Class]] = (),
        beta: float | None = None,
        highest_reward: float = 1.0,
    ):
        self.table = list(table)
        # each class once, in the table's order: several globs may lead to one class
        self.all = list(dict.fromkeys(class_ for _, class_ in table))
        self.beta = beta
        self.highest_reward = highest_reward
        self.decided_by = collections.Counter()

        # The same in forms in which one of many thousands is found at once: the number of each
        # class, and the first class of each condition.
        self.ids = {class_: i for i, class_ in enumerate(self.all)}
        self.of_condition = {}
        for class_ in self.all:
            self.of_condition.setdefault(class_.condition, class_)
        self.names = {class_.name for class_ in self.all}
        # the table's places by glob: those that fit one label only, and those that fit several
        self.place_of = {}
        self.places_to_try = []
        for place, (glob, _) in enumerate(self.table):
            if "*" in glob or "?" in glob:
                self.places_to_try.append(place)
            else:
                self.place_of.setdefault(glob, place)

    def assign(self, conversation: Conversation) -> Conversation:
        """The conversation with class, condition and every message's weight filled in.

        ValueError: no class for the row, or no weight for an answer.
        """
        class_ = self.class_of(conversation)
        messages = [
            self.weighted(message, class_, conversation) for message in conversation.messages
        ]
        return dataclasses.replace(
            conversation,
            messages=tuple(messages),
            condition=class_.condition,
            class_id=self.ids[class_],
        )

    def class_of(self, conversation: Conversation) -> Class:
        """The class of the row's own condition, else that of the first glob that fits the label.

        Without a table a row without a label has the condition "", whose prompt is a bare `User:`.
        """
        # OpenChat writes the field always, with "" where the row has no condition
        if conversation.condition:
            return self.class_with_condition(conversation.condition)
        if not self.table and not conversation.label:
            return self.class_with_condition("")

        self.check_label(conversation)
        # the first place whose glob is the label itself, unless an earlier one fits, too
        first = self.place_of.get(conversation.label, len(self.table))
        for place in self.places_to_try:
            if place > first:
                break
            glob, class_ = self.table[place]
            if glob_match(glob, conversation.label):
                return class_
        if first == len(self.table):
            raise ValueError(
                f"{conversation.where}: label {conversation.label!r} matches no class; "
                "add it (or *=..) to --classes"
            )
        _, class_ = self.table[first]
        return class_

    def check_label(self, conversation: Conversation) -> None:
        """ValueError: the table asks for a label, and the row has it under another name."""
        # `*` alone takes every row, whoever wrote it
        if conversation.label or all(glob == "*" for glob, _ in self.table):
            return
        others = [(name, value) for name, value in conversation.unread if name in LABEL_KEYS]
        if others:
            shown = ", ".join(f"{name} {value!r}" for name, value in others)
            first, _ = others[0]
            raise ValueError(
                f"{conversation.where}: no label, but {shown}; "
                f"say which field is the label, such as --label {first}"
            )

    def class_with_condition(self, condition: str) -> Class:
        """The first class with this condition; if there is none, it is added."""
        # The first, as with globs: where two classes of the table share a condition, the table's
        # order decides.
        if condition in self.of_condition:
            return self.of_condition[condition]

        # No name twice: a prepared file keeps the counts of each class under its name (data.py).
        name = condition or "none"
        while name in self.names:
            name += "_"
        self.names.add(name)
        new = Class(name, condition, weight=None)
        self.ids[new] = len(self.all)
        self.all.append(new)
        self.of_condition[condition] = new
        check_number_of_classes(len(self.all))
        return new

    def id_of(self, class_: Class) -> int:
        """The number of a class that another process has found; one that only rows name is added
        here, under a name of its own."""
        if class_.weight is None:
            class_ = self.class_with_condition(class_.condition)
        return self.ids[class_]

    def weighted(self, message: Message, class_: Class, conversation: Conversation) -> Message:
        """The message with a weight: its own, else the row's, else its class's; a user's message
        has its own or 0."""
        if message.role == "user":
            return Message("user", message.text, float(message.weight or 0))

        if message.weight is not None:
            decided_by = "message"
            weight = message.weight
        elif conversation.reward is not None:
            decided_by = "reward"
            weight = weight_of_reward(conversation.reward, self.beta, self.highest_reward)
        elif conversation.weight is not None:
            decided_by = "row"
            weight = conversation.weight
        else:
            decided_by = "class"
            weight = class_.weight
        if weight is None:
            raise ValueError(
                f"{conversation.where}: an answer without weight under the condition "
                f"{class_.condition!r}, which --classes does not have; give one, or add it there"
            )
        self.decided_by[decided_by] += 1
        return Message("assistant", message.text, float(weight))

    def expert(self, name: str | None = None) -> Class:
        """The class whose condition sampling uses: the one of this name or condition; else the
        table's of the highest number, the first on ties.

        ValueError: there is no such class, or several and no table to say which.
        """
        names = ", ".join(class_.name for class_ in self.all)
        if name:
            for known in ("name", "condition"):
                for class_ in self.all:
                    if getattr(class_, known) == name:
                        return class_
            raise ValueError(f"--expert {name!r} is not one of the classes {names}")
        if self.table:
            of_table = [class_ for _, class_ in self.table]
            # not of the highest weight: two far rewards may both be so low that exp() gives 0
            return max(of_table, key=lambda class_: class_.number)
        if len(self.all) > 1:
            raise ValueError(
                f"classes {names}, and no --classes that says which is the expert's; "
                "name it with --expert"
            )
        return self.all[0]


def glob_match(glob: str, label: str) -> bool:
    """Whether the glob fits the label: * is any text, ? any character, and case counts."""
    return pattern_of(glob).fullmatch(label) is not None


@functools.cache
def pattern_of(glob: str) -> re.Pattern:
    """A glob as a regular expression."""
    # Python's fnmatch would not do: it takes the brackets of a label such as "[v2] model" for a
    # set of characters.
    pattern = re.escape(glob).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(pattern, re.DOTALL)


# ---- templates: class -> what stands before each text


@dataclass(frozen=True)
class Template:
    """What stands before a message of either role; {c} is the condition.

    `<|names|>` of special tokens become those tokens here, and nowhere else: in a condition or in a
    message they stay text.
    """

    user: str
    assistant: str
    # a text before the system text and all turns, which ends in <|end_of_turn|> like a turn
    opening: str | None = None
    # whether the system text stands before the opening instead
    system_first: bool = False
    # what stands before a system text
    system: str = ""
    # the token after each text
    end_of_turn: str = EOT
    # whether a text begins with a space
    space: bool = True
    # whether an export's chat template trims what is said; training never does
    chat_trims: bool = False


# Where the condition can stand: Table 3. "none" is ours: the paper has runs without a condition,
# but does not give their prompts. With one class of weight 1 it is plain SFT (Eq. 1).
TEMPLATES = {
    "before_speaker": Template("{c} User:", "{c} Assistant:"),
    "before_assistant": Template("User:", "{c} Assistant:"),
    "beginning": Template("User:", "Assistant:", opening="Assistant is {c}"),
    "none": Template("User:", "Assistant:"),
    # OpenChat 3.6's, on Llama-3, with the base's own tokens; the condition there is GPT4 Correct.
    # OpenChat trains on texts as they are, but its chat template trims them.
    "llama-3": Template(
        "<|start_header_id|>{c} User<|end_header_id|>\n\n",
        "<|start_header_id|>{c} Assistant<|end_header_id|>\n\n",
        system="<|start_header_id|>System<|end_header_id|>\n\n",
        end_of_turn="<|eot_id|>",
        space=False,
        chat_trims=True,
    ),
}

# What prepared files and exports were made with before FORMAT was 2. Nothing new is made with it.
BEGINNING_1 = "beginning (format 1)"
FORMER_TEMPLATES = {
    BEGINNING_1: dataclasses.replace(TEMPLATES["beginning"], system_first=True),
}
# of the metadata of prepared files and exports; where they have no such number, it is 1
FORMAT = 2


def template_of(meta: dict) -> str:
    """The name of the template that a prepared file or an export was made with, by its metadata."""
    if meta["template"] == "beginning" and meta.get("format", 1) < 2:
        return BEGINNING_1
    return meta["template"]


def template_named(name: str) -> Template:
    """The template of this name, a former one too."""
    return (TEMPLATES | FORMER_TEMPLATES)[name]


def tokenizer_for(template: str, file: str | Path | bytes, meta: dict | None = None) -> Tokenizer:
    """The tokenizer, with the end of turn and the space that belong to the template.

    meta: of a prepared file, which holds the tokenizer's bytes and knows ids that they do not say.
    (Beside a path files say them.)
    """
    chosen = template_named(template)
    # files prepared by older versions have no ids
    found = meta or {}
    ids = {kind: found[kind] for kind in KINDS if found.get(kind) is not None}
    return Tokenizer(file, chosen.end_of_turn, chosen.space, ids)


# A special token in a template's text.
SPECIAL_TOKEN = re.compile(r"(<\|\w+\|>)")


def pieces_of(text: str, condition: str | None) -> list[str]:
    """A template's text, cut at special tokens, each a piece, with the condition in its place.

    The cut comes first: a condition that holds the name of a special token does not make one.
    """
    pieces = []
    for piece in SPECIAL_TOKEN.split(text):
        if "{c}" in piece:
            # stripped: an empty condition leaves `User:`, not ` User:`
            piece = piece.format(c=condition).strip()
        if piece:
            pieces.append(piece)
    return pieces


def tokens_of(template: Template, tokenizer: Tokenizer) -> list[int]:
    """The ids of the special tokens that a template names."""
    texts = f"{template.user}{template.assistant}{template.system}{template.end_of_turn}"
    names = dict.fromkeys(SPECIAL_TOKEN.findall(texts))
    return [tokenizer.id_of(name) for name in names]


def role_texts(template: str, condition: str | None) -> tuple[str, str, str | None]:
    """(user's prefix, assistant's prefix, opening or None) of a template for a condition.

    Only "none", which does not use it, may have the condition None. For every other template
    `Classes.assign` comes first: it gives each conversation a condition.
    """
    chosen = template_named(template)
    user = "".join(pieces_of(chosen.user, condition))
    assistant = "".join(pieces_of(chosen.assistant, condition))
    opening = None
    if chosen.opening is not None:
        opening = "".join(pieces_of(chosen.opening, condition))
    return user, assistant, opening


# ---- tokens and weights


def encode(
    conversation: Conversation, tokenizer: Tokenizer, template: str
) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """(preamble, turns): the ids before the first turn, and (prefix ids, text ids) per message.

        <s> [opening EOT] [system EOT]  prefix text EOT  prefix text EOT ..

    EOT is the tokenizer's end of turn: <|end_of_turn|>, the one token that C-RLFT adds to a
    tokenizer, or what the template names. The ids of a text end in it. Each prefix and each text is
    tokenized by itself, as in the public trainer: `GPT4 User:` is the same ids whatever follows.
    """
    chosen = template_named(template)
    condition = conversation.condition
    before_turns = []
    if chosen.opening is not None:
        opening = template_ids(chosen.opening, condition, tokenizer)
        before_turns.append([*opening, tokenizer.eot])
    if conversation.system is not None:
        prefix = template_ids(chosen.system, None, tokenizer)
        text_ids = tokenizer.encode(conversation.system)
        before_turns.append([*prefix, *text_ids, tokenizer.eot])
    if chosen.system_first:
        before_turns.reverse()
    preamble = [tokenizer.bos, *itertools.chain.from_iterable(before_turns)]

    prefix_of = {
        "user": template_ids(chosen.user, condition, tokenizer),
        "assistant": template_ids(chosen.assistant, condition, tokenizer),
    }
    turns = []
    for message in conversation.messages:
        text_ids = [*tokenizer.encode(message.text), tokenizer.eot]
        turns.append((prefix_of[message.role], text_ids))
    return preamble, turns


def template_ids(text: str, condition: str | None, tokenizer: Tokenizer) -> list[int]:
    """The ids of a template's text; the names of special tokens in it become those tokens.

    They are the same in each conversation of a class, so the tokenizer keeps them. Nobody may
    change the list.
    """
    known = tokenizer.of_templates.get((text, condition))
    if known is not None:
        return known
    ids = []
    for piece in pieces_of(text, condition):
        if SPECIAL_TOKEN.fullmatch(piece):
            ids.append(tokenizer.id_of(piece))
        else:
            ids += tokenizer.encode(piece)
    tokenizer.of_templates[text, condition] = ids
    return ids


def tokenize(
    conversation: Conversation, tokenizer: Tokenizer, template: str = "before_speaker"
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [T], weights fp32 [T]): a token's weight is the weight of predicting it.

    A text and the EOT after it carry the message's weight, everything else has 0. So only what the
    assistant says is learned, unless the file gives a user's message a weight.
    """
    preamble, turns = encode(conversation, tokenizer, template)
    tokens = list(preamble)
    weighted = []
    for message, (prefix_ids, text_ids) in zip(conversation.messages, turns):
        weight = message.weight
        if weight is None:
            assert message.role == "user", "Classes.assign gives every answer its weight"
            weight = 0.0
        # the prefix is part of every prompt: the model never has to predict it
        tokens += prefix_ids
        weighted.append((len(tokens), weight))
        tokens += text_ids
        weighted.append((len(tokens), 0.0))

    # from each of these places to the next, all tokens have this weight
    weights = np.zeros(len(tokens), np.float32)
    for (first, weight), (stop, _) in itertools.pairwise(weighted):
        weights[first:stop] = weight
    return np.array(tokens, np.int32), weights


# ---- cut: what is beyond max_len, and what nothing can be learned from


def cut_to_length(
    conversation: Conversation, tokenizer: Tokenizer, template: str, max_len: int, too_long: str
) -> tuple[list[tuple[np.ndarray, np.ndarray]], collections.Counter]:
    """(parts, ledger): what of a conversation is trained on, and the counts of what became of it.

    Each part is (tokens, weights), max_len tokens at most. too_long says what becomes of a longer
    conversation: "truncate", "split" (`split_exchanges`) or "drop". The ledger counts every token:

        tokens_read + added_by_split = trained + prompt + truncated + dropped + trailing_cut

        tokens_read     the tokens of the whole conversation
        added_by_split  the preamble's, once more for each part after the first
        trained         those with a weight
        prompt          those without a weight that have one with a weight after them
        truncated       those beyond max_len
        dropped         all of a part that is left out
        trailing_cut    those before max_len, but after the last one with a weight

    It also counts conversations and turns.
    """
    whole = tokenize(conversation, tokenizer, template)
    length = len(whole[0])
    ledger = collections.Counter(
        conversations=1, turns=len(conversation.messages), tokens_read=length
    )
    # An empty answer would teach the model to say nothing. The whole conversation is left out:
    # without that answer the turns after it would have another context than in the file.
    if has_empty_answer(conversation):
        ledger.update(dropped=length, dropped_conversations=1)
        return [], ledger

    parts = [whole]
    if length > max_len and too_long == "split":
        shorter = split_exchanges(conversation, tokenizer, template, max_len)
        parts = [tokenize(part, tokenizer, template) for part in shorter]
        # every part repeats the preamble
        ledger["added_by_split"] += sum(len(tokens) for tokens, _ in parts) - length
        if len(parts) > 1:
            ledger["split_conversations"] += 1

    kept = []
    is_cut = False
    for tokens, weights in parts:
        # a part is left out if it has no token with a weight before max_len, or is to be dropped
        supervised = np.flatnonzero(weights[:max_len])
        if len(supervised) == 0 or (too_long == "drop" and len(tokens) > max_len):
            ledger["dropped"] += len(tokens)
            continue
        # After the last token with a weight there is nothing to learn. Most often it is a question
        # that got no answer.
        end = supervised[-1] + 1
        ledger["truncated"] += max(0, len(tokens) - max_len)
        is_cut = is_cut or len(tokens) > max_len
        ledger["trailing_cut"] += min(len(tokens), max_len) - end
        ledger["trained"] += len(supervised)
        ledger["prompt"] += end - len(supervised)
        kept.append((tokens[:end], weights[:end]))
    if is_cut:
        ledger["truncated_conversations"] += 1
    if not kept:
        ledger["dropped_conversations"] += 1
    return kept, ledger


def has_empty_answer(conversation: Conversation) -> bool:
    """Whether an answer that would be trained on has no text, or only whitespace."""
    answers = [m for m in conversation.messages if m.role == "assistant" and m.weight]
    return any(not answer.text.strip() for answer in answers)


def split_exchanges(
    conversation: Conversation, tokenizer: Tokenizer, template: str, max_len: int
) -> list[Conversation]:
    """The conversation as several ones of whole exchanges, of max_len tokens at most.

    An exchange is what the user says and the assistant's answer to it. Each new conversation has
    the preamble of the old one. An exchange above max_len stands alone; `cut_to_length` truncates
    it.
    """
    messages = conversation.messages
    preamble, turns = encode(conversation, tokenizer, template)
    sizes = [len(prefix_ids) + len(text_ids) for prefix_ids, text_ids in turns]

    # an exchange starts where the user speaks after the assistant
    starts = [0]
    for i in range(1, len(messages)):
        if messages[i].role == "user" and messages[i - 1].role == "assistant":
            starts.append(i)

    # each exchange goes to the last part, or starts another where that would get too long
    parts = [[]]
    used = len(preamble)
    for start, stop in zip(starts, [*starts[1:], len(messages)]):
        size = sum(sizes[start:stop])
        if parts[-1] and used + size > max_len:
            parts.append([])
            used = len(preamble)
        parts[-1] += messages[start:stop]
        used += size
    return [dataclasses.replace(conversation, messages=tuple(part)) for part in parts]


def prompt_hash(conversation: Conversation) -> int:
    """A hash of the first user message, as int64.

    Conversations of the same prompt have the same hash. The validation split goes by it (data.py),
    so no prompt is both trained on and validated with.
    """
    user_texts = [message.text for message in conversation.messages if message.role == "user"]
    prompt = user_texts[0] if user_texts else ""
    # not Python's hash(), which differs from process to process
    hashed = hashlib.blake2b(prompt.encode(), digest_size=8)
    return int.from_bytes(hashed.digest(), "big", signed=True)
