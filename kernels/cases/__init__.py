"""What each kernel is timed and compiled with: a file per kernel, found by walking this folder.

A file has LESSON, SIZES, SHAPES, SMALL, COMPILED; `peers_of(make, device, **sizes)` gives (inputs, {name: function of the
inputs}, the definition, costs); `launch(dtype, **sizes)` runs the operators once on small CPU tensors.
"""

import importlib
import pkgutil

import torch

absent = {}  # peer -> why


def cases():
    """{kernel: its module here}, in the order of the reports."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    found = {name: importlib.import_module(f"kernels.cases.{name}") for name in names}
    return dict(sorted(found.items(), key=lambda item: item[1].LESSON))


def compiled(f, device):
    return torch.compile(f, dynamic=False, backend="inductor" if device == "cuda" else "eager")


def optional(device, module, name):
    """A peer that runs on GPUs only, and may not be installed: then that is said, once."""
    try:
        return getattr(importlib.import_module(module), name) if device == "cuda" else None
    except (ImportError, AttributeError, RuntimeError) as error:
        absent[f"{module}.{name}"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return None
