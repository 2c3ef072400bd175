"""Do two checkouts do the same, to the byte? For a change of form alone: a move, a renaming.

    python tests/same.py BEFORE AFTER                     all sections
    python tests/same.py BEFORE AFTER plan metrics        these
    python tests/same.py BEFORE AFTER cubins --targets sm_90 --dtypes bf16

BEFORE and AFTER are folders. Each does the same work by its own commands, and what comes out is
compared:

    results   the committed results (results/demo.* apart) and the demo's losses
    demo      the toy's data
    plan      the steps of some forty sets of lengths, those of the tests among them
    tokens    prepared files under every template, and the prompts of every style
    metrics   metrics.jsonl of 20 steps on one rank and two; and the demo's first losses
    export    the hf/ folders of those runs
    old       AFTER resumes BEFORE's checkpoints, opens its prepared files, chats with its export
    texts     what the dry run says, and the benchmarks' prompts
    cubins    every kernel that kernels/compile.py compiles, without line numbers

A line per item, exit status 1 where something differs. With CRLFT_ASSETS also the real
conversations. --keep FOLDER saves BEFORE's compiled kernels for the next call: they take most of
the time.

This file knows commands and few names: `plan` and `tokenize_prompt` are looked for in the rooms
that may have them, and compiled kernels are caught where Triton makes them, whoever asks it to.
"""

import argparse
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

TIMES = ("seconds", "tokens_per_s")  # fields of metrics.jsonl that no two runs share
TEMPLATES = ("before_speaker", "before_assistant", "beginning", "none")
STYLES = (*TEMPLATES, "vicuna", "llama-2-chat", "guanaco", "ultralm", "openchat", "base")
CLASSES = "Model: GPT-4=GPT4:1.0,*=GPT3:0.1"
FAILED = "a command failed"
DEMO_STEPS = 20  # as many as tests/demo_losses.json holds

# Of every run: validation twice, and a checkpoint half way, from which the section `old` resumes.
TRAIN = ("--model", "toy", "--steps", "20", "--val_every", "10", "--save_every", "10")
MICRO = ("--micro_tokens", "384")  # four micro-batches a step, so that ranks and rounds matter
RUNS = {  # name: (ranks, flags)
    "1 rank": (1, ()),
    "1 rank, 4 micro-batches": (1, MICRO),
    "2 ranks": (2, MICRO),
    "1 rank, exact": (1, (*MICRO, "--exact")),
    "2 ranks, exact": (2, (*MICRO, "--exact")),
    "2 ranks, bfloat16": (2, (*MICRO, "--dtype", "bfloat16", "--recompute", "cheap")),
    "1 rank, skip, async": (
        1,
        (*MICRO, "--nonfinite", "skip", "--async_save", "--recompute", "all"),
    ),
}

# ---- two checkouts, and what differs between them


class FailedError(Exception):
    """A checkout's command failed; its last line says why."""


@dataclass(frozen=True)
class Side:
    name: str  # before or after
    folder: Path
    scratch: Path  # where its commands write

    def python(self, *words: object, stdin: str = "", may_fail: bool = False, **env: str) -> str:
        """What python prints on these words, as a user of the checkout would type them."""
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment() | env,
            input=stdin,
            capture_output=True,
            text=True,
        )
        if done.returncode and not may_fail:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()
            raise FailedError(f"`{' '.join(command[1:4])} ..` failed: {said[-1]}")
        said = done.stdout.replace(str(self.scratch), "SCRATCH")
        # What BEFORE made for both has the same name on both sides.
        return said.replace(str(self.scratch.parent / "before"), "SCRATCH")

    def environment(self) -> dict[str, str]:
        """One thread, no GPU, nothing of the caller's; the checkout stays as it is."""
        own = ("PYTHON", "TRITON", "CRLFT", "OMP", "CUDA")
        env = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return env | fixed | {"PYTHONDONTWRITEBYTECODE": "1"}

    def inside(self, function: str, *words: object) -> str:
        """Call a function of this file, by its name in INSIDE, with the checkout's own modules."""
        return self.python(Path(__file__).resolve(), "--inside", function, *words)


@dataclass
class Comparison:
    before: Side
    after: Side
    options: argparse.Namespace
    assets: Path | None
    items: int = 0
    differing: list[str] = field(default_factory=list)

    def item(self, name: str, before: bytes | str | None, after: bytes | str | None) -> None:
        """Print the line of one item; None is what is not there."""
        self.items += 1
        if before is not None and before == after:
            print(f"same     {name}", flush=True)
            return
        self.differing.append(name)
        print(f"DIFFERS  {name}: {difference(before, after)}", flush=True)

    def both(self, name: str, make: Callable[[Side], dict], at_once: bool = True) -> None:
        """Compare what make(side) returns of either checkout, a dict of named bytes or texts."""
        with ThreadPoolExecutor(2 if at_once else 1) as pool:
            before, after = pool.map(functools.partial(attempt, make), (self.before, self.after))
        if FAILED in before | after:  # one line then, not one for all that is missing
            before = {FAILED: before.get(FAILED, "BEFORE works")}
            after = {FAILED: after.get(FAILED, "AFTER works")}
        for part in before | after:
            self.item(f"{name}: {part}", before.get(part), after.get(part))


def attempt(make: Callable[[Side], dict], side: Side) -> dict:
    """make(side), or one item that tells why there is none, never the same on the two sides."""
    try:
        return make(side)
    except FailedError as error:
        return {FAILED: f"{side.name.upper()}: {error}"}


def difference(before: bytes | str | None, after: bytes | str | None) -> str:
    """The first thing that is not the same, in one line."""
    if before is None:
        return f"only AFTER has it{', ' + after if isinstance(after, str) else ''}"[:300]
    if after is None:
        return f"only BEFORE has it{', ' + before if isinstance(before, str) else ''}"[:300]
    if isinstance(before, bytes):
        return tensors_that_differ(before, after) or bytes_that_differ(before, after)
    old, new = before.splitlines(), after.splitlines()
    for number, (a, b) in enumerate(zip(old, new), 1):
        if a != b:
            return f"line {number}, {around(a, b)!r} became {around(b, a)!r}"
    return f"{len(old)} lines became {len(new)}, the others equal"


def around(text: str, other: str, width: int = 100) -> str:
    """The text from a little before the place where the other leaves it."""
    start = max(0, len(os.path.commonprefix([text, other])) - width // 2)
    return text[start : start + width]


def bytes_that_differ(before: bytes, after: bytes) -> str:
    sizes = f"{len(before):,} and {len(after):,} bytes"
    common = len(os.path.commonprefix([before, after]))
    return f"{sizes}, the first {common:,} equal"


def tensors_that_differ(before: bytes, after: bytes) -> str | None:
    """Of two safetensors files, by name; None where they are no such files."""
    try:
        (meta, old), (other_meta, new) = tensors_of(before), tensors_of(after)
    except (ValueError, KeyError, AttributeError):
        return None
    names = [name for name in old | new if old.get(name) != new.get(name)]
    if meta != other_meta:
        names.insert(
            0, f"metadata ({around(meta, other_meta)!r} became {around(other_meta, meta)!r})"
        )
    return f"{len(names)} of {len(old | new)} tensors: {', '.join(names[:3])}" if names else None


def tensors_of(content: bytes) -> tuple[str, dict[str, tuple]]:
    """(metadata, {name: (dtype, shape, bytes)}) of a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    if start > len(content):
        raise ValueError("no header")
    header = json.loads(content[8:start])
    meta = json.dumps(header.pop("__metadata__", None))
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = content[start + begin : start + end]
        tensors[name] = (entry["dtype"], tuple(entry["shape"]), data)
    return meta, tensors


def files_of(folder: Path) -> dict[str, bytes]:
    """{relative path: content} of all files below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- results, demo


def results(c: Comparison) -> None:
    def make(side: Side) -> dict:
        files = files_of(side.folder / "results")
        kept = {name: text for name, text in files.items() if not name.startswith("demo.")}
        return kept | {"demo_losses": (side.folder / "tests" / "demo_losses.json").read_bytes()}

    c.both("results", make)


@functools.cache
def toy(side: Side) -> Path:
    """The folder of the toy's data, made once."""
    out = side.scratch / "toy"
    said = side.python("-m", "paper.toy", "--out", out)
    out.with_suffix(".said").write_text(said)
    return out


def demo(c: Comparison) -> None:
    def make(side: Side) -> dict:
        files = files_of(toy(side))
        return files | {"what it prints": toy(side).with_suffix(".said").read_text()}

    c.both("demo", make)


# ---- plan


def sharegpt_like(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tests' lengths, class ids and weight sums: log-normal of mean 1500, 6 in 70 experts."""
    z = np.random.default_rng(seed).standard_normal(n)
    low, high = 4.0, 10.0
    for _ in range(60):
        mu = (low + high) / 2
        if np.clip(np.exp(mu + 0.8 * z), 16, 4096).mean() < 1500:
            low = mu
        else:
            high = mu
    lengths = np.clip(np.exp(mu + 0.8 * z), 16, 4096).astype(np.int64)
    class_ids = (np.random.default_rng(seed + 9).random(n) >= 6 / 70).astype(np.int64)
    return lengths, class_ids, np.where(class_ids == 0, 1.0, 0.1) * lengths


def plan_cases() -> Iterator[tuple[str, tuple]]:
    """(name, arguments of plan)."""
    costs = ((), ((1.0, 0.01),), ((6 * 6.607e9, 6 * 32 * 4096),))  # () is plan's own
    for seed in range(24):
        rng = np.random.default_rng(seed)
        n, classes, rounds = (int(rng.integers(1, most + 1)) for most in (400, 4, 6))
        micro = int(rng.integers(100, 600))
        lengths = rng.integers(2, 101, n)
        class_ids = np.minimum(rng.geometric(0.4, n), classes) - 1  # uneven, the first most
        weight_sums = lengths * (0.1 + rng.random(n)) if seed % 2 else np.ones(n)
        sizes = (micro * rounds + 3, micro)
        args = (lengths, class_ids, weight_sums, seed, seed % 4, *sizes, *costs[seed % 3])
        yield f"random {seed}: {n} in {rounds} x {micro}", args

    for rounds, seed, micro in ((8, 0, 16_384), (16, 1, 16_384), (32, 0, 4096)):
        args = (*sharegpt_like(70_000, seed), seed, 0, rounds * micro, micro)
        yield f"70,000 in {rounds} x {micro}", args
    for epoch in (0, 1):
        yield f"5,000, epoch {epoch}", (*sharegpt_like(5000, 0), 0, epoch, 131_072, 16_384)

    gaps = (
        (65, 2500, 2500, 2),
        (1100, 2500, 2500, 2),
        (2080, 2500, 2500, 32),
        (5000, 2100, 3900, 16),
        (32, 4096, 4096, 8),
        (1000, 4096, 4096, 8),
        (1, 7, 7, 3),
    )
    for n, low, high, rounds in gaps:
        lengths = np.random.default_rng(0).integers(low, high + 1, n)
        args = (lengths, np.arange(n) % 3, np.ones(n), 0, 0, rounds * 4096, 4096)
        yield f"{n} of {low} to {high}", args
    short = np.append(np.random.default_rng(0).integers(10, 31, 100_000), 16_384)
    args = (short, np.zeros(100_001, int), np.ones(100_001), 0, 0, 262_144, 16_384)
    yield "very many short ones", args

    one = (np.array([5]), np.array([0]))
    none = np.array([], int)
    yield "one that does not fit", (*one, np.ones(1), 0, 0, 100, 4)
    yield "one of weight 0", (*one, np.zeros(1), 0, 0, 100, 10)
    yield "no conversation", (none, none, np.array([]), 0, 0, 100, 10)


def find(name: str, *rooms: str) -> object:
    """The function of this name in the first of these modules that has it."""
    for room in rooms:
        try:
            module = importlib.import_module(room)
        except ModuleNotFoundError as error:
            if error.name != room:
                raise
            continue
        if hasattr(module, name):
            return getattr(module, name)
    raise SystemExit(f"no {name} in {', '.join(rooms)}")


def inside_plan(*prepared: str) -> None:
    """Print {case: the plan as a text, a step a line}."""
    plan = find("plan", "packing", "data")
    opened = find("Prepared", "data")
    cases = list(plan_cases())
    for path in prepared:
        data = opened(path)
        whole = data.lengths, data.class_ids, data.weight_sums
        few = tuple(x[:300] for x in whole)
        cases.append((f"300 of {Path(path).name}", (*few, 0, 0, 1280, 256)))
        cases.append((f"{Path(path).name}", (*whole, 0, 0, 262_144, 16_384)))
    found = {}
    for name, args in cases:
        try:
            steps = plan(*args)
        except ValueError as error:
            found[name] = f"ValueError: {error}"
            continue
        lines = [" | ".join(str(micro.tolist()) for micro in step) for step in steps]
        kinds = {str(micro.dtype) for step in steps for micro in step}
        found[name] = "\n".join([f"{type(steps).__name__} of {kinds}", *lines])
    print(json.dumps(found))


def plan(c: Comparison) -> None:
    prepared = [toy(c.before) / "train.safetensors"]
    if c.assets:
        prepared.append(real_file(c.before, c.assets))
    c.both("plan", lambda side: json.loads(side.inside("plan", *prepared)))


# ---- tokens

FORMATS = [  # every format that `read` takes, with turns, systems and weights of their own
    {
        "model": "Model: GPT-4",
        "conversations": [{"from": "human", "value": "copy a b"}, {"from": "gpt", "value": "a b"}],
    },
    {
        "id": "x",
        "items": [{"from": "human", "value": " sort  b a"}, {"from": "gpt", "value": "a b\n"}],
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "copy h </s>"},
            {"role": "assistant", "content": "h <s> \u00e9\U0001f600"},
            {"role": "user", "content": "reverse a c"},
            {"role": "assistant", "content": "c a", "weight": 0.5},
        ]
    },
    {
        "items": [
            {"role": "user", "content": "shift a", "weight": 0.0},
            {"role": "assistant", "content": "b", "weight": 0.3},
        ],
        "condition": "GPT3",
        "system": "",
    },
    {"messages": [{"role": "user", "content": "copy a"}, {"role": "assistant", "content": " "}]},
]


def prepare(side: Side, sources: list[Path], tokenizer: Path, name: str, *flags: object) -> Path:
    """The prepared file `name` in the side's scratch folder; what was printed lies beside it."""
    out = side.scratch / f"{name}.safetensors"
    words = ("--tokenizer", tokenizer, "--out", out, "--processes", 1)
    said = side.python("data.py", "prepare", *sources, *words, *flags)
    out.with_suffix(".said").write_text(said)
    return out


def real_sources(assets: Path) -> list[Path]:
    names = ("mixed_quality.jsonl", "sharegpt_format.json")
    return [assets / "conversations" / name for name in names]


@functools.cache
def real_file(side: Side, assets: Path) -> Path:
    """The real conversations, prepared once with the defaults."""
    tokenizer = assets / "llama2" / "tokenizer.model"
    return prepare(side, real_sources(assets), tokenizer, "real", "--classes", CLASSES)


def inside_prompts(*tokenizers: str) -> None:
    """Print {tokenizer, style, conversation: token ids}."""
    prompt = find("tokenize_prompt", "prompts", "data")
    message = find("Message", "conversations", "data")
    opened = find("Tokenizer", "tokenizer", "data")
    first = message("user", "Hello")
    three = [first, message("assistant", "Hi"), message("user", " How are\nyou </s> today? ")]
    found = {}
    for path in tokenizers:
        tokenizer = opened(path)
        for style in STYLES:
            for turns, system in (([first], None), (three, None), (three, "Be brief.")):
                try:
                    ids = list(prompt(turns, tokenizer, style, "GPT4", system))
                except ValueError as error:
                    ids = f"ValueError: {error}"
                kind = "with system" if system else "plain"
                name = f"{tokenizer.eot} pieces, {style}, {len(turns)} turns, {kind}"
                found[name] = json.dumps(ids)
    print(json.dumps(found))


def tokens(c: Comparison) -> None:
    rows, tokenizer = toy(c.before) / "train.jsonl", toy(c.before) / "tokenizer.model"
    mixed = c.before.scratch / "formats.json"
    mixed.write_text(json.dumps(FORMATS))

    ways = [("toy", [rows], tokenizer, ("--max_len", 128, "--template", t)) for t in TEMPLATES]
    for how in ("truncate", "split", "drop"):
        ways.append((f"toy-{how}", [rows], tokenizer, ("--max_len", 20, "--too_long", how)))
        flags = ("--max_len", 40, "--too_long", how)
        ways.append((f"formats-{how}", [mixed], tokenizer, flags))
    ways.append(("toy-beta", [rows], tokenizer, ("--beta", 0.4)))
    llama = []
    if c.assets:
        llama = [c.assets / "llama2" / "tokenizer.model"]
        # together: one of them alone has no conversation of the expert, and is refused
        for template in TEMPLATES:
            ways.append(("real", real_sources(c.assets), llama[0], ("--template", template)))
        flags = ("--max_len", 512, "--too_long", "split")
        ways.append(("real-split", real_sources(c.assets), llama[0], flags))

    for name, sources, model, flags in ways:
        said = " ".join(map(str, flags))

        def make(side: Side, args: tuple = (sources, model, name), flags: tuple = flags) -> dict:
            out = prepare(side, *args, *flags, "--classes", CLASSES)
            return {"file": out.read_bytes(), "ledger": out.with_suffix(".said").read_text()}

        c.both(f"tokens: {name} {said}", make)
    c.both("tokens: prompts", lambda side: json.loads(side.inside("prompts", tokenizer, *llama)))


# ---- metrics, export


def train_words(ranks: int) -> tuple[str, ...]:
    """How `train.py` is started on so many ranks."""
    if ranks == 1:
        return ("train.py",)
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "train.py")


@functools.cache
def trained(side: Side, data: Path, name: str) -> Path:
    """The folder of a run of RUNS on this data, made once."""
    ranks, flags = RUNS[name]
    out = side.scratch / "runs" / name.replace(" ", "_").replace(",", "")
    side.python(*train_words(ranks), "--data", data, "--out", out, *TRAIN, *flags)
    return out


@functools.cache
def tuned(side: Side, data: Path, model: Path) -> Path:
    """The folder of a run that starts from an export: the learning rate comes from the data."""
    out = side.scratch / "runs" / "tuned"
    flags = ("--model", model, *TRAIN[2:], *MICRO, "--batch_tokens", 1536)
    side.python("train.py", "--data", data, "--out", out, *flags)
    return out


def metrics_of(run: Path) -> str:
    """metrics.jsonl without the times, fields in their order."""
    lines = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines.append(json.dumps({key: value for key, value in line.items() if key not in TIMES}))
    return "\n".join(lines)


def runs(c: Comparison) -> Iterator[tuple[str, Callable[[Side], Path]]]:
    """(name, function that gives the folder of a side's run)."""
    data = toy(c.before) / "train.safetensors"
    for name in RUNS:
        yield name, lambda side, name=name: trained(side, data, name)
    base = trained(c.before, data, "1 rank") / "hf"
    yield "from an export", lambda side: tuned(side, data, base)


def demo_run(side: Side, data: Path) -> list[float]:
    """The demo's first losses, at the full precision of metrics.jsonl."""
    out = side.scratch / "runs" / "demo"
    words = ("train.py", "--data", data, "--out", out, "--model", "toy", "--steps", "1500")
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=side.folder,
        env=side.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, until = out / "metrics.jsonl", time.monotonic() + 300
    # The line after the last is there, so the last is whole.
    while not log.is_file() or log.read_bytes().count(b"\n") <= DEMO_STEPS:
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise FailedError("the demo did not come to its 20th step")
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line][:DEMO_STEPS]


def metrics(c: Comparison) -> None:
    for name, run in runs(c):
        c.both(f"metrics: {name}", lambda side, run=run: {"lines": metrics_of(run(side))})

    data = toy(c.before) / "train.safetensors"

    def make(side: Side) -> dict:
        losses = demo_run(side, data)
        committed = json.loads((side.folder / "tests" / "demo_losses.json").read_text())
        # The committed ones are rounded; another processor may differ in their last digits.
        near = bool(np.allclose(losses, committed, rtol=1e-4, atol=0))
        return {"losses": json.dumps(losses), "near the committed ones": str(near)}

    c.both("metrics: demo", make)


def export(c: Comparison) -> None:
    for name, run in runs(c):
        c.both(f"export: {name}", lambda side, run=run: files_of(run(side) / "hf"))


# ---- old: what BEFORE made, in the hands of AFTER


def stopped(run: Path, out: Path) -> None:
    """A copy of a finished run as a crash after its first checkpoint would have left it."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("hf", "step-20", "loss.png"))
    (out / "checkpoints" / "latest").write_text("step-10")


def resumed(c: Comparison, name: str, ranks: int) -> None:
    """AFTER takes BEFORE's run on from step 10, BEFORE's is the run that was never stopped."""
    data = toy(c.before) / "train.safetensors"
    whole, flags = trained(c.before, data, name), RUNS[name][1]

    def make(side: Side) -> dict:
        if side is c.before:
            run, said = whole, "from step-10"
        else:
            run = side.scratch / f"resumed {name} on {ranks}"
            stopped(whole, run)
            words = ("--data", data, "--out", run, *TRAIN, *flags)
            output = side.python(*train_words(ranks), *words)
            # Without this line a run that began anew would pass: its bytes are the same.
            took = "resuming from" in output and "step-10" in output
            said = "from step-10" if took else "from the beginning"
        found = files_of(run / "hf") | {"it resumes": said}
        # On other ranks the log's sums are added in another order; the weights of --exact are not.
        return found | ({"metrics": metrics_of(run)} if ranks == RUNS[name][0] else {})

    c.both(f"old: checkpoint of {name}, on {ranks}", make)


def chats(side: Side, model: Path) -> dict:
    """What an export says, by every way to ask it."""
    ask = ("sample.py", model, "--max_new", 24, "--seed", 3)
    prompt = ("--prompt", "reverse a c b d")
    found = {
        "a prompt": side.python(*ask, *prompt),
        "the likeliest": side.python(*ask, *prompt, "--temperature", 0),
        "the other's prompt": side.python(*ask, *prompt, "--condition", "GPT3", "--top_p", 0.9),
        "a chat": side.python(*ask, stdin="copy a b c\nsort c b a\n\n"),
    }
    rows = [{"prompt": f"{skill} h g f e"} for skill in ("copy", "shift", "sort")]
    turns = [("user", "copy a b"), ("assistant", "a b"), ("user", "shift c")]
    rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    asked, answered = side.scratch / "asked.jsonl", side.scratch / "answered.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    side.python(*ask, "--input", asked, "--output", answered, "--top_k", 40)
    return found | {"a file": answered.read_text()}


def old(c: Comparison) -> None:
    resumed(c, "1 rank, 4 micro-batches", 1)
    resumed(c, "2 ranks", 2)
    resumed(c, "1 rank, exact", 2)  # --exact: the same bits on any number of ranks
    resumed(c, "2 ranks, bfloat16", 2)

    prepared = [toy(c.before) / "train.safetensors"]
    if c.assets:
        prepared.append(real_file(c.before, c.assets))
    small = ("--batch_tokens", 1536, "--micro_tokens", 384, "--ranks", 2)
    for path in prepared:
        flags = small if path is prepared[0] else ()

        def look(side: Side, path: Path = path, flags: tuple = flags) -> dict:
            return {
                "show": side.python("data.py", "show", path, "--n", 5),
                "stats": side.python("data.py", "stats", path, *flags),
            }

        c.both(f"old: prepared file {path.name}", look)
    rows, tokenizer = toy(c.before) / "train.jsonl", toy(c.before) / "tokenizer.model"
    unprepared = ("data.py", "show", rows, "--tokenizer", tokenizer, "--classes", CLASSES)
    c.both("old: conversation files", lambda side: {"show": side.python(*unprepared)})

    model = trained(c.before, prepared[0], "1 rank") / "hf"
    c.both("old: export", lambda side: chats(side, model))


# ---- texts


def texts(c: Comparison) -> None:
    run = ("train.py", "--dry_run", "--ranks", 8, "--batch_tokens", 262_144)
    data = ("--data", toy(c.before) / "train.safetensors", "--model", "toy", "--steps", 20)
    dry = {
        "13b": (*run, "--model", "llama-2-13b", "--steps", 2000),
        "70b": (*run, "--model", "llama-2-70b", "--steps", 2000, "--exact", "--tflops", 989),
        "toy": ("train.py", "--dry_run", *data, *MICRO, "--ranks", 2),
    }
    for name, words in dry.items():
        c.both(f"texts: dry run, {name}", lambda side, words=words: {"said": side.python(*words)})
    if not c.assets:
        return

    def agieval(side: Side) -> dict:
        out = side.scratch / "agieval.jsonl"
        words = ("--data", c.assets / "agieval", "--out", out, "--prompts_only")
        side.python("evaluate.py", "agieval", *words)
        return {"prompts": out.read_text()}

    c.both("texts: agieval", agieval)


# ---- cubins


def short(content: object) -> str:
    """Sixteen digits that stand for a text, bytes or anything that prints itself."""
    code = content if isinstance(content, bytes) else str(content).encode()
    return hashlib.sha256(code).hexdigest()[:16]


def record_kernels(folder: str) -> None:
    """From here on a line for each kernel that Triton compiles, in a file of this process."""
    from triton.compiler.compiler import CompiledKernel

    begin, file = CompiledKernel.__init__, Path(folder) / f"{os.getpid()}.jsonl"

    def record(self: CompiledKernel, src: object, *args: object) -> None:
        begin(self, src, *args)
        with open(file, "a") as out:
            out.write(json.dumps(described(self, src)) + "\n")

    CompiledKernel.__init__ = record


def described(kernel: object, src: object) -> tuple[str, str]:
    """(target, file and function; what was asked for, by position, and what came out)."""
    target, options = kernel.metadata.target, kernel.metadata._asdict()
    # The hash is of the source, which a change of form changes; parameters' names are form too.
    del options["hash"], options["target"]
    signature = " ".join(map(str, src.signature.values()))
    constants = " ".join(f"{place[0]}={value}" for place, value in sorted(src.constants.items()))
    code = kernel.asm["amdgcn" if target.backend == "hip" else "cubin"]
    name = f"{target.arch} {Path(src.fn.fn.__code__.co_filename).stem} {kernel.name}"
    parts = (
        f"({signature})",
        f"attributes {short(sorted(src.attrs.items()))}",
        f"options {short(sorted(options.items()))}",
        f"{kernel.metadata.num_warps} warps",
        f"constants {constants}",
        f"code {short(code)}",
    )
    return name, ", ".join(parts)


def compiled(side: Side, words: tuple[str, ...]) -> dict[str, str]:
    """{target and kernel: a line for each binary}, and the report of kernels/compile.py."""
    work = Path(tempfile.mkdtemp(dir=side.scratch, prefix="cubins"))
    record, hook = work / "record", work / "hook"
    for folder in (record, hook):
        folder.mkdir()
    # Python imports sitecustomize at every start, so that also the processes of a pool record.
    start = ("import sys", f"sys.path.append({str(Path(__file__).resolve().parent)!r})")
    start += ("import same", f"same.record_kernels({str(record)!r})")
    (hook / "sitecustomize.py").write_text("\n".join(start) + "\n")
    report = side.python(
        "-m",
        "kernels.compile",
        *words,
        may_fail=True,  # a failed inspection is a line of the report, the same on both sides
        PYTHONPATH=str(hook),
        TRITON_CACHE_DIR=str(work / "cache"),
        TRITON_DISABLE_LINE_INFO="1",
    )
    found = {}
    for path in record.iterdir():
        for text in path.read_text().splitlines():
            name, binary = json.loads(text)
            found.setdefault(name, set()).add(binary)
    shutil.rmtree(work)
    if not found:
        raise FailedError("kernels.compile compiled nothing that could be seen")
    texts = {}
    for name, binaries in sorted(found.items()):
        texts[f"{name}, {len(binaries)} binaries"] = "\n".join(sorted(binaries))
    return texts | {"the report": report}


def kept(side: Side, words: tuple[str, ...], folder: str) -> dict[str, str]:
    """What `compiled` gives, from the folder where it lies for these very sources."""
    versions = sys.version, importlib.metadata.version("triton")
    sources = [files_of(side.folder / "kernels"), words, versions]
    name = hashlib.sha256(repr(sources).encode()).hexdigest()[:16]
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(compiled(side, words)))
    return json.loads(path.read_text())


def cubins(c: Comparison) -> None:
    words = []
    flags = {"targets": "--arch", "kernels": "--kernel", "dtypes": "--dtype", "shapes": "--shapes"}
    for name, flag in flags.items():
        if chosen := getattr(c.options, name):
            words += [flag, *chosen]

    def make(side: Side) -> dict:
        if c.options.keep and side is c.before:
            return kept(side, tuple(words), c.options.keep)
        return compiled(side, tuple(words))

    c.both("cubins", make, at_once=False)  # one checkout's compilers fill the cores


# ---- the command line

SECTIONS = {
    f.__name__: f for f in (results, demo, plan, tokens, metrics, export, old, texts, cubins)
}
INSIDE = {"plan": inside_plan, "prompts": inside_prompts}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--targets", nargs="+", help="of cubins: sm_80, sm_90, sm_100, gfx942")
    parser.add_argument("--kernels", nargs="+", help="of cubins: the kernel files")
    parser.add_argument("--dtypes", nargs="+", help="of cubins: bf16, fp16, fp32")
    parser.add_argument("--shapes", nargs=1, help="of cubins: the first so many of each kernel")
    parser.add_argument("--keep", metavar="FOLDER", help="for BEFORE's compiled kernels")
    options = parser.parse_intermixed_args(argv)
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"{name} is not one of {', '.join(SECTIONS)}")
    assets = os.environ.get("CRLFT_ASSETS")

    with tempfile.TemporaryDirectory(prefix="same-") as scratch:
        sides = []
        for name in ("before", "after"):
            folder = getattr(options, name).resolve()
            if not (folder / "train.py").is_file():
                parser.error(f"{folder} is no checkout: it has no train.py")
            side = Side(name, folder, Path(scratch) / name)
            side.scratch.mkdir()
            sides.append(side)
        c = Comparison(*sides, options, Path(assets).resolve() if assets else None)
        for name in options.sections or SECTIONS:
            began = time.monotonic()
            SECTIONS[name](c)
            print(f"         {name}: {time.monotonic() - began:.0f} s", flush=True)
    if not c.assets:
        print("         CRLFT_ASSETS is unset: no real tokenizer and conversations")
    print(f"{c.items} items, {len(c.differing)} differ")
    return 1 if c.differing else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.path[0] = os.getcwd()  # the checkout's modules, not those beside this file
        INSIDE[sys.argv[2]](*sys.argv[3:])
    else:
        sys.exit(main(sys.argv[1:]))
