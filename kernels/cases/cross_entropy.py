"""Head and loss at the sizes that are timed and compiled, beside its peers."""

import torch
import torch.nn.functional as F

from kernels.cases import compiled, optional
from kernels.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_op,
    linear_cross_entropy_ref,
)

LESSON = 4  # its place in the reports

# bench.py: what its flags set, with their defaults; LLaMA-2 7B, 13B and 70B; --check.
SIZES = dict(T=16384, D=4096, V=32001, supervised=0.6)
SHAPES = [
    dict(D=4096, supervised=1.0),
    dict(D=4096, supervised=0.6),
    dict(D=5120, supervised=0.6),
    dict(D=8192, supervised=0.6),
]
SMALL = dict(T=96, D=64, V=101)

# compile.py: LLaMA-2 7B, 13B, 70B and 1.1B, the toy, and a T that 16 does not divide.
COMPILED = [dict(V=32000), dict(V=32001)]


def peers_of(make, device, T, D, V, supervised):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (T,), generator=g).to(device)
    # the peers take no others
    weights = torch.where(torch.rand(T, generator=g) < supervised, 1.0, 0.0).to(device)
    rows = weights.nonzero()[:, 0]
    ignored = torch.where(weights > 0, labels, -100)
    plain = lambda h, w: linear_cross_entropy_ref(h, w, labels, weights)[0]
    unfused = lambda h, w: F.cross_entropy(F.linear(h, w).float(), ignored, reduction="sum")
    peers = {
        "ours": lambda h, w: linear_cross_entropy(h, w, labels, weights, rows)[0],
        "torch": unfused,
        "torch.compile": compiled(unfused, device),
    }
    if torch_fused := getattr(F, "linear_cross_entropy", None):
        options = torch.nn.LinearCrossEntropyOptions()  # without it, the unfused reference runs
        peers["F.linear_cross_entropy"] = lambda h, w: torch_fused(
            h, w, ignored, reduction="sum", ignore_index=-100, options=options
        )
    if liger := optional(
        device, "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"
    ):
        peers["Liger"] = lambda h, w: liger(h, w, ignored, reduction="sum")
    if cce := optional(device, "cut_cross_entropy", "linear_cross_entropy"):
        peers["cut-cross-entropy"] = lambda h, w: cce(h, w, ignored, reduction="sum")
    # gradients are made with the loss: one time for both
    return (
        (make(T, D), make(V, D) * D**-0.5),
        peers,
        plain,
        dict(both=dict(flops=6 * len(rows) * D * V)),
    )


def launch(dtype, V, T=16):
    hidden, weight, rows = (
        torch.ones(T, 16, dtype=dtype),
        torch.ones(V, 16, dtype=dtype),
        torch.arange(T),
    )
    linear_cross_entropy_op(hidden, weight, rows, torch.ones(T), rows, True)
