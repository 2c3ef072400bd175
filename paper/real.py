"""Real text on a real base: what the condition does to a model of 135M parameters.

    python -m paper.real mixed_quality.jsonl       into out/real; the same line goes on
    python -m paper.real FILE.. --label generator --expert gpt4 --other text_davinci_001
    python -m paper.real FILE.. --steps 20         a look at what it does

SmolLM2-135M-Instruct is fine-tuned on two sources' answers to the same prompts, GPT-4's and
text_davinci_001's, in two arms of the same budget:

    c-rlft          the prompt says the class: `GPT4 User:`, `GPT3 User:`
    no-condition    the prompt is `User:` for both

Both have the same weights: 1 for the expert's answers and, as in the paper, 0.1 for the other's.
Prompts are held out, never rows. What is then measured, of all sources of the files, stands in
real_measure.py. The model and the data are prepared, trained and exported by the project's own
commands.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from conversations import FieldNames, parse
from paper.code_hash import ROOT
from paper.commands import cores
from paper.real_base import fetch_base
from paper.real_measure import ARMS, HELD_OUT, held_out, measure, samples
from paper.real_report import publish
from paper.runs import prepared
from sample import tokenizer_file
from support.cli import parse_args, run
from support.metrics import read_metrics
from support.rows import read_rows

STEPS = 150
# The condition is learned late: many small steps at a high rate teach more of it than few large.
LR = 5e-4
SAVE_EVERY = 25
# the conditions are those of the paper's prompts
TABLE = "GPT4=GPT4:1.0,GPT3=GPT3:{}"
# Of one core, where the committed results were made.
TOKENS_PER_S = 100
# Measuring and sampling take about so many tokens' training.
TOKENS_OF_REPORT = 80_000
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class RealConfig:
    """The flags of `python -m paper.real`."""

    # conversation files: several sources' answers to the same prompts
    files: tuple = ()
    # the field of a row that says who wrote its answer
    label: str = "model"
    # what that field has for the expert; sources beside the two are only measured
    expert: str = "Model: GPT-4"
    # what it has for the other source that is trained on
    other: str = "Model: text_davinci_001"
    # the weight of the other's answers; the expert's is 1
    weight: float = 0.1
    # a Hugging Face directory to fine-tune
    # default: SmolLM2-135M-Instruct, fetched by pip
    base: str | None = None
    # a folder for both arms; the same line goes on with what is there
    out: str = "out/real"
    # optimizer steps of either arm
    steps: int = STEPS
    # tokens of a step, at most
    batch_tokens: int = 1024
    # tokens of a conversation; longer ones are cut
    max_len: int = 256
    # arms trained at a time: 4.5 GB of memory each
    processes: int = min(len(ARMS), cores())

    @property
    def changed(self) -> dict:
        """{flag: its value} of those that change the results, where they are not the defaults."""
        defaults = dataclasses.asdict(RealConfig())
        found = {}
        for name, value in dataclasses.asdict(self).items():
            if name not in ("files", "out", "processes") and value != defaults[name]:
                found[name] = value
        return found


# (flag, least, most)
BOUNDS = (
    ("steps", 1, 10**6),
    ("batch_tokens", 64, 10**6),
    ("max_len", 64, 10**6),
    ("processes", 1, len(ARMS)),
)


# ---- conversations


def read_files(config: RealConfig) -> list[dict]:
    """The rows of all files, with the source as `model`. ValueError: a source is not there."""
    rows = []
    for path in config.files:
        for where, row in read_rows(path):
            source = parse(row, where, FieldNames(config.label)).label
            rows.append(row | {"model": source})
    sources = list(dict.fromkeys(row["model"] for row in rows))
    for name in ("expert", "other"):
        wanted = getattr(config, name)
        if wanted not in sources:
            known = ", ".join(map(repr, sources)) or "none"
            raise ValueError(
                f"--{name} {wanted!r} wrote no answer in {', '.join(config.files)}; the field "
                f"{config.label!r} (--label) has {known}"
            )
    return rows


def training_rows(rows: list[dict], config: RealConfig) -> list[dict]:
    """The two sources' rows; the class is the source."""
    class_of = {config.expert: "GPT4", config.other: "GPT3"}
    chosen = []
    for row in rows:
        if row["model"] in class_of:
            chosen.append(row | {"model": class_of[row["model"]]})
    return chosen


# ---- two arms


def prepare_arms(config: RealConfig, rows: list[dict], base: Path) -> list[Path]:
    """Both arms' folders, each with its prepared file."""
    tokenizer = tokenizer_file(base)
    table = TABLE.format(config.weight)
    folders = []
    for arm, template in ARMS.items():
        folder = Path(config.out) / arm
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "train.safetensors"
        prepared(path, training_rows(rows, config), table, tokenizer, template, config.max_len)
        folders.append(folder)
    return folders


def train_arms(config: RealConfig, folders: list[Path], base: Path) -> None:
    """Train both arms, `processes` at a time; each goes on where it stopped."""
    threads = max(1, cores() // config.processes)
    waiting = list(folders)
    running = {}
    bar = tqdm(total=len(ARMS) * config.steps, unit=" steps", disable=None, dynamic_ncols=True)
    # SIGTERM and a closed terminal leave by `finally`, as Ctrl-C does, so that no arm is left
    # behind.
    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        while waiting or running:
            while waiting and len(running) < config.processes:
                folder = waiting.pop(0)
                running[folder] = start(folder, base, config, threads)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for folder, process in list(running.items()):
                if process.poll() is not None:
                    check_ended(folder, process)
                    del running[folder]
            bar.n = sum(map(steps_taken, folders))
            bar.refresh()
    finally:
        # an arm that is told to stop saves first
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        bar.close()


def start(folder: Path, base: Path, config: RealConfig, threads: int) -> subprocess.Popen:
    """train.py on an arm's data, which writes what it says into log.txt."""
    flags = {
        "data": folder / "train.safetensors",
        "model": base,
        "out": folder,
        "steps": config.steps,
        "batch_tokens": config.batch_tokens,
        "lr": LR,
        "val_fraction": HELD_OUT,
        "val_every": config.steps,
        "save_every": SAVE_EVERY,
        "keep": 1,
    }
    words = [sys.executable, str(ROOT / "train.py")]
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            # Ctrl-C reaches this process alone, which tells the arms once
            start_new_session=True,
        )


def check_ended(folder: Path, process: subprocess.Popen) -> None:
    """ValueError: the arm ended before its last step."""
    if process.returncode:
        log = folder / "log.txt"
        *_, why = ["it says nothing", *log.read_text().strip().splitlines()]
        raise ValueError(f"{log}: training ended with status {process.returncode}: {why}")


def steps_taken(folder: Path) -> int:
    lines = read_metrics(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def forecast(config: RealConfig) -> str:
    """What the run will take, said before it starts."""
    left = len(ARMS) * config.steps
    left -= sum(steps_taken(Path(config.out) / arm) for arm in ARMS)
    seconds = (left * config.batch_tokens + TOKENS_OF_REPORT) / TOKENS_PER_S / cores()
    return (
        f"{left:,} steps of {config.batch_tokens:,} tokens to take, then the measurement: about "
        f"{seconds / 60:.0f} min on {cores()} cores of {TOKENS_PER_S} tokens/s, "
        f"{4.5 * config.processes:.1f} GB of memory, 5 GB of disk in {config.out}. "
        "Stop it when you like; the same line goes on"
    )


# ---- the command


def check_flags(config: RealConfig) -> None:
    """ValueError: before anything is fetched."""
    if not config.files:
        raise ValueError(
            "name the conversations: python -m paper.real FILE.. (docs/real.md says where some lie)"
        )
    for name, least, most in BOUNDS:
        value = getattr(config, name)
        if not least <= value <= most:
            raise ValueError(f"--{name} {value} is not from {least} to {most:,}")
    if config.batch_tokens < config.max_len:
        raise ValueError(f"--batch_tokens {config.batch_tokens} is below --max_len, a conversation")
    if not 0 < config.weight <= 1:
        raise ValueError(f"--weight {config.weight:g} is not above 0 and at most 1, the expert's")
    if config.expert == config.other:
        raise ValueError(f"--expert and --other are both {config.expert!r}; name two sources")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the picture needs matplotlib: `pip install matplotlib`") from None


def main(argv: list[str]) -> None:
    config = parse_args(RealConfig, argv, positional="files")
    check_flags(config)
    rows = read_files(config)
    # before anything is fetched: are there any?
    held_out(rows)
    print(forecast(config), flush=True)
    base = Path(config.base) if config.base else fetch_base(Path(config.out) / "base")
    train_arms(config, prepare_arms(config, rows, base), base)

    torch.set_num_threads(cores())
    out = Path(config.out)
    measured = measure(out, rows, config.max_len)
    publish(config, rows, measured, samples(out, rows))


if __name__ == "__main__":
    run(main)
