"""RMSNorm at the sizes that are timed and compiled, beside its peers."""

import torch
import torch.nn.functional as F

from kernels.cases import compiled, optional
from kernels.rms_norm import rms_norm, rms_norm_bwd_op, rms_norm_op, rms_norm_ref

LESSON = 1  # its place in the reports

# bench.py: what its flags set, with their defaults; LLaMA-2 7B, 13B and 70B; --check.
SIZES = dict(T=16384, D=4096)
SHAPES = [dict(D=4096), dict(D=5120), dict(D=8192)]
SMALL = dict(T=96, D=64)

# compile.py: LLaMA-2 7B, 13B, 70B and 1.1B, the toy, and a T that 16 does not divide.
COMPILED = [dict(D=4096), dict(D=5120), dict(D=8192), dict(D=96), dict(D=4096, T=17)]


def peers_of(make, device, T, D):
    inputs = make(T, D), make(T, D), make(D)
    peers = {
        "ours": lambda x, r, w: rms_norm(x, w, 1e-5, r),
        "torch": lambda x, r, w: rms_norm_ref(x, w, 1e-5, r),
        "F.rms_norm": lambda x, r, w: (F.rms_norm(h := x + r, (D,), w, 1e-5), h),
        "torch.compile": compiled(lambda x, r, w: rms_norm_ref(x, w, 1e-5, r), device),
    }
    if liger := optional(
        device, "liger_kernel.transformers.functional", "liger_fused_add_rms_norm"
    ):
        peers["Liger"] = lambda x, r, w: liger(x, r, w, 1e-5, in_place=False)
    return (
        inputs,
        peers,
        lambda x, r, w: rms_norm_ref(x, w, 1e-5, r),
        dict(forward=dict(bytes=8 * T * D), backward=dict(bytes=8 * T * D)),
    )


def launch(dtype, D, T=16):
    x, w = torch.ones(T, D, dtype=dtype), torch.ones(D, dtype=dtype)
    for residual in (None, x):
        _, h, r = rms_norm_op(x, residual, w, 1e-5)
        rms_norm_bwd_op(x, w, r, x, residual)
