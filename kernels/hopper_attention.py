"""Rotary attention's forward pass and its dk, dv once more, for Hopper alone: who does what, when.

The mathematics, the plan and the contract are those of rotary_attention.py, whose kernels run on
every GPU and are this file's second opinion. There a program's warps all do the same: load,
multiply, exponentiate, and the tensor cores idle while the exponentials are made. Here a program is
warp-specialised. It is written in Gluon, Triton's lower floor, where layouts, shared memory and
barriers are spelt out.

Who. A program has nine warps in three parts. The producer is one warp. It computes nothing: it asks
TMA, the chip's copy engine, for tile after tile of global memory. The two consumers are warpgroups
of four warps, each with 64 of the block's 128 rows (the rows of one wgmma, the instruction that
multiplies straight out of shared memory). setmaxnreg takes registers from the producer (24 a
thread) and gives them to the consumers (240), whose accumulators need them. There is one program a
multiprocessor; it stays there and takes block after block from the plan, so that a block's first
tiles are fetched while the block before it ends.

How they wait. Shared memory holds a ring of slots for tiles. Every slot has two mbarriers: `full`
flips when all bytes of its copy have landed, `free` when both consumers have left the tile. An
mbarrier has a phase, the parity of its flips. Tile number `step` is the (step // STAGES)-th in its
slot, so its users wait for the phase (step // STAGES) & 1 of `full`, and its producer for the
opposite one of `free`, which a new barrier counts as done: the first lap does not wait. No barrier
of the whole program stands in a loop; what a slow consumer holds up is its own slots.

What is in flight, forward: S(i + 1) = q k^T is issued before P(i) V(i), and both run on the tensor
cores while the consumer turns S(i + 1) into P(i + 1) and the other consumer does the same half a
turn later. The diagonal tile comes first, so that only the part before the loop has a mask.
In dk, dv: S = k q^T and dP = v do^T run together; P is made while dP runs, and dS while P do runs.

The end of a conversation. Tiles have 128 or 64 rows and TMA knows nothing of conversations: rows
after the end arrive with what a neighbour holds, even NaN. A mask makes their p zero, but 0 x NaN
is NaN in the product that sums over rows. So the producer lets a ragged tile land, writes zeros
over the rows beyond (the tile is `washed`), and only then says `full`. Rows beyond the end that a
product does not sum over touch nothing but results that are not stored.

Deterministic: a block of keys belongs to one program, its two halves to one warpgroup each, and
each adds up query heads and tiles in one order, in registers. No atomics; dq is computed elsewhere.

Not yet run on a GPU in this form, therefore not called: rotary_attention.py has its own kernels.
A first form, that ended a program with its block and knew no padding, was measured on one H100,
triton 3.6.0, 2026-11-27, bf16, 16,384 tokens, 32 heads, in TFLOP/s (in brackets the best of
rotary_attention.py): lengths as in ShareGPT, mean 1,500: forward 399 (326), dk and dv 522 (334);
lengths of 4,096: 567 (430) and 628 (408). tests/strict_gluon.py runs this file's source on a CPU.

Shapes as in rotary_attention.py: q, o, do [T, H, E], k, v, dk, dv [T, G, E] in bf16 or fp16, cos
and sin [T, C], lse and delta [H, T] in fp32; lse in units of log 2. E is 128.
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

    # a barrier of the calling part's warps, under its names in triton 3.7 and 3.6
    part_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
    HAVE_GLUON = True
except ImportError:

    def _unchanged(function=None, **_options):
        return _unchanged if function is None else function

    # the file can still be read
    gluon = SimpleNamespace(jit=_unchanged)
    gl = SimpleNamespace(constexpr=_unchanged)
    HAVE_GLUON = False

# Rows that a program owns: two consumers of 64, the rows of one wgmma. The plan goes by them.
BLOCK = 128
# The one head size for which the tiles below fit registers and shared memory.
HEAD_SIZE = 128
# Slots of the rings: in 227 KB no third pair of 128 keys and values fits beside q; in dk, dv the
# queries come 64 at a time (the scores of 128 would need more registers than there are).
FWD_STAGES = 2
DKV_TILE = 64
DKV_STAGES = 3
LOG2E = math.log2(math.e)
LN2 = gl.constexpr(math.log(2))


# i_ program index, o_ offsets, m_ mask, b_ block in registers, s_ tile in shared memory, d_ TMA
# descriptor; bare names are pointers, scalars or mbarriers. [64, ..]: rows of one consumer.


@gluon.jit
def _barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """mbarriers that flip when `arrivals` arrivals and all announced bytes are in."""
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def _work(base, place, A: gl.constexpr):
    """This program's work in the round that begins with number `base`: conversation (-1: none left,
    N: padding), its first row and length, the block's first row in it, and one of A heads."""
    cu_seqlens, plan, blocks, T, N = place
    programs = gl.num_programs(0)
    i = gl.program_id(0)
    # The plan lists the most work first. Every second round goes through the programs backwards, so
    # that no program gets the longer end each time.
    if base // programs % 2 == 1:
        i = programs - 1 - i
    work = base + i
    at = plan + 2 * (work // A).to(gl.int64)
    m_work = work < blocks * A
    n = gl.load(at, mask=m_work, other=-1)
    first = gl.load(at + 1, mask=m_work, other=0)
    start = gl.load(cu_seqlens + n, mask=n >= 0, other=0)
    end = gl.load(cu_seqlens + n + 1, mask=(n >= 0) & (n < N), other=T)
    return n, start, end - start, first, work % A


@gluon.jit
def _fetch(d_x, row, column, s_x, full):
    """Have a tile copied: `full` takes one arrival and the tile's bytes."""
    mbarrier.expect(full, d_x.block_type.nbytes)
    tma.async_copy_global_to_shared(d_x, [row, column], full, s_x)


@gluon.jit
def _wash(s_x, valid, rows: gl.constexpr, E: gl.constexpr):
    """Zeros over a tile's rows from `valid` on, by the producer's one warp."""
    # TMA lays the left halves of all rows first, 128 bytes each, then the right halves. It swizzles
    # within the 128 bytes: that is all the same to zeros.
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    half_rows = s_x._reinterpret(s_x.dtype, [2 * rows, E // 2], flat)
    b_zero = gl.zeros([E // 2], s_x.dtype, gl.BlockedLayout([4], [32], [1], [0]))
    for r in range(valid, rows):
        half_rows.index(r).store(b_zero)
        half_rows.index(rows + r).store(b_zero)


@gluon.jit
def _hand_over(full, arrivals: gl.constexpr):
    """After the producer's own stores: the consumers may read what it stored when `full` flips."""
    # stores and wgmma reach shared memory by different roads
    fence_async_shared()
    # one thread arrives for the warp: all must have stored and fenced before
    part_barrier()
    mbarrier.arrive(full, count=arrivals)


@gluon.jit
def _store_rows(b_x, x, start, first, length, stride: gl.constexpr, E: gl.constexpr):
    """64 rows of a conversation from its row `first` on, as far as it goes."""
    # 16 bytes a thread, whole rows of 256 bytes
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    o_r = first + gl.arange(0, 64, gl.SliceLayout(1, L))
    o_e = gl.arange(0, E, gl.SliceLayout(0, L))
    o_x = (start + o_r).to(gl.int64)[:, None] * stride + o_e[None, :]
    b_x = gl.convert_layout(b_x.to(x.dtype.element_ty), L)
    gl.store(x + o_x, b_x, mask=(o_r < length)[:, None])


@gluon.jit
def _store_zeros(x, start, first, length, stride: gl.constexpr, E: gl.constexpr):
    """What padding gets."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    b_zero = gl.zeros([64, E], x.dtype.element_ty, L)
    _store_rows(b_zero, x, start, first, length, stride, E)


# ---- forward


@gluon.jit
def _fwd_producer(
    d_q, d_k, d_v, tiles, place,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_q, s_k, s_v, q_full, q_free, k_full, k_free, v_full, v_free = tiles
    _cu_seqlens, _plan, blocks, _T, N = place
    # key tiles, blocks and washed tiles so far, from which come slots and phases
    step = 0
    turn = 0
    washed = 0
    for base in range(0, blocks * H, gl.num_programs(0)):
        n, start, length, first, i_h = _work(base, place, H)
        if (n >= 0) & (n < N):
            column = i_h // (H // G) * E
            for i in range(first // BN + 1):
                slot = step % STAGES
                phase = (step // STAGES) & 1
                # the diagonal tile, then back to the conversation's first row
                row = start + first - i * BN
                mbarrier.wait(k_free.index(slot), phase ^ 1)
                _fetch(d_k, row, column, s_k.index(slot), k_full.index(slot))
                if i == 0:
                    for half in gl.static_range(2):
                        mbarrier.wait(q_free.index(half), (turn & 1) ^ 1)
                        _fetch(d_q, row + half * 64, i_h * E, s_q.index(half), q_full.index(half))

                # of keys beyond the end the mask takes care, of values it cannot
                mbarrier.wait(v_free.index(slot), phase ^ 1)
                if (i == 0) & (first + BN > length):
                    landed = v_full.index(STAGES)
                    _fetch(d_v, row, column, s_v.index(slot), landed)
                    mbarrier.wait(landed, washed & 1)
                    _wash(s_v.index(slot), length - first, BN, E)
                    _hand_over(v_full.index(slot), 1)
                    washed += 1
                else:
                    _fetch(d_v, row, column, s_v.index(slot), v_full.index(slot))
                step += 1
            turn += 1


@gluon.jit
def _fwd_consumer(
    half: gl.constexpr, cos, sin, o, lse, tiles, place, scale,
    H: gl.constexpr, E: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_q, s_k, s_v, q_full, q_free, k_full, k_free, v_full, v_free = tiles
    _cu_seqlens, _plan, blocks, T, N = place
    ring = (s_k, s_v, k_full, k_free, v_full, v_free)
    s_q = s_q.index(half)
    step = 0
    turn = 0
    for base in range(0, blocks * H, gl.num_programs(0)):
        n, start, length, first, i_h = _work(base, place, H)
        count = first // BN + 1
        first += half * 64
        o_h = o + i_h.to(gl.int64) * E
        lse_h = lse + i_h.to(gl.int64) * T
        L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        if n == N:
            _store_zeros(o_h, start, first, length, H * E, E)
            o_m = first + gl.arange(0, 64, L)
            gl.store(lse_h + start + o_m, gl.zeros([64], gl.float32, L), mask=o_m < length)
        elif n >= 0:
            mbarrier.wait(q_full.index(half), turn & 1)
            _rotate(s_q, cos, sin, start + first, length - first, E)
            b_o, b_lse = _attend(
                half, s_q, q_free.index(half), ring, step, count, scale, E, BN, STAGES
            )
            _store_rows(b_o, o_h, start, first, length, H * E, E)
            o_m = first + gl.arange(0, 64, L)
            gl.store(lse_h + start + o_m, gl.convert_layout(b_lse, L), mask=o_m < length)
            step += count
            turn += 1


@gluon.jit
def _rotate(s_q, cos, sin, t, rows, E: gl.constexpr):
    """q' = R q in place, for the rows from token t on."""
    C: gl.constexpr = E // 2
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    b_cos, b_sin = _tables(cos, sin, t, rows, C, L)
    s_lo = s_q.slice(0, C, dim=1)
    s_hi = s_q.slice(C, C, dim=1)
    b_lo = s_lo.load(L).to(gl.float32)  # [64, C]
    b_hi = s_hi.load(L).to(gl.float32)
    s_lo.store((b_lo * b_cos - b_hi * b_sin).to(s_q.dtype))
    s_hi.store((b_hi * b_cos + b_lo * b_sin).to(s_q.dtype))
    # stored by all threads of this consumer, read by its wgmma
    fence_async_shared()
    part_barrier()


@gluon.jit
def _tables(cos, sin, t, rows, C: gl.constexpr, L: gl.constexpr):
    """[64, C] of cos and sin from token t on."""
    o_r = gl.arange(0, 64, gl.SliceLayout(1, L))
    o_c = gl.arange(0, C, gl.SliceLayout(0, L))
    o_tc = (t + o_r).to(gl.int64)[:, None] * C + o_c[None, :]
    m_r = (o_r < rows)[:, None]
    return gl.load(cos + o_tc, mask=m_r, other=0.0), gl.load(sin + o_tc, mask=m_r, other=0.0)


@gluon.jit
def _attend(
    half: gl.constexpr, s_q, q_free, ring, step, count, scale,
    E: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(o, lse) of 64 queries over `count` tiles of keys, the ring's tiles from `step` on."""
    s_k, s_v, k_full, k_free, v_full, v_free = ring
    # how wgmma spreads its sums over threads: scores, output
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    b_zero = gl.zeros([64, BN], gl.float32, SL)
    b_o = gl.zeros([64, E], gl.float32, OL)
    b_m = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SL))
    b_l = gl.zeros([64], gl.float32, gl.SliceLayout(1, SL))

    # The diagonal tile: its keys up to each query. It has every query's own key, so no maximum
    # stays -inf.
    slot = step % STAGES
    mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
    b_s = warpgroup_mma(s_q, s_k.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    mbarrier.arrive(k_free.index(slot), count=1)
    o_m = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, SL))
    o_n = gl.arange(0, BN, gl.SliceLayout(0, SL))
    b_s = gl.where(o_m[:, None] >= o_n[None, :], b_s, float("-inf"))
    b_p, b_decay, b_m, b_l = _softmax(b_s, b_m, b_l, scale, s_q.dtype, OL)

    # the others: the scores of this tile beside the sum over the tile before
    for i in range(step + 1, step + count):
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
        b_p, b_decay, b_m, b_l = _softmax(b_s, b_m, b_l, scale, s_q.dtype, OL)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        mbarrier.arrive(v_free.index(before), count=1)
        b_o = b_o * gl.convert_layout(b_decay, gl.SliceLayout(1, OL))[:, None]
    # no product reads q any more: the next block's may come
    mbarrier.arrive(q_free, count=1)

    last = step + count - 1
    slot = last % STAGES
    mbarrier.wait(v_full.index(slot), (last // STAGES) & 1)
    b_o = warpgroup_mma(b_p, s_v.index(slot), b_o, is_async=True)
    b_o = warpgroup_mma_wait(0, deps=(b_o,))
    mbarrier.arrive(v_free.index(slot), count=1)
    b_o = b_o / gl.convert_layout(b_l, gl.SliceLayout(1, OL))[:, None]
    return b_o, b_m + gl.log2(b_l)


@gluon.jit
def _softmax(b_s, b_m, b_l, scale, dtype: gl.constexpr, OL: gl.constexpr):
    """Take scores into the running maximum and sum: p as wgmma's operand, what the sums so far
    shrink by, the new maximum and sum."""
    # the maximum of raw scores: the scale is then a part of exp2's multiply-add
    b_new = gl.maximum(b_m, gl.max(b_s, 1) * scale)
    b_p = gl.exp2(b_s * scale - b_new[:, None])
    b_decay = gl.exp2(b_m - b_new)
    b_l = b_l * b_decay + gl.sum(b_p, 1)
    return gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, OL, 2)), b_decay, b_new, b_l


@gluon.jit(do_not_specialize=["blocks", "T", "N"])
def _fwd_kernel(
    d_q, d_k, d_v, cos, sin, cu_seqlens, plan, o, lse, scale, blocks, T, N,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_q = gl.allocate_shared_memory(d_q.dtype, [2, 64, E], d_q.layout)
    s_k = gl.allocate_shared_memory(d_k.dtype, [STAGES, BN, E], d_k.layout)
    s_v = gl.allocate_shared_memory(d_v.dtype, [STAGES, BN, E], d_v.layout)
    q_full = _barriers(2, 1)
    q_free = _barriers(2, 1)
    k_full = _barriers(STAGES, 1)
    k_free = _barriers(STAGES, 2)
    # one more: where a tile lands that must be washed
    v_full = _barriers(STAGES + 1, 1)
    v_free = _barriers(STAGES, 2)
    tiles = (s_q, s_k, s_v, q_full, q_free, k_full, k_free, v_full, v_free)
    place = (cu_seqlens, plan, blocks, T, N)
    gl.warp_specialize(
        [
            (_fwd_consumer, (0, cos, sin, o, lse, tiles, place, scale, H, E, BN, STAGES)),
            (_fwd_consumer, (1, cos, sin, o, lse, tiles, place, scale, H, E, BN, STAGES)),
            (_fwd_producer, (d_q, d_k, d_v, tiles, place, H, G, E, BN, STAGES)),
        ],
        # warps and registers a thread of the second consumer and of the producer
        [4, 1],
        [240, 24],
    )


# ---- dk and dv


@gluon.jit
def _dkv_producer(
    d_k, d_v, d_q, d_do, lse, delta, tiles, place,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_k, s_v, s_q, s_do, s_lse, s_delta, kv_full, kv_free, full, free = tiles
    _cu_seqlens, _plan, blocks, T, N = place
    step = 0
    turn = 0
    washed = 0
    for base in range(0, blocks * G, gl.num_programs(0)):
        n, start, length, first, i_g = _work(base, place, G)
        if (n >= 0) & (n < N):
            first = _from_end(first, length)
            for half in gl.static_range(2):
                row = start + first + half * 64
                mbarrier.wait(kv_free.index(half), (turn & 1) ^ 1)
                _fetch(d_k, row, i_g * E, s_k.index(half), kv_full.index(half))
                _fetch(d_v, row, i_g * E, s_v.index(half), kv_full.index(half))
            turn += 1

            # the queries from the diagonal to the conversation's end, for each head of the group
            for j in range(H // G):
                i_h = i_g * (H // G) + j
                lse_h = lse + i_h.to(gl.int64) * T + start
                delta_h = delta + i_h.to(gl.int64) * T + start
                for i in range(first, length, BM):
                    slot = step % STAGES
                    mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
                    ragged = i + BM > length
                    lands = full.index(STAGES if ragged else slot)
                    mbarrier.expect(lands, 2 * d_q.block_type.nbytes)
                    at = [start + i, i_h * E]
                    tma.async_copy_global_to_shared(d_q, at, lands, s_q.index(slot))
                    tma.async_copy_global_to_shared(d_do, at, lands, s_do.index(slot))
                    _copy(lse_h, i, length, s_lse.index(slot), BM)
                    _copy(delta_h, i, length, s_delta.index(slot), BM)
                    if ragged:
                        # q = do = lse = delta = 0 beyond the end: nothing is added
                        mbarrier.arrive(lands, count=1)
                        mbarrier.wait(lands, washed & 1)
                        _wash(s_q.index(slot), length - i, BM, E)
                        _wash(s_do.index(slot), length - i, BM, E)
                        # its own arrival and that of the copies, which went to the other barrier
                        _hand_over(full.index(slot), 2)
                        washed += 1
                    else:
                        _hand_over(full.index(slot), 1)
                    step += 1


@gluon.jit
def _copy(x, i, length, s_x, BM: gl.constexpr):
    """Numbers i to i + BM of a conversation's row, by loads and stores: TMA reads from 16-byte
    boundaries, and a conversation begins anywhere."""
    L: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    o_x = i + gl.arange(0, BM, L)
    s_x.store(gl.load(x + o_x, mask=o_x < length, other=0.0))


@gluon.jit
def _from_end(first, length):
    """The plan goes by the rows before a block. A block of keys works for the rows after it, so a
    conversation's blocks are taken from its end."""
    return (length - 1) - (length - 1) % 128 - first


@gluon.jit
def _dkv_consumer(
    half: gl.constexpr, cos, sin, dk, dv, tiles, place, scale,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_k, s_v, s_q, s_do, s_lse, s_delta, kv_full, kv_free, full, free = tiles
    _cu_seqlens, _plan, blocks, _T, N = place
    ring = (s_q, s_do, s_lse, s_delta, full, free)
    s_k = s_k.index(half)
    s_v = s_v.index(half)
    step = 0
    turn = 0
    for base in range(0, blocks * G, gl.num_programs(0)):
        n, start, length, first, i_g = _work(base, place, G)
        first = _from_end(first, length)
        column = i_g.to(gl.int64) * E
        if n == N:
            _store_zeros(dk + column, start, first + half * 64, length, G * E, E)
            _store_zeros(dv + column, start, first + half * 64, length, G * E, E)
        elif n >= 0:
            left = length - first
            end = step + H // G * ((left + BM - 1) // BM)
            t = start + first + half * 64
            left -= half * 64
            mbarrier.wait(kv_full.index(half), turn & 1)
            b_dk, b_dv = _gather(half, s_k, s_v, ring, step, end, left, scale, E, BM, STAGES)
            # the next block's k and v may come while this one's gradients are written
            mbarrier.arrive(kv_free.index(half), count=1)
            _store_rows(b_dv, dv + column, t, 0, left, G * E, E)
            # scale is log2(e) / sqrt(E)
            b_dk = _unrotate(b_dk * (scale * LN2), cos, sin, t, left, E)
            _store_rows(b_dk, dk + column, t, 0, left, G * E, E)
            step = end
            turn += 1


@gluon.jit
def _gather(
    half: gl.constexpr, s_k, s_v, ring, step, end, left, scale,
    E: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(sqrt(E) R dk, dv) of 64 keys from the ring's tiles `step` to `end`: the queries of each head
    of the group. `left` is how many of a head's queries do not come before the first key."""
    s_q, s_do, s_lse, s_delta, full, free = ring
    dtype: gl.constexpr = s_k.dtype
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    AL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, AL, 2)
    ML: gl.constexpr = gl.SliceLayout(0, SL)
    b_zero = gl.zeros([64, BM], gl.float32, SL)
    b_dk = gl.zeros([64, E], gl.float32, AL)
    b_dv = gl.zeros([64, E], gl.float32, AL)
    o_n = gl.arange(0, 64, gl.SliceLayout(1, SL))
    o_m = gl.arange(0, BM, ML)

    # rows from this half's first key to the tile's first query
    ahead = -half * 64
    # one loop over all heads' tiles: two nested ones would spill
    for this in range(step, end):
        slot = this % STAGES
        mbarrier.wait(full.index(slot), (this // STAGES) & 1)
        # [64, BM], the scores transposed
        b_s = warpgroup_mma(
            s_k, s_q.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True
        )
        b_dp = warpgroup_mma(
            s_v, s_do.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True
        )

        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_lse = s_lse.index(slot).load(ML)
        b_p = gl.exp2(b_s * scale - b_lse[None, :])
        if ahead < 64:
            b_p = gl.where((o_m + ahead)[None, :] >= o_n[:, None], b_p, 0.0)
        b_pd = gl.convert_layout(b_p.to(dtype), P)
        b_dv = warpgroup_mma(b_pd, s_do.index(slot), b_dv, is_async=True)

        b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
        b_delta = s_delta.index(slot).load(ML)
        b_ds = gl.convert_layout((b_p * (b_dp - b_delta[None, :])).to(dtype), P)
        b_dk = warpgroup_mma(b_ds, s_q.index(slot), b_dk, is_async=True)
        b_dv, b_dk = warpgroup_mma_wait(0, deps=(b_dv, b_dk))
        mbarrier.arrive(free.index(slot), count=1)
        ahead += BM
        if ahead >= left:
            ahead = -half * 64
    return b_dk, b_dv


@gluon.jit
def _unrotate(b_x, cos, sin, t, rows, E: gl.constexpr):
    """R^T x for the rows from token t on: a gradient as it is before the rotation."""
    C: gl.constexpr = E // 2
    # columns c and c + C lie in the same thread: nothing moves
    b_lo, b_hi = gl.split(gl.permute(gl.reshape(b_x, [64, 2, C]), [0, 2, 1]))  # [64, C]
    L: gl.constexpr = b_lo.type.layout
    b_cos, b_sin = _tables(cos, sin, t, rows, C, L)
    b_x = gl.join(b_lo * b_cos + b_hi * b_sin, b_hi * b_cos - b_lo * b_sin)
    return gl.reshape(gl.permute(b_x, [0, 2, 1]), [64, E])


@gluon.jit(do_not_specialize=["blocks", "T", "N"])
def _dkv_kernel(
    d_q, d_k, d_v, d_do, lse, delta, cos, sin, cu_seqlens, plan, dk, dv, scale, blocks, T, N,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_k = gl.allocate_shared_memory(d_k.dtype, [2, 64, E], d_k.layout)
    s_v = gl.allocate_shared_memory(d_v.dtype, [2, 64, E], d_v.layout)
    s_q = gl.allocate_shared_memory(d_q.dtype, [STAGES, BM, E], d_q.layout)
    s_do = gl.allocate_shared_memory(d_do.dtype, [STAGES, BM, E], d_do.layout)
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BM], ROW)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BM], ROW)
    # k and v: two arrivals, one of each copy
    kv_full = _barriers(2, 2)
    kv_free = _barriers(2, 1)
    # two arrivals: of the copies, and of the producer after its own stores; one barrier more, where
    # a step lands that must be washed
    full = _barriers(STAGES + 1, 2)
    free = _barriers(STAGES, 2)
    tiles = (s_k, s_v, s_q, s_do, s_lse, s_delta, kv_full, kv_free, full, free)
    place = (cu_seqlens, plan, blocks, T, N)
    gl.warp_specialize(
        [
            (_dkv_consumer, (0, cos, sin, dk, dv, tiles, place, scale, H, G, E, BM, STAGES)),
            (_dkv_consumer, (1, cos, sin, dk, dv, tiles, place, scale, H, G, E, BM, STAGES)),
            (
                _dkv_producer,
                (d_k, d_v, d_q, d_do, lse, delta, tiles, place, H, G, E, BM, STAGES),
            ),
        ],
        # warps and registers a thread of the second consumer and of the producer
        [4, 1],
        [240, 24],
    )


# ---- the two functions to call, when available


def available(q: torch.Tensor) -> bool:
    """Whether these kernels take this q: on an H100 or H200, bf16 or fp16, heads of 128, at least
    128 rows."""
    half_precision = q.dtype in (torch.bfloat16, torch.float16)
    # a tensor that TMA reads is no smaller than a tile
    fits = half_precision and q.shape[-1] == HEAD_SIZE and len(q) >= BLOCK
    return HAVE_GLUON and fits and arch(q) == "sm_90"


def _programs(x):
    """One for each multiprocessor of the GPU that holds x."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _descriptor(x, rows):
    """What TMA must know of x [T, A, E] to read tiles of some rows of a head."""
    x = x.view(len(x), -1)
    # it reads from 16-byte boundaries
    if x.data_ptr() % 16:
        x = x.clone()
    block = [rows, HEAD_SIZE]
    dtype = getattr(gl, str(x.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor.from_tensor(x, block, layout)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) from q as it came and k rotated. tables: cos, sin, cu_seqlens, plan of BLOCK rows.

    All contiguous; available(q) is true.
    """
    cos, sin, cu_seqlens, plan = tables
    T, H, E = q.shape
    G = k.shape[1]
    N = len(cu_seqlens) - 1
    o = torch.empty_like(q)
    lse = q.new_empty(H, T, dtype=torch.float32)
    d_q = _descriptor(q, 64)
    d_k, d_v = (_descriptor(x, BLOCK) for x in (k, v))
    scale = E**-0.5 * LOG2E
    _fwd_kernel[(_programs(q),)](
        *(d_q, d_k, d_v, cos, sin, cu_seqlens, plan, o, lse, scale, len(plan), T, N),
        *(H, G, E, BLOCK, FWD_STAGES),
        num_warps=4,
    )
    return o, lse


def dkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dk, dv) from q and k rotated; dk as it is before the rotation. tables as in forward.

    All contiguous; available(q) is true.
    """
    cos, sin, cu_seqlens, plan = tables
    T, H, E = q.shape
    G = k.shape[1]
    N = len(cu_seqlens) - 1
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    d_q, d_do = (_descriptor(x, DKV_TILE) for x in (q, do))
    d_k, d_v = (_descriptor(x, 64) for x in (k, v))
    scale = E**-0.5 * LOG2E
    _dkv_kernel[(_programs(q),)](
        *(d_q, d_k, d_v, d_do, lse, delta, cos, sin, cu_seqlens, plan, dk, dv, scale),
        *(len(plan), T, N, H, G, E, DKV_TILE, DKV_STAGES),
        num_warps=4,
    )
    return dk, dv
