"""Rows become arrays, a chunk at a time, in several processes.

What is done to a conversation stands in conversations.py. Here it is done to the rows of files, in
their order, and counted. `Makers.run` gives what is made of each chunk; data.py puts the arrays
into a file.
"""

import collections
import functools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from conversations import (
    Class,
    Classes,
    Conversation,
    FieldNames,
    cut_to_length,
    parse,
    parse_classes,
    prompt_hash,
)
from support.rows import Chunk, decoded, first_bytes, read_chunks
from tokenizer import Tokenizer


class Flags(Protocol):
    """The flags that say how rows become tokens: a `PrepareConfig` or `ShowConfig` has them."""

    files: tuple
    classes: str
    beta: float | None
    label: str | None
    reward: str | None
    template: str
    max_len: int
    too_long: str


# ---- what is counted


@dataclass
class Account:
    """How the answers of some conversations came to their weights, and which fields were not
    asked."""

    decided_by: collections.Counter = field(default_factory=collections.Counter)
    unread: collections.Counter = field(default_factory=collections.Counter)
    # messages of users with a weight of their own
    user_messages: int = 0
    lowest_reward: float = math.inf
    highest_reward: float = -math.inf
    # of all answers
    answers: int = 0
    weight_sum: float = 0.0
    square_sum: float = 0.0

    def see(self, conversation: Conversation) -> None:
        """Count a conversation; what decided its weights is counted by Classes."""
        self.unread.update(name for name, _ in conversation.unread)
        if conversation.reward is not None:
            self.lowest_reward = min(self.lowest_reward, conversation.reward)
            self.highest_reward = max(self.highest_reward, conversation.reward)
        for message in conversation.messages:
            if message.role == "assistant":
                self.answers += 1
                self.weight_sum += message.weight
                self.square_sum += message.weight**2
            elif message.weight:
                self.user_messages += 1

    def add(self, other: "Account") -> None:
        self.decided_by.update(other.decided_by)
        count(self.unread, other.unread)
        self.user_messages += other.user_messages
        self.lowest_reward = min(self.lowest_reward, other.lowest_reward)
        self.highest_reward = max(self.highest_reward, other.highest_reward)
        self.answers += other.answers
        self.weight_sum += other.weight_sum
        self.square_sum += other.square_sum

    def fields(self, beta: float | None) -> dict:
        """For the metadata."""
        found = {
            "decided_by": dict(self.decided_by),
            "user_messages": self.user_messages,
            "unread": dict(self.unread),
        }
        if self.highest_reward > -math.inf:
            found["rewards"] = {
                "lowest": self.lowest_reward,
                "highest": self.highest_reward,
                "beta": beta,
                "answers": self.answers,
                "sample_size": self.weight_sum**2 / self.square_sum,
            }
        return found


# Labels, and names of fields, that are counted each by itself. In files that make up a new one in
# each row the others are not, or counting would take more memory than tokenizing.
MOST_NAMES = 10_000


def count(counts: collections.Counter, more: collections.Counter) -> None:
    """Add counts of names, up to MOST_NAMES names."""
    for name, number in more.items():
        if name in counts or len(counts) < MOST_NAMES:
            counts[name] += number


@dataclass
class OfClass:
    """What is counted of one class."""

    ledger: collections.Counter = field(default_factory=collections.Counter)
    labels: collections.Counter = field(default_factory=collections.Counter)
    highest_weight: float = 0.0

    def add(self, other: "OfClass") -> None:
        self.ledger.update(other.ledger)
        count(self.labels, other.labels)
        self.highest_weight = max(self.highest_weight, other.highest_weight)


# ---- one process


@dataclass(frozen=True)
class Made:
    """What is made of a chunk: n conversations that are kept, S tokens in all."""

    tokens: np.ndarray  # int32 [S]
    weights: np.ndarray  # fp32 [S]
    lengths: np.ndarray  # int64 [n]
    group: np.ndarray  # int64 [n]
    # int64 [n], places in `classes`
    class_ids: np.ndarray
    # the classes of the chunk, in the order in which they come in it, and what is counted of each
    classes: dict[Class, OfClass]
    account: Account


class Maker:
    """Makes arrays of rows. A process has one, so that it builds the tokenizer once."""

    def __init__(self, config: Flags, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.names = FieldNames(config.label or "model", config.reward)
        table = parse_classes(config.classes, config.beta, bool(config.reward))
        self.classes = Classes(table, config.beta)

    def conversations(self, chunk: Chunk) -> Iterator[Conversation]:
        """Each with its class and weights. ValueError: the first row that is wrong."""
        for where, raw in chunk.rows:
            conversation = parse(decoded(where, raw), where, self.names)
            yield self.classes.assign(conversation)

    def highest_reward(self, chunk: Chunk) -> float | None:
        """Of the rows that need one; None if no row does."""
        rewards = [conversation.reward for conversation in self.conversations(chunk)]
        return max((reward for reward in rewards if reward is not None), default=None)

    def make(self, chunk: Chunk, highest: float) -> Made:
        """highest: the reward for which the weight is 1."""
        config = self.config
        self.classes.highest_reward = highest
        account = Account()
        self.classes.decided_by = account.decided_by
        of_class = {}
        places = {}
        tokens, weights = [], []
        class_ids, group = [], []
        for conversation in self.conversations(chunk):
            account.see(conversation)
            class_ = self.classes.all[conversation.class_id]
            if class_ not in of_class:
                places[class_] = len(places)
                of_class[class_] = OfClass()
            mine = of_class[class_]
            mine.labels[conversation.label] += 1
            heaviest = max(message.weight for message in conversation.messages)
            mine.highest_weight = max(mine.highest_weight, heaviest)

            parts, ledger = cut_to_length(
                conversation, self.tokenizer, config.template, config.max_len, config.too_long
            )
            mine.ledger.update(ledger)
            for part_tokens, part_weights in parts:
                tokens.append(part_tokens)
                weights.append(part_weights)
                class_ids.append(places[class_])
                group.append(prompt_hash(conversation))

        # end to end, without padding; a chunk of which nothing is kept has none
        return Made(
            tokens=np.concatenate([*tokens, np.empty(0, np.int32)]),
            weights=np.concatenate([*weights, np.empty(0, np.float32)]),
            lengths=np.array([len(part) for part in tokens], np.int64),
            group=np.array(group, np.int64),
            class_ids=np.array(class_ids, np.int64),
            classes=of_class,
            account=account,
        )


# ---- several processes

# In a process of `Makers`: its Maker.
of_this_process = []

# Bytes of the files for which a further process is started: starting it costs as much as some
# thousand conversations.
BYTES_OF_A_PROCESS = 2**21


class Makers:
    """For `with`: Makers in so many processes, or in this one where the files are short."""

    def __init__(self, config: Flags, tokenizer: Tokenizer, processes: int):
        self.files = config.files
        # a file that is not there is missed before hours are spent on another one
        for path in self.files:
            first_bytes(path)
        self.bytes = sum(os.path.getsize(path) for path in self.files)
        self.processes = max(1, min(processes, self.bytes // BYTES_OF_A_PROCESS))
        self.maker = Maker(config, tokenizer)
        self.pool = None
        if self.processes > 1:
            self.pool = ProcessPoolExecutor(
                self.processes, initializer=start_process, initargs=(config, tokenizer)
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def run(self, title: str, method: Callable, *args: object) -> Iterator:
        """What a method of Maker gives for each chunk of the files, in their order."""
        began = time.monotonic()
        conversations = 0
        # no bar where the output is not a terminal
        with tqdm(None, title, self.bytes, unit="B", unit_scale=True, disable=None) as bar:
            for rows, read, made in self.in_order(method, args):
                conversations += rows
                pace = conversations / (time.monotonic() - began)
                bar.set_postfix_str(f"{pace:,.0f} conversations/s", refresh=False)
                bar.update(read)
                yield made

    def in_order(self, method: Callable, args: tuple) -> Iterator[tuple[int, int, Any]]:
        """(rows of the chunk, bytes read since the one before, what is made of it) of each chunk.

        What is wrong with a chunk is raised in its turn, whichever was worked on first.
        """
        # so many are read ahead that no process waits
        ahead = 2 * self.processes if self.pool else 0
        waiting = collections.deque()
        for path in self.files:
            before = 0
            for chunk in read_chunks(path):
                result = self.start(method, chunk, args)
                waiting.append((len(chunk.rows), chunk.done - before, result))
                before = chunk.done
                while len(waiting) > ahead:
                    yield finished(*waiting.popleft())
        while waiting:
            yield finished(*waiting.popleft())

    def start(self, method: Callable, chunk: Chunk, args: tuple) -> Callable[[], Any]:
        """Begin with a chunk; the function gives what is made of it."""
        if self.pool is None:
            return functools.partial(method, self.maker, chunk, *args)
        try:
            return self.pool.submit(in_this_process, method, chunk, args).result
        except BrokenProcessPool:
            raise killed() from None


def finished(rows: int, read: int, result: Callable[[], Any]) -> tuple[int, int, Any]:
    """A chunk as `Makers.in_order` gives it, once it is made."""
    try:
        return rows, read, result()
    except BrokenProcessPool:
        raise killed() from None


def killed() -> ValueError:
    return ValueError(
        "a process that tokenizes was killed, perhaps because memory ran out; "
        "give fewer --processes"
    )


def start_process(config: Flags, tokenizer: Tokenizer) -> None:
    """In a process of `Makers`, at its start."""
    of_this_process.append(Maker(config, tokenizer))
    # Ctrl-C reaches all processes of a terminal; the one that has started the others ends them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent() -> None:
    """End this process when the one that has started it is gone, killed perhaps."""
    multiprocessing.parent_process().join()
    os._exit(1)


def in_this_process(method: Callable, chunk: Chunk, args: tuple) -> Any:
    """What a method of this process's Maker gives for a chunk."""
    (maker,) = of_this_process
    return method(maker, chunk, *args)
