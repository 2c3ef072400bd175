"""Rotary attention's forward pass and its dk, dv on Hopper, written for what that chip can overlap.

The mathematics, the plan and the contract are rotary_attention's. This file says only who does
what, and when, inside a program. It is in Gluon, Triton's lower floor, where layouts, shared memory
and barriers are written by hand.
"""

import math
from types import SimpleNamespace

import torch

from kernels import arch

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    HAVE_GLUON = True
    # the same barrier under its names in triton 3.7 and 3.6
    partition_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
except ImportError:
    # the file can still be read
    gluon = SimpleNamespace(jit=lambda f=None, **_: f or (lambda f: f))
    gl = SimpleNamespace(constexpr=None)
    HAVE_GLUON = False

LOG2E = math.log2(math.e)
LN2 = gl.constexpr(math.log(2))
# Rows that a program owns: two consumers of 64, the rows of one wgmma instruction.
BLOCK = 128
# The one head size for which the tiles below fit registers and shared memory.
HEAD_SIZE = 128
FWD_STAGES = 2
DKV_STAGES = 3
# Query rows at a time in dk, dv: 128 would need more registers than there are.
DKV_TILE = 64


# i_ program index, o_ offsets, m_ mask, b_ block held in registers, s_ tile in shared memory, d_ TMA
# descriptor; bare names are pointers, scalars in registers, or mbarriers.


@gluon.jit
def _barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """mbarriers, each of which flips when `arrivals` arrivals and all announced bytes are in."""
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def _fetch(d_x, row, column, s_x, full):
    """Start the copy of a tile; `full` flips when its last byte has landed."""
    mbarrier.expect(full, d_x.block_type.nbytes)
    tma.async_copy_global_to_shared(d_x, [row, column], full, s_x)


@gluon.jit
def _wash(s_x, valid, rows: gl.constexpr, E: gl.constexpr):
    """Zeros over a tile's rows from `valid` on, by the producer's one warp."""
    # In shared memory the left half of all rows comes first, 128 bytes a row, then the right half;
    # where in its 128 bytes an element lies does not matter to zeros.
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    half_rows = s_x._reinterpret(s_x.dtype, [2 * rows, E // 2], flat)
    b_zero = gl.zeros([E // 2], s_x.dtype, gl.BlockedLayout([2], [32], [1], [0]))
    for r in range(valid, rows):
        half_rows.index(r).store(b_zero)
        half_rows.index(rows + r).store(b_zero)


@gluon.jit
def _hand_over(full):
    """What this warp stored to shared memory, wgmma may read once `full` has flipped."""
    # stores take another road to shared memory than wgmma's reads
    fence_async_shared()
    # one thread arrives for all: each must have fenced before
    partition_barrier()
    mbarrier.arrive(full, count=1)


@gluon.jit
def _work(round_, plan, cu_seqlens, blocks, T, N, H: gl.constexpr):
    """This program's block of that round: conversation (-1: none), the block's first row in it, the
    conversation's first row and length, and the head."""
    programs = gl.num_programs(0)
    i = gl.program_id(0)
    # The plan lists the longest work first. Every second round runs backwards through the programs,
    # so that none always gets the longer end.
    if round_ % 2 == 1:
        i = programs - 1 - i
    work = round_ * programs + i
    at = plan + 2 * (work // H).to(gl.int64)
    m_work = work < blocks * H
    n = gl.load(at, mask=m_work, other=-1)
    first = gl.load(at + 1, mask=m_work, other=0)
    start = gl.load(cu_seqlens + n, mask=n >= 0, other=0)
    end = gl.load(cu_seqlens + n + 1, mask=(n >= 0) & (n < N), other=T)
    return n, first, start, end - start, work % H


@gluon.jit
def _fwd_producer(
    d_q, d_k, d_v, cu_seqlens, plan, s_q, s_k, s_v,
    q_full, q_free, k_full, k_free, v_full, v_free, landed, rounds, blocks, T, N,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # tiles and blocks so far: from them come slots and the parities of their barriers
    step = 0
    turn = 0
    washed = 0
    for r in range(rounds):
        n, first, start, length, i_h = _work(r, plan, cu_seqlens, blocks, T, N, H)
        if (n >= 0) & (n < N):
            column = i_h // (H // G) * E
            for i in range(first // BN + 1):
                slot = step % STAGES
                # a new barrier counts as flipped once before: the first lap does not wait
                lap = (step // STAGES) & 1
                row = start + first - i * BN
                mbarrier.wait(k_free.index(slot), lap ^ 1)
                _fetch(d_k, row, column, s_k.index(slot), k_full.index(slot))
                if i == 0:
                    for half in gl.static_range(2):
                        mbarrier.wait(q_free.index(half), (turn & 1) ^ 1)
                        _fetch(d_q, row + half * 64, i_h * E, s_q.index(half), q_full.index(half))
                mbarrier.wait(v_free.index(slot), lap ^ 1)
                if (i == 0) & (first + BN > length):
                    _fetch(d_v, row, column, s_v.index(slot), landed.index(0))
                    mbarrier.wait(landed.index(0), washed & 1)
                    _wash(s_v.index(slot), length - first, BN, E)
                    _hand_over(v_full.index(slot))
                    washed += 1
                else:
                    _fetch(d_v, row, column, s_v.index(slot), v_full.index(slot))
                step += 1
            turn += 1


@gluon.jit
def _softmax(b_s, b_m, b_l, scale, dtype: gl.constexpr, P: gl.constexpr):
    """One tile of scores into the running maximum and sum: its weights, and what the sums so far
    are worth now."""
    # max on raw scores: scale is then part of exp2's multiply-add
    b_new = gl.maximum(b_m, gl.max(b_s, 1) * scale)
    b_p = gl.exp2(b_s * scale - b_new[:, None])
    b_decay = gl.exp2(b_m - b_new)
    b_l = b_l * b_decay + gl.sum(b_p, 1)
    return gl.convert_layout(b_p.to(dtype), P), b_decay, b_new, b_l


@gluon.jit
def _fwd_consumer(
    half: gl.constexpr, cos, sin, o, lse, cu_seqlens, plan, s_q, s_k, s_v,
    q_full, q_free, k_full, k_free, v_full, v_free, rounds, blocks, scale, T, N,
    H: gl.constexpr, E: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    step = 0
    turn = 0
    s_q = s_q.index(half)
    for r in range(rounds):
        n, first, start, length, i_h = _work(r, plan, cu_seqlens, blocks, T, N, H)
        first += half * 64
        if n == N:
            _zero_rows(o + i_h * E, lse + i_h.to(gl.int64) * T, start, first, length, H * E, E)
        elif n >= 0:
            mbarrier.wait(q_full.index(half), turn & 1)
            _rotate(s_q, cos, sin, start + first, length - first, E)
            tiles = first // BN + 1
            _fwd_block(
                half,
                o + i_h * E,
                lse + i_h.to(gl.int64) * T,
                s_q,
                s_k,
                s_v,
                q_free.index(half),
                k_full,
                k_free,
                v_full,
                v_free,
                step,
                start,
                first,
                length,
                tiles,
                scale,
                H * E,
                E,
                BN,
                STAGES,
            )
            step += tiles
            turn += 1


@gluon.jit
def _zero_rows(o, lse, start, first, length, stride: gl.constexpr, E: gl.constexpr):
    BL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    _store_rows(gl.zeros([64, E], gl.float32, BL), o, start, first, length, stride, E)
    o_r = first + gl.arange(0, 64, gl.SliceLayout(1, BL))
    b_zero = gl.zeros([64], gl.float32, gl.SliceLayout(1, BL))
    gl.store(lse + start + o_r, b_zero, mask=o_r < length)


@gluon.jit
def _rotate(s_q, cos, sin, t, rows, E: gl.constexpr):
    C: gl.constexpr = E // 2
    BL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_r = gl.arange(0, 64, gl.SliceLayout(1, BL))
    o_c = gl.arange(0, C, gl.SliceLayout(0, BL))
    o_tc = (t + o_r).to(gl.int64)[:, None] * C + o_c[None, :]
    m_r = (o_r < rows)[:, None]
    b_cos = gl.load(cos + o_tc, mask=m_r, other=0.0)
    b_sin = gl.load(sin + o_tc, mask=m_r, other=0.0)
    s_lo = s_q.slice(0, C, dim=1)
    s_hi = s_q.slice(C, C, dim=1)
    b_lo = s_lo.load(BL).to(gl.float32)
    b_hi = s_hi.load(BL).to(gl.float32)
    s_lo.store((b_lo * b_cos - b_hi * b_sin).to(s_q.dtype))
    s_hi.store((b_hi * b_cos + b_lo * b_sin).to(s_q.dtype))
    fence_async_shared()
    partition_barrier()


@gluon.jit
def _fwd_block(
    half: gl.constexpr, o, lse, s_q, s_k, s_v, q_free, k_full, k_free, v_full, v_free,
    step, start, first, length, tiles, scale,
    stride: gl.constexpr, E: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = o.dtype.element_ty
    # the accumulators of wgmma
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OL, 2)
    b_zero = gl.zeros([64, BN], gl.float32, SL)
    b_o = gl.zeros([64, E], gl.float32, OL)
    b_m = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SL))
    b_l = gl.zeros([64], gl.float32, gl.SliceLayout(1, SL))

    slot = step % STAGES
    mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
    b_s = warpgroup_mma(s_q, s_k.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    mbarrier.arrive(k_free.index(slot), count=1)
    o_row = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, SL))
    o_column = gl.arange(0, BN, gl.SliceLayout(0, SL))
    b_s = gl.where(o_row[:, None] >= o_column[None, :], b_s, float("-inf"))
    b_p, b_decay, b_m, b_l = _softmax(b_s, b_m, b_l, scale, dtype, P)

    for i in range(step + 1, step + tiles):
        slot = i % STAGES
        mbarrier.wait(k_full.index(slot), (i // STAGES) & 1)
        b_s = warpgroup_mma(
            s_q, s_k.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True
        )
        before = (i - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        b_o = warpgroup_mma(b_p, s_v.index(before), b_o, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        mbarrier.arrive(k_free.index(slot), count=1)
        b_p, b_decay, b_m, b_l = _softmax(b_s, b_m, b_l, scale, dtype, P)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        mbarrier.arrive(v_free.index(before), count=1)
        b_o = b_o * gl.convert_layout(b_decay, gl.SliceLayout(1, OL))[:, None]
    mbarrier.arrive(q_free, count=1)

    last = step + tiles - 1
    slot = last % STAGES
    mbarrier.wait(v_full.index(slot), (last // STAGES) & 1)
    b_o = warpgroup_mma(b_p, s_v.index(slot), b_o, is_async=True)
    b_o = warpgroup_mma_wait(0, deps=(b_o,))
    mbarrier.arrive(v_free.index(slot), count=1)
    b_o = b_o / gl.convert_layout(b_l, gl.SliceLayout(1, OL))[:, None]

    _store_rows(b_o, o, start, first, length, stride, E)
    o_m = first + gl.arange(0, 64, gl.SliceLayout(1, SL))
    gl.store(lse + start + o_m, b_m + gl.log2(b_l), mask=o_m < length)


@gluon.jit
def _store_rows(b_x, x, start, first, length, stride: gl.constexpr, E: gl.constexpr):
    """64 rows of a conversation, from its row `first` on, as far as it goes."""
    BL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    o_r = first + gl.arange(0, 64, gl.SliceLayout(1, BL))
    o_e = gl.arange(0, E, gl.SliceLayout(0, BL))
    o_x = (start + o_r).to(gl.int64)[:, None] * stride + o_e[None, :]
    b_x = gl.convert_layout(b_x.to(x.dtype.element_ty), BL)
    gl.store(x + o_x, b_x, mask=(o_r < length)[:, None])


@gluon.jit(do_not_specialize=["T", "N", "blocks", "rounds"])
def _fwd_kernel(
    d_q, d_k, d_v, cos, sin, cu_seqlens, plan, o, lse, scale, rounds, blocks, T, N,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_q = gl.allocate_shared_memory(d_q.dtype, [2, 64, E], d_q.layout)
    s_k = gl.allocate_shared_memory(d_k.dtype, [STAGES, BN, E], d_k.layout)
    s_v = gl.allocate_shared_memory(d_v.dtype, [STAGES, BN, E], d_v.layout)
    q_full = _barriers(2, 1)
    q_free = _barriers(2, 1)
    k_full = _barriers(STAGES, 1)
    k_free = _barriers(STAGES, 2)
    v_full = _barriers(STAGES, 1)
    v_free = _barriers(STAGES, 2)
    landed = _barriers(1, 1)
    gl.warp_specialize(
        [
            (
                _fwd_consumer,
                (
                    0,
                    cos,
                    sin,
                    o,
                    lse,
                    cu_seqlens,
                    plan,
                    s_q,
                    s_k,
                    s_v,
                    q_full,
                    q_free,
                    k_full,
                    k_free,
                    v_full,
                    v_free,
                    rounds,
                    blocks,
                    scale,
                    T,
                    N,
                    H,
                    E,
                    BN,
                    STAGES,
                ),
            ),
            (
                _fwd_consumer,
                (
                    1,
                    cos,
                    sin,
                    o,
                    lse,
                    cu_seqlens,
                    plan,
                    s_q,
                    s_k,
                    s_v,
                    q_full,
                    q_free,
                    k_full,
                    k_free,
                    v_full,
                    v_free,
                    rounds,
                    blocks,
                    scale,
                    T,
                    N,
                    H,
                    E,
                    BN,
                    STAGES,
                ),
            ),
            (
                _fwd_producer,
                (
                    d_q,
                    d_k,
                    d_v,
                    cu_seqlens,
                    plan,
                    s_q,
                    s_k,
                    s_v,
                    q_full,
                    q_free,
                    k_full,
                    k_free,
                    v_full,
                    v_free,
                    landed,
                    rounds,
                    blocks,
                    T,
                    N,
                    H,
                    G,
                    E,
                    BN,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _dkv_producer(
    d_q, d_k, d_v, d_do, d_lse, d_delta, cu_seqlens, plan, s_q, s_k, s_v, s_do, s_lse, s_delta,
    kv_full, kv_free, full, free, landed, rounds, blocks, T, N,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    step = 0
    turn = 0
    washed = 0
    for r in range(rounds):
        n, first, start, length, i_g = _work(r, plan, cu_seqlens, blocks, T, N, G)
        if (n >= 0) & (n < N):
            first = _from_end(first, length)
            for half in gl.static_range(2):
                row = start + first + half * 64
                mbarrier.wait(kv_free.index(half), (turn & 1) ^ 1)
                _fetch(d_k, row, i_g * E, s_k.index(half), kv_full.index(half))
                _fetch(d_v, row, i_g * E, s_v.index(half), kv_full.index(half))
            turn += 1
            for i_h in range(i_g * (H // G), (i_g + 1) * (H // G)):
                for i in range(0, length - first, BM):
                    slot = step % STAGES
                    row = start + first + i
                    valid = length - first - i
                    mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
                    if valid < BM:
                        _fetch_step(d_q, d_do, d_lse, d_delta, s_q.index(slot), s_do.index(slot), s_lse.index(slot), s_delta.index(slot), row, i_h * E, i_h * T, landed.index(0))
                        mbarrier.wait(landed.index(0), washed & 1)
                        _set_rest(s_lse.index(slot), valid, float("inf"), BM)
                        _set_rest(s_delta.index(slot), valid, 0.0, BM)
                        _wash(s_q.index(slot), valid, BM, E)
                        _wash(s_do.index(slot), valid, BM, E)
                        _hand_over(full.index(slot))
                        washed += 1
                    else:
                        _fetch_step(d_q, d_do, d_lse, d_delta, s_q.index(slot), s_do.index(slot), s_lse.index(slot), s_delta.index(slot), row, i_h * E, i_h * T, full.index(slot))
                    step += 1


@gluon.jit
def _from_end(first, length):
    """The block's first row, counted from the conversation's end: the plan goes by the rows before
    a block, and here the rows after it are the work."""
    return (length - 1) - (length - 1) % 128 - first


@gluon.jit
def _fetch_step(d_q, d_do, d_lse, d_delta, s_q, s_do, s_lse, s_delta, row, column, at, full):
    mbarrier.expect(
        full,
        d_q.block_type.nbytes
        + d_do.block_type.nbytes
        + d_lse.block_type.nbytes
        + d_delta.block_type.nbytes,
    )
    tma.async_copy_global_to_shared(d_q, [row, column], full, s_q)
    tma.async_copy_global_to_shared(d_lse, [at + row], full, s_lse)
    tma.async_copy_global_to_shared(d_delta, [at + row], full, s_delta)
    tma.async_copy_global_to_shared(d_do, [row, column], full, s_do)


@gluon.jit
def _set_rest(s_x, valid, value, rows: gl.constexpr):
    RL: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    b_x = s_x.load(RL)
    o_r = gl.arange(0, rows, RL)
    s_x.store(gl.where(o_r < valid, b_x, value))


@gluon.jit
def _dkv_consumer(
    half: gl.constexpr, cos, sin, dk, dv, cu_seqlens, plan, s_q, s_k, s_v, s_do, s_lse, s_delta,
    kv_full, kv_free, full, free, rounds, blocks, scale, T, N,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    step = 0
    turn = 0
    for r in range(rounds):
        n, first, start, length, i_g = _work(r, plan, cu_seqlens, blocks, T, N, G)
        first = _from_end(first, length)
        if n == N:
            BL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
            b_zero = gl.zeros([64, E], gl.float32, BL)
            _store_rows(b_zero, dk + i_g * E, start, first + half * 64, length, G * E, E)
            _store_rows(b_zero, dv + i_g * E, start, first + half * 64, length, G * E, E)
        elif n >= 0:
            mbarrier.wait(kv_full.index(half), turn & 1)
            _dkv_block(
                half, cos, sin, dk + i_g * E, dv + i_g * E, s_q, s_k.index(half), s_v.index(half), s_do, s_lse, s_delta,
                kv_free.index(half), full, free, step, start + first, length - first, scale,
                H // G, G * E, E, BM, STAGES,
            )
            step += H // G * ((length - first + BM - 1) // BM)
            turn += 1


@gluon.jit
def _dkv_block(
    half: gl.constexpr, cos, sin, dk, dv, s_q, s_k, s_v, s_do, s_lse, s_delta,
    kv_free, full, free, step, t, left, scale,
    group: gl.constexpr, stride: gl.constexpr, E: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = dk.dtype.element_ty
    AL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, AL, 2)
    ML: gl.constexpr = gl.SliceLayout(0, SL)
    # BM numbers, one a thread
    RL: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])

    b_dk = gl.zeros([64, E], gl.float32, AL)
    b_dv = gl.zeros([64, E], gl.float32, AL)
    b_zero = gl.zeros([64, BM], gl.float32, SL)
    o_n = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, SL))
    o_m = gl.arange(0, BM, ML)
    tiles = (left + BM - 1) // BM
    i = 0
    for step in range(step, step + group * tiles):
        slot = step % STAGES
        lap = (step // STAGES) & 1
        mbarrier.wait(full.index(slot), lap)
        b_s = warpgroup_mma(
            s_k, s_q.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True
        )
        b_dp = warpgroup_mma(
            s_v, s_do.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True
        )
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_lse = s_lse.index(slot).load(ML)
        b_p = gl.exp2(b_s * scale - b_lse[None, :])
        if i * BM < 128:
            b_p = gl.where((o_m + i * BM)[None, :] >= o_n[:, None], b_p, 0.0)
        b_pd = gl.convert_layout(b_p.to(dtype), P)
        b_dv = warpgroup_mma(b_pd, s_do.index(slot), b_dv, is_async=True)
        b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
        b_delta = s_delta.index(slot).load(ML)
        b_ds = gl.convert_layout((b_p * (b_dp - b_delta[None, :])).to(dtype), P)
        b_dk = warpgroup_mma(b_ds, s_q.index(slot), b_dk, is_async=True)
        b_dv = warpgroup_mma_wait(1, deps=(b_dv,))
        b_dk = warpgroup_mma_wait(0, deps=(b_dk,))
        mbarrier.arrive(free.index(slot), count=1)
        i += 1
        if i == tiles:
            i = 0

    mbarrier.arrive(kv_free, count=1)

    t += half * 64
    left -= half * 64
    _store_rows(b_dv, dv, t, 0, left, stride, E)
    b_dk = _unrotate(b_dk * (scale * LN2), cos, sin, t, left, AL, E)
    _store_rows(b_dk, dk, t, 0, left, stride, E)


@gluon.jit
def _unrotate(b_x, cos, sin, t, rows, L: gl.constexpr, E: gl.constexpr):
    C: gl.constexpr = E // 2
    b_lo, b_hi = gl.split(gl.permute(gl.reshape(b_x, [64, 2, C]), [0, 2, 1]))
    CL: gl.constexpr = b_lo.type.layout
    o_r = gl.arange(0, 64, gl.SliceLayout(1, CL))
    o_c = gl.arange(0, C, gl.SliceLayout(0, CL))
    o_tc = (t + o_r).to(gl.int64)[:, None] * C + o_c[None, :]
    m_r = (o_r < rows)[:, None]
    b_cos = gl.load(cos + o_tc, mask=m_r, other=0.0)
    b_sin = gl.load(sin + o_tc, mask=m_r, other=0.0)
    b_x = gl.join(b_lo * b_cos + b_hi * b_sin, b_hi * b_cos - b_lo * b_sin)
    return gl.convert_layout(gl.reshape(gl.permute(b_x, [0, 2, 1]), [64, E]), L)


@gluon.jit(do_not_specialize=["T", "N", "blocks", "rounds"])
def _dkv_kernel(
    d_q, d_k, d_v, d_do, d_lse, d_delta, cos, sin, cu_seqlens, plan, dk, dv, scale, rounds, blocks, T, N,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_q = gl.allocate_shared_memory(d_q.dtype, [STAGES, BM, E], d_q.layout)
    s_k = gl.allocate_shared_memory(d_k.dtype, [2, 64, E], d_k.layout)
    s_v = gl.allocate_shared_memory(d_v.dtype, [2, 64, E], d_v.layout)
    s_do = gl.allocate_shared_memory(d_do.dtype, [STAGES, BM, E], d_do.layout)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BM], d_lse.layout)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BM], d_delta.layout)
    kv_full = _barriers(2, 2)
    kv_free = _barriers(2, 1)
    full = _barriers(STAGES, 1)
    free = _barriers(STAGES, 2)
    landed = _barriers(1, 1)
    gl.warp_specialize(
        [
            (_dkv_consumer, (0, cos, sin, dk, dv, cu_seqlens, plan, s_q, s_k, s_v, s_do, s_lse, s_delta, kv_full, kv_free, full, free, rounds, blocks, scale, T, N, H, G, E, BM, STAGES)),
            (_dkv_consumer, (1, cos, sin, dk, dv, cu_seqlens, plan, s_q, s_k, s_v, s_do, s_lse, s_delta, kv_full, kv_free, full, free, rounds, blocks, scale, T, N, H, G, E, BM, STAGES)),
            (_dkv_producer, (d_q, d_k, d_v, d_do, d_lse, d_delta, cu_seqlens, plan, s_q, s_k, s_v, s_do, s_lse, s_delta, kv_full, kv_free, full, free, landed, rounds, blocks, T, N, H, G, E, BM, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def _descriptor(x, rows):
    x = x.view(len(x), -1)
    layout = gl.NVMMASharedLayout.get_default_for(
        [rows, HEAD_SIZE], getattr(gl, str(x.dtype).removeprefix("torch."))
    )
    return TensorDescriptor.from_tensor(x, [rows, HEAD_SIZE], layout)


def _rows(x):
    return TensorDescriptor.from_tensor(x.view(-1), [DKV_TILE], gl.NVMMASharedLayout(0, 32, 1))


def _programs(x):
    """One for each multiprocessor."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def forward(q, k, v, cos, sin, cu_seqlens, plan, o, lse, scale):
    T, H, E = q.shape
    G = k.shape[1]
    N = len(cu_seqlens) - 1
    blocks = len(plan)
    programs = _programs(q)
    rounds = -(-blocks * H // programs)
    _fwd_kernel[(programs,)](
        _descriptor(q, 64),
        _descriptor(k, BLOCK),
        _descriptor(v, BLOCK),
        cos,
        sin,
        cu_seqlens,
        plan,
        o,
        lse,
        scale,
        rounds,
        blocks,
        T,
        N,
        H,
        G,
        E,
        BLOCK,
        FWD_STAGES,
        num_warps=4,
    )


def dkv(q, k, v, do, lse, delta, cos, sin, cu_seqlens, plan, dk, dv):
    T, H, E = q.shape
    G = k.shape[1]
    N = len(cu_seqlens) - 1
    blocks = len(plan)
    programs = _programs(q)
    rounds = -(-blocks * G // programs)
    _dkv_kernel[(programs,)](
        _descriptor(q, DKV_TILE),
        _descriptor(k, 64),
        _descriptor(v, 64),
        _descriptor(do, DKV_TILE),
        _rows(lse),
        _rows(delta),
        cos,
        sin,
        cu_seqlens,
        plan,
        dk,
        dv,
        E**-0.5 * LOG2E,
        rounds,
        blocks,
        T,
        N,
        H,
        G,
        E,
        DKV_TILE,
        DKV_STAGES,
        num_warps=4,
    )
