"""Four kernels, one lesson each: rms_norm, rotary_attention, cross_entropy, swiglu.

Every file has a PyTorch reference, Triton kernels forward and backward, and one public function
that picks between them. `python -m kernels.compile` compiles them for four GPU generations without
a GPU, `python -m kernels.bench` times them on one.
"""

import contextlib
import functools
import warnings
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:
    # macOS, Windows: the kernel files can still be read, and their references run
    def _as_it_is(function=None, **_options):
        """triton.jit, with or without options, where there is no Triton."""
        return function or _as_it_is

    triton = SimpleNamespace(jit=_as_it_is)
    tl = SimpleNamespace(constexpr=None)
    HAVE_TRITON = False


@functools.cache
def warn_once(text):
    warnings.warn(text, stacklevel=2)


def on_gpu(x):
    """Whether x goes to the Triton kernel. The tests, which interpret the kernels on the CPU, put
    their own answer here."""
    if x.is_cuda and not HAVE_TRITON:
        warn_once("a GPU, but no Triton: the PyTorch references run instead of the kernels")
    return x.is_cuda and HAVE_TRITON


def arch(x):
    """The row of a launch table for the GPU that holds x; "interpreter" on a CPU."""
    if not x.is_cuda:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(x.device)[0]
    # consumer GPUs (8.6, 8.9, 12.0) have the least shared memory: as sm_80
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def on_device_of(x):
    """Launch on the GPU that holds x: Triton by itself takes the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def attention_without_cudnn():
    """For `with`: scaled_dot_product_attention takes any form but cuDNN's.

    On Blackwell, and by version on Hopper, cuDNN's is PyTorch's first choice. It plans anew for
    every new length: on a B200 that took half a second
    (https://github.com/modelscope/FunASR/issues/3704; we have not measured it). Our lengths are
    always new: by one token in decoding, by conversation in the reference.
    """
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def check(name, true, what):
    """ValueError "name: what" unless true."""
    if not true:
        raise ValueError(f"{name}: {what}")
