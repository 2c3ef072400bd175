"""The strict interpreter refuses what a GPU would get wrong: each fault planted in a kernel."""

import os

import pytest
import torch

from kernels import tl, triton

if os.environ.get("TRITON_INTERPRET") == "1":
    import strict

bf16 = torch.bfloat16
fp32 = torch.float32


@triton.jit
def _bad_kernel(x, y, n, what: tl.constexpr):
    i = tl.program_id(0)
    if what == "bounds":
        tl.store(y + i, tl.load(x + i + n))
    if what == "race":
        tl.store(y, i.to(tl.float32))
    if what == "twice":
        tl.store(y + tl.arange(0, 2) // 2, 1.0)
    if what == "bf16":
        tl.store(y + i, tl.load(x + i) * tl.load(x))
    if what == "sum":
        tl.store(y, tl.sum(tl.load(x + tl.arange(0, 4)), 0))
    if what == "overflow":
        tl.store(y + i, tl.load(x + i * 2**30 * n))


BAD = {
    "bounds": "OutOfBounds",
    "race": "Race",
    "twice": "Race",
    "bf16": "TypeError",
    "sum": "TypeError",
    "overflow": "AssertionError",
}


@pytest.mark.parametrize("what, error", BAD.items())
def test_the_strict_interpreter_sees(what, error):
    x = torch.ones(4, dtype=bf16 if what in ("bf16", "sum") else fp32)
    with pytest.raises(Exception) as caught:
        _bad_kernel[(4,)](x, torch.zeros(4), 4, what)
    assert type(caught.value).__name__ == error, caught.value


def test_the_strict_interpreter_rounds_bf16_to_nearest_even():
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
    special = torch.tensor([torch.inf, torch.nan, 0.0, 3.4e38])
    x = torch.cat([torch.randn(1000), ties, special])
    rounded = torch.from_numpy(strict._bits(x.numpy())).view(bf16)
    assert torch.equal(rounded.nan_to_num(7), x.bfloat16().nan_to_num(7))


# ---- a load of what the program has stored


@triton.jit
def _turned_kernel(x, y, what: tl.constexpr):
    """y = x reversed in blocks of 4, by way of y itself."""
    i = tl.program_id(0)
    o = i * 4 + tl.arange(0, 4)
    turned = i * 4 + 3 - tl.arange(0, 4)
    b_x = tl.load(x + o)
    tl.store(y + o, b_x)
    if what == "barrier":
        tl.debug_barrier()
    if what == "reduction":
        b_x += tl.sum(b_x, 0)
    if what != "untouched":
        b_x = tl.load(y + turned)
    tl.store(y + o, b_x)


@triton.jit
def _wider_kernel(x, y, halves):
    """Stores fp32 and loads the upper half of the second as bf16: y and halves are one memory."""
    o = tl.arange(0, 2)
    tl.store(y + o, tl.load(x + o))
    tl.store(x, tl.load(halves + 3).to(tl.float32))


@triton.jit
def _in_place_kernel(x):
    """As the softmax of the loss: each block is loaded and then stored, none is loaded again."""
    for i in range(0, 8, 4):
        o = i + tl.arange(0, 4)
        b_x = tl.load(x + o)
        tl.store(x + o, b_x + tl.sum(b_x, 0))


@pytest.mark.parametrize("what", ["plain", "reduction"])
def test_a_load_of_what_the_program_stored_is_refused(what):
    with pytest.raises(strict.Race, match="without a barrier"):
        _turned_kernel[(2,)](torch.arange(8.0), torch.zeros(8), what)


def test_a_load_of_a_part_of_what_the_program_stored_is_refused():
    y = torch.zeros(2)
    with pytest.raises(strict.Race, match="without a barrier"):
        _wider_kernel[(1,)](torch.ones(2), y, y.view(bf16))


def test_a_barrier_settles_what_was_stored():
    y = torch.zeros(8)
    _turned_kernel[(2,)](torch.arange(8.0), y, "barrier")
    assert y.tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
    _turned_kernel[(2,)](torch.arange(8.0), y, "untouched")
    assert y.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_kernel_that_loads_first_and_then_stores_is_not_touched():
    x = torch.ones(8)
    _in_place_kernel[(1,)](x)
    assert x.tolist() == [5] * 8


# ---- alignment hints


@triton.jit
def _hint_kernel(x, y, n, what: tl.constexpr):
    o = tl.arange(0, 8)
    if what == "row":
        # a row's first offset, which the compiler would load 16 bytes at a time
        o += tl.multiple_of(tl.program_id(0) * n, 4)
    if what == "multiple":
        o = tl.max_contiguous(tl.multiple_of((o + n) % 8, 4), 4)
    if what == "contiguous":
        o = tl.max_contiguous(o * n % 8, 2)
    if what == "constant":
        o = tl.max_constancy(o // n, 4)
    if what == "pointer":
        tl.multiple_of(x + n, 16)
    tl.store(y + tl.arange(0, 8), tl.load(x + o))


# true of the first n, not of the second
HINTS = {"row": (8, 9), "multiple": (4, 3), "contiguous": (1, 3), "constant": (4, 2)}
HINTS["pointer"] = (4, 1)


@pytest.mark.parametrize("what", HINTS)
def test_a_false_alignment_hint_is_refused(what, monkeypatch):
    # the first program's row starts at 0, a multiple of everything
    monkeypatch.setattr(strict, "only", [(1, 0, 0)])
    x = torch.arange(24.0)
    y = torch.zeros(8)
    true, false = HINTS[what]
    _hint_kernel[(2,)](x, y, true, what)
    with pytest.raises(strict.FalseHint):
        _hint_kernel[(2,)](x, y, false, what)


# ---- the grid


@triton.jit
def _nothing_kernel(x):
    pass


@pytest.mark.parametrize("axis", [1, 2])
def test_a_grid_that_no_gpu_takes_is_refused(axis, monkeypatch):
    # a GPU's limit is looked at, no program is run
    monkeypatch.setattr(strict, "only", [])
    grid = [1, 1, 1]
    grid[axis] = 65535
    _nothing_kernel[tuple(grid)](torch.zeros(1))
    grid[axis] = 65536
    with pytest.raises(ValueError, match="65536 programs"):
        _nothing_kernel[tuple(grid)](torch.zeros(1))
