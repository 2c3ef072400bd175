"""The prepared file: conversation files become tokens, loss weights and classes, once.

    python data.py prepare FILE.. --tokenizer tokenizer.model --out train.safetensors \\
        --classes "Model: GPT-4=GPT4:1.0,*=GPT3:0.1"
    python data.py show train.safetensors         tokens coloured by weight
    python data.py stats train.safetensors        classes, weights, and how the steps come out

What is done to a conversation stands in conversations.py, what is done to many in packing.py. The
file holds the conversations one behind the other (N conversations, S tokens in all):

    tokens      int32 [S]
    weights     fp32 [S]       the weight of predicting the token, 0 outside answers
    offsets     int64 [N + 1]  conversation i is tokens[offsets[i] : offsets[i + 1]]
    class_ids   int16 [N]
    group       int64 [N]      hash of the prompt; the validation split goes by it
    tokenizer   uint8          the bytes of tokenizer.model or tokenizer.json
    and as metadata `crlft`, JSON: format, template, max_len, the ids of bos, eos and the end of
    turn, classes, expert, counts per class
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from conversations import (
    FORMAT,
    TEMPLATES,
    Class,
    Classes,
    Conversation,
    Fields,
    cut_to_length,
    parse_classes,
    prompt_hash,
    read,
    template_named,
    template_of,
    tokenize,
    tokenizer_for,
    tokens_of,
)
from packing import COST_7B, Batch, Steps, flat, pack, plan
from recipe import finetune_lr
from support.cli import check_help, parse_args, run
from support.files import written_whole
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
    # the table has rewards instead of weights: a weight is exp((reward - highest) / beta)
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
    """The flags of `data.py show`; all but n are for conversation files."""

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


@dataclass(frozen=True)
class StatsConfig:
    """The flags of `data.py stats`: the run whose steps are to be looked at."""

    # a prepared file
    files: tuple
    # tokens of an optimizer step, at most
    batch_tokens: int = 262_144
    # tokens of a micro-batch, at most
    micro_tokens: int = 16_384
    # GPUs of the run
    ranks: int = 8
    # the base's own learning rate, which the run's is scaled from
    pretrain_lr: float = 3e-4
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

# What worker processes are given at a time: enough that sending it costs little beside tokenizing.
CONVERSATIONS_AT_ONCE = 256


def prepare(config: PrepareConfig) -> dict:
    """Tokenize conversation files into one safetensors file; returns its metadata."""
    if not config.files or not config.tokenizer or not config.out:
        raise ValueError("prepare needs FILE.. --tokenizer PATH --out FILE.safetensors")
    check_conversation_flags(config)
    if not config.out.endswith(".safetensors"):
        raise ValueError(
            f"--out {config.out!r} does not end in .safetensors, as a prepared file does"
        )
    check_no_input(config)

    # every line is read and checked before any work is done
    tokenizer = tokenizer_for(config.template, config.tokenizer)
    conversations, classes = read_all(config)
    expert = expert_of(conversations, classes, config.expert)

    tokens, weights = [], []
    class_ids, groups = [], []
    ledgers = [collections.Counter() for _ in classes.all]
    cuts = cut_all(conversations, tokenizer, config)
    # no bar where the output is not a terminal
    bar = tqdm(cuts, "tokenize", len(conversations), unit=" conversations", disable=None)
    for (parts, ledger), conversation in zip(bar, conversations):
        ledgers[conversation.class_id].update(ledger)
        for part_tokens, part_weights in parts:
            tokens.append(part_tokens)
            weights.append(part_weights)
            class_ids.append(conversation.class_id)
            groups.append(prompt_hash(conversation))
    if not tokens:
        raise ValueError(
            f"{', '.join(map(str, config.files))}: no conversation has a token to train on; "
            "check roles and weights"
        )

    # one behind the other, without padding
    lengths = [len(part) for part in tokens]
    arrays = {}
    arrays["tokens"] = np.concatenate(tokens)
    arrays["weights"] = np.concatenate(weights)
    arrays["offsets"] = np.cumsum([0, *lengths], dtype=np.int64)
    arrays["class_ids"] = np.array(class_ids, np.int16)
    arrays["group"] = np.array(groups, np.int64)
    arrays["tokenizer"] = np.frombuffer(tokenizer.bytes, np.uint8)
    if expert not in [classes.all[i] for i in set(class_ids)]:
        raise ValueError(
            f"every conversation of the expert's class {expert.name} is dropped (empty answers, "
            "nothing with a weight, or too long); check weights, --max_len and --expert"
        )
    complete = with_weights(classes.all, conversations)
    meta = metadata(config, tokenizer, complete, expert.name, ledgers)
    meta |= account(conversations, classes)
    # the file appears when it is whole
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as partial:
        save_file(arrays, partial, metadata={"crlft": json.dumps(meta)})
    return meta


def check_no_input(config: PrepareConfig) -> None:
    """ValueError: the prepared file would take the place of a file that it is made from."""
    if not Path(config.out).exists():
        return
    for path in (*config.files, config.tokenizer):
        # the same file under another name, too: a link, or another way to its folder
        if Path(path).exists() and os.path.samefile(path, config.out):
            raise ValueError(f"--out {config.out} is the input {path}; give another name")


def read_all(config: PrepareConfig | ShowConfig) -> tuple[list[Conversation], Classes]:
    """The conversations of all files, each with its class and weights; and the classes.

    ValueError: also --label or --reward that reaches nothing.
    """
    table = parse_classes(config.classes, config.beta)
    fields = Fields(config.label or "model", config.reward)
    conversations = []
    for path in config.files:
        conversations += read(path, fields)

    files = ", ".join(map(str, config.files))
    if config.label and not any(conversation.label for conversation in conversations):
        raise ValueError(f"--label {config.label}: no row of {files} has a text in that field")
    rewards = [c.reward for c in conversations if c.reward is not None]
    if config.reward and not rewards:
        raise ValueError(
            f"--reward {config.reward}: every answer of {files} has a weight of its own; "
            "remove the weights, or leave out --reward"
        )

    # What is the same for all weights cancels, so the highest reward may stand for 1.
    classes = Classes(table, config.beta, max(rewards, default=1.0))
    assigned = [classes.assign(conversation) for conversation in conversations]
    return assigned, classes


# Labels that a message lists, the most frequent first.
LABELS_SHOWN = 8


def expert_of(conversations: list[Conversation], classes: Classes, name: str | None) -> Class:
    """The expert's class. ValueError: it is not known, or no conversation is of it."""
    if not conversations:
        raise ValueError("the files hold no conversation; give others")
    expert = classes.expert(name)
    if any(classes.all[c.class_id] == expert for c in conversations):
        return expert
    labels = collections.Counter(conversation.label for conversation in conversations)
    shown = [f"{label!r} ({n:,})" for label, n in labels.most_common(LABELS_SHOWN)]
    if len(labels) > LABELS_SHOWN:
        shown.append("..")
    raise ValueError(
        f"no conversation is of the expert's class {expert.name}; the labels are "
        f"{', '.join(shown)}; check --classes, --label and --expert"
    )


def account(conversations: list[Conversation], classes: Classes) -> dict:
    """How the answers came to their weights, and which fields were not asked; for the metadata."""
    unread = collections.Counter()
    rewards = []
    weights = []
    user_messages = 0
    for conversation in conversations:
        unread.update(name for name, _ in conversation.unread)
        if conversation.reward is not None:
            rewards.append(conversation.reward)
        for message in conversation.messages:
            if message.role == "assistant":
                weights.append(message.weight)
            elif message.weight:
                user_messages += 1

    found = {
        "decided_by": dict(classes.decided_by),
        "user_messages": user_messages,
        "unread": dict(unread),
    }
    if rewards:
        found["rewards"] = {
            "lowest": min(rewards),
            "highest": max(rewards),
            "beta": classes.beta,
            "answers": len(weights),
            "sample_size": float(np.sum(weights) ** 2 / np.sum(np.square(weights))),
        }
    return found


def cut_all(
    conversations: list[Conversation], tokenizer: Tokenizer, config: PrepareConfig
) -> Iterator[tuple[list, collections.Counter]]:
    """What `cut_to_length` gives for each, in their order, by several processes where that pays."""
    chunks = []
    for start in range(0, len(conversations), CONVERSATIONS_AT_ONCE):
        chunks.append(conversations[start : start + CONVERSATIONS_AT_ONCE])

    # starting a process costs as much as some thousand conversations: four chunks for each
    processes = min(config.processes, len(chunks) // 4)
    if processes > 1:
        # a process is given the tokenizer once: to build Llama-3's takes a second
        with multiprocessing.Pool(processes, worker_starts, (tokenizer, config)) as pool:
            yield from itertools.chain.from_iterable(pool.imap(worker_cuts, chunks))
    else:
        for chunk in chunks:
            yield from cut_chunk(chunk, tokenizer, config)


def cut_chunk(
    conversations: list[Conversation], tokenizer: Tokenizer, config: PrepareConfig
) -> list[tuple[list, collections.Counter]]:
    """`cut_to_length` of some conversations."""
    found = []
    for conversation in conversations:
        found.append(
            cut_to_length(conversation, tokenizer, config.template, config.max_len, config.too_long)
        )
    return found


# In a worker process: what all its chunks need.
of_this_worker = {}


def worker_starts(tokenizer: Tokenizer, config: PrepareConfig) -> None:
    of_this_worker.update(tokenizer=tokenizer, config=config)


def worker_cuts(conversations: list[Conversation]) -> list[tuple[list, collections.Counter]]:
    """`cut_chunk`, in a worker process."""
    return cut_chunk(conversations, **of_this_worker)


def with_weights(classes: list[Class], conversations: list[Conversation]) -> list[Class]:
    """The classes, none without a weight: one that only the rows name gets their highest."""
    highest = [0.0] * len(classes)
    for conversation in conversations:
        for message in conversation.messages:
            highest[conversation.class_id] = max(highest[conversation.class_id], message.weight)

    complete = []
    for class_, weight in zip(classes, highest):
        if class_.weight is None:
            class_ = dataclasses.replace(class_, weight=weight)
        complete.append(class_)
    return complete


def metadata(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    classes: list[Class],
    expert: str,
    ledgers: list[collections.Counter],
) -> dict:
    """What train.py and the export must know of a prepared file beside its arrays."""
    shown = []
    for class_ in classes:
        # with a template without it no prompt says the condition, so sampling has none to say
        template = TEMPLATES[config.template]
        if "{c}" not in f"{template.user}{template.assistant}{template.opening}":
            class_ = dataclasses.replace(class_, condition="")
        shown.append(dataclasses.asdict(class_))

    counts = {}
    for class_, ledger in zip(classes, ledgers):
        counts[class_.name] = {key: int(ledger[key]) for key in LEDGER}

    return {
        "format": FORMAT,
        "tokenizer_sha256": hashlib.sha256(tokenizer.bytes).hexdigest(),
        **tokenizer.ids,
        "eot": tokenizer.eot,
        "vocab_size": tokenizer.vocab_size,
        "template": config.template,
        "max_len": config.max_len,
        "classes": shown,
        "expert": expert,
        "counts": counts,
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
        line = f"{class_['name']:12} {class_['weight']:7.4g}"
        for _, key, width in LEDGER_COLUMNS:
            line += f" {counts[key]:{width},}"
        lines.append(line)

    dropped = f"{total['dropped_conversations']:,} conversations dropped"
    why_dropped = "(an empty answer, nothing to train on, or too long)"
    truncated = f"{total['truncated_conversations']:,} cut at {meta['max_len']:,} tokens"
    split = f"{total['split_conversations']:,} split"
    chosen = f"expert: {meta['expert']}, template: {meta['template']}"
    lines.append(f"{dropped} {why_dropped}, {truncated}, {split}; {chosen}")
    for class_ in meta["classes"]:
        if not meta["counts"][class_["name"]]["conversations"]:
            lines.append(f"warning: no conversation is of class {class_['name']}; check --classes")
    return "\n".join(lines + account_lines(meta))


# What decides an answer's weight, in words; in the order in which it is asked.
DECIDED_BY = {
    "message": "the message",
    "reward": "the row's reward",
    "row": "the row's weight",
    "class": "the class",
}


def account_lines(meta: dict) -> list[str]:
    """What `account` found, in words. Files that were prepared before it was kept say nothing."""
    lines = []
    decided = meta.get("decided_by", {})
    if decided:
        counts = [f"{decided[key]:,} by {DECIDED_BY[key]}" for key in DECIDED_BY if key in decided]
        lines.append(f"weights of answers: {', '.join(counts)}")
    if meta.get("user_messages"):
        lines.append(f"messages of users with a weight of their own: {meta['user_messages']:,}")
    if "rewards" in meta:
        r = meta["rewards"]
        lines.append(
            f"rewards from {r['lowest']:g} to {r['highest']:g}, beta {r['beta']:g}: effective "
            f"sample size (sum w)^2 / sum w^2: {r['sample_size']:,.1f} of {r['answers']:,} answers"
        )
    for name, rows in meta.get("unread", {}).items():
        lines.append(
            f"not used: {name} (rows: {rows:,}); if it says who wrote an answer or how much it "
            "counts, see docs/data.md"
        )
    return lines


# ---- a prepared file, opened

# Conversations whose weights are summed at once: the file may be larger than the memory.
SUMMED_AT_ONCE = 2**14

# The validation split looks at a prompt's hash modulo this: fractions are exact to 0.01%.
HASH_SHARES = 10_000


class Prepared:
    """A prepared file, memory-mapped: every rank opens it, none has a copy.

    The arrays of the file have its names (see the top of this file). Besides:

        lengths      int64 [N]  tokens of each conversation
        weight_sums  fp64 [N]   sum of its weights
        supervised   int64 [N]  tokens of it that have a weight
        classes      [Class], by class id
        tokenizer    Tokenizer, built when it is asked for: Llama-3's takes a second and 0.3 GB
        vocab_size   ids of the tokenizer, the end of turn included
        meta         the metadata
    """

    def __init__(self, path: str | Path):
        """ValueError: no prepared file, or one that does not hold what its own counts say."""
        self.path = str(path)
        self.meta, arrays = open_mapped(path)
        self.tokens = arrays["tokens"]
        self.weights = arrays["weights"]
        self.offsets = arrays["offsets"]
        self.class_ids = arrays["class_ids"]
        self.group = arrays["group"]
        self.tokenizer_bytes = arrays["tokenizer"]
        self.classes = [Class(**fields) for fields in self.meta["classes"]]

        # what plan needs of each conversation, known before any of it is trained on
        self.lengths = np.diff(self.offsets)
        self.weight_sums = np.zeros(len(self))
        self.supervised = np.zeros(len(self), np.int64)
        self.sum_weights()
        self.check_counts()

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

    def sum_weights(self) -> None:
        """Fill weight_sums and supervised."""
        for first in range(0, len(self), SUMMED_AT_ONCE):
            some = slice(first, first + SUMMED_AT_ONCE)
            offsets = self.offsets[first : first + SUMMED_AT_ONCE + 1]
            weights = self.weights[offsets[0] : offsets[-1]]
            # reduceat adds up from each start to the next
            starts = offsets[:-1] - offsets[0]
            self.weight_sums[some] = np.add.reduceat(weights, starts, dtype=np.float64)
            self.supervised[some] = np.add.reduceat(weights != 0, starts, dtype=np.int64)

    def check_counts(self) -> None:
        """ValueError unless the file holds, to the token, what its counts say."""
        # a file that was copied in part, or edited, would be trained on without a word
        trained = sum(counts["trained"] for counts in self.meta["counts"].values())
        prompt = sum(counts["prompt"] for counts in self.meta["counts"].values())
        if (
            self.supervised.sum() != trained
            or self.offsets[-1] != trained + prompt
            or len(self.tokens) != self.offsets[-1]
        ):
            found = f"{len(self.tokens):,} tokens, {self.supervised.sum():,} of them trained on"
            raise ValueError(
                f"{self.path}: {found}, are not what its own counts say; prepare it again"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def conversation(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, weights) of conversation i."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[rows], self.weights[rows]

    def batch(self, conversations: Sequence[int]) -> Batch:
        """The Batch of these conversations, in this order."""
        return pack([self.conversation(i) for i in conversations], self.class_ids[conversations])

    def split(self, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """(train, val): indices of conversations.

        A prompt goes to val by its hash, in whichever file it stands: the split is the same after
        reshuffling and after adding data.
        """
        in_val = (self.group % HASH_SHARES) < val_fraction * HASH_SHARES
        return np.flatnonzero(~in_val), np.flatnonzero(in_val)


def open_mapped(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(metadata, {name: array}) of a prepared file; the arrays are read where they are used."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such prepared file; make it with `python data.py prepare`")
    try:
        # "pt": tensors of torch are mapped, and numpy shares their memory; "np" would copy
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("crlft", "null"))
            arrays = {key: file.get_tensor(key).numpy() for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole prepared file ({error}); prepare it again") from None
    if meta is None:
        raise ValueError(
            f"{path}: a safetensors file, but not one that `python data.py prepare` wrote"
        )
    return meta, arrays


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
    # of all conversations, int64
    lengths: np.ndarray
    # the highest weight, which is the brightest colour
    heaviest: float
    # (class id, tokens, weights) of the first few
    rows: list[tuple[int, np.ndarray, np.ndarray]]


def show(config: ShowConfig) -> None:
    """Print a few conversations of a prepared file, or of conversation files as they would be
    prepared: tokens by weight, classes, lengths."""
    if not config.files:
        raise ValueError("show needs a prepared file, or conversation files and --tokenizer")
    if config.files[0].endswith(".safetensors"):
        if len(config.files) > 1:
            raise ValueError(
                f"{config.files[1]}: show takes one prepared file, or conversation files"
            )
        data = Prepared(config.files[0])
        print(ledger_table(data.meta))
        shown = shown_of_prepared(data, config.n)
    else:
        shown = shown_of_conversations(config)

    if len(shown.lengths) == 0:
        raise ValueError(
            f"{', '.join(config.files)}: no conversation has a token to train on; "
            "check roles, answers and weights"
        )
    for i in range(len(shown.rows)):
        print_conversation(shown, i)
    print_lengths(shown.lengths)


def shown_of_prepared(data: Prepared, n: int) -> Shown:
    """The first n conversations of a prepared file."""
    names = [class_.name for class_ in data.classes]
    heaviest = max(class_.weight for class_ in data.classes)
    rows = []
    for i in range(min(n, len(data))):
        tokens, weights = data.conversation(i)
        rows.append((data.class_ids[i], tokens, weights))
    return Shown(data.tokenizer, names, data.lengths, heaviest, rows)


def shown_of_conversations(config: ShowConfig) -> Shown:
    """The first conversations of conversation files, cut as `prepare` would."""
    check_conversation_flags(config)
    if not config.tokenizer:
        raise ValueError("conversation files are shown with --tokenizer tokenizer.model")
    tokenizer = tokenizer_for(config.template, config.tokenizer)
    conversations, classes = read_all(config)
    for line in account_lines(account(conversations, classes)):
        print(line)

    rows = []
    for conversation in conversations:
        parts, _ = cut_to_length(
            conversation, tokenizer, config.template, config.max_len, config.too_long
        )
        for tokens, weights in parts:
            rows.append((conversation.class_id, tokens, weights))
    names = [class_.name for class_ in classes.all]
    lengths = np.array([len(tokens) for _, tokens, _ in rows])
    heaviest = max((weights.max() for _, _, weights in rows), default=1.0)
    return Shown(tokenizer, names, lengths, heaviest, rows[: config.n])


def print_conversation(shown: Shown, i: int) -> None:
    """One conversation: its class, its tokens by weight, and what the model learns where."""
    class_id, tokens, weights = shown.rows[i]
    name = shown.class_names[class_id]
    trained = np.count_nonzero(weights)
    print(f"\n-- conversation {i}, class {name}, {len(tokens)} tokens, {trained} trained")
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
        line = f"{class_.name:12} {len(lengths):8,} {lengths.sum():11,} {supervised:11,}"
        print(f"{line} {share:9.1%}   {percentiles(lengths)}")


def percentiles(lengths: np.ndarray) -> str:
    if len(lengths) == 0:
        return "-"
    found = np.percentile(lengths, [0, 5, 50, 95, 100])
    return " ".join(f"{length:7,.0f}" for length in found)


def print_sample_size(data: Prepared) -> None:
    """How many tokens of equal weight would be worth as much as these of unequal weight."""
    squares = 0.0
    for start in range(0, len(data.weights), SQUARED_AT_ONCE):
        weights = data.weights[start : start + SQUARED_AT_ONCE].astype(np.float64)
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
    micro_batches = max(1, config.batch_tokens // config.micro_tokens)
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
    tokens = np.zeros((len(steps), ranks))
    squares = np.zeros((len(steps), ranks))
    for s, step in enumerate(steps):
        for m, micro_batch in enumerate(step):
            lengths = data.lengths[micro_batch]
            # ranks take the micro-batches of a step in turn
            tokens[s, m % ranks] += lengths.sum()
            squares[s, m % ranks] += (lengths.astype(np.float64) ** 2).sum()
    flops = per_token * tokens + per_square * squares

    # a step takes as long as its busiest rank
    for name, load in (("tokens", tokens), ("sum of length^2", squares), ("7B's FLOPs", flops)):
        uneven = load.max(1) / load.mean(1)
        mean, worst = uneven.mean(), uneven.max()
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
        title=Path(data.path).name,
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    check_help(argv)
    command, words = argv[:1], argv[1:]
    if command == ["prepare"]:
        config = parse_args(PrepareConfig, words, positional="files")
        print(ledger_table(prepare(config)))
        print(f"wrote {config.out}")
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
