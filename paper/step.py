"""A whole training step beside transformers': the same conversations, the same AdamW, the same
model with an untied head.

    python -m paper.step                this CPU                      -> results/step_cpu.json
    python -m paper.step --model 13b    a GPU, LLaMA-2-13B's width    -> results/step_gpu_13b.json
    python -m paper.step --out DIR      the file goes into another folder
    python -m paper.step --check        the script itself on a CPU: times and writes nothing

On the CPU the model has 15M parameters and one thread. On a GPU it has 8 layers of the width, and a
step has 16,384 packed tokens. Each contestant runs in a process of its own, one after the other:

    ours
    ours, plain PyTorch           on a GPU: the kernels' references, but for the loss
    transformers, packed          rows filled first-fit decreasing, positions from 0 in each
                                  conversation, a block-diagonal mask: the same numbers as ours
    transformers, padded          a conversation to a row
    transformers + Liger, ..      on a GPU: both with Liger's kernels

tokens/s counts real tokens. On the CPU time is process CPU time, and memory is the peak above the
level before the model is built. On a GPU, MFU is the FLOPs that the batch needs (`train_flops`),
per second, over the GPU's dense bf16 peak.

A contestant that fails is named with its reason, and the others go on. Where it is ours, the exit
status is 1.
"""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import kernels.rms_norm
import kernels.rotary_attention
import kernels.swiglu
from kernels.timing import Clock, machine
from model import RECOMPUTE, SIZES, Config
from packing import pack, plan
from paper.packing import sharegpt_like
from recipe import TrainConfig
from support.budget import peak_flops, train_flops
from support.cli import parse_args, run
from support.ranks import local_rows, start_group
from train import Tally, build, train_step

VOCABULARY = 32_000

# AdamW's, of all contestants
LR = 1e-4

# of the gradient's norm
CLIP = 1.0


class Width(NamedTuple):
    """A model, and the batches that it is trained on."""

    config: Config
    conversations: int
    row: int  # tokens of a peer's row
    rows: int  # of a step; ours has as many tokens in one micro-batch


WIDTHS = {
    "cpu": Width(Config(288, 768, 6, 6, 6, VOCABULARY, 2048), 64, 1024, 4),
    "7b": Width(SIZES["llama-2-7b"], 88, 4096, 4),
    "13b": Width(SIZES["llama-2-13b"], 88, 4096, 4),
}

# The share of the tokens that have a loss. We do not project the others to the vocabulary.
SUPERVISED = {"cpu": (1.0, 0.6), "cuda": (0.6,)}

CONTESTANTS = {
    "cpu": ("ours", "transformers, packed", "transformers, padded"),
    "cuda": (
        "ours",
        "transformers + Liger, packed",
        "transformers, packed",
        "ours, plain PyTorch",
        "transformers + Liger, padded",
    ),
}


@dataclass(frozen=True)
class StepConfig:
    """The flags of `python -m paper.step`."""

    # the width: cpu, 7b or 13b; several with commas, one after the other
    model: str = "cpu"
    # blocks of a GPU's model
    layers: int = 8
    # micro-batches of an optimizer step: our default has 2 on each of 8 GPUs
    micro: int = 1
    # how often each contestant runs
    rounds: int = 3
    # for all contestants: none is begun that would most likely not end in time
    minutes: float = 60.0
    # of ours: none, cheap or all
    recompute: str = "none"
    # number of conversations, instead of the width's own
    conversations: int | None = None
    # the folder of the results
    out: str = "results"
    # one round of four conversations on a CPU, without a time
    check: bool = False
    # who runs; set by the parent process
    contestant: str | None = None
    # the share of supervised tokens; set by the parent process
    supervised: float | None = None


# ---- the work

# A conversation: (tokens int32 [n], loss weights fp32 [n])
Tokenized = tuple[np.ndarray, np.ndarray]

# Makes one optimizer step. Its batch is ready, so that the time is the step's alone.
Step = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    model_config: Config
    conversations: list[Tokenized]
    row: int
    rows: int

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(tokens) for tokens, _ in self.conversations])


def workload(config: StepConfig, supervised: float) -> Workload:
    """Random conversations; the last part of each, the answer, is supervised."""
    width = WIDTHS[config.model]
    model_config = width.config
    n = config.conversations or width.conversations
    rng = np.random.default_rng(0)
    if config.model == "cpu":
        # log-normal with mean 350, then cut to a row
        sigma = 0.8
        mu = np.log(350) - sigma**2 / 2
        lengths = np.clip(rng.lognormal(mu, sigma, n), 8, width.row).astype(int)
    else:
        lengths = sharegpt_like(n, 0).lengths
        model_config = dataclasses.replace(model_config, num_hidden_layers=config.layers)

    conversations = []
    for length in lengths:
        tokens = rng.integers(0, VOCABULARY, length).astype(np.int32)
        question = round(length * (1 - supervised))
        weights = (np.arange(length) >= question).astype(np.float32)
        conversations.append((tokens, weights))
    return Workload(model_config, conversations, width.row, width.rows)


# ---- ours


def our_steps(config: StepConfig, work: Workload, device: torch.device) -> list[Step]:
    """The epoch's steps, with train.py's own model, optimizer and step."""
    on_gpu = device.type == "cuda"
    dtype = "bfloat16" if on_gpu else "float32"
    settings = TrainConfig(dtype=dtype, recompute=config.recompute, lr=LR)
    start_group(None, alone=on_gpu, timeout=600)
    model, optimizer, _ = build(settings, work.model_config, device)
    for parameter in model.parameters():
        rows, _ = local_rows(parameter)
        torch.nn.init.normal_(rows.detach(), std=0.02)

    planned = plan(
        work.lengths,
        class_ids=np.zeros(len(work.lengths), int),
        weight_sums=np.array([weights.sum() for _, weights in work.conversations]),
        seed=0,
        epoch=0,
        batch_tokens=work.row * work.rows * config.micro,
        micro_tokens=work.row * work.rows,
        cost=train_flops(work.model_config).plan_cost,
    )

    def our_step(micro_batches: list[np.ndarray]) -> Step:
        batches = [pack([work.conversations[i] for i in micro]) for micro in micro_batches]

        def go() -> float:
            weight_sum = sum(batch.weights_T.sum().item() for batch in batches)
            tally = Tally(1, device)
            return train_step(model, optimizer, batches, device, weight_sum, CLIP, tally)

        return go

    return [our_step(step) for step in planned]


# ---- transformers'


def peer_steps(name: str, work: Workload, micro: int, device: torch.device) -> list[Step]:
    """The epoch's steps with transformers' model: fp32 weights under autocast on a GPU, clipped, as
    ours.
    """
    on_gpu = device.type == "cuda"
    model = peer_model(name, work.model_config, device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-5,
        weight_decay=0.1,
        fused=on_gpu,
    )

    def peer_step(rows: list[list[Tokenized]]) -> Step:
        micro_batches = []
        for start in range(0, len(rows), work.rows):
            some = rows[start : start + work.rows]
            micro_batches.append(peer_inputs(some, work.row, "packed" in name, device))

        def go() -> float:
            for inputs in micro_batches:
                with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                    loss = model(**inputs).loss / len(micro_batches)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return go

    if "packed" in name:
        filled = fill_rows(work.conversations, work.row)
    else:
        filled = [[conversation] for conversation in work.conversations]
    rows_of_step = work.rows * micro
    starts = range(0, len(filled), rows_of_step)
    return [peer_step(filled[start : start + rows_of_step]) for start in starts]


def peer_model(name: str, model_config: Config, device: torch.device) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    # before the model is built: Liger replaces its classes
    if "Liger" in name:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    fields = dataclasses.asdict(model_config)
    peer_config = LlamaConfig(**fields, use_cache=False, attn_implementation="sdpa")
    with device:
        return LlamaForCausalLM(peer_config).float().train()


def fill_rows(conversations: list[Tokenized], row: int) -> list[list[Tokenized]]:
    """Rows of at most so many tokens: the longest conversation first, each into the first row that
    has room for it.
    """

    def longest_first(conversation: Tokenized) -> int:
        return -len(conversation[0])

    filled = []
    room = []
    for conversation in sorted(conversations, key=longest_first):
        length = len(conversation[0])
        with_room = (i for i, left in enumerate(room) if left >= length)
        i = next(with_room, None)
        if i is None:
            i = len(room)
            filled.append([])
            room.append(row)
        filled[i].append(conversation)
        room[i] -= length
    return filled


def peer_inputs(
    rows: list[list[Tokenized]], row: int, packed: bool, device: torch.device
) -> dict[str, torch.Tensor]:
    """What transformers' model takes. B rows, of conversations; L tokens of a row."""
    shape = (len(rows), row)
    tokens_BL = torch.zeros(shape, dtype=torch.long)
    positions_BL = torch.zeros(shape, dtype=torch.long)
    # -100 is transformers' word for a token without loss
    labels_BL = torch.full(shape, -100)
    # the number of the conversation in its row; -1 is padding
    conversation_BL = torch.full(shape, -1)
    for b, conversations in enumerate(rows):
        start = 0
        for number, (tokens, weights) in enumerate(conversations):
            end = start + len(tokens)
            tokens = torch.from_numpy(tokens).long()
            is_supervised = torch.from_numpy(weights) > 0
            tokens_BL[b, start:end] = tokens
            positions_BL[b, start:end] = torch.arange(len(tokens))
            conversation_BL[b, start:end] = number
            labels_BL[b, start:end] = tokens.where(is_supervised, -100)
            # nothing predicts the first token of a conversation
            labels_BL[b, start] = -100
            start = end

    mask = conversation_BL >= 0
    if packed:
        # [B, 1, L, L]: from a token to those of its own conversation up to itself
        is_same = conversation_BL[:, :, None] == conversation_BL[:, None, :]
        is_past = torch.ones(row, row, dtype=torch.bool).tril()
        mask = (is_same & is_past)[:, None]
    return {
        "input_ids": tokens_BL.to(device),
        "labels": labels_BL.to(device),
        "position_ids": positions_BL.to(device),
        "attention_mask": mask.to(device),
    }


# ---- one contestant, in a process of its own


def contest(config: StepConfig) -> None:
    """Print the contestant's line: an epoch of steps, after one or all to warm up."""
    torch.set_num_threads(1)
    device = torch.device("cpu" if config.model == "cpu" else "cuda")
    on_gpu = device.type == "cuda"
    work = workload(config, config.supervised)
    if "transformers" in config.contestant:
        # its own memory is not a step's
        import transformers  # noqa: F401
    memory = PeakMemory()

    if config.contestant == "ours, plain PyTorch":
        for module in (kernels.rms_norm, kernels.rotary_attention, kernels.swiglu):
            module.on_gpu = never
    if config.contestant.startswith("ours"):
        steps = our_steps(config, work, device)
    else:
        steps = peer_steps(config.contestant, work, config.micro, device)

    clock = time.perf_counter if on_gpu else time.process_time
    # On a GPU all steps warm up: each has new lengths, for which libraries make plans once.
    for step in steps if on_gpu else steps[:1]:
        step()
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    for step in steps:
        step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = clock() - began

    tokens = work.lengths.sum()
    squares = (work.lengths.astype(float) ** 2).sum()
    supervised = sum(int(weights[1:].sum()) for _, weights in work.conversations)
    flops = train_flops(work.model_config).total(tokens, supervised, squares)
    line = {
        "contestant": config.contestant,
        "supervised": config.supervised,
        "tokens": int(tokens),
        "steps": len(steps),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else memory.peak,
    }
    if on_gpu:
        peak = peak_flops()
        line["mfu"] = peak and flops / seconds / peak
    print(json.dumps(line), flush=True)


def never(_: torch.Tensor) -> bool:
    """In place of a kernel's on_gpu: it takes its reference."""
    return False


class PeakMemory:
    """`peak`: the most bytes of memory that this process has had above its level at the start.

    A thread looks every 2 ms.
    """

    def __init__(self) -> None:
        self.level = resident_bytes()
        self.peak = 0
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while True:
            self.peak = max(self.peak, resident_bytes() - self.level)
            time.sleep(0.002)


def resident_bytes() -> int:
    """Memory of this process, as Linux counts it."""
    with open("/proc/self/statm") as file:
        pages = file.read().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


# ---- all of them


def main(argv: list[str]) -> None:
    config = parse_args(StepConfig, argv)
    if config.contestant:
        contest(config)
        return
    if config.check:
        argv = [*argv, "--model", "cpu", "--rounds", "1", "--conversations", "4"]
        config = parse_args(StepConfig, argv)
    check_flags(config)
    models = config.model.split(",")
    for model in models:
        if model not in WIDTHS:
            raise ValueError(f"--model {model!r} is not one of {', '.join(WIDTHS)}")
        if model != "cpu" and not torch.cuda.is_available():
            raise ValueError(
                f"--model {model} needs a GPU; without --model the step is timed on this CPU"
            )
    clock = Clock(config.minutes)
    failures = []
    for model in models:
        failures += race(model, config, argv, clock)
    if failures:
        raise ValueError(f"ours failed: {'; '.join(failures)}")


def check_flags(config: StepConfig) -> None:
    for name in ("layers", "micro", "rounds", "conversations"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} is not above 0")
    if config.recompute not in RECOMPUTE:
        raise ValueError(f"--recompute {config.recompute!r} is not one of {', '.join(RECOMPUTE)}")


def race(model: str, config: StepConfig, argv: list[str], clock: Clock) -> list[str]:
    """All contestants at one width. Returns why ours failed, for each time that it did."""
    if model == "cpu":
        device = "cpu"
        out = Path(config.out) / "step_cpu.json"
        about = {
            "command": " ".join(["python -m paper.step", *argv]),
            "torch": torch.__version__,
            "threads": 1,
            "device": "CPU",
        }
    else:
        device = "cuda"
        out = Path(config.out) / f"step_gpu_{model}.json"
        about = machine("python -m paper.step") | {"micro": config.micro}

    lines = []
    failures = []
    not_run = {}
    # Contestants take turns, so that a slow minute of the machine does not fall on one alone. The
    # file is written after each, so that a run that ends early leaves what it has.
    turns = itertools.product(range(config.rounds), SUPERVISED[device], CONTESTANTS[device])
    for _, supervised, name in turns:
        if not clock.has_time():
            not_run[name] = f"not begun within --minutes {config.minutes}"
            continue
        line, problem = run_alone(name, supervised, [*argv, "--model", model], clock.left)
        if problem:
            not_run[name] = problem
            if name == "ours":
                failures.append(f"{name}: {problem}")
        elif config.check:
            print(f"{supervised:4.0%} supervised  {name} ran")
        else:
            lines.append(line)
            show(line)
        if not config.check:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(about | {"rows": lines, "not_run": not_run}, indent=1) + "\n")
    for name, problem in not_run.items():
        print(f"{name}: {problem}")
    for supervised in SUPERVISED[device]:
        show_ratios(supervised, [line for line in lines if line["supervised"] == supervised])
    return failures


def run_alone(
    name: str, supervised: float, argv: list[str], seconds: float
) -> tuple[dict | None, str | None]:
    """(the line of this contestant, why there is none)."""
    own = ["--contestant", name, "--supervised", str(supervised)]
    command = [sys.executable, "-m", "paper.step", *argv, *own]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, f"stopped when the time was up, after {seconds:.0f} s"
    if done.returncode:
        # a process that the system has killed prints nothing
        errors = done.stderr.strip().splitlines() or ["killed"]
        return None, errors[-1]
    return json.loads(done.stdout.splitlines()[-1]), None


def show(line: dict) -> None:
    who = f"{line['supervised']:4.0%} supervised  {line['contestant']:30}"
    speed = f"{line['tokens_per_s']:9.0f} tokens/s"
    memory = f"{line['peak_bytes'] / 2**20:9.0f} MiB"
    # None on a GPU whose peak we do not know
    mfu = f" MFU {line['mfu']:.0%}" if line.get("mfu") else ""
    print(f"{who} {speed} {memory}{mfu}", flush=True)


def show_ratios(supervised: float, lines: list[dict]) -> None:
    """Print our speed over each peer's, medians over the rounds."""
    rates = {}
    for line in lines:
        rates.setdefault(line["contestant"], []).append(line["tokens_per_s"])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = medians.pop("ours", None)
    if ours is None:
        return
    ratios = ", ".join(f"{name} {ours / theirs:.2f}" for name, theirs in medians.items())
    print(f"{supervised:.0%} supervised, ours over: {ratios}")


if __name__ == "__main__":
    run(main)
