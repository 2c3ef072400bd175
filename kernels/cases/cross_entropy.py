"""Head and loss at the sizes that are timed, tuned and compiled, beside their peers."""

import torch
import torch.nn.functional as F

from kernels import cross_entropy as module
from kernels.cases import Case, Cost, Knob, compiled, constants, optional
from kernels.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_op,
    linear_cross_entropy_ref,
)

LESSON = 4
SIZES = {"T": 16384, "D": 4096, "V": 32001, "supervised": 0.6}
# LLaMA-2 7B with all rows and with 60%, 13B, 70B
SHAPES = [
    {"D": 4096, "supervised": 1.0},
    {"D": 4096, "supervised": 0.6},
    {"D": 5120, "supervised": 0.6},
    {"D": 8192, "supervised": 0.6},
]
SMALL = {"T": 96, "D": 64, "V": 101}
COMPILED = [{"V": 32000}, {"V": 32001}]


def turn_chunk(_arch, value):
    module.CHUNK_BYTES["cuda"] = value


BLOCKS = ((2048, 4), (4096, 8), (8192, 8), (8192, 16))
KNOBS = [
    Knob(
        "bytes of a chunk",
        "both",
        values=(2**27, 2**28, 2**29, 2**30),
        place=lambda arch: 'CHUNK_BYTES["cuda"]',
        read=lambda arch: module.CHUNK_BYTES["cuda"],
        turn=turn_chunk,
    ),
    constants("block, warps", "both", BLOCKS, module, "BLOCK", "WARPS"),
]


def case_of(make, device, T, D, V, supervised):
    """Weights are 1 or 0, since most peers take no others; those that do are named weighted."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (T,), generator=g).to(device)
    weights = torch.where(torch.rand(T, generator=g) < supervised, 1.0, 0.0).to(device)
    rows = weights.nonzero()[:, 0]
    ignored = torch.where(weights > 0, labels, -100)

    def ours(hidden, matrix):
        return linear_cross_entropy(hidden, matrix, labels, weights, rows)[0]

    def definition(hidden, matrix):
        return linear_cross_entropy_ref(hidden, matrix, labels, weights)[0]

    def unfused(hidden, matrix):
        logits = F.linear(hidden, matrix).float()
        return F.cross_entropy(logits, ignored, reduction="sum")

    def unfused_weighted(hidden, matrix):
        logits = F.linear(hidden, matrix).float()
        return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()

    peers = {"ours": ours, "torch": unfused, "torch.compile": compiled(unfused, device)}
    peers["torch, weighted"] = unfused_weighted
    peers["torch.compile, weighted"] = compiled(unfused_weighted, device)
    peers |= built_in(labels, ignored, weights) | packages(device, ignored)
    # gradients are made with the loss: one time for both
    cost = Cost("flops", 6 * len(rows) * D * V)
    return Case((make(T, D), make(V, D) * D**-0.5), peers, definition, {"both": cost})


def built_in(labels, ignored, weights):
    """PyTorch 2.13's own fused form, without and with weights."""
    fused = getattr(F, "linear_cross_entropy", None)
    if fused is None:
        return {}
    # without options, the unfused reference runs
    options = torch.nn.LinearCrossEntropyOptions()

    def plain(hidden, matrix):
        return fused(hidden, matrix, ignored, reduction="sum", ignore_index=-100, options=options)

    def weighted(hidden, matrix):
        return (fused(hidden, matrix, labels, reduction="none", options=options) * weights).sum()

    return {"F.linear_cross_entropy": plain, "F.linear_cross_entropy, weighted": weighted}


def packages(device, ignored):
    peers = {}
    liger = optional(
        device, "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"
    )
    if liger:
        peers["Liger"] = lambda hidden, matrix: liger(hidden, matrix, ignored, reduction="sum")
    # Liger's form for Hopper, in CuTe
    cute = optional(
        device,
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90",
        "LigerFusedLinearCrossEntropySM90Function",
    )
    if cute:
        peers["Liger, CuTe"] = lambda hidden, matrix: cute.apply(
            hidden, matrix, ignored, -100, "sum"
        )
    quack = optional(device, "quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    if quack:
        peers["QuACK"] = lambda hidden, matrix: quack(
            hidden, matrix, ignored, ignore_index=-100, reduction="sum"
        )
    cut = optional(device, "cut_cross_entropy", "linear_cross_entropy")
    if cut:
        peers["cut-cross-entropy"] = lambda hidden, matrix: cut(
            hidden, matrix, ignored, reduction="sum"
        )
    return peers


def launch(dtype, V, T=16):
    hidden = torch.ones(T, 16, dtype=dtype)
    matrix = torch.ones(V, 16, dtype=dtype)
    rows = torch.arange(T)
    linear_cross_entropy_op(hidden, matrix, rows, torch.ones(T), rows, True)
