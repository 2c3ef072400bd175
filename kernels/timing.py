"""How a kernel is timed and compared: used by bench.py and tune.py.

Times are of CUDA events, after three calls to warm up, the functions in turn. Before each timed
call 256 MiB are read, so that the L2 holds nothing of the inputs. (Writing them instead would leave
dirty lines behind, which the timed kernel then writes back: a copy of 512 MiB came out 2% slower
so.) On a CPU nothing is timed: each function is called once.
"""

import datetime
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels import triton

FLUSH_BYTES = 2**28  # more than any L2
WARM_UP = 3


@dataclass(frozen=True)
class Times:
    """Seconds of one function."""

    median: float
    least: float
    # nine calls in ten took no longer
    most_of_ten: float


class Clock:
    """The time that a script has: nothing is begun that would most likely not end in it."""

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.began = time.monotonic()
        self.last = self.began
        self.longest = 0.0

    @property
    def left(self) -> float:
        """Seconds."""
        return self.began + self.seconds - time.monotonic()

    def has_time(self) -> bool:
        """Asked before each piece of work: is there time for one as long as the longest so far?"""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.last)
        self.last = now
        return self.left >= self.longest


def seconds_of(functions: dict[str, Callable], runs: int, device: str) -> dict[str, Times]:
    """Each function `runs` times, in turn."""
    if device == "cpu":
        for function in functions.values():
            function()
        return dict.fromkeys(functions, Times(1.0, 1.0, 1.0))

    flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    for function in functions.values():
        for _ in range(WARM_UP):
            function()
    events = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            flush.sum()
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: times_of(pairs) for name, pairs in events.items()}


def times_of(pairs: list) -> Times:
    milliseconds = sorted(start.elapsed_time(end) for start, end in pairs)
    nine_in_ten = milliseconds[int(0.9 * (len(milliseconds) - 1))]
    return Times(statistics.median(milliseconds) / 1e3, milliseconds[0] / 1e3, nine_in_ten / 1e3)


def copy_rate(moved: float, runs: int, device: str) -> float:
    """Bytes a second of a copy that moves as many bytes in all, read and written."""
    count = max(1, int(moved) // 8) if device == "cuda" else 2**10
    a = torch.randn(count, device=device)
    b = torch.empty_like(a)
    times = seconds_of({"copy": lambda: b.copy_(a)}, runs, device)
    return 2 * a.nbytes / times["copy"].median


def matmul_rate(runs: int, device: str) -> float:
    """FLOP/s of an 8192^3 product in bf16."""
    width = 8192 if device == "cuda" else 64
    a = torch.randn(width, width, device=device).bfloat16()
    b = torch.randn(width, width, device=device).bfloat16()
    times = seconds_of({"matmul": lambda: a @ b}, runs, device)
    return 2 * width**3 / times["matmul"].median


def fresh(inputs: tuple) -> list[torch.Tensor]:
    """Copies that require gradients: some peers write into their inputs in the backward pass."""
    return [x.detach().clone().requires_grad_() for x in inputs]


def outputs_of(function: Callable, inputs: tuple) -> tuple:
    outputs = function(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def once(function: Callable, inputs: tuple, upstream: list, device: str):
    """(outputs then gradients, peak bytes beyond the inputs and the upstream gradients; None on a
    CPU)."""
    inputs = fresh(inputs)
    before = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    outputs = outputs_of(function, inputs)
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    return [*(x.detach() for x in outputs), *gradients], peak


def timed(direction: str, function: Callable, inputs: tuple, upstream: list) -> Callable:
    """A function to time: the forward pass under autograd, the backward pass of a kept graph, or
    both."""
    leaves = fresh(inputs)
    if direction == "forward":
        return lambda: function(*leaves)
    if direction == "both":
        return lambda: torch.autograd.grad(outputs_of(function, leaves), leaves, upstream)
    outputs = outputs_of(function, leaves)
    return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def errors_of(found: list, reference: list) -> list[float]:
    """The relative error by norm of each output and gradient; inf where anything is not finite."""
    errors = []
    for a, b in zip(found, reference):
        error = ((a.float() - b.float()).norm() / b.float().norm()).item()
        errors.append(error if math.isfinite(error) else math.inf)
    return errors


def machine(command: str) -> dict:
    """Where and how results were made: the first fields of every results file."""
    facts = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "driver": None,
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "date": datetime.date.today().isoformat(),
        "command": " ".join([command, *sys.argv[1:]]),
    }
    if torch.cuda.is_available():
        facts |= nvidia_smi()
    return facts


def nvidia_smi() -> dict:
    """Driver, clocks and power as they are now: just after a kernel, those of a busy GPU. Nothing
    where the tool is missing."""
    fields = {
        "driver": "driver_version",
        "sm_clock": "clocks.sm",
        "memory_clock": "clocks.mem",
        "power": "power.draw",
        "power_limit": "power.limit",
    }
    query = ",".join(fields.values())
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(fields, values))
