"""RMSNorm at the sizes that are timed, tuned and compiled, beside its peers."""

import torch
import torch.nn.functional as F

from kernels import rms_norm as module
from kernels.cases import Case, Cost, Knob, compiled, constants, optional
from kernels.rms_norm import rms_norm, rms_norm_bwd_op, rms_norm_op, rms_norm_ref

LESSON = 1
SIZES = {"T": 16384, "D": 4096}
# LLaMA-2 7B, 13B, 70B
SHAPES = [{"D": 4096}, {"D": 5120}, {"D": 8192}]
SMALL = {"T": 96, "D": 64}
# the same, the toy, and a T that 16 does not divide
COMPILED = [{"D": 4096}, {"D": 5120}, {"D": 8192}, {"D": 96}, {"D": 4096, "T": 17}]


KNOBS = [
    Knob(
        "backward programs",
        "backward",
        values=(132, 198, 264, 396, 528),
        place=lambda arch: f'PROGRAMS["{arch}"]',
        read=lambda arch: module.PROGRAMS[arch],
        turn=module.PROGRAMS.__setitem__,
    ),
    constants("most warps", "backward", (4, 8, 16), module, "MOST_WARPS"),
]


def case_of(make, device, T, D):
    """With the residual: what a block of the model calls."""

    def ours(x, residual, w):
        return rms_norm(x, w, 1e-5, residual)

    def plain(x, residual, w):
        return rms_norm_ref(x, w, 1e-5, residual)

    def built_in(x, residual, w):
        h = x + residual
        return F.rms_norm(h, (D,), w, 1e-5), h

    peers = {"ours": ours, "torch": plain, "F.rms_norm": built_in}
    peers["torch.compile"] = compiled(plain, device)
    liger = optional(device, "liger_kernel.transformers.functional", "liger_fused_add_rms_norm")
    if liger:
        peers["Liger"] = lambda x, residual, w: liger(x, residual, w, 1e-5, in_place=False)
    quack = optional(device, "quack.rmsnorm", "rmsnorm")
    if quack:
        peers["QuACK"] = lambda x, residual, w: quack(x, w, residual=residual, eps=1e-5)

    # read x and residual, write y and h; read h, dy and dh, write dx; 2 bytes each
    traffic = Cost("bytes", 8 * T * D)
    inputs = (make(T, D), make(T, D), make(D))
    return Case(inputs, peers, plain, {"forward": traffic, "backward": traffic})


def launch(dtype, D, T=16):
    x = torch.ones(T, D, dtype=dtype)
    w = torch.ones(D, dtype=dtype)
    for residual in (None, x):
        _, h, r = rms_norm_op(x, residual, w, 1e-5)
        rms_norm_bwd_op(x, w, r, x, residual)
