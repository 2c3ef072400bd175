"""The Triton kernels in the strict interpreter, at shapes that hypothesis draws.

Apart from test_triton.py, which runs on a GPU machine, too: there hypothesis may be missing.
"""

# T tokens, D width, E head size

import contextlib

import kernel_checks as checks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cross_entropy, rms_norm, rotary_attention, swiglu

few = settings(max_examples=6, deadline=None, derandomize=True)
many = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def on_triton():
    """Every call of this file goes to the kernels."""
    with contextlib.ExitStack() as stack:
        for module in (cross_entropy, rms_norm, rotary_attention, swiglu):
            stack.enter_context(checks.kernels_on(module))
        yield


some_dtype = st.sampled_from(list(checks.DTYPES.values()))
some_seed = st.integers(0, 2**20)
some_length = st.one_of(st.integers(0, 40), st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 64, 65]))
PACKING = {
    "lengths": st.lists(some_length, min_size=1, max_size=7),
    "padding": st.integers(0, 20),
    "heads": st.sampled_from([(1, 1), (4, 1), (8, 1), (6, 3), (8, 2)]),
    "E": st.sampled_from([32, 64]),
    "dtype": some_dtype,
    "seed": some_seed,
}


def any_packing(lengths, padding, heads, E, dtype, seed):
    checks.rotary_attention(rotary_attention, dtype, lengths, padding, *heads, E, seed=seed)


test_any_packing = few(given(**PACKING)(any_packing))
test_any_packing_at_length = pytest.mark.long(many(given(**PACKING)(any_packing)))

ROWS = {
    "T": st.integers(1, 40),
    "D": st.integers(1, 300),
    "flag": st.booleans(),
    "strided": st.booleans(),
    "dtype": some_dtype,
    "seed": some_seed,
}


def any_rows(T, D, flag, strided, dtype, seed):
    checks.rms_norm(rms_norm, dtype, T, D, flag, strided, seed)
    checks.swiglu(swiglu, dtype, T, D, strided, seed)
    checks.linear_cross_entropy(
        cross_entropy, dtype, T, D, D + 1, chunk_rows=128, strided=strided, seed=seed
    )


test_any_rows = few(given(**ROWS)(any_rows))
test_any_rows_at_length = pytest.mark.long(many(given(**ROWS)(any_rows)))


@few
@given(lengths=st.lists(st.integers(0, 70), max_size=150), padding=st.integers(0, 50))
def test_plan_holds_every_block_once_most_work_first(lengths, padding):
    checks.plan(rotary_attention, lengths, padding)
