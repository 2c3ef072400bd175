"""Triton's interpreter, made as strict as a GPU: import it before the kernels, in a process that has TRITON_INTERPRET=1.

The stock interpreter (3.6, 3.7) runs a kernel on CPU tensors, faithfully in fp32 and fp16. What it lets pass or gets wrong:
    bf16          fp32 -> bf16 truncates; tl.dot multiplies bit patterns; so does any arithmetic. Here: rounds to nearest
                  even; the dot is of values; other arithmetic, sums and scans on bf16 are refused (cast to fp32 first).
    addresses     loads and stores outside every tensor argument go through. Here: OutOfBounds.
    races         two programs may store to one address. Here: Race; also one program twice in one tl.store, and any atomic.
                  (A program that loads what another stores is not seen.)
    int32         products wrap silently. Here: an overflow raises.
    order         programs run in order. Here: in the order that `shuffle` seeds, when it is set.
`only`, when set, is the list of grid positions to run: a tensor above 2^31 elements is tested at its far end, in a sparse
memory map (`far`).
"""

import dataclasses
import inspect
import itertools
import mmap
import os

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1"
Builder = interpreter.InterpreterBuilder

shuffle = None  # a seed: programs run in a random order
only = None  # a list of (x, y, z): the other programs are left out
# of this launch: (first, end) of each tensor argument; (program, addresses) of each store
_spans, _written = [], []


class OutOfBounds(IndexError):
    pass


class Race(RuntimeError):
    pass


def far(shape, dtype):
    """An empty tensor of any size: pages that nobody writes take no memory."""
    count = int(np.prod(shape, dtype=np.int64))
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)


# ---- bf16


def _value(bits):
    return (
        (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16)
        .view(np.float32)
        .reshape(bits.shape)
    )


def _bits(value):
    u = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    rounded = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded.reshape(value.shape))


def _is_bf16(x):
    pointer = isinstance(getattr(x, "dtype", None), tl.pointer_type)
    return (
        isinstance(x, interpreter.TensorHandle)
        and not pointer
        and x.get_element_ty() == tl.bfloat16
    )


_cast_impl, _create_dot = Builder.cast_impl, Builder.create_dot


def cast_impl(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target == tl.float32:
        return interpreter.TensorHandle(_value(src.data), target)
    if source == tl.float32 and target == tl.bfloat16:
        return interpreter.TensorHandle(_bits(src.data), target)
    if tl.bfloat16 in (source, target) and source != target:
        raise TypeError(
            f"a cast from {source} to {target} is wrong in the interpreter; go by way of fp32"
        )
    return _cast_impl(self, src, dst_type)


def create_dot(self, a, b, d, *rest):
    if _is_bf16(d):
        raise TypeError("tl.dot accumulates in bf16")
    a, b = (
        interpreter.TensorHandle(_value(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b)
    )
    return _create_dot(self, a, b, d, *rest)


def _refuse_bf16(name):
    f = getattr(Builder, name)

    def refusing(self, *args):
        if any(_is_bf16(x) for x in args):
            raise TypeError("arithmetic on bf16: cast to fp32 first")
        return f(self, *args)

    setattr(Builder, name, refusing)


Builder.cast_impl, Builder.create_dot = cast_impl, create_dot
for cast in (
    "create_si_to_fp",
    "create_ui_to_fp",
    "create_fp_to_si",
    "create_fp_to_ui",
    "create_fp_ext",
    "create_fp_trunc",
    "create_fp_to_fp",
):
    setattr(Builder, cast, lambda self, src, dst_type, *_: self.cast_impl(src, dst_type))
for operator in ("binary_op", "unary_op", "ternary_op", "create_fma"):
    _refuse_bf16(operator)
_apply = interpreter.ReduceScanOpInterface.apply


def apply(self, input):  # noqa: A002
    if any(_is_bf16(x.handle) for x in (input if isinstance(input, tuple) else (input,))):
        raise TypeError("a reduction or scan of bf16: cast to fp32 first")
    return _apply(self, input)


interpreter.ReduceScanOpInterface.apply = apply

# ---- addresses and races

_convert_argument = interpreter._implicit_cvt
_load, _store = Builder.create_masked_load, Builder.create_masked_store


def convert_argument(arg):
    if hasattr(arg, "data_ptr") and arg.numel():
        last = sum((n - 1) * stride for n, stride in zip(arg.shape, arg.stride()))
        _spans.append((arg.data_ptr(), arg.data_ptr() + (last + 1) * arg.element_size()))
    return _convert_argument(arg)


def _addresses(builder, pointers, mask, what):
    at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))[
        np.broadcast_to(mask.data, pointers.data.shape)
    ]
    size = pointers.get_element_ty().primitive_bitwidth // 8
    inside = np.zeros(at.shape, bool)
    for first, end in _spans:
        inside |= (at >= first) & (at + size <= end)
    if not inside.all():
        raise OutOfBounds(
            f"program {builder.grid_idx}: {what} of {(~inside).sum()} elements outside every tensor argument"
        )
    return at


def create_masked_load(self, pointers, mask, *rest):
    _addresses(self, pointers, mask, "load")
    return _load(self, pointers, mask, *rest)


def create_masked_store(self, pointers, value, mask, *rest):
    at = _addresses(self, pointers, mask, "store")
    if at.size != np.unique(at).size:
        raise Race(f"program {self.grid_idx} stores twice to one address in one tl.store")
    _written.append((self.grid_idx, at))
    return _store(self, pointers, value, mask, *rest)


Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
# we have none: their order is not fixed, so their bits are not
for atomic in ("create_atomic_rmw", "create_atomic_cas"):
    setattr(Builder, atomic, lambda self, *args: (_ for _ in ()).throw(Race("an atomic")))

# ---- launches


def _check_races():
    if not _written:
        return
    at = np.concatenate([addresses for _, addresses in _written])
    program = np.repeat(
        [x + (y << 31) + (z << 47) for (x, y, z), _ in _written],
        [len(addresses) for _, addresses in _written],
    )
    order = np.lexsort((program, at))
    at, program = at[order], program[order]
    if ((at[1:] == at[:-1]) & (program[1:] != program[:-1])).any():
        raise Race("two programs store to one address")


def launch(self, *args, **kwargs):
    """GridExecutor.__call__, for CPU tensors only: the programs of the grid, one after the other."""
    _spans.clear()
    _written.clear()
    names = inspect.getfullargspec(self.fn).args  # num_warps and the like are not among them
    # `tl` of the kernels, `core` of Triton's own library
    scopes = [interpreter._patch_lang(f) for f in (self.fn, tl.zeros.fn)]
    # 3.6's fails on numpy 2.4
    scopes[-1].set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    try:
        args = inspect.getcallargs(
            self.fn, *args, **{k: v for k, v in kwargs.items() if k in names}
        )
        args = {
            name: arg if name in self.constexprs else convert_argument(arg)
            for name, arg in args.items()
        }
        grid = tuple(self.grid) + (1,) * (3 - len(self.grid))
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*grid)
        programs = list(itertools.product(*(range(n) for n in grid))) if only is None else only
        if shuffle is not None:
            programs = [
                programs[i] for i in np.random.default_rng(shuffle).permutation(len(programs))
            ]
        for program in programs:
            builder.grid_idx = program
            self.fn(**args)
    finally:
        for scope in reversed(scopes):
            scope.restore()
    _check_races()


interpreter.GridExecutor.__call__ = launch
# A device function called by a kernel finds the language patched already; its errors arrive as they
# are.
interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(
    *args, **kwargs
)
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, debug=True
)
