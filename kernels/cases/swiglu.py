"""SwiGLU at the sizes that are timed, tuned and compiled, beside its peers."""

import torch

from kernels import swiglu as module
from kernels.cases import Case, Cost, compiled, constants, optional
from kernels.swiglu import swiglu, swiglu_bwd_op, swiglu_op, swiglu_ref

LESSON = 2
# F, the flag, is the ffn width
SIZES = {"T": 16384, "F": 11008}
# LLaMA-2 7B, 13B, 70B
SHAPES = [{"F": 11008}, {"F": 13824}, {"F": 28672}]
SMALL = {"T": 96, "F": 80}
# 7B, and a size that 16 does not divide
COMPILED = [{"F": 11008}, {"F": 11009, "T": 17}]


BLOCKS = ((1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8))
KNOBS = [constants("block, warps", "both", BLOCKS, module, "BLOCK", "WARPS")]


def case_of(make, device, T, F):
    peers = {"ours": swiglu, "torch": swiglu_ref, "torch.compile": compiled(swiglu_ref, device)}
    liger = optional(device, "liger_kernel.transformers.functional", "liger_swiglu")
    if liger:
        peers["Liger"] = liger
    # 3 and 5 tensors of 2 bytes an element
    costs = {"forward": Cost("bytes", 6 * T * F), "backward": Cost("bytes", 10 * T * F)}
    return Case((make(T, F), make(T, F)), peers, swiglu_ref, costs)


def launch(dtype, F, T=16):
    x = torch.ones(T, F, dtype=dtype)
    swiglu_op(x, x)
    swiglu_bwd_op(x, x, x)
