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

import collections
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from conversations import TEMPLATES, Class, Classes, expert_of, fit, group_of, parse_classes, read
from conversations import tokenize as tokenize  # handed on, as are read, Classes, plan and pack
from packing import COST_7B, flat, pack, plan
from recipe import finetune_lr
from support.cli import parse_args, run
from tokenizer import Tokenizer


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
