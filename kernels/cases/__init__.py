"""What each kernel is timed, tuned and compiled with: a file each, found by walking this folder.

A file has

    LESSON      its place in the reports
    SIZES       bench.py's flags for it, with their defaults
    SHAPES      the sizes that are timed, the most telling first
    SMALL       the sizes of a trial run on a CPU
    COMPILED    the shapes that compile.py compiles
    KNOBS       what tune.py turns
    case_of(make, device, **sizes)      a Case
    launch(dtype, **sizes)              runs the operators once on small CPU tensors
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch


@dataclass(frozen=True)
class Cost:
    """What a pass must do at least: bytes to move, or floating-point operations."""

    unit: str
    amount: float


@dataclass
class Case:
    inputs: tuple[torch.Tensor, ...]
    # name -> function of the inputs; "ours" and "torch", plain PyTorch, are always there
    peers: dict[str, Callable]
    # what all are compared with, called in fp32
    definition: Callable
    # direction -> Cost; "both" where gradients are made with the outputs
    costs: dict[str, Cost]
    # direction -> {name: function of the inputs}: a part of our own time
    parts: dict[str, dict[str, Callable]] = field(default_factory=dict)
    # peers that compute something else, and are timed only
    not_compared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Knob:
    """A setting that a GPU is to decide."""

    name: str
    # which time it is judged by: forward, backward or both
    direction: str
    # what is tried beside today's value
    values: tuple
    # (architecture) -> where it stands in the kernel's module, as `PROGRAMS["sm_90"]`
    place: Callable[[str], str]
    # (architecture) -> today's value
    read: Callable
    # (architecture, value): set it
    turn: Callable


def constants(name: str, direction: str, values: tuple, module: ModuleType, *names: str) -> Knob:
    """The knob of constants of a kernel's module: of several, a value is a tuple."""

    def read(_arch):
        found = tuple(getattr(module, constant) for constant in names)
        return found if len(names) > 1 else found[0]

    def turn(_arch, value):
        parts = value if len(names) > 1 else (value,)
        for constant, part in zip(names, parts, strict=True):
            setattr(module, constant, part)

    return Knob(name, direction, values, lambda _arch: ", ".join(names), read, turn)


# Peers that are not here, or break: name -> why. Printed, and written into the results.
absent: dict[str, str] = {}


def cases() -> dict[str, ModuleType]:
    """{kernel: its module here}, in the order of the reports."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    found = {name: importlib.import_module(f"kernels.cases.{name}") for name in names}
    return dict(sorted(found.items(), key=lambda item: item[1].LESSON))


def compiled(f: Callable, device: str) -> Callable:
    """The peer torch.compile, with its own kernels on a GPU."""
    backend = "inductor" if device == "cuda" else "eager"
    return torch.compile(f, dynamic=False, backend=backend)


def optional(device: str, module: str, name: str) -> Callable | None:
    """A peer that runs on GPUs only, and may not be installed: then that is noted."""
    if device != "cuda":
        return None
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        absent[f"{module}.{name}"] = why(error)
        return None


def why(error: BaseException) -> str:
    lines = str(error).splitlines() or ["-"]
    return f"{type(error).__name__}: {lines[0]}"
