"""Kernels that kernels/compile.py must fail, and two that it must not: run by test_triton.py.

python tests/compile_probe.py        a line for each: its name, and what failed
"""

import torch
import triton
import triton.language as tl

from kernels import compile as aot
from kernels import rotary_attention
from kernels.cases.rotary_attention import launch


@triton.jit
def loop_kernel(x, y, n, stride, B: tl.constexpr):
    """32-bit products reach the address round by round."""
    o = tl.arange(0, B)
    for i in range(n):
        o += i * stride
    tl.store(y + tl.arange(0, B), tl.load(x + o, mask=o < n, other=0.0))


@triton.jit
def branch_kernel(x, y, n, stride, B: tl.constexpr):
    """A 32-bit product reaches the address through a branch."""
    o = 0
    if n > 5:
        o = n * stride
    for i in range(n):
        tl.store(y + i, tl.load(x + o + tl.arange(0, B)).to(tl.float32).sum() + i)


@triton.jit
def fine_kernel(x, y, n, stride, B: tl.constexpr):
    """The product that reaches the address is of 64 bits; another only counts rounds."""
    o = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, B)
    for i in range(n * stride):
        o += i
    tl.store(y + tl.arange(0, B), tl.load(x + o, mask=o < n, other=0.0))


@triton.jit
def hint_kernel(x, y, stride, B: tl.constexpr):
    """A product of 64 bits with an alignment hint, an attribute of type i32 in the IR."""
    row = tl.multiple_of(tl.program_id(0).to(tl.int64) * stride, 16)
    o = row + tl.arange(0, B)
    tl.store(y + tl.arange(0, B), tl.load(x + o))


@triton.jit
def tf32_kernel(x, y, B: tl.constexpr):
    o = tl.arange(0, B)[:, None] * B + tl.arange(0, B)
    b = tl.load(x + o)
    tl.store(y + o, tl.dot(b, b, input_precision="tf32"))


x = torch.ones(32, 32)


def loop(dtype):
    loop_kernel[(1,)](x, x, 9, 33, 32)


def branch(dtype):
    branch_kernel[(1,)](x, x, 9, 33, 32)


def fine(dtype):
    fine_kernel[(1,)](x, x, 9, 33, 32)


def hint(dtype):
    hint_kernel[(1,)](x, x, 33, 32)


def tf32(dtype):
    tf32_kernel[(1,)](x, x, 32)


def spill(dtype):
    # too few warps for these tiles
    rotary_attention.LAUNCH["sm_90"] = ((128, 64, 4, 2),) * 3
    launch(dtype, 128, 1, 1)


def main():
    for probe in (loop, branch, fine, hint, tf32, spill):
        dtype = "bf16" if probe is spill else "fp32"
        lines = aot.report_of(("sm_90", probe.__name__, probe, dtype, {}))
        failed = [line.text for line in lines if line.failed]
        print(probe.__name__, "|".join(failed).replace("\n", " "))


if __name__ == "__main__":
    main()
