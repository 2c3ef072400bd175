"""Triton's interpreter, made as strict as a GPU.

Import it before the kernels, in a process that has TRITON_INTERPRET=1. The stock interpreter (3.6,
3.7) runs a kernel on CPU tensors, faithfully in fp32 and fp16. What it lets pass or gets wrong:

    bf16          fp32 -> bf16 truncates; tl.dot multiplies bit patterns; so does any arithmetic.
                  Here: rounds to nearest even; the dot is of values; other arithmetic, sums and
                  scans on bf16 are refused (cast to fp32 first).
    addresses     loads and stores outside every tensor argument go through. Here: OutOfBounds.
    races         two programs may store to one address. Here: Race; also one program twice in one
                  tl.store, and any atomic. (A program that loads what another stores is not seen.)
    barriers      a program may load what it has stored. On a GPU another thread may have stored
                  it, and not yet: here Race, unless a tl.debug_barrier stands between. Reductions
                  do not count, though they often wait. Loading first and storing then is fine.
    hints         tl.multiple_of, max_contiguous and max_constancy are believed. Here: FalseHint
                  where the values say otherwise.
    int32         products wrap silently. Here: an overflow raises.
    grid          any size runs. Here: as many programs in x, y and z as a GPU takes.
    order         programs run in order. Here: in the order that `shuffle` seeds, when it is set.

`only`, when set, is the list of grid positions to run: a tensor above 2^31 elements is tested at
its far end, in a sparse memory map (`far`).
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
TensorHandle = interpreter.TensorHandle

# a seed: programs run in a random order
shuffle = None
# a list of (x, y, z): the other programs are left out
only = None

# of this launch: (first, end) of each tensor argument
_spans = []
# of this launch: (program, addresses) of each store
_written = []
# of this program since its last barrier: (addresses in order, bytes of an element) of each store
_unsettled = []

# programs in x, y and z (CUDA; AMD's are no smaller)
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)


class OutOfBounds(IndexError):
    pass


class Race(RuntimeError):
    pass


class FalseHint(ValueError):
    pass


def far(shape, dtype):
    """An empty tensor of any size: pages that nobody writes take no memory."""
    count = int(np.prod(shape, dtype=np.int64))
    memory = mmap.mmap(-1, count * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


# ---- bf16, which numpy does not have: the interpreter holds its bits as uint16


def _value(bits):
    bits16 = np.ascontiguousarray(bits).view(np.uint16)
    # a bf16 is the upper half of an fp32
    bits32 = bits16.astype(np.uint32) << 16
    return bits32.view(np.float32).reshape(bits.shape)


def _bits(value):
    bits32 = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    # half of the last place, and a little less where the last bit is even: ties go to even
    half = 0x7FFF + ((bits32 >> 16) & 1)
    rounded = ((bits32 + half) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded.reshape(value.shape))


def _is_bf16(x):
    if not isinstance(x, TensorHandle) or isinstance(x.dtype, tl.pointer_type):
        return False
    return x.get_element_ty() == tl.bfloat16


_cast_impl = Builder.cast_impl
_create_dot = Builder.create_dot
_apply = interpreter.ReduceScanOpInterface.apply


def cast_impl(self, src, dst_type):
    source = src.dtype.scalar
    target = dst_type.scalar
    if source == tl.bfloat16 and target == tl.float32:
        return TensorHandle(_value(src.data), target)
    if source == tl.float32 and target == tl.bfloat16:
        return TensorHandle(_bits(src.data), target)
    if tl.bfloat16 in (source, target) and source != target:
        raise TypeError(
            f"a cast from {source} to {target} is wrong in the interpreter; go by way of fp32"
        )
    return _cast_impl(self, src, dst_type)


def cast(self, src, dst_type, *_):
    return self.cast_impl(src, dst_type)


def in_fp32(x):
    return TensorHandle(_value(x.data), tl.float32) if _is_bf16(x) else x


def create_dot(self, a, b, d, *rest):
    if _is_bf16(d):
        raise TypeError("tl.dot accumulates in bf16")
    return _create_dot(self, in_fp32(a), in_fp32(b), d, *rest)


def refusing_bf16(f):
    def refusing(self, *args):
        if any(_is_bf16(x) for x in args):
            raise TypeError("arithmetic on bf16: cast to fp32 first")
        return f(self, *args)

    return refusing


def apply(self, tensors):
    inputs = tensors if isinstance(tensors, tuple) else (tensors,)
    if any(_is_bf16(x.handle) for x in inputs):
        raise TypeError("a reduction or scan of bf16: cast to fp32 first")
    return _apply(self, tensors)


CASTS = (
    "create_si_to_fp",
    "create_ui_to_fp",
    "create_fp_to_si",
    "create_fp_to_ui",
    "create_fp_ext",
    "create_fp_trunc",
    "create_fp_to_fp",
)
Builder.cast_impl = cast_impl
Builder.create_dot = create_dot
for name in CASTS:
    setattr(Builder, name, cast)
for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
    setattr(Builder, name, refusing_bf16(getattr(Builder, name)))
interpreter.ReduceScanOpInterface.apply = apply

# ---- addresses and races

_convert_argument = interpreter._implicit_cvt
_load = Builder.create_masked_load
_store = Builder.create_masked_store
_barrier = Builder.create_barrier


def convert_argument(arg):
    if hasattr(arg, "data_ptr") and arg.numel():
        last = sum((n - 1) * stride for n, stride in zip(arg.shape, arg.stride()))
        first = arg.data_ptr()
        _spans.append((first, first + (last + 1) * arg.element_size()))
    return _convert_argument(arg)


def element_bytes(pointers):
    return pointers.get_element_ty().primitive_bitwidth // 8


def _addresses(builder, pointers, mask, what):
    """The addresses that this load or store touches: those in the mask. They lie in an argument."""
    shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
    at = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape)]
    size = element_bytes(pointers)
    inside = np.zeros(at.shape, bool)
    for first, end in _spans:
        inside |= (at >= first) & (at + size <= end)
    if not inside.all():
        raise OutOfBounds(
            f"program {builder.grid_idx}: {what} of {(~inside).sum()} elements "
            "outside every tensor argument"
        )
    return at


def create_masked_load(self, pointers, mask, *rest):
    at = _addresses(self, pointers, mask, "load")
    size = element_bytes(pointers)
    for stored, stored_size in _unsettled:
        # the stored elements that begin before this one ends, and after one that would end before
        begin = np.searchsorted(stored, at - stored_size, side="right")
        end = np.searchsorted(stored, at + size, side="left")
        if (end > begin).any():
            raise Race(f"program {self.grid_idx} loads what it has stored, without a barrier")
    return _load(self, pointers, mask, *rest)


def create_masked_store(self, pointers, value, mask, *rest):
    at = _addresses(self, pointers, mask, "store")
    in_order = np.unique(at)
    if at.size != in_order.size:
        raise Race(f"program {self.grid_idx} stores twice to one address in one tl.store")
    _written.append((self.grid_idx, at))
    _unsettled.append((in_order, element_bytes(pointers)))
    return _store(self, pointers, value, mask, *rest)


def create_barrier(self):
    _unsettled.clear()
    return _barrier(self)


def refuse_atomic(self, *_):
    raise Race("an atomic")


Builder.create_masked_load = create_masked_load
Builder.create_masked_store = create_masked_store
Builder.create_barrier = create_barrier
# we have none: their order is not fixed, so their bits are not
Builder.create_atomic_rmw = refuse_atomic
Builder.create_atomic_cas = refuse_atomic

# ---- alignment hints


def set_attr(self, hint, values):
    """TensorHandle.set_attr: a value for each axis of the tensor, one for a scalar."""
    right = {
        "tt.divisibility": is_multiple,
        "tt.contiguity": is_contiguous,
        "tt.constancy": is_constant,
    }
    # of an address, bytes are meant; neighbours are an element apart
    step = element_bytes(self) if isinstance(self.dtype, tl.pointer_type) else 1
    numbers = np.atleast_1d(self.data).astype(np.int64)
    for axis, value in enumerate(values):
        if not right[hint](np.moveaxis(numbers, axis, 0), value, step):
            raise FalseHint(f"{hint} {value} on axis {axis} is not so")
    self.attr[hint] = values


def is_multiple(numbers, value, step):
    """The first of each run of neighbours is a multiple: so the compiler reads the hint."""
    first = np.ones(numbers.shape, bool)
    first[1:] = np.diff(numbers, axis=0) != step
    return not (numbers[first] % value).any()


def is_contiguous(numbers, value, step):
    """Each group of so many are neighbours."""
    within_group = np.arange(1, len(numbers)) % value != 0
    return (np.diff(numbers, axis=0)[within_group] == step).all()


def is_constant(numbers, value, step):
    """Each group of so many are equal."""
    within_group = np.arange(1, len(numbers)) % value != 0
    return (np.diff(numbers, axis=0)[within_group] == 0).all()


TensorHandle.set_attr = set_attr

# ---- launches


def _check_races():
    """No address was stored to by two programs of this launch."""
    if not _written:
        return
    at = np.concatenate([addresses for _, addresses in _written])
    # one number for each program: x below 2^31, y below 2^16
    numbers = [x + (y << 31) + (z << 47) for (x, y, z), _ in _written]
    counts = [len(addresses) for _, addresses in _written]
    program = np.repeat(numbers, counts)
    order = np.lexsort((program, at))
    at = at[order]
    program = program[order]
    same_address = at[1:] == at[:-1]
    other_program = program[1:] != program[:-1]
    if (same_address & other_program).any():
        raise Race("two programs store to one address")


def programs_of(grid):
    """The grid positions to run, in the order in which they run."""
    if only is not None:
        programs = only
    else:
        programs = list(itertools.product(*(range(n) for n in grid)))
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(len(programs))
        programs = [programs[i] for i in order]
    return programs


def arguments_of(executor, args, kwargs):
    """{name: argument} of the kernel. num_warps and the like are not among its names."""
    names = inspect.getfullargspec(executor.fn).args
    kwargs = {name: value for name, value in kwargs.items() if name in names}
    arguments = inspect.getcallargs(executor.fn, *args, **kwargs)
    for name, value in arguments.items():
        if name not in executor.constexprs:
            arguments[name] = convert_argument(value)
    return arguments


def launch(self, *args, **kwargs):
    """GridExecutor.__call__, for CPU tensors only: one program of the grid after the other."""
    _spans.clear()
    _written.clear()
    # `tl` of the kernels, `core` of Triton's own library
    scopes = [interpreter._patch_lang(f) for f in (self.fn, tl.zeros.fn)]
    # 3.6's fails on numpy 2.4
    scopes[-1].set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    try:
        arguments = arguments_of(self, args, kwargs)
        grid = tuple(self.grid) + (1,) * (3 - len(self.grid))
        for axis, programs, most in zip("xyz", grid, MOST_PROGRAMS):
            if programs > most:
                raise ValueError(f"{programs} programs in {axis}, a GPU takes {most}")
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*grid)
        for program in programs_of(grid):
            _unsettled.clear()
            builder.grid_idx = program
            self.fn(**arguments)
    finally:
        for scope in reversed(scopes):
            scope.restore()
    _check_races()


def call_device_function(self, *args, **kwargs):
    """A kernel's callee finds the language patched already; its errors arrive as they are."""
    return self.rewrite()(*args, **kwargs)


interpreter.GridExecutor.__call__ = launch
interpreter.InterpretedFunction.__call__ = call_device_function
# this makes an int32 overflow raise
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, debug=True
)
