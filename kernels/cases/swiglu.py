"""SwiGLU at the sizes that are timed and compiled, beside its peers."""

import torch

from kernels.cases import compiled, optional
from kernels.swiglu import swiglu, swiglu_bwd_op, swiglu_op, swiglu_ref

LESSON = 2  # its place in the reports

# bench.py: what its flags set, with their defaults; LLaMA-2 7B, 13B and 70B; --check.
SIZES = dict(T=16384, F=11008)
SHAPES = [dict(F=11008), dict(F=13824), dict(F=28672)]
SMALL = dict(T=96, F=80)

# compile.py: LLaMA-2 7B, 13B, 70B and 1.1B, the toy, and a T that 16 does not divide.
COMPILED = [dict(F=11008), dict(F=11008 + 1, T=17)]


def peers_of(make, device, T, F):
    peers = {"ours": swiglu, "torch": swiglu_ref, "torch.compile": compiled(swiglu_ref, device)}
    if liger := optional(device, "liger_kernel.transformers.functional", "liger_swiglu"):
        peers["Liger"] = liger
    return (
        (make(T, F), make(T, F)),
        peers,
        swiglu_ref,
        dict(forward=dict(bytes=6 * T * F), backward=dict(bytes=10 * T * F)),
    )


def launch(dtype, F, T=16):
    x = torch.ones(T, F, dtype=dtype)
    swiglu_op(x, x)
    swiglu_bwd_op(x, x, x)
