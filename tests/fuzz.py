"""Broken input for every entry point, made at random, held against what the project promises.

    python tests/fuzz.py --seed 1 --number 1000
    python tests/fuzz.py --seed 1 --number 100000 --minutes 15 rows report
    python tests/fuzz.py --seed 1 --first 17 --number 1 rows        one input again

A target is one kind of input: rows, flags, prepared files, exports, judges' files and so on. Each
input of it follows from the seed, the target's name and a number, and goes to the entry point's own
main, in this process, up to its first expensive step. Whatever it is, an input is

    refused     one line that begins with the program's name; nothing half-written, no input changed
    accepted    and then what the target promises of a result must hold
    unexpected  a traceback, two lines, a hang, a left-over file, a broken promise

A single bit flip in a file that carries its own hashes may not be accepted at all.
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402, after the path
import tokenizers  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from conversations import TEMPLATES  # noqa: E402
from evaluation.agieval import TASKS, AgievalConfig  # noqa: E402
from evaluation.answers import AnswersConfig  # noqa: E402
from evaluation.judge import JudgeConfig  # noqa: E402
from evaluation.report import ReportConfig  # noqa: E402
from recipe import TrainConfig  # noqa: E402
from support.budget import FitConfig  # noqa: E402
from support.checkpoint import digest  # noqa: E402
from support.cli import run  # noqa: E402
from support.export import write_manifest  # noqa: E402
from tokenizer import EOT, Tokenizer  # noqa: E402

# seconds after which an input has hung; all inputs are small
HANGS = 30
# bytes of address space; a process that only imports torch has some 2e9
MOST_MEMORY = 14 * 2**30
# characters of a line that a user reads
LONGEST_LINE = 1200


# ---- broken values, texts and bytes

TEXTS = [
    "",
    " ",
    "a",
    "copy a b",
    "</s>",
    "<|end_of_turn|>",
    "GPT4 User: a<|end_of_turn|>",
    "\x00",
    "\u2028",
    "\n",
    "caf\u00e9 \U0001f600",
    "\ud800",
    "\udcff",
    "../x",
    "/etc/passwd",
    "x" * 5000,
    "user",
    "assistant",
    "system",
    "nan",
    "1e999",
    "-1",
    "[[9]]",
    "[[A]]",
    "{}",
    "$\\frac{$",
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
    2**31,
    2**63,
    10**30,
    10**400,
]
ODD = [None, True, False, [], {}, [[]], {"a": None}, [None], {"": ""}]
DEEP = 3000


def odd_value(rng: random.Random, like=None):
    """A JSON value of any kind; as often one of the kind of `like`."""
    kind = rng.randrange(4)
    alike = rng.random() < 0.5
    if alike and isinstance(like, str):
        kind = 0
    elif alike and isinstance(like, (int, float)):
        kind = 1
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(ODD)
    nested = rng.choice(TEXTS)
    for _ in range(rng.randrange(4)):
        nested = [nested] if rng.random() < 0.5 else {"role": nested}
    return nested


def places_in(value, path: tuple = ()) -> list[tuple]:
    """The paths of all values within a JSON value, itself included."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places_in(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            found += places_in(inner, (*path, i))
    return found


def changed(rng: random.Random, value):
    """A copy of a JSON value with one place changed: another value, none, twice, or a new key."""
    value = copy.deepcopy(value)
    *way, last = rng.choice(places_in(value)) or (None,)
    if last is None:
        return odd_value(rng)
    parent = value
    for step in way:
        parent = parent[step]
    how = rng.randrange(10)
    if how == 0:
        del parent[last]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice([*parent, *TEXTS])] = parent.pop(last)
    elif how == 2 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[last]))
    elif how == 3 and isinstance(parent, dict):
        parent[last] = copy.deepcopy(rng.choice(list(parent.values())))
    else:
        parent[last] = odd_value(rng, parent[last])
    return value


def changed_often(rng: random.Random, value):
    """The same with one change, or a few."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = changed(rng, value)
    return value


def as_json(rng: random.Random, value) -> bytes:
    """JSON of a value, its bytes broken now and then."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    content = text.encode("utf-8", "surrogatepass")
    return broken_bytes(rng, content) if rng.random() < 0.15 else content


def as_lines(rng: random.Random, rows) -> bytes:
    """JSON lines of rows, some of them broken. What is no list of rows is one."""
    rows = rows if isinstance(rows, list) else [rows]
    lines = [as_json(rng, row) for row in rows]
    content = b"\n".join(lines) + rng.choice([b"\n", b"", b"\n\n", b"\r\n"])
    return broken_bytes(rng, content) if rng.random() < 0.1 else content


def broken_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes with a piece flipped, cut, doubled, put in or replaced."""
    content = bytearray(content)
    at = rng.randrange(len(content) + 1)
    length = rng.choice([1, 1, 2, 8, 100])
    how = rng.randrange(8)
    if how == 0 and content:
        flip(content, rng.randrange(8 * len(content)))
    elif how == 1:
        del content[at : at + length]
    elif how == 2:
        content[at:at] = content[at : at + length]
    elif how == 3:
        content[at:at] = rng.randbytes(length)
    elif how == 4:
        del content[at:]
    elif how == 5:
        content[at:at] = rng.choice([b"\xff", b"\x00", b"\n", b"\xed\xa0\x80", b"\\ud800", b'"'])
    elif how == 6:
        content[at:at] = rng.choice([b"[", b'{"a":']) * DEEP
    else:
        content[at : at + length] = rng.choice([b"9" * 5000, b"1e999", b"-", b"null", b"NaN"])
    return bytes(content)


def flip(content: bytearray, bit: int) -> None:
    content[bit // 8] ^= 1 << (bit % 8)


def flip_in(rng: random.Random, path: Path) -> None:
    """One bit of a file, which may be a link to what others read."""
    content = bytearray(path.read_bytes())
    flip(content, rng.randrange(8 * len(content)))
    replace(path, content)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def in_the_way(rng: random.Random, path: Path) -> None:
    """Something else than a file, or none, where a file was."""
    path.unlink()
    how = rng.randrange(6)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how == 2:
        path.symlink_to(path)
    elif how == 3:
        path.touch()
    elif how == 4:
        path.symlink_to("/dev/null")


# ---- what is broken: a folder with one good input of each kind


class Desk:
    """Good inputs, from the demo's data and a run on them; inputs are copied from here."""

    def __init__(self, toy: Path, run_folder: Path):
        self.toy = toy
        self.run = run_folder
        self.hf = run_folder / "hf"
        self.tokenizer = toy / "tokenizer.model"
        self.prepared = toy / "small.safetensors"
        self.byte_level = toy / "byte_level.json"
        make_byte_level(self.byte_level)
        lines = (toy / "train.jsonl").read_text().splitlines()
        self.rows = [json.loads(line) for line in lines[:40]]
        self.prepare_small()
        self.model = sample.load_model(self.hf)

    def prepare_small(self) -> None:
        source = self.toy / "small.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        config = data.PrepareConfig(
            files=(str(source),),
            tokenizer=str(self.tokenizer),
            out=str(self.prepared),
            classes="expert=GPT4:1,*=GPT3:0.1" if self.has("expert") else "*=GPT4:1",
            max_len=128,
            processes=1,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            data.prepare(config)

    def has(self, label: str) -> bool:
        return any(row.get("model") == label for row in self.rows)

    def copy_of_hf(self, work: Path) -> Path:
        return linked(self.hf, work / "hf")


# of all templates
SPECIALS = ["<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>"]


def make_byte_level(path: Path) -> None:
    """A small tokenizer.json of GPT-2's kind."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["GPT4 User: copy reverse a b c"] * 9, trainer)
    library.save(str(path))


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder: large files as links, since nobody writes into them."""
    for path in source.rglob("*"):
        if path.is_file():
            there = target / path.relative_to(source)
            there.parent.mkdir(parents=True, exist_ok=True)
            if path.stat().st_size > 2**16:
                os.link(path, there)
            else:
                shutil.copy(path, there)
    return target


# ---- one input


@dataclass
class Case:
    """One input: what is called, with which words, and what must hold afterwards.

    stops: {name of a function: what stands in for it}; one that raises Reached ends the run there
    may_leave: names that a refused call may leave in the folder
    check: called where the input was accepted; raises AssertionError
    must_refuse: this input may not be accepted
    must_accept: this input may not be refused
    """

    main: Callable
    words: list
    stops: dict = field(default_factory=dict)
    may_leave: tuple = ()
    check: Callable = lambda: None
    must_refuse: bool = False
    must_accept: bool = False


class Reached(BaseException):
    """The first expensive step: the input has been accepted."""


class Hung(BaseException):
    pass


def reached(*_, **__):
    raise Reached


def snapshot(work: Path) -> dict:
    """{name: what can be told of it} of all that is in a folder."""
    found = {}
    for path in work.rglob("*"):
        at = path.lstat()
        is_file = path.is_file() and not path.is_symlink()
        content = hash(path.read_bytes()) if is_file and at.st_size < 2**16 else at.st_mtime_ns
        found[str(path.relative_to(work))] = (at.st_mode, at.st_size if is_file else 0, content)
    return found


def outcome(case: Case, work: Path) -> tuple[str, str]:
    """("refused" | "accepted" | "unexpected", why)"""
    before = snapshot(work)
    try:
        line = called(case)
    except Reached:
        line = None
    except KeyboardInterrupt:
        raise
    # Hung, and a panic of a library's Rust code, are no Exception
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "unexpected", f"{type(error).__name__} at {where.name}:{where.lineno}: {error}"[:300]

    after = snapshot(work)
    touched = [name for name in before if after.get(name) != before[name]]
    left = [name for name in after if name not in before]
    if line is None:
        if case.must_refuse:
            return "unexpected", "accepted, though a bit is flipped"
        try:
            case.check()
        except Exception as error:
            return "unexpected", f"accepted, but {type(error).__name__}: {error}"[:300]
        return "accepted", ""
    if case.must_accept:
        return "unexpected", f"refused: {line}"[:300]
    if isinstance(line, int):
        return "unexpected", f"exit {line} without a line"
    if len(line.splitlines()) != 1 or not line.startswith(f"{program_of(case)}: "):
        return "unexpected", f"not one line of {program_of(case)}: {line!r}"[:300]
    if len(line) > LONGEST_LINE:
        return "unexpected", f"a line of {len(line)} characters: {line[:200]!r}"
    forgiven = [name for name in left + touched if name.startswith(case.may_leave or ("\0",))]
    wrong = [name for name in left + touched if name not in forgiven]
    if wrong:
        return "unexpected", f"refused, but left or changed {wrong}: {line}"[:300]
    return "refused", line


def outcome_of_process(case: Case, work: Path) -> tuple[str, str]:
    """The same, with the case in a process of its own: what is printed, and the exit code."""
    before = snapshot(work)
    # forked, it has what stands in for the expensive steps; all else is as in any process
    with tempfile.TemporaryFile("w+", errors="replace") as said, open(os.devnull, "w") as nothing:
        args = case, nothing, said
        process = multiprocessing.get_context("fork").Process(target=alone, args=args)
        process.start()
        process.join(HANGS)
        if process.is_alive():
            process.kill()
            return "unexpected", f"no answer in {HANGS} s"
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    after = snapshot(work)
    touched = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    if process.exitcode in (0, REACHED):
        return (
            ("unexpected", "accepted, with a bit flipped") if case.must_refuse else ("accepted", "")
        )
    if case.must_accept:
        return "unexpected", f"refused: {lines[-3:]}"[:300]
    if process.exitcode != 1 or not lines or not lines[-1].startswith(program_of(case)):
        return "unexpected", f"exit {process.exitcode}: {lines[-3:]}"[:300]
    if any("Traceback" in line for line in lines):
        return "unexpected", f"a traceback: {lines[-3:]}"[:300]
    wrong = [name for name in touched if not name.startswith(case.may_leave or ("\0",))]
    return ("unexpected", f"left or changed {wrong}") if wrong else ("refused", lines[-1])


# the exit code of a process that came to the first expensive step
REACHED = 77


def alone(case: Case, out, err) -> None:
    """In a process of its own: what a script does. out, err: files for what it prints."""
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.argv = [program_of(case), *map(str, case.words)]
    with contextlib.ExitStack() as stack:
        for name, stand_in in case.stops.items():
            stack.enter_context(mock.patch(name, stand_in))
        try:
            run(case.main)
        except Reached:
            sys.exit(REACHED)


def program_of(case: Case) -> str:
    return f"{case.main.__module__}.py"


def called(case: Case) -> str | int | None:
    """The line with which the entry point refuses the input, or the code with which it exits; None
    where it accepts the input."""
    sys.argv = [program_of(case), *map(str, case.words)]
    with contextlib.ExitStack() as stack:
        for name, stand_in in case.stops.items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(alarm())
        try:
            run(case.main)
        except SystemExit as stop:
            return stop.code or None
    return None


@contextlib.contextmanager
def alarm():
    """Hung, where the block takes too long."""

    def ring(*_):
        raise Hung(f"no answer in {HANGS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- the targets

TARGETS = {}


def target(make: Callable) -> Callable:
    """A target: (desk, work, rng) -> Case, which writes its input into the folder `work`."""
    TARGETS[make.__name__] = make
    return make


# of conversations, in all forms


def conversation(rng: random.Random) -> dict:
    """A good row, in one of the forms."""
    asked, said = "copy a b", rng.choice(["a b", "b", "</s> a", "caf\u00e9"])
    system = rng.choice([None, "", "be brief"])
    form = rng.randrange(4)
    if form == 0:
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        row = {"conversations": turns * rng.choice([1, 1, 2])}
    elif form == 1:
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        row = {"messages": turns * rng.choice([1, 1, 2])}
        row["messages"][1] = row["messages"][1] | {"weight": rng.choice([1, 0.5, 0])}
    elif form == 2:
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        row = {"items": turns, "condition": "GPT4", "system": system or ""}
    else:
        row = {"instruction": asked, "input": "", "output": said}
    row["model"] = rng.choice(["expert", "x", "y"])
    if rng.random() < 0.3:
        row["reward"] = rng.choice([0, 1, 0.5])
    return row


def spoken(asked: str, said: str) -> dict:
    """A good row, whatever is said in it."""
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": turns, "model": "x"}


def write_rows(rng: random.Random, path: Path, rows: list) -> None:
    """Rows as JSON lines, an array, or either of them gzipped."""
    content = as_lines(rng, rows) if rng.random() < 0.6 else as_json(rng, rows)
    if rng.random() < 0.15:
        content = gzip.compress(content, 1)
        content = broken_bytes(rng, content) if rng.random() < 0.3 else content
    if rng.random() < 0.05:
        content = b"\xef\xbb\xbf" + content
    path.write_bytes(content)


def broken_rows(rng: random.Random, good: Callable) -> list:
    """A few rows, at least one of them broken."""
    rows = [good(rng) for _ in range(rng.randrange(1, 5))]
    at = rng.randrange(len(rows))
    rows[at] = changed_often(rng, rows[at])
    return rows


def check_prepared(path: Path, tokenizer: Tokenizer) -> None:
    """What is promised of a prepared file, read without the project's own reader."""
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        meta = json.loads(file.metadata()["crlft"])
    offsets, tokens, weights = arrays["offsets"], arrays["tokens"], arrays["weights"]
    assert offsets[0] == 0 and offsets[-1] == len(tokens) == len(weights)
    assert (np.diff(offsets) >= 2).all() and np.diff(offsets).max() <= meta["max_len"]
    assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size
    assert np.isfinite(weights).all() and weights.min() >= 0
    assert (weights[offsets[:-1]] == 0).all()
    # a text never becomes a special token: each conversation has its one bos, and no eos
    first = np.zeros(len(tokens), bool)
    first[offsets[:-1]] = True
    assert ((tokens == tokenizer.bos) == first).all()
    assert not (tokens == tokenizer.eos).any()
    assert arrays["class_ids"].max() < len(meta["classes"])
    sums = Counter()
    for counts in meta["counts"].values():
        ends = ("trained", "prompt", "truncated", "dropped", "trailing_cut")
        assert counts["tokens_read"] + counts["added_by_split"] == sum(counts[k] for k in ends)
        sums.update(counts)
    assert sums["trained"] == (weights > 0).sum()
    assert sums["trained"] + sums["prompt"] == len(tokens)


def prepare_words(desk: Desk, work: Path, source: Path) -> list:
    out = work / "x.safetensors"
    words = ["prepare", source, "--tokenizer", desk.tokenizer, "--out", out, "--processes", 1]
    return [*words, "--classes", "expert=GPT4:1,*=GPT3:0.1"]


@target
def rows(desk: Desk, work: Path, rng: random.Random) -> Case:
    """Conversation files, prepared: JSON lines, arrays, gzipped, in all four forms."""
    source = work / "in.jsonl"
    if rng.random() < 0.7:
        write_rows(rng, source, broken_rows(rng, conversation))
    else:
        texts = [text for text in TEXTS if not re.search("[\ud800-\udfff]", text)]
        odd = [spoken(rng.choice(texts), rng.choice(texts)) for _ in range(3)]
        put(work, {"in.jsonl": [conversation(rng) | {"model": "expert"}, *odd]})
    words = prepare_words(desk, work, source)
    words += ["--max_len", rng.choice([2, 16, 64]), "--too_long", rng.choice(data.TOO_LONG)]
    if rng.random() < 0.3:
        words += ["--label", rng.choice(["model", "model", "model", "id"])]
    if rng.random() < 0.15:
        words += ["--reward", "reward", "--beta", rng.choice([0.1, 1, 1e-9])]
    tokenizer = Tokenizer(desk.tokenizer)
    check = lambda: check_prepared(work / "x.safetensors", tokenizer)  # noqa: E731
    return Case(data.main, words, check=check)


@target
def shown_rows(desk: Desk, work: Path, rng: random.Random) -> Case:
    """The same files, shown in each of the templates."""
    source = work / "in.jsonl"
    write_rows(rng, source, broken_rows(rng, conversation))
    template = rng.choice([*TEMPLATES])
    is_ours = TEMPLATES[template].end_of_turn == EOT
    file = desk.tokenizer if is_ours else desk.byte_level
    return Case(data.main, ["show", source, "--tokenizer", file, "--template", template])


@target
def parquet(desk: Desk, work: Path, rng: random.Random) -> Case:
    """Conversation files in parquet, of which rows are broken, or bytes."""
    # slow to import, and for this target only
    import pyarrow.parquet

    source = work / "in.parquet"
    try:
        columns = pyarrow.Table.from_pylist(broken_rows(rng, conversation))
        pyarrow.parquet.write_table(columns, source)
    # no column holds such values
    except (ValueError, TypeError, AttributeError, OverflowError, NotImplementedError):
        columns = pyarrow.Table.from_pylist([conversation(rng)])
        pyarrow.parquet.write_table(columns, source)
    if rng.random() < 0.4:
        source.write_bytes(broken_bytes(rng, source.read_bytes()))
    tokenizer = Tokenizer(desk.tokenizer)
    check = lambda: check_prepared(work / "x.safetensors", tokenizer)  # noqa: E731
    return Case(data.main, prepare_words(desk, work, source), check=check)


@target
def table(desk: Desk, work: Path, rng: random.Random) -> Case:
    """--classes, --beta and --expert of prepare."""
    source = work / "in.jsonl"
    source.write_text("".join(json.dumps(conversation(rng)) + "\n" for _ in range(3)))
    text = rng.choice(["*=GPT4:1", "expert=GPT4:1,*=GPT3:0.1", "x=A:1,y=B:0.5,*=C:0"])
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice([",", "=", ":", "*", "", "nan", "1e999", "-1", "a", "\n", "9" * 30, " "])
        text = text[:at] + piece + text[at + rng.randrange(3) :]
    words = [*prepare_words(desk, work, source)[:-1], text]
    if rng.random() < 0.4:
        words += ["--beta", rng.choice([0, 1, -1, "nan", 1e-300, 0.1])]
    if rng.random() < 0.3:
        words += ["--expert", rng.choice(["GPT4", "A", "", "*"])]
    tokenizer = Tokenizer(desk.tokenizer)
    check = lambda: check_prepared(work / "x.safetensors", tokenizer)  # noqa: E731
    return Case(data.main, words, check=check)


@target
def tokenizer_file(desk: Desk, work: Path, rng: random.Random) -> Case:
    """tokenizer.model, or a tokenizer.json and what lies beside it."""
    source = work / "in.jsonl"
    source.write_text(json.dumps({"messages": CHAT}) + "\n")
    if rng.random() < 0.5:
        path = work / "tokenizer.model"
        path.write_bytes(broken_bytes(rng, desk.tokenizer.read_bytes()))
    else:
        path = work / "tokenizer.json"
        good = json.loads(desk.byte_level.read_text())
        beside = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
        if rng.random() < 0.5:
            good = changed_often(rng, good)
        else:
            beside = changed_often(rng, beside)
        path.write_bytes(as_json(rng, good))
        (work / "tokenizer_config.json").write_bytes(as_json(rng, beside))
    words = prepare_words(desk, work, source)
    words[words.index("--tokenizer") + 1] = path
    return Case(data.main, [*words[:-1], "*=GPT4:1"])


CHAT = [{"role": "user", "content": "copy a b"}, {"role": "assistant", "content": "a b"}]


# of prepared files


@target
def prepared(desk: Desk, work: Path, rng: random.Random) -> Case:
    """A file whose arrays or metadata are others, as one without digests, or whose bytes are."""
    path = work / "x.safetensors"
    if rng.random() < 0.3:
        path.write_bytes(broken_bytes(rng, desk.prepared.read_bytes()))
    else:
        arrays = load_file(desk.prepared)
        with safe_open(desk.prepared, "np") as file:
            meta = json.loads(file.metadata()["crlft"])
        for name in ("digests", "sha256"):
            meta.pop(name, None)
        if rng.random() < 0.5:
            meta = changed_often(rng, meta)
        else:
            name = rng.choice([*arrays])
            arrays[name] = broken_array(rng, arrays[name])
        text = json.dumps(meta).encode("utf-8", "replace").decode()
        save_file(arrays, path, metadata={"crlft": text})
    flags = ["--data", path, "--model", "toy", "--out", work / "run"]
    words = rng.choice([["show", path], ["stats", path], flags, ["--dry_run", *flags]])
    main = data.main if words[0] in ("show", "stats") else train.main
    stops = {"train.build": reached}
    return Case(main, words, stops, may_leave=("run",))


def broken_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    how = rng.randrange(5)
    if how == 0:
        return array[: rng.randrange(len(array))].copy()
    if how == 1:
        return np.concatenate([array, array[:1]])
    if how == 2:
        return array.astype(rng.choice([np.int8, np.int64, np.float64, np.float32]))
    if how == 3:
        return array.reshape(1, -1).copy()
    array = array.copy()
    values = [0, -1, 1, array.min(), 2**30, 1e9, np.nan, np.inf, 5]
    with np.errstate(all="ignore"):
        for _ in range(rng.choice([1, 3])):
            value = np.array([rng.choice(values)]).astype(array.dtype)
            array[rng.randrange(len(array))] = value[0]
    return array


@target
def prepared_flip(desk: Desk, work: Path, rng: random.Random) -> Case:
    """One bit of a prepared file with digests."""
    path = work / "x.safetensors"
    shutil.copy(desk.prepared, path)
    flip_in(rng, path)
    flags = ["--data", path, "--model", "toy", "--out", work / "run"]
    words = rng.choice([["stats", path], flags])
    main = data.main if words[0] == "stats" else train.main
    stops = {"train.build": reached}
    return Case(main, words, stops, may_leave=("run",), must_refuse=True)


# of exports


def ask(desk: Desk, hf: Path, rng: random.Random) -> Case:
    """--prompt to a directory, up to where it would be answered; or a run that fine-tunes it."""
    if rng.random() < 0.8:
        words = [hf, "--prompt", "copy a"]
        return Case(sample.main, words, {"sample.Speaker.generate": reached})
    words = ["--data", desk.prepared, "--model", hf, "--out", hf.with_name("run")]
    stops = {"train.training_loop": reached}
    return Case(train.main, words, stops, may_leave=("run",))


@target
def export(desk: Desk, work: Path, rng: random.Random) -> Case:
    """A file of an export that is another, with a manifest that agrees, none, or a broken one."""
    hf = desk.copy_of_hf(work)
    names = ["config.json", "crlft.json", "tokenizer_config.json", "model.safetensors.index.json"]
    path = hf / rng.choice([*names, *names, rng.choice(sorted(os.listdir(hf)))])
    if path.suffix == ".json" and rng.random() < 0.85:
        replace(path, as_json(rng, changed_often(rng, json.loads(path.read_text()))))
    elif rng.random() < 0.2:
        in_the_way(rng, path)
    else:
        replace(path, broken_bytes(rng, path.read_bytes()))
    manifest = hf / "manifest.json"
    if path != manifest:
        how = rng.random()
        if how < 0.5:
            manifest.unlink()
        elif how < 0.7 and all(p.is_file() for p in hf.iterdir()):
            write_manifest(hf)
        elif how < 0.9:
            replace(manifest, as_json(rng, changed_often(rng, json.loads(manifest.read_text()))))
    return ask(desk, hf, rng)


@target
def export_flip(desk: Desk, work: Path, rng: random.Random) -> Case:
    """One bit of a file of an export with a manifest, the manifest's own included."""
    hf = desk.copy_of_hf(work)
    flip_in(rng, rng.choice(sorted(hf.iterdir())))
    case = ask(desk, hf, rng)
    case.must_refuse = True
    return case


# of checkpoints


def resumed(desk: Desk, work: Path) -> Case:
    """The run of the desk, with its own command, up to its next step."""
    words = ["--data", desk.toy / "train.safetensors", "--model", "toy", "--out", work / "run"]
    words += RUN_FLAGS
    return Case(train.main, words, {"train.training_loop": reached}, may_leave=("run",))


# of the run on the desk; without its export it goes on from its last checkpoint
RUN_FLAGS = ["--steps", 60, "--val_every", 30, "--save_every", 25]


@target
def checkpoint(desk: Desk, work: Path, rng: random.Random) -> Case:
    """A checkpoint in which something is another, or missing, or in the way."""
    copied = linked(desk.run / "checkpoints", work / "run" / "checkpoints")
    path = rng.choice(sorted(p for p in copied.rglob("*") if p.is_file()))
    if path.name == "MANIFEST.json" and rng.random() < 0.7:
        replace(path, as_json(rng, changed_often(rng, json.loads(path.read_text()))))
    elif rng.random() < 0.2:
        in_the_way(rng, path)
    else:
        replace(path, broken_bytes(rng, path.read_bytes()))
    return resumed(desk, work)


@target
def vouched(desk: Desk, work: Path, rng: random.Random) -> Case:
    """A checkpoint whose manifest says something else, under the right sha256 of its own."""
    copied = linked(desk.run / "checkpoints", work / "run" / "checkpoints")
    for path in copied.rglob("MANIFEST.json"):
        manifest = json.loads(path.read_text())
        manifest.pop("sha256")
        manifest = changed_often(rng, manifest)
        if isinstance(manifest, dict):
            manifest = {"sha256": digest(manifest)} | manifest
        replace(path, json.dumps(manifest, indent=1).encode(errors="surrogatepass"))
    return resumed(desk, work)


@target
def run_folder(desk: Desk, work: Path, rng: random.Random) -> Case:
    """A run that goes on, with anything in its metrics.jsonl and its lock: neither may stop it."""
    linked(desk.run / "checkpoints", work / "run" / "checkpoints")
    lines = (desk.run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    at = rng.randrange(len(rows))
    rows[at] = changed_often(rng, rows[at])
    kept = work / "run" / "metrics.jsonl"
    kept.write_bytes(as_lines(rng, rows))
    (work / "run" / "lock").write_bytes(broken_bytes(rng, b"process 1 on a since b: train.py"))
    case = resumed(desk, work)
    # the log is open, and what it kept has been written anew
    case.stops = {"train.batches_after": reached}
    case.check = lambda: check_log(kept)
    case.must_accept = True
    return case


def check_log(path: Path) -> None:
    """All lines are of steps that were taken."""
    for line in path.read_text().splitlines():
        assert 0 < json.loads(line)["step"] <= 60


@target
def checkpoint_flip(desk: Desk, work: Path, rng: random.Random) -> Case:
    """One bit of a checkpoint: it is passed over, so that with all flipped none is taken."""
    copied = linked(desk.run / "checkpoints", work / "run" / "checkpoints")
    for folder in sorted(copied.glob("step-*")):
        flip_in(rng, rng.choice(sorted(p for p in folder.rglob("*") if p.is_file())))
    case = resumed(desk, work)
    case.must_refuse = True
    return case


@target
def metrics(desk: Desk, work: Path, rng: random.Random) -> Case:
    """A metrics.jsonl with anything in it, drawn by plot."""
    lines = (desk.run / "metrics.jsonl").read_text().splitlines()[:6]
    rows = [json.loads(line) for line in lines]
    at = rng.randrange(len(rows))
    rows[at] = changed_often(rng, rows[at])
    (work / "metrics.jsonl").write_bytes(as_lines(rng, rows))
    # the picture itself takes longer than all the rest
    picture = mock.MagicMock(), mock.MagicMock()
    stops = {"matplotlib.pyplot.subplots": lambda **_: picture}
    return Case(train.main, ["plot", work], stops)


# of prompts and answers


def quick_answer(speaker, prompts, config, numbers=None) -> list:
    """Stands in for Speaker.answer: the same for the same prompt."""
    answers = []
    for ids in prompts:
        said = [3 + len(ids) % 7] * min(config.max_new, 1 + len(ids) % 3)
        answers.append(sample.Answer(said, "stop"))
    return answers


def speaking(desk: Desk) -> dict:
    return {"sample.load_model": lambda *_: desk.model, "sample.Speaker.answer": quick_answer}


def prompt(rng: random.Random) -> dict:
    if rng.random() < 0.5:
        return {"prompt": "copy a b", "id": 7}
    return {"messages": [*CHAT, {"role": "user", "content": "again"}], "system": "be brief"}


def prompt_words(desk: Desk, work: Path, rng: random.Random) -> list:
    words = [desk.hf, "--input", work / "in.jsonl", "--output", work / "out.jsonl"]
    words += ["--batch", rng.choice([1, 3]), "--max_new", 4]
    return words + (["--condition", "GPT4,GPT3"] if rng.random() < 0.3 else [])


def check_lines(path: Path) -> None:
    """Whole lines of JSON objects, in UTF-8."""
    content = path.read_bytes().decode("utf-8")
    assert content.endswith("\n")
    for line in content.split("\n")[:-1]:
        assert isinstance(json.loads(line), dict)
    assert not path.with_name(f"{path.name}.partial").exists()


@target
def prompts(desk: Desk, work: Path, rng: random.Random) -> Case:
    """The rows of sample.py --input, with one condition or two."""
    write_rows(rng, work / "in.jsonl", broken_rows(rng, prompt))
    words = prompt_words(desk, work, rng)
    check = lambda: check_lines(work / "out.jsonl")  # noqa: E731
    return Case(sample.main, words, speaking(desk), check=check)


@target
def chat(desk: Desk, work: Path, rng: random.Random) -> Case:
    """What is typed into a chat, UTF-8 or not."""
    typed = "\n".join(rng.choice(TEXTS) for _ in range(rng.randrange(1, 5)))
    content = broken_bytes(rng, typed.encode(errors="surrogatepass"))
    stops = {
        "sample.load_model": lambda *_: desk.model,
        "sample.Speaker.generate": quick_steps,
        "sys.stdin": io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"),
    }
    return Case(sample.main, [desk.hf], stops)


def quick_steps(speaker, prompts, config, numbers=None) -> Iterator[list]:
    """Stands in for Speaker.generate: a token, and the end of the turn."""
    yield [5] * len(prompts)
    yield [speaker.tokenizer.eot] * len(prompts)


@target
def kept_answers(desk: Desk, work: Path, rng: random.Random) -> Case:
    """OUT.partial, of a run that was stopped."""
    (work / "in.jsonl").write_text("".join(json.dumps(prompt(rng)) + "\n" for _ in range(4)))
    words = [str(word) for word in prompt_words(desk, work, rng)]
    partial = stopped_run(desk, work, words)
    lines = partial.splitlines()
    if rng.random() < 0.7 and lines:
        at = rng.randrange(len(lines))
        lines[at] = as_json(rng, changed_often(rng, json.loads(lines[at])))
        partial = b"\n".join(lines) + b"\n"
    else:
        partial = broken_bytes(rng, partial)
    (work / "out.jsonl.partial").write_bytes(partial)
    check = lambda: check_lines(work / "out.jsonl")  # noqa: E731
    return Case(sample.main, words, speaking(desk), check=check)


def stopped_run(desk: Desk, work: Path, words: list) -> bytes:
    """What a run leaves that is stopped after its first batch."""
    made = []

    def stop_second(*args):
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return quick_answer(*args)

    case = Case(sample.main, words, speaking(desk) | {"sample.Speaker.answer": stop_second})
    called(case)
    path = work / "out.jsonl.partial"
    return path.read_bytes() if path.exists() else b""


@target
def questions(desk: Desk, work: Path, rng: random.Random) -> Case:
    """Question files of evaluate.py answers, of each bench."""
    bench = rng.choice(["alpaca", "mt", "vicuna"])

    def good(rng):
        if bench == "alpaca":
            return {"dataset": "koala", "instruction": "copy a"}
        number = rng.randrange(81, 160)
        return {"question_id": number, "category": "math", "turns": ["copy a", "again"]}

    write_rows(rng, work / "q.jsonl", broken_rows(rng, good))
    words = ["answers", desk.hf, "--bench", bench, "--questions", work / "q.jsonl"]
    words += ["--out", work / "out", "--max_new", 4]
    return Case(evaluate.main, words, speaking(desk), check=lambda: read_whole(work / "out"))


def read_whole(path: Path) -> None:
    """A JSON array, or JSON lines."""
    content = path.read_bytes().decode("utf-8")
    if content.startswith("["):
        assert isinstance(json.loads(content), list)
    else:
        check_lines(path)


EXAM_ITEM = {"passage": None, "question": "a?", "options": ["(A)a", "(B)b"], "label": "A"}


@target
def exam(desk: Desk, work: Path, rng: random.Random) -> Case:
    """A task's file of evaluate.py agieval."""
    put(work, {f"{task}.jsonl": [EXAM_ITEM] for task in TASKS})
    path = work / f"{rng.choice([*TASKS])}.jsonl"
    write_rows(rng, path, broken_rows(rng, lambda _: EXAM_ITEM))
    words = ["agieval", desk.hf, "--data", work, "--out", work / "out", "--max_new", 2]
    check = lambda: check_lines(work / "out")  # noqa: E731
    return Case(evaluate.main, words, speaking(desk), check=check)


# of judges


def question(number: int) -> dict:
    return {"question_id": number, "category": "writing", "turns": ["copy a", "again"]}


def answer_of(model: str, number: int) -> dict:
    choices = [{"index": 0, "turns": ["a", "b"]}]
    return {"question_id": number, "model_id": model, "choices": choices, "answer_id": "x"}


def judge_files(work: Path) -> dict[str, list]:
    """Good files for the judge, by name."""
    numbers = (81, 111)
    return {
        "q.jsonl": [question(number) for number in numbers],
        "one.jsonl": [answer_of("one", number) for number in numbers],
        "two.jsonl": [answer_of("two", number) for number in numbers],
        "ref.jsonl": [answer_of("gpt-4", number) for number in numbers],
    }


def ask_judge(work: Path, mode: str, out: str) -> list:
    words = ["judge", work / "one.jsonl", "--mode", mode, "--questions", work / "q.jsonl"]
    words += ["--references", work / "ref.jsonl", "--out", work / out]
    return words + (["--baseline", work / "two.jsonl"] if mode == "pair" else [])


def put(work: Path, files: dict[str, list]) -> None:
    for name, rows in files.items():
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@target
def judged(desk: Desk, work: Path, rng: random.Random) -> Case:
    """Questions, answers and references of judge --mode."""
    files = judge_files(work)
    put(work, files)
    name = rng.choice([*files])
    write_rows(rng, work / name, changed_often(rng, files[name]))
    words = ask_judge(work, rng.choice(["single", "pair"]), "out.jsonl")
    if rng.random() < 0.2:
        words += ["--judge", rng.choice(["claude-2", "", "\u2028"])]
    check = lambda: check_lines(work / "out.jsonl")  # noqa: E731
    return Case(evaluate.main, words, check=check)


@target
def conversations_judged(desk: Desk, work: Path, rng: random.Random) -> Case:
    """Conversation files of judge --mode conversation."""
    write_rows(rng, work / "in.jsonl", broken_rows(rng, conversation))
    words = ["judge", work / "in.jsonl", "--mode", "conversation", "--out", work / "out.jsonl"]
    check = lambda: check_lines(work / "out.jsonl")  # noqa: E731
    return Case(evaluate.main, words, check=check)


@target
def verdicts(desk: Desk, work: Path, rng: random.Random) -> Case:
    """A batch's output, the requests and their ids."""
    mode = rng.choice(["single", "pair"])
    put(work, judge_files(work))
    assert called(Case(evaluate.main, ask_judge(work, mode, "requests.jsonl"))) is None
    replies = []
    for line in (work / "requests.jsonl").read_text().splitlines():
        verdict = rng.choice(["[[7]]", "[[A]]", "none"])
        body = {"choices": [{"message": {"content": verdict}}]}
        reply = {"custom_id": json.loads(line)["custom_id"], "error": None}
        replies.append(reply | {"response": {"status_code": 200, "body": body}})
    put(work, {"batch.jsonl": replies})
    path = work / rng.choice(["requests.jsonl", "requests.jsonl.ids.jsonl", "batch.jsonl"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(rng, path, changed_often(rng, rows))
    words = ["judge", work / "batch.jsonl", "--requests", work / "requests.jsonl"]
    words += ["--out", work / "out.jsonl"]
    return Case(evaluate.main, words)


def judgment(rng: random.Random) -> dict:
    """A good row of `report`, of any kind."""
    kind = rng.randrange(4)
    judge = rng.choice(["gpt-4", "claude-2"])
    number = rng.randrange(1, 161)
    if kind == 0:
        row = {"model_1": "m", "model_2": "gpt-3.5-turbo", "g1_winner": "model_1"}
        row |= {"g2_winner": rng.choice(["tie", "model_1", "error"])}
        return row | {"question_id": number, "turn": 1, "judge": [judge, "pair-v2"]}
    if kind == 1:
        row = {"model": "m", "score": rng.choice([1, 7.5, -1]), "turn": rng.choice([1, 2])}
        return row | {"question_id": number, "judge": [judge, "single-v1"]}
    if kind == 2:
        row = {"model": "GPT-4", "score": 7, "turn": 3, "question_id": "x.jsonl#4"}
        return row | {"judge": [judge, "table-6"]}
    row = {"generator_1": "text_davinci_003", "generator_2": "m", "instruction": f"{number}"}
    return row | {"preference": rng.choice([1, 2, 1.5, 0]), "annotator": judge}


def response(rng: random.Random) -> dict:
    """A good row of an agieval run, which `report` reads too."""
    said = rng.choice(["A", "so B", ""])
    return {"task": "sat-en", "index": 0, "label": "A", "response": said, "prompt": "p"}


@target
def judgments(desk: Desk, work: Path, rng: random.Random) -> Case:
    """Judgments, annotations, scores and agieval's responses of evaluate.py report."""
    good = rng.choice([judgment, judgment, judgment, response])
    write_rows(rng, work / "j.jsonl", broken_rows(rng, good))
    put(work, {"more.jsonl": [judgment(rng) for _ in range(4)]})
    return Case(evaluate.main, ["report", work / "j.jsonl", work / "more.jsonl"])


# of the command line


def odd_word(rng: random.Random, config_class) -> str:
    """A word that may stand anywhere in a command."""
    names = [*config_class.__dataclass_fields__]
    name = rng.choice([*names, *names, "help", "nothing", ""])
    value = rng.choice([*TEXTS, *map(str, NUMBERS[:-1]), "true", "none", "1e-400", "0x10", "1_0"])
    return rng.choice([f"--{name}", f"--{name}={value}", value, "-h", "--", f"--{name[:-1]}"])


def good_commands(desk: Desk, work: Path) -> list[tuple]:
    """(main, its words, the flags' class) of every entry point."""
    put(work, judge_files(work) | {"j.jsonl": [judgment(random.Random(1))]})
    put(work, {"in.jsonl": [{"prompt": "copy a"}], "chats.jsonl": [{"messages": CHAT}]})
    put(work, {f"{task}.jsonl": [EXAM_ITEM] for task in TASKS})
    chats = work / "chats.jsonl"
    run_words = ["--data", desk.prepared, "--model", "toy", "--out", work / "run"]
    answer = ["answers", desk.hf, "--bench", "mt", "--questions", work / "q.jsonl"]
    return [
        (data.main, prepare_words(desk, work, chats), data.PrepareConfig),
        (data.main, ["show", chats, "--tokenizer", desk.tokenizer], data.ShowConfig),
        (data.main, ["show", desk.prepared, "--n", 1], data.ShowConfig),
        (data.main, ["stats", desk.prepared], data.StatsConfig),
        (train.main, run_words, TrainConfig),
        (train.main, ["--dry_run", *run_words], FitConfig),
        (sample.main, [desk.hf, "--prompt", "copy a"], sample.SampleConfig),
        (sample.main, prompt_words(desk, work, random.Random(0)), sample.SampleConfig),
        (evaluate.main, [*answer, "--out", work / "out"], AnswersConfig),
        (evaluate.main, ["agieval", desk.hf, "--data", work, "--out", work / "o"], AgievalConfig),
        (evaluate.main, ask_judge(work, "pair", "out.jsonl"), JudgeConfig),
        (evaluate.main, ["report", work / "j.jsonl"], ReportConfig),
    ]


@target
def flags(desk: Desk, work: Path, rng: random.Random) -> Case:
    """A good command of any program, with words changed, put in, left out."""
    main, words, config_class = rng.choice(good_commands(desk, work))
    words = [str(word) for word in words]
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(words) + 1)
        how = rng.randrange(3)
        if how == 0 and at < len(words):
            del words[at]
        elif how == 1 and at < len(words):
            words[at] = odd_word(rng, config_class)
        else:
            words.insert(at, odd_word(rng, config_class))
    # the kernel passes no zero byte; a name that is not there is made in the folder
    words = [word.replace("\0", "") for word in words]
    stops = speaking(desk) | {
        "train.build": reached,
        "sample.Speaker.generate": reached,
        "sample.chat": reached,
        "multiprocessing.Process.start": reached,
        "evaluation.report.scatter": reached,
        "data.draw_lengths": reached,
    }
    return Case(main, words, stops, may_leave=("run",))


@target
def paths(desk: Desk, work: Path, rng: random.Random) -> Case:
    """A good command, with a directory, a pipe, a loop or nothing in the place of a file."""
    good = good_commands(desk, work)
    shutil.copy(desk.prepared, work / "d.safetensors")
    main, words, _ = rng.choice(good)
    words = [work / "d.safetensors" if word == desk.prepared else word for word in words]
    mine = [p for p in words if isinstance(p, Path) and p.parent == work and p.is_file()]
    if mine:
        in_the_way(rng, rng.choice(mine))
    else:
        words[rng.randrange(len(words))] = rng.choice([work, work / "no", "/dev/null", ROOT])
    stops = speaking(desk) | {
        "train.build": reached,
        "sample.Speaker.generate": reached,
    }
    return Case(main, words, stops, may_leave=("run",))


# ---- many


@dataclass
class Result:
    """What became of a target's inputs."""

    target: str
    # what is broken
    what: str
    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    unexpected: int = 0
    seconds: float = 0.0
    # number of the input: what was not expected of it
    examples: dict = field(default_factory=dict)
    # how often inputs were refused in so many words
    reasons: Counter = field(default_factory=Counter)


def fuzz(
    desk: Desk,
    name: str,
    seed: int,
    number: int,
    first: int = 0,
    minutes: float = 15,
    way: Callable = outcome,
) -> Result:
    """`number` inputs of a target, or as many as fit into the minutes."""
    result = Result(name, TARGETS[name].__doc__.splitlines()[0])
    began = time.monotonic()
    for i in range(first, first + number):
        if time.monotonic() - began > 60 * minutes:
            break
        verdict, why = one(desk, name, seed, i, way)
        result.inputs += 1
        setattr(result, verdict, getattr(result, verdict) + 1)
        if verdict == "unexpected":
            result.examples[i] = why
        elif verdict == "refused":
            # without the folder and the numbers, so that like refusals count as one
            result.reasons[re.sub(r"\S*/|\d+|'.*'", "", why)[:90]] += 1
    result.seconds = round(time.monotonic() - began, 1)
    return result


def one(desk: Desk, name: str, seed: int, i: int, way: Callable = outcome) -> tuple[str, str]:
    """One input of a target; way: in this process, or in one of its own."""
    rng = random.Random(f"{seed}/{name}/{i}")
    with tempfile.TemporaryDirectory(prefix="fuzz.") as folder:
        work = Path(folder)
        before = os.getcwd()
        case = TARGETS[name](desk, work, rng)
        # what an input makes without a folder is made here
        os.chdir(work)
        try:
            return way(case, work)
        finally:
            os.chdir(before)


def make_desk(folder: Path) -> Desk:
    """The demo's data and a short run on them."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    make = [sys.executable, "-m", "paper.toy", "--out", str(folder)]
    subprocess.run(make, cwd=ROOT, env=env, check=True, capture_output=True)
    words = ["--data", folder / "train.safetensors", "--model", "toy", "--out", folder / "run"]
    command = [sys.executable, "train.py", *map(str, [*words, *RUN_FLAGS])]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    return Desk(folder, folder / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=[], help="all, if none is named")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=1000, help="inputs of each target")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--minutes", type=float, default=15, help="of each target, at most")
    parser.add_argument("--desk", help="a folder with the demo's data and a run, to begin faster")
    parser.add_argument("--processes", action="store_true", help="each in a process of its own")
    parser.add_argument("--reasons", action="store_true", help="print what refused most inputs")
    parser.add_argument("--out", help="a JSON file for the table; keeps the rows of other targets")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if args.desk:
            desk = Desk(Path(args.desk), Path(args.desk) / "run")
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="desk."))
            desk = make_desk(Path(folder))
        unexpected = 0
        for result in fuzz_on_all_cores(desk, args):
            say(result, args)
            if args.out:
                keep(result, args)
            unexpected += result.unexpected
    sys.exit(unexpected > 0)


def fuzz_on_all_cores(desk: Desk, args: argparse.Namespace) -> Iterator[Result]:
    """A target's result after the other; each core is at one target."""
    cores = len(os.sched_getaffinity(0))
    way = outcome_of_process if args.processes else outcome
    how = args.seed, args.number, args.first, args.minutes, way
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, spawn, initializer=in_bounds) as pool:
        waiting = [pool.submit(fuzz, desk, name, *how) for name in args.targets or TARGETS]
        for one_target in waiting:
            yield one_target.result()


def in_bounds() -> None:
    """One thread, and a MemoryError where an input makes the program ask for more than it may."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))


def say(result: Result, args: argparse.Namespace) -> None:
    print(
        f"{result.target:22}{result.inputs:9,} inputs in {result.seconds:5,.0f} s:"
        f"{result.refused:9,} refused{result.accepted:9,} accepted"
        f"{result.unexpected:7,} unexpected",
        flush=True,
    )
    for i, why in list(result.examples.items())[:12]:
        print(f"    {result.target} {i}: {why}", flush=True)
    for reason, count in result.reasons.most_common(12 if args.reasons else 0):
        print(f"    {count:6,} {reason}", flush=True)


def keep(result: Result, args: argparse.Namespace) -> None:
    """Writes a target's row into --out; rows of other targets stay what they are."""
    path = Path(args.out)
    rows = {}
    if path.exists():
        rows = {row["target"]: row for row in json.loads(path.read_text())["rows"]}
    row = {k: v for k, v in vars(result).items() if k != "reasons"}
    rows[result.target] = row | {"seed": args.seed, "date": time.strftime("%Y-%m-%d")}
    # --desk saves half a minute, and changes no input
    how = f"--seed {args.seed} --number {args.number} --minutes {args.minutes:g}"
    command = f"python tests/fuzz.py {how} --out results/fuzz.json"
    in_order = [rows[name] for name in TARGETS if name in rows]
    path.write_text(json.dumps({"command": command, "rows": in_order}, indent=1) + "\n")


if __name__ == "__main__":
    main()
