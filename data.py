"""The prepared file: conversation files become tokens, loss weights and classes, once.

    python data.py prepare FILE.. --tokenizer tokenizer.model --out train.safetensors \\
        --classes "Model: GPT-4=GPT4:1.0,*=GPT3:0.1"
    python data.py show train.safetensors         tokens coloured by weight
    python data.py stats train.safetensors        classes, weights, and how the steps come out

What is done to a conversation stands in conversations.py, what is done to many in packing.py. The
file holds the conversations end to end (N conversations, S tokens in all):

    tokens      int32 [S]
    weights     fp32 [S]       the weight of predicting the token; 0 for all but answers, as a rule
    offsets     int64 [N + 1]  conversation i is tokens[offsets[i] : offsets[i + 1]]
    class_ids   int16 [N]
    group       int64 [N]      hash of the prompt; the validation split goes by it
    tokenizer   uint8          the bytes of tokenizer.model or tokenizer.json
    and as metadata `crlft`, JSON: format, template, max_len, the ids of bos, eos and the end of
    turn, classes, expert, counts per class, digests of the arrays, its own sha256
"""

import support.threads  # noqa: F401, first: how threads wait is said before torch is loaded

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from conversations import (
    FORMAT,
    FORMER_TEMPLATES,
    MAX_WEIGHT,
    MOST_CLASSES,
    TEMPLATES,
    Class,
    Classes,
    parse_classes,
    read,
    template_named,
    template_of,
    tokenize,
    tokenizer_for,
    tokens_of,
)
from packing import COST_7B, Batch, Steps, flat, micro_batches_of, pack, plan
from recipe import FINETUNE_BATCH_TOKENS, MICRO_TOKENS, PRETRAIN_LR, finetune_lr
from support.arrays import Arrays, Spool, digest_of
from support.cli import check_help, on_one_line, parse_args, run
from support.fields import Fields, parse_object
from support.makers import Account, Made, Maker, Makers, OfClass
from tokenizer import EOT, Tokenizer

# the whole way from a file to a batch can be imported from here
__all__ = ["read", "Classes", "tokenize", "plan", "pack", "prepare", "Prepared", "show", "stats"]

TOO_LONG = ("truncate", "split", "drop")


@dataclass(frozen=True)
class PrepareConfig:
    """The flags of `data.py prepare`."""

    # conversation files: JSON lines, JSON arrays, either of them gzipped, or parquet
    files: tuple
    # the base's tokenizer.model or tokenizer.json
    tokenizer: str = ""
    # the prepared file, NAME.safetensors
    out: str = ""
    # a table: LABEL=CLASS:WEIGHT with commas between; `*` is any other label
    classes: str = ""
    # the table has rewards r instead of weights: a weight is exp((r - 1) / beta)
    beta: float | None = None
    # the field of a row that says who wrote its answers
    # default: model
    label: str | None = None
    # the field with a reward of the row's own, if that is to decide its weight
    reward: str | None = None
    # the class whose prompt is used for sampling, where the table's highest number does not say it
    expert: str | None = None
    # how a prompt says who speaks and under which condition
    template: str = "before_speaker"
    # tokens of a conversation, at most
    max_len: int = 4096
    # what becomes of a conversation above --max_len: truncate, split or drop
    too_long: str = "truncate"
    # processes that tokenize
    # default: the cores of the machine
    processes: int = os.cpu_count()


@dataclass(frozen=True)
class ShowConfig:
    """The flags of `data.py show`; all but n, at and of are for conversation files."""

    # a prepared file, or conversation files
    files: tuple
    # the base's tokenizer.model or tokenizer.json
    tokenizer: str = ""
    # as for prepare
    classes: str = "*=GPT4:1.0"
    # as for prepare
    beta: float | None = None
    # as for prepare
    label: str | None = None
    # as for prepare
    reward: str | None = None
    # as for prepare
    template: str = "before_speaker"
    # tokens of a conversation, at most
    max_len: int = 4096
    # what becomes of a conversation above --max_len: truncate, split or drop
    too_long: str = "truncate"
    # conversations to print
    n: int = 3
    # the number of the first of them: what comes after them is then not read
    at: int = 0
    # only those of this class: what comes after them is then not read
    of: str | None = None

    @property
    def is_part(self) -> bool:
        """Whether only the conversations to print are asked for, and not all lengths."""
        return self.at > 0 or self.of is not None


@dataclass(frozen=True)
class StatsConfig:
    """The flags of `data.py stats`: the run whose steps are to be looked at."""

    # a prepared file
    files: tuple
    # tokens of an optimizer step, at most
    batch_tokens: int = FINETUNE_BATCH_TOKENS
    # tokens of a micro-batch, at most
    micro_tokens: int = MICRO_TOKENS
    # GPUs of the run
    ranks: int = 8
    # the base's own learning rate, which the run's is scaled from
    pretrain_lr: float = PRETRAIN_LR
    # measured, of all ranks together: gives the time of an epoch
    tokens_per_s: float | None = None
    # where to draw the lengths
    png: str | None = None


def check_conversation_flags(config: PrepareConfig | ShowConfig) -> None:
    """ValueError: a flag that says how conversations become tokens is wrong."""
    if config.template not in TEMPLATES:
        raise ValueError(f"--template {config.template!r} is not one of {', '.join(TEMPLATES)}")
    if config.too_long not in TOO_LONG:
        raise ValueError(f"--too_long {config.too_long!r} is not one of {', '.join(TOO_LONG)}")
    if config.max_len < 2:
        raise ValueError(f"--max_len {config.max_len}: a conversation has at least 2 tokens")
    if config.reward and config.beta is None:
        raise ValueError(
            f"--reward {config.reward} needs --beta: the weight is exp((r - the highest r) / beta)"
        )
    if config.beta is not None and not (config.reward or config.classes):
        raise ValueError(f"--beta {config.beta} without --classes or --reward, so without a reward")


# ---- prepare: conversation files -> a prepared file

# What is counted of each class. Every token that is read is in exactly one of these:
# tokens_read + added_by_split = trained + prompt + truncated + dropped + trailing_cut
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

# The arrays of a prepared file in their order, and their types.
ARRAYS = {
    "group": "<i8",
    "offsets": "<i8",
    "weights": "<f4",
    "tokens": "<i4",
    "class_ids": "<i2",
    "tokenizer": "|u1",
}


def prepare(config: PrepareConfig) -> dict:
    """Tokenize conversation files into one safetensors file; returns its metadata.

    However long the files are, a few hundred conversations of them are held at a time: what is made
    of them grows on the disk.
    """
    if not config.files or not config.tokenizer or not config.out:
        raise ValueError("prepare needs FILE.. --tokenizer PATH --out FILE.safetensors")
    check_conversation_flags(config)
    if not config.out.endswith(".safetensors"):
        raise ValueError(
            f"--out {config.out!r} does not end in .safetensors, as a prepared file does"
        )
    check_no_input(config)

    tokenizer = tokenizer_for(config.template, config.tokenizer)
    totals = Totals(config)
    with Makers(config, tokenizer, config.processes) as makers, Spool(config.out) as spool:
        highest = highest_reward(config, makers)
        offset = 0
        spool.append("offsets", np.zeros(1, np.int64))
        for made in makers.run("tokenize", Maker.make, highest):
            class_ids = totals.add(made)
            spool.append("group", made.group)
            spool.append("offsets", offset + np.cumsum(made.lengths))
            spool.append("weights", made.weights)
            spool.append("tokens", made.tokens)
            spool.append("class_ids", class_ids)
            offset += len(made.tokens)
        spool.append("tokenizer", np.frombuffer(tokenizer.bytes, np.uint8))

        # what only the whole of the files shows; then the file appears
        if config.reward and totals.account.highest_reward != highest:
            raise ValueError("the files were changed while they were read; prepare them again")
        totals.check()
        meta = totals.metadata(tokenizer)
        meta["digests"] = spool.digests()
        meta["sha256"] = metadata_sha256(meta)
        spool.join(tuple(ARRAYS), {"crlft": json.dumps(meta)})
    return meta


def metadata_sha256(meta: dict) -> str:
    """The sha256 of the metadata: through their digests, of the whole file."""
    without = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(without).encode()).hexdigest()


def check_no_input(config: PrepareConfig) -> None:
    """ValueError: the prepared file would take the place of a file that it is made from."""
    if not Path(config.out).exists():
        return
    for path in (*config.files, config.tokenizer):
        # the same file under another name, too: a link, or another way to its folder
        if Path(path).exists() and os.path.samefile(path, config.out):
            raise ValueError(f"--out {config.out} is the input {path}; give another name")


def highest_reward(config: PrepareConfig | ShowConfig, makers: Makers) -> float:
    """With --reward, the highest in all files, which weights are relative to: so they are read
    twice. ValueError: no answer needs a reward.
    """
    # What is the same for all weights cancels, so the highest reward may stand for 1.
    if not config.reward:
        return 1.0
    of_chunks = makers.run("find the highest reward", Maker.highest_reward)
    found = [highest for highest in of_chunks if highest is not None]
    if not found:
        files = ", ".join(map(str, config.files))
        raise ValueError(
            f"--reward {config.reward}: every answer of {files} has a weight of its own; "
            "remove the weights, or leave out --reward"
        )
    return max(found)


# ---- prepare: what only the whole of the files shows

# Labels that a message lists, the most frequent first.
LABELS_SHOWN = 8
# columns of a label in a list
LABEL_WIDTH = 60


# what the metadata say of a class
CLASS_FIELDS = ("name", "condition", "weight")


class Totals:
    """What is counted over all chunks, and the classes by their numbers in the whole of the files.

    The table's classes keep the table's order. The others are numbered as the files name them,
    whichever process has seen them first.
    """

    def __init__(self, config: PrepareConfig | ShowConfig):
        self.config = config
        table = parse_classes(config.classes, config.beta, bool(config.reward))
        self.classes = Classes(table, config.beta)
        self.of_class = [OfClass() for _ in self.classes.all]
        self.account = Account()
        self.kept = np.zeros(len(self.classes.all), np.int64)

    def add(self, made: Made) -> np.ndarray:
        """Count a chunk; returns the class ids of its conversations, int16 [n]."""
        ids = []
        for class_, counted in made.classes.items():
            i = self.classes.id_of(class_)
            if i == len(self.of_class):
                self.of_class.append(OfClass())
            self.of_class[i].add(counted)
            ids.append(i)
        self.account.add(made.account)
        class_ids = np.array(ids, np.int16)[made.class_ids]
        kept = np.bincount(class_ids, minlength=len(self.of_class))
        kept[: len(self.kept)] += self.kept
        self.kept = kept
        return class_ids

    @property
    def labels(self) -> collections.Counter:
        """Of all classes together."""
        found = collections.Counter()
        for of_class in self.of_class:
            found.update(of_class.labels)
        return found

    def check(self) -> None:
        """ValueError: a flag that reaches nothing, or nothing to train on."""
        self.check_flags()
        config = self.config
        files = ", ".join(map(str, config.files))
        expert = self.expert()
        if not self.kept.any():
            raise ValueError(
                f"{files}: no conversation has a token to train on; check roles and weights"
            )
        if not self.kept[self.classes.ids[expert]]:
            raise ValueError(
                f"every conversation of the expert's class {expert.name} is dropped (empty "
                "answers, nothing with a weight, or too long); check weights, --max_len and "
                "--expert"
            )

    def check_flags(self) -> None:
        """ValueError: --label names a field that no row has."""
        label = self.config.label
        if label and not any(self.labels):
            files = ", ".join(map(str, self.config.files))
            raise ValueError(f"--label {label}: no row of {files} has a text in that field")

    def expert(self) -> Class:
        """The expert's class. ValueError: it is not known, or no conversation is of it."""
        if not self.account.answers and not self.labels:
            raise ValueError("the files hold no conversation; give others")
        expert = self.classes.expert(self.config.expert)
        if self.of_class[self.classes.ids[expert]].ledger["conversations"]:
            return expert
        labels = self.labels
        shown = [f"{label!r} ({n:,})" for label, n in labels.most_common(LABELS_SHOWN)]
        if len(labels) > LABELS_SHOWN:
            shown.append("..")
        raise ValueError(
            f"no conversation is of the expert's class {expert.name}; the labels are "
            f"{', '.join(shown)}; check --classes, --label and --expert"
        )

    def metadata(self, tokenizer: Tokenizer) -> dict:
        """What train.py and the export must know of a prepared file beside its arrays."""
        config = self.config
        template = TEMPLATES[config.template]
        shown = []
        counts = {}
        labels = {}
        for class_, of_class in zip(self.classes.all, self.of_class):
            # a class that only the rows name has their highest weight
            if class_.weight is None:
                class_ = dataclasses.replace(class_, weight=of_class.highest_weight)
            # with a template without it no prompt says the condition, so sampling has none to say
            if "{c}" not in f"{template.user}{template.assistant}{template.opening}":
                class_ = dataclasses.replace(class_, condition="")
            shown.append({name: getattr(class_, name) for name in CLASS_FIELDS})
            counts[class_.name] = {key: int(of_class.ledger[key]) for key in LEDGER}
            labels[class_.name] = dict(of_class.labels.most_common(LABELS_SHOWN))

        return {
            "format": FORMAT,
            "tokenizer_sha256": hashlib.sha256(tokenizer.bytes).hexdigest(),
            **tokenizer.ids,
            "eot": tokenizer.eot,
            "vocab_size": tokenizer.vocab_size,
            "template": config.template,
            "max_len": config.max_len,
            "classes": shown,
            "expert": self.expert().name,
            "counts": counts,
            "labels": labels,
            **self.account.fields(config.beta),
        }


# The printed table: (title, key in the counts, columns).
LEDGER_COLUMNS = (
    ("convs", "conversations", 8),
    ("turns", "turns", 8),
    ("read", "tokens_read", 10),
    ("trained", "trained", 10),
    ("prompt", "prompt", 10),
    ("truncated", "truncated", 9),
    ("dropped", "dropped", 8),
    ("trailing", "trailing_cut", 8),
    ("split", "added_by_split", 6),
)


def ledger_table(meta: dict) -> str:
    """The counts as a table, a line per class; from `read` on they are tokens."""
    header = "class         weight"
    for title, _, width in LEDGER_COLUMNS:
        header += f" {title:>{width}}"
    lines = [header]

    total = collections.Counter()
    for class_ in meta["classes"]:
        counts = meta["counts"][class_["name"]]
        total.update(counts)
        line = f"{on_one_line(class_['name']):12} {class_['weight']:7.4g}"
        for _, key, width in LEDGER_COLUMNS:
            line += f" {counts[key]:{width},}"
        lines.append(line)
    lines += label_lines(meta)

    dropped = f"{total['dropped_conversations']:,} conversations dropped"
    why_dropped = "(an empty answer, nothing to train on, or too long)"
    truncated = f"{total['truncated_conversations']:,} cut at {meta['max_len']:,} tokens"
    split = f"{total['split_conversations']:,} split"
    chosen = f"expert: {on_one_line(meta['expert'])}, template: {meta['template']}"
    lines.append(f"{dropped} {why_dropped}, {truncated}, {split}; {chosen}")
    for class_ in meta["classes"]:
        if not meta["counts"][class_["name"]]["conversations"]:
            name = on_one_line(class_["name"])
            lines.append(f"warning: no conversation is of class {name}; check --classes")
    return "\n".join(lines + account_lines(meta))


def label_lines(meta: dict) -> list[str]:
    """Which labels each class has, the most frequent first: `Model: GPT-4 805 -> GPT4`."""
    lines = []
    for name, labels in (meta.get("labels") or {}).items():
        for label, conversations in labels.items():
            label = textwrap.shorten(label, LABEL_WIDTH, placeholder="..") or "(no label)"
            lines.append(f"{label} {conversations:,} -> {on_one_line(name)}")
        others = meta["counts"][name]["conversations"] - sum(labels.values())
        if others:
            lines.append(f"other labels {others:,} -> {on_one_line(name)}")
    return lines


# What decides an answer's weight, in words; in the order in which it is asked.
DECIDED_BY = {
    "message": "the message",
    "reward": "the row's reward",
    "row": "the row's weight",
    "class": "the class",
}


def account_lines(meta: dict) -> list[str]:
    """What `Account` found, in words. Files that were prepared before it was kept say nothing."""
    lines = []
    decided = meta.get("decided_by") or {}
    if decided:
        counts = [f"{decided[key]:,} by {DECIDED_BY[key]}" for key in DECIDED_BY if key in decided]
        lines.append(f"weights of answers: {', '.join(counts)}")
    if meta.get("user_messages"):
        lines.append(f"messages of users with a weight of their own: {meta['user_messages']:,}")
    if meta.get("rewards"):
        r = meta["rewards"]
        lines.append(
            f"rewards from {r['lowest']:g} to {r['highest']:g}, beta {r['beta']:g}: effective "
            f"sample size (sum w)^2 / sum w^2: {r['sample_size']:,.1f} of {r['answers']:,} answers"
        )
    for name, rows in (meta.get("unread") or {}).items():
        lines.append(
            f"not used: {name} (rows: {rows:,}); if it says who wrote an answer or how much it "
            "counts, see docs/data.md"
        )
    return lines


# ---- a prepared file, opened

# Tokens whose weights are summed at once: the file may be larger than the memory.
SUMMED_AT_ONCE = 2**20
# Values that are checked at once: few enough to be in the processor's cache still when they are
# hashed.
CHECKED_AT_ONCE = 2**17

# What is said of a file that was prepared before there were digests.
NO_DIGESTS = (
    "{path}: carries no digests, as it was prepared before there were any; a value that changed "
    "on the disk may go unseen"
)

# The validation split looks at a prompt's hash modulo this: fractions are exact to 0.01%.
HASH_SHARES = 10_000


class Prepared:
    """A prepared file, open: every rank opens it, none has a copy.

    A conversation is read when it is asked for, from the file that was opened, also if another one
    takes its name. The arrays of the file have its names (see the top of this file); `tokens` and
    `weights` are mapped. Besides:

        lengths      int64 [N]  tokens of each conversation
        weight_sums  fp64 [N]   sum of its weights
        supervised   int64 [N]  tokens of it that have a weight
        classes      [Class], by class id
        tokenizer    Tokenizer, built when it is asked for: Llama-3's takes a second and 0.3 GB
        vocab_size   ids of the tokenizer, the end of turn included
        meta         the metadata
    """

    def __init__(self, path: str | Path):
        """ValueError: no prepared file, or one whose metadata or offsets are wrong.

        Tokens and weights are not read here. `check` reads them all, `weight_sums` the weights.
        """
        self.path = str(path)
        if not Path(path).is_file():
            raise ValueError(
                f"{path}: no such prepared file; make it with `python data.py prepare`"
            )
        self.file = Arrays(path)
        if "crlft" not in self.file.metadata:
            raise ValueError(
                f"{path}: a safetensors file, but not one that `python data.py prepare` wrote"
            )
        self.meta = checked_metadata(self.file.metadata["crlft"], f"{path}: metadata")
        self.classes = [Class(**fields) for fields in self.meta["classes"]]
        self.check_arrays()
        self.offsets = self.file.read("offsets")
        self.class_ids = self.file.read("class_ids")
        self.group = self.file.read("group")
        self.tokenizer_bytes = self.file.read("tokenizer")

        # what plan needs of each conversation, known before any of it is trained on
        self.lengths = np.diff(self.offsets)
        self.check_small_arrays()

    def check_arrays(self) -> None:
        """ValueError: not the arrays of a prepared file, by their names, types and lengths."""
        stored = self.file.stored
        if set(stored) != set(ARRAYS):
            raise self.broken(f"has the arrays {', '.join(stored)}, not {', '.join(ARRAYS)}")
        conversations = stored["class_ids"].length
        tokens = stored["tokens"].length
        lengths = {"group": conversations, "offsets": conversations + 1, "weights": tokens}
        for name, array in stored.items():
            if array.dtype != np.dtype(ARRAYS[name]):
                raise self.broken(f"{name}: of type {array.dtype}, not {np.dtype(ARRAYS[name])}")
            if array.length != lengths.get(name, array.length):
                raise self.broken(f"{name}: {array.length:,} values instead of {lengths[name]:,}")

    def check_small_arrays(self) -> None:
        """ValueError: values that cannot be in the arrays that have been read by now."""
        tokens = self.file.stored["tokens"].length
        if self.offsets[0] != 0 or self.offsets[-1] != tokens:
            raise self.broken(f"offsets: not from 0 to the {tokens:,} tokens")
        if len(self) and not 2 <= self.lengths.min() <= self.lengths.max() <= tokens:
            raise self.broken("offsets: a conversation of fewer than 2 tokens")
        if len(self) and not 0 <= self.class_ids.min() <= self.class_ids.max() < len(self.classes):
            raise self.broken(f"class_ids: one that is none of the {len(self.classes):,} classes")
        if hashlib.sha256(self.tokenizer_bytes).hexdigest() != self.meta["tokenizer_sha256"]:
            raise self.broken("tokenizer: not the bytes of tokenizer_sha256")
        counted = sum(n["trained"] + n["prompt"] for n in self.meta["counts"].values())
        if counted != tokens:
            raise self.broken(f"{tokens:,} tokens are not what its own counts say, {counted:,}")

    def broken(self, why: str) -> ValueError:
        return ValueError(f"{self.path}: {why}; {REMEDY}")

    @property
    def has_digests(self) -> bool:
        """Whether its metadata have them; files that were prepared before have none."""
        return "digests" in self.meta

    @property
    def tokens(self) -> np.ndarray:
        return self.file.mapped("tokens")

    @property
    def weights(self) -> np.ndarray:
        return self.file.mapped("weights")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_for(template_of(self.meta), self.tokenizer_bytes.tobytes(), self.meta)

    @property
    def vocab_size(self) -> int:
        return self.meta.get("vocab_size") or self.tokenizer.vocab_size

    def template_tokens(self) -> tuple[list[int], int | None]:
        """(ids of special tokens that the template takes from the base, how many ids come before
        the base's special tokens); ([], None) where it takes none."""
        template = template_named(template_of(self.meta))
        if template.end_of_turn == EOT:
            return [], None
        return tokens_of(template, self.tokenizer), self.tokenizer.first_special

    @property
    def weight_sums(self) -> np.ndarray:
        return self.sums[0]

    @property
    def supervised(self) -> np.ndarray:
        return self.sums[1]

    @functools.cached_property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """(weight_sums, supervised). ValueError: the ledger counts otherwise."""
        weight_sums = np.zeros(len(self))
        supervised = np.zeros(len(self), np.int64)
        first = 0
        while first < len(self):
            # at least one conversation, and no more than so many tokens
            stop = np.searchsorted(self.offsets, self.offsets[first] + SUMMED_AT_ONCE, "right") - 1
            stop = max(first + 1, stop)
            offsets = self.offsets[first : stop + 1]
            weights = self.file.read("weights", offsets[0], offsets[-1])
            self.check_values("weights", offsets[0], weights)
            # reduceat adds up from each start to the next
            starts = offsets[:-1] - offsets[0]
            weight_sums[first:stop] = np.add.reduceat(weights, starts, dtype=np.float64)
            supervised[first:stop] = np.add.reduceat(weights != 0, starts, dtype=np.int64)
            first = stop

        # a file that was edited would be trained on without a word
        for i, class_ in enumerate(self.classes):
            found = supervised[self.class_ids == i].sum()
            counted = self.meta["counts"][class_.name]["trained"]
            if found != counted:
                raise self.broken(
                    f"{found:,} tokens of class {class_.name} are trained on, which is not what "
                    f"its own counts say, {counted:,}"
                )
        return weight_sums, supervised

    def check_values(self, name: str, first: int, values: np.ndarray) -> None:
        """ValueError: values of an array that cannot be; they are those from `first` on."""
        if name not in ("tokens", "weights") or len(values) == 0:
            return
        most = MAX_WEIGHT if name == "weights" else self.vocab_size - 1
        # NaN is not in this range either
        if not (values.min() >= 0 and values.max() <= most):
            raise self.broken(f"{name}: a value that is not from 0 to {most:,}")
        if name == "weights":
            one, other = np.searchsorted(self.offsets[:-1], [first, first + len(values)])
            if values[self.offsets[one:other] - first].any():
                raise self.broken("weights: a weight on a conversation's first token")

    def check(self) -> None:
        """ValueError: anything in the file is not as it was prepared."""
        self.check_digests(self.check_pieces())
        # summing up the weights compares them with the ledger
        _ = self.sums

    def check_pieces(self, part: int = 0, parts: int = 1) -> dict[tuple[str, int], bytes]:
        """Check the values of every parts-th piece of the file, from number `part` on.

        Returns what `check_digests` takes: {(array, its first value): sha256} of these pieces,
        nothing without digests.
        """
        found = {}
        pieces = list(itertools.islice(self.file.pieces(), part, None, parts))
        # a bar where it takes over two seconds, on a terminal
        is_quiet = True if part else None
        for name, first, stop in tqdm(pieces, f"check {self.path}", disable=is_quiet, delay=2):
            digest = hashlib.sha256()
            for start in range(first, stop, CHECKED_AT_ONCE):
                values = self.file.read(name, start, min(start + CHECKED_AT_ONCE, stop))
                self.check_values(name, start, values)
                if self.has_digests:
                    digest.update(values)
            if self.has_digests:
                found[name, first] = digest.digest()
        return found

    def check_digests(self, found: dict[tuple[str, int], bytes]) -> None:
        """ValueError: an array is not the one that was prepared. found: of all pieces."""
        for name, digest in self.meta.get("digests", {}).items():
            mine = sorted(key for key in found if key[0] == name)
            if digest_of([found[key] for key in mine]) != digest:
                raise self.broken(f"{name}: not what was prepared, by its digest")

    def __len__(self) -> int:
        return len(self.lengths)

    def conversation(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, weights) of conversation i."""
        first, stop = self.offsets[i : i + 2].tolist()
        return self.file.read("tokens", first, stop), self.file.read("weights", first, stop)

    def batch(self, conversations: Sequence[int]) -> Batch:
        """The Batch of these conversations, in this order. ValueError: the file has changed."""
        self.file.check_unchanged()
        return pack([self.conversation(i) for i in conversations], self.class_ids[conversations])

    def split(self, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """(train, val): indices of conversations.

        A prompt goes to val by its hash, in whichever file it stands: the split is the same after
        reshuffling and after adding data.
        """
        in_val = (self.group % HASH_SHARES) < val_fraction * HASH_SHARES
        return np.flatnonzero(~in_val), np.flatnonzero(in_val)


# what a prepared file needs that is not as it was written
REMEDY = "copy or prepare it again"
# above all ids and lengths
MOST = 2**31


def checked_metadata(text: str, place: str) -> dict:
    """The metadata of a prepared file. ValueError names the field that cannot be.

    Files that were prepared before lack some of the fields.
    """
    meta = parse_object(text.encode("utf-8", "surrogatepass"), place, REMEDY)
    # one of the two is enough to know that both were there
    if "digests" in meta or "sha256" in meta:
        check_seal(meta, text, place)
    fields = Fields(meta, place, REMEDY)
    fields.whole("format", 1, MOST, default=1)
    fields.whole("max_len", 2, MOST)
    fields.text("tokenizer_sha256")
    if fields.text("template") not in TEMPLATES | FORMER_TEMPLATES:
        raise fields.wrong("template", f"one of {', '.join(TEMPLATES)}")
    vocab_size = fields.whole("vocab_size", 1, MOST, default=MOST)
    for name in ("bos", "eos", "pad", "eot"):
        fields.whole(name, 0, vocab_size - 1, default=0)
    check_classes(fields)
    return meta


def check_seal(meta: dict, text: str, place: str) -> None:
    """ValueError: the metadata are not those that were written with their sha256."""
    # the text, too: `1e-05` and `1E-05` are the same number
    is_same = meta.get("sha256") == metadata_sha256(meta) and text == json.dumps(meta)
    digests = meta.get("digests")
    if not is_same or not isinstance(digests, dict) or set(digests) != set(ARRAYS):
        raise ValueError(f"{place}: not what was prepared, by their sha256; {REMEDY}")


def check_classes(fields: Fields) -> None:
    """ValueError: classes, expert or counts cannot be, or the counts do not add up."""
    names = []
    for class_ in fields.objects("classes"):
        names.append(class_.text("name"))
        class_.text("condition")
        class_.number("weight", 0, MAX_WEIGHT)
        if set(class_.content) != set(CLASS_FIELDS):
            raise fields.wrong("classes", "a list of names, conditions and weights")
    if len(names) > MOST_CLASSES or len(set(names)) < len(names):
        raise fields.wrong("classes", f"a list of at most {MOST_CLASSES:,}, each with its own name")
    if fields.text("expert") not in names:
        raise fields.wrong("expert", "the name of a class")

    counts = fields.object("counts")
    if set(counts.content) != set(names):
        raise fields.wrong("counts", "an object with each class's name")
    for name in names:
        of_class = counts.object(name)
        n = {key: of_class.whole(key, 0, 2**63) for key in LEDGER}
        ends = n["trained"] + n["prompt"] + n["truncated"] + n["dropped"] + n["trailing_cut"]
        if n["tokens_read"] + n["added_by_split"] != ends:
            raise counts.wrong(name, "a ledger that adds up")
    check_accounts(fields)


def check_accounts(fields: Fields) -> None:
    """ValueError: what `show` and `stats` only print is of another kind."""
    fields.whole("user_messages", 0, 2**63, default=0)
    nothing = Fields({}, fields.place)
    for name in ("decided_by", "unread"):
        counted = fields.object(name, default=nothing)
        for key in counted.content:
            counted.whole(key, 0, 2**63)

    labels = fields.object("labels", default=nothing)
    for name in labels.content:
        # a class of that name there must be
        fields.object("counts").object(name)
        of_class = labels.object(name)
        for label in of_class.content:
            of_class.whole(label, 0, 2**63)

    rewards = fields.object("rewards", default=None)
    if rewards:
        for name in ("lowest", "highest", "beta", "sample_size"):
            rewards.number(name, -1e308, 1e308)
        rewards.whole("answers", 0, 2**63)


# ---- show: a few conversations, token by token

# As sentencepiece writes them: the space that a word carries, and a newline.
SPACE_PIECE = "\u2581"
NEWLINE_PIECE = "<0x0A>"

WIDEST_BAR = 50  # columns of the printed histogram


@dataclass(frozen=True)
class Shown:
    """What `show` prints: the same for a prepared file as for conversation files."""

    tokenizer: Tokenizer
    class_names: list[str]
    # the highest weight, which is the brightest colour
    heaviest: float
    # (number, class id, tokens, weights) of the conversations to print
    rows: list[tuple[int, int, np.ndarray, np.ndarray]]
    # int64, of all conversations; None where not all were read
    lengths: np.ndarray | None


def show(config: ShowConfig) -> None:
    """Print a few conversations of a prepared file, or of conversation files as they would be
    prepared: tokens by weight, classes, lengths."""
    if not config.files:
        raise ValueError("show needs a prepared file, or conversation files and --tokenizer")
    if config.at < 0 or config.n < 0:
        raise ValueError(f"--at {config.at} --n {config.n}: conversations are counted from 0")
    if config.files[0].endswith(".safetensors"):
        if len(config.files) > 1:
            raise ValueError(
                f"{config.files[1]}: show takes one prepared file, or conversation files"
            )
        check_only_prepared(config)
        data = Prepared(config.files[0])
        if not data.has_digests:
            print(NO_DIGESTS.format(path=data.path))
        print(ledger_table(data.meta))
        shown = shown_of_prepared(data, config)
    else:
        shown = shown_of_conversations(config)

    if not shown.rows and config.n:
        wanted = "conversation"
        if config.of is not None:
            wanted += f" of class {config.of}"
        if config.at:
            wanted += f" from number {config.at} on"
        raise ValueError(
            f"{', '.join(config.files)}: no {wanted} has a token to train on; "
            "check roles, answers and weights"
        )
    for row in shown.rows:
        print_conversation(shown, *row)
    if shown.lengths is not None:
        print_lengths(shown.lengths)


def check_only_prepared(config: ShowConfig) -> None:
    """ValueError: a flag that says how to prepare, and the file is prepared already."""
    for option in dataclasses.fields(ShowConfig):
        is_for_both = option.name in ("files", "n", "at", "of")
        if not is_for_both and getattr(config, option.name) != option.default:
            raise ValueError(
                f"--{option.name} is for conversation files, and {config.files[0]} is prepared; "
                "leave it out"
            )


def check_class_is_known(name: str | None, names: list[str]) -> None:
    """ValueError: --of names a class that there is not."""
    if name is not None and name not in names:
        raise ValueError(f"--of {name!r} is none of the classes {', '.join(names)}")


def shown_of_prepared(data: Prepared, config: ShowConfig) -> Shown:
    """n conversations of a prepared file, from one number on, of one class or of all."""
    names = [class_.name for class_ in data.classes]
    check_class_is_known(config.of, names)
    wanted = np.arange(config.at, len(data))
    if config.of is not None:
        wanted = wanted[data.class_ids[config.at :] == names.index(config.of)]
    rows = []
    for i in wanted[: config.n].tolist():
        tokens, weights = data.conversation(i)
        data.check_values("tokens", data.offsets[i], tokens)
        data.check_values("weights", data.offsets[i], weights)
        rows.append((i, data.class_ids[i], tokens, weights))
    heaviest = max(class_.weight for class_ in data.classes)
    lengths = None if config.is_part else data.lengths
    return Shown(data.tokenizer, names, heaviest, rows, lengths)


def shown_of_conversations(config: ShowConfig) -> Shown:
    """The same of conversation files, cut as `prepare` would; what comes after is not read."""
    check_conversation_flags(config)
    if not config.tokenizer:
        raise ValueError("conversation files are shown with --tokenizer PATH")
    tokenizer = tokenizer_for(config.template, config.tokenizer)
    totals = Totals(config)
    rows = []
    lengths = []
    heaviest = 0.0
    number = 0
    with Makers(config, tokenizer, processes=1) as makers:
        for made in makers.run("read", Maker.make, highest_reward(config, makers)):
            class_ids = totals.add(made)
            lengths.append(made.lengths)
            heaviest = max(heaviest, made.weights.max(initial=0.0))
            ends = np.cumsum(made.lengths)
            for class_id, length, end in zip(class_ids, made.lengths, ends):
                is_wanted = config.of in (None, totals.classes.all[class_id].name)
                if number >= config.at and is_wanted and len(rows) < config.n:
                    mine = slice(end - length, end)
                    rows.append((number, class_id, made.tokens[mine], made.weights[mine]))
                number += 1
            if config.is_part and len(rows) == config.n:
                break
    names = [class_.name for class_ in totals.classes.all]
    check_class_is_known(config.of, names)
    if not config.is_part:
        totals.check_flags()
        for line in account_lines(totals.account.fields(config.beta)):
            print(line)
    lengths = None if config.is_part else np.concatenate([*lengths, np.empty(0, np.int64)])
    return Shown(tokenizer, names, heaviest or 1.0, rows, lengths)


def print_conversation(
    shown: Shown, number: int, class_id: int, tokens: np.ndarray, weights: np.ndarray
) -> None:
    """One conversation: its class, its tokens by weight, and what the model learns where."""
    name = on_one_line(shown.class_names[class_id])
    trained = np.count_nonzero(weights)
    print(f"\n-- conversation {number}, class {name}, {len(tokens)} tokens, {trained} trained")
    print(colored(shown.tokenizer, tokens, weights, shown.heaviest))

    # Weights and labels of a batch stand one row before the token that they are of. Where an answer
    # starts and where the last ends, one can see that they do.
    batch = pack([(tokens, weights)])
    rows = batch.rows_R.tolist()
    for t in (*rows[:2], *rows[-1:]):
        token = readable_piece(shown.tokenizer, batch.tokens_T[t])
        label = readable_piece(shown.tokenizer, batch.labels_T[t])
        weight = batch.weights_T[t]
        print(f"  row {t}: after {token!r} the model is to say {label!r}, weight {weight:g}")


def readable_piece(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.piece(int(token)).replace(SPACE_PIECE, " ")


def colored(tokenizer: Tokenizer, tokens: np.ndarray, weights: np.ndarray, heaviest: float) -> str:
    """The tokens as one text, in which one sees the weights.

    On a terminal those without weight are dim, the others green, brighter with weight. Elsewhere
    they are plain, and [weight|text].
    """
    texts = []
    pairs = zip(weights.tolist(), tokens.tolist())
    for weight, run_of_pairs in itertools.groupby(pairs, key=lambda pair: pair[0]):
        text = "".join(tokenizer.piece(token) for _, token in run_of_pairs)
        text = text.replace(SPACE_PIECE, " ").replace(NEWLINE_PIECE, "\n")
        texts.append(painted(text, weight, heaviest))
    return "".join(texts)


def painted(text: str, weight: float, heaviest: float) -> str:
    """A text whose tokens all have this weight."""
    if not sys.stdout.isatty():
        return f"[{weight:g}|{text}]" if weight else text
    if not weight:
        return f"\x1b[2m{text}\x1b[0m"
    # from 55, dark, to 255; by the root, or a tenth of the weight would hardly be seen
    green = 55 + round(200 * min(1, weight / heaviest) ** 0.5)
    return f"\x1b[38;2;0;{green};0m{text}\x1b[0m"


def print_lengths(lengths: np.ndarray) -> None:
    """A histogram in powers of 2."""
    print(f"\nlengths of {len(lengths):,} conversations: {lengths.sum():,} tokens")
    highest_power = int(np.log2(max(lengths.max(), 2)))
    edges = 2 ** np.arange(1, highest_power + 2)
    counts, _ = np.histogram(lengths, [*edges, 2 * edges[-1]])
    for first, count in zip(edges, counts):
        last = 2 * first - 1
        bar = "#" * round(WIDEST_BAR * count / counts.max())
        print(f"{first:7,} to {last:7,} {count:8,} {bar}")


# ---- stats: the whole file, and its steps

# Weights that are squared at once, as fp64: 128 MB.
SQUARED_AT_ONCE = 2**24

BAR_EDGES = 50  # of the drawn histogram


def stats(config: StatsConfig) -> None:
    """Print what a prepared file is made of, and how its steps come out."""
    if len(config.files) != 1:
        raise ValueError("stats needs one prepared file: python data.py stats FILE.safetensors")
    for name in ("batch_tokens", "micro_tokens", "ranks", "pretrain_lr", "tokens_per_s"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} {value} is not above 0")

    data = Prepared(config.files[0])
    data.check()
    if not data.has_digests:
        print(NO_DIGESTS.format(path=data.path))
    print(ledger_table(data.meta), "\n")
    print_classes(data)
    print_sample_size(data)

    # the steps of the first epoch with seed 0; any other is much the same
    steps = plan(
        data.lengths,
        data.class_ids,
        data.weight_sums,
        seed=0,
        epoch=0,
        batch_tokens=config.batch_tokens,
        micro_tokens=config.micro_tokens,
    )
    print_steps(data, steps, config)
    print_load(data, steps, config.ranks)
    _, how = finetune_lr(data.supervised.sum() / len(steps), config.pretrain_lr)
    print(how)
    if config.tokens_per_s:
        hours = data.lengths.sum() / config.tokens_per_s / 3600
        print(f"{hours:.2f} hours an epoch at {config.tokens_per_s:,.0f} tokens/s")
    if config.png:
        draw_lengths(data, config.png)


def print_classes(data: Prepared) -> None:
    """A line per class: its conversations, tokens, share of all weight, and lengths."""
    total = data.weight_sums.sum()
    print(
        "class           convs      tokens  supervised of weight   "
        "length: min, 5%, median, 95%, max"
    )
    for i, class_ in enumerate(data.classes):
        mine = data.class_ids == i
        lengths = data.lengths[mine]
        supervised = data.supervised[mine].sum()
        share = data.weight_sums[mine].sum() / total
        line = (
            f"{on_one_line(class_.name):12} {len(lengths):8,} {lengths.sum():11,} {supervised:11,}"
        )
        print(f"{line} {share:9.1%}   {percentiles(lengths)}")


def percentiles(lengths: np.ndarray) -> str:
    if len(lengths) == 0:
        return "-"
    found = np.percentile(lengths, [0, 5, 50, 95, 100])
    return " ".join(f"{length:7,.0f}" for length in found)


def print_sample_size(data: Prepared) -> None:
    """How many tokens of equal weight would be worth as much as these of unequal weight."""
    squares = 0.0
    for first in range(0, data.offsets[-1], SQUARED_AT_ONCE):
        stop = min(first + SQUARED_AT_ONCE, data.offsets[-1])
        weights = data.file.read("weights", first, stop).astype(np.float64)
        squares += float((weights**2).sum())
    size = data.weight_sums.sum() ** 2 / squares
    print(
        f"effective sample size (sum w)^2 / sum w^2: {size:,.0f} of "
        f"{data.supervised.sum():,} supervised tokens\n"
    )


def print_steps(data: Prepared, steps: Steps, config: StatsConfig) -> None:
    """How full the steps are, and whether each holds the classes in proportion."""
    # as `plan` has it
    capacity = min(config.micro_tokens, config.batch_tokens)
    micro_batches = micro_batches_of(config.batch_tokens, config.micro_tokens)
    full = data.lengths.sum() / (len(steps) * micro_batches * capacity)
    size = f"{micro_batches} x {capacity:,} tokens"
    print(f"an epoch: {len(steps)} steps of {size}, {full:.1%} full")

    # where this share changes from step to step, so does what the reward is worth (packing.py)
    names = [class_.name for class_ in data.classes]
    is_expert = data.class_ids == names.index(data.meta["expert"])
    weight_sums = np.zeros(len(steps))
    shares = np.zeros(len(steps))
    for s, step in enumerate(steps):
        conversations = flat([step])
        experts = conversations[is_expert[conversations]]
        weight_sums[s] = data.weight_sums[conversations].sum()
        shares[s] = data.weight_sums[experts].sum() / weight_sums[s]
    in_all = data.weight_sums[is_expert].sum() / data.weight_sums.sum()
    print(f"weight sum of a step: {span(weight_sums, ',.0f')}")
    print(f"expert's share of it: {span(shares, '.4f')} ({in_all:.4f} in all)")


def span(values: np.ndarray, form: str) -> str:
    low = format(values.min(), form)
    high = format(values.max(), form)
    mean = format(values.mean(), form)
    return f"{low} to {high}, mean {mean}"


def print_load(data: Prepared, steps: Steps, ranks: int) -> None:
    """How much longer the busiest rank works on a step than the mean rank."""
    per_token, per_square = COST_7B
    uneven = {"tokens": [], "sum of length^2": [], "7B's FLOPs": []}
    for step in steps:
        # ranks take the micro-batches of a step in turn; of many ranks some have none
        busy = min(ranks, len(step))
        tokens = np.zeros(busy)
        squares = np.zeros(busy)
        for m, micro_batch in enumerate(step):
            lengths = data.lengths[micro_batch]
            tokens[m % ranks] += lengths.sum()
            squares[m % ranks] += (lengths.astype(np.float64) ** 2).sum()
        flops = per_token * tokens + per_square * squares
        # a step takes as long as its busiest rank
        for load, of_steps in zip((tokens, squares, flops), uneven.values(), strict=True):
            of_steps.append(load.max() / (load.sum() / ranks))
    for name, of_steps in uneven.items():
        mean, worst = np.mean(of_steps), np.max(of_steps)
        print(f"{ranks} ranks, most / mean {name}: {mean:.4f}, at worst {worst:.4f}")


def draw_lengths(data: Prepared, path: str) -> None:
    """A histogram of the lengths, classes on top of each other."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install matplotlib") from None
    # draws into a file, needs no screen
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    # even steps on a logarithmic axis
    edges = np.geomspace(data.lengths.min(), data.lengths.max() + 1, BAR_EDGES)
    names = [class_.name for class_ in data.classes]
    lengths = [data.lengths[data.class_ids == i] for i in range(len(names))]
    axes.hist(lengths, edges, stacked=True, label=names)
    axes.set(
        xscale="log",
        xlabel="tokens of a conversation",
        ylabel="conversations",
    )
    # names are no formulas, whatever dollar signs they have
    axes.set_title(Path(data.path).name, parse_math=False)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    check_help(argv)
    command, words = argv[:1], argv[1:]
    if command == ["prepare"]:
        config = parse_args(PrepareConfig, words, positional="files")
        try:
            meta = prepare(config)
        except KeyboardInterrupt:
            print(f"stopped; nothing is left of {config.out}", file=sys.stderr)
            raise
        print(ledger_table(meta))
        print(on_one_line(f"wrote {config.out}"))
    elif command == ["show"]:
        show(parse_args(ShowConfig, words, positional="files"))
    elif command == ["stats"]:
        stats(parse_args(StatsConfig, words, positional="files"))
    else:
        raise ValueError(
            "say `prepare FILE.. --tokenizer PATH --out FILE.safetensors` `show FILE..` "
            "or `stats FILE.safetensors`; see the top of data.py"
        )


if __name__ == "__main__":
    run(main)
