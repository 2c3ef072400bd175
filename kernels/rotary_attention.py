"""Rotary attention over packed conversations: causal within each conversation, blind across them.

    q'_t, k'_t = R_t q_t, R_t k_t        R_t turns pair (c, c + E/2) by position_t / theta^(2c / E)
    s_tj = q'_t . k'_j / sqrt(E)         j <= t, j in the conversation of t
    p_t = softmax(s_t)    o_t = sum_j p_tj v_j

    dp_tj = do_t . v_j    delta_t = do_t . o_t    ds_tj = p_tj (dp_tj - delta_t) / sqrt(E)
    dv_j = sum_t p_tj do_t
    dk_j = R_j^T sum_t ds_tj q'_t        dq_t = R_t^T sum_j ds_tj k'_j

Flash attention: a program holds BM rows of one head and walks over BN columns at a time with a
running maximum m and sum l; no T x T anything. Saved: q, k', v, o and lse_t = log sum_j exp(s_tj),
from which the backward kernels make p again. One of them owns rows (dq), the other columns (dk, dv,
over all the query heads of its group): 7 matmuls where atomics would need 5, but the same bits
every time.

Where to rotate. A query row is loaded by one forward program, which rotates it in registers: no
bytes but cos and sin. A key row is loaded by every later block of queries. Rotating it there would
take about 3.5 instructions per element of a key tile, on an H100 224 cycles of the vector units
beside 1,024 of the tensor cores for 128 x 64 x 128; the tile could no longer go straight from
memory to the tensor cores; and its cos and sin in fp32 are twice the bytes of the tile itself. So
k' is written once, ahead: 2 T G E elements of traffic, 268 MB or 0.09 ms at 3 TB/s for 16,384
tokens and 32 heads of 128. That is 16% of a forward pass at 400 TFLOP/s over ShareGPT-like lengths
(mean 1,500), 3% at 8,192 tokens each, 2% at mean 1,500 with 8 key heads for 64. It is saved in
place of k, so it costs no memory, and the backward pass rotates q once in the same way.

Schedule. A block's work grows with its place in its conversation, from one tile to length / BN.
_plan_kernel lists the blocks of all conversations, most work first, from cu_seqlens on the device:
programs start in that order, so the last ones to end are short, and no program is spent on padding
a short conversation to the longest. One small launch a pass.

Conversation n holds rows cu_seqlens[n] to cu_seqlens[n + 1]; rows after the last one are padding:
zeros, in gradients too. Shapes: q and o [T, H, E], k and v [T, G, E] of one dtype, cos and sin
[T, C] in fp32, cu_seqlens int32 [N + 1], lse and delta [H, T] in fp32. T packed tokens, N
conversations, H query heads in groups that share one of G key-value heads, A heads of either kind,
E head size, C = E / 2 rotation pairs, L tokens of one conversation. FLOPs: 2 H E sum(length^2)
forward, 5 H E sum(length^2) backward (7 executed).
"""

import math

import torch
import torch.nn.functional as F

from kernels import (
    arch,
    attention_without_cudnn,
    check,
    on_device_of,
    on_gpu,
    tl,
    triton,
    warn_once,
)

LOG2E = math.log2(math.e)
HEAD_SIZES = 32, 64, 128

# Tiles of (forward, dq, dk and dv): rows a program owns, rows it reads at a time, warps, stages of
# the software pipeline. sm_90: forward and dq from a sweep on one H100, 2026-11-27
# (results/gpu_tune_d331a37.json): best or within 1% at ShareGPT-like lengths. Its dk, dv row is not
# the fastest: (64, 64, 4, 2) was 14% faster there, but spills. The other GPUs' rows are from the
# ahead-of-time report (no spill, within shared memory), not measured.
LAUNCH = {
    "sm_80": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    "sm_90": ((64, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
    "sm_100": ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2)),
    "gfx942": ((128, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
    # small: conversations cross many borders
    "interpreter": ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
}
# For correctness only: IEEE products of fp32, which no tensor core makes.
LAUNCH_FP32 = ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1))


def rotate(x_TAE: torch.Tensor, cos_TC: torch.Tensor, sin_TC: torch.Tensor) -> torch.Tensor:
    """R_t x_t for every head A of x: LLaMA's "half" rotation, in fp32, back in the dtype of x."""
    lo_TAC, hi_TAC = x_TAE.float().chunk(2, -1)
    cos_T1C = cos_TC[:, None]
    sin_T1C = sin_TC[:, None]
    turned_lo_TAC = lo_TAC * cos_T1C - hi_TAC * sin_T1C
    turned_hi_TAC = hi_TAC * cos_T1C + lo_TAC * sin_T1C
    return torch.cat([turned_lo_TAC, turned_hi_TAC], -1).to(x_TAE.dtype)


# The compiler would compile its loop over conversations once for each number of them.
@torch.compiler.disable
def rotary_attention_ref(
    q_THE: torch.Tensor,
    k_TGE: torch.Tensor,
    v_TGE: torch.Tensor,
    cos_TC: torch.Tensor,
    sin_TC: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """The definition in plain PyTorch: o_THE."""
    q_THE = rotate(q_THE, cos_TC, sin_TC)
    k_TGE = rotate(k_TGE, cos_TC, sin_TC)
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(ends, ends[1:])]
    padding = len(q_THE) - ends[-1]
    lengths.append(padding)

    # One small attention per conversation, never a T x T mask; split, because slices would each get
    # a T-row gradient.
    pieces = list(zip(q_THE.split(lengths), k_TGE.split(lengths), v_TGE.split(lengths)))
    outputs = []
    for piece in pieces[:-1]:
        q_1HLE, k_1GLE, v_1GLE = (x.transpose(0, 1)[None] for x in piece)
        with attention_without_cudnn():
            o_1HLE = F.scaled_dot_product_attention(
                q_1HLE, k_1GLE, v_1GLE, is_causal=True, enable_gqa=True
            )
        outputs.append(o_1HLE[0].transpose(0, 1))
    outputs.append(torch.zeros_like(pieces[-1][0]))
    return torch.cat(outputs)


# i_ program index, o_ offsets, m_ mask, b_ block held in registers; bare names are pointers, or
# scalars in registers.


# T and N are other numbers in every batch: Triton is not to compile a kernel for some of them.
@triton.jit(do_not_specialize=["T", "N"])
def _plan_kernel(cu_seqlens, plan, T, N, BM: tl.constexpr, BC: tl.constexpr):
    """plan[rank] = (conversation, first row in it) of every block of BM rows, the blocks with the
    most rows before them first.

    Program i takes slot i. Conversation n, with ceil(length / BM) blocks, begins at slot
    cu_seqlens[n] // BM + n: always room enough, and no sum over the conversations before it. Slots
    left over rank last, as (-1, 0). Padding is conversation N.
    """
    i = tl.program_id(0)
    # this slot's conversation; blocks in all; blocks of the conversations up to it
    n = -1
    total = 0
    before = 0
    for i_c in range(0, N + 1, BC):
        o_c = i_c + tl.arange(0, BC)
        b_start = tl.load(cu_seqlens + o_c, mask=o_c <= N, other=0)  # [BC]
        b_end = tl.load(cu_seqlens + o_c + 1, mask=o_c < N, other=T)
        m_mine = (o_c <= N) & (b_start // BM + o_c <= i)
        b_blocks = tl.where(o_c <= N, tl.cdiv(b_end - b_start, BM), 0)
        n += tl.sum(m_mine.to(tl.int32), 0)
        total += tl.sum(b_blocks, 0)
        before += tl.sum(tl.where(m_mine, b_blocks, 0), 0)
    start = tl.load(cu_seqlens + n)
    end = tl.load(cu_seqlens + n + 1, mask=n < N, other=T)
    block = i - (start // BM + n)
    if block >= tl.cdiv(end - start, BM):
        at = plan + 2 * (total - before + i).to(tl.int64)
        tl.store(at, -1)
        tl.store(at + 1, 0)
    else:
        # how many blocks have more rows before them, or as many and an earlier conversation
        rank = 0
        for i_c in range(0, N + 1, BC):
            o_c = i_c + tl.arange(0, BC)
            b_start = tl.load(cu_seqlens + o_c, mask=o_c <= N, other=0)
            b_end = tl.load(cu_seqlens + o_c + 1, mask=o_c < N, other=T)
            b_blocks = tl.where(o_c <= N, tl.cdiv(b_end - b_start, BM), 0)
            b_longer = tl.maximum(b_blocks - block - 1, 0)
            b_earlier = ((o_c < n) & (b_blocks > block)).to(tl.int32)
            rank += tl.sum(b_longer + b_earlier, 0)
        at = plan + 2 * rank.to(tl.int64)
        tl.store(at, n)
        tl.store(at + 1, block * BM)


@triton.jit
def _planned(plan, cu_seqlens, T, N):
    """Of program (i, head): conversation, the block's first row in it, the conversation's first row
    and its length."""
    at = plan + 2 * tl.program_id(0).to(tl.int64)
    n = tl.load(at)
    first = tl.load(at + 1)
    start = tl.load(cu_seqlens + n, mask=n >= 0, other=0)
    end = tl.load(cu_seqlens + n + 1, mask=n < N, other=T)
    return n, first, start.to(tl.int64), end - start


@triton.jit
def _turn(b_lo, b_hi, cos, sin, o_t, m_t, way, C: tl.constexpr):
    """Both halves of rows o_t, fp32 [BT, C], turned by their angles (way = 1: R) or back
    (way = -1: R^T)."""
    o_c = o_t[:, None] * C + tl.arange(0, C)
    b_cos = tl.load(cos + o_c, mask=m_t[:, None], other=0.0)
    b_sin = tl.load(sin + o_c, mask=m_t[:, None], other=0.0) * way
    return b_lo * b_cos - b_hi * b_sin, b_hi * b_cos + b_lo * b_sin


@triton.jit
def _rotate_kernel(x, y, cos, sin, A: tl.constexpr, E: tl.constexpr, BA: tl.constexpr):
    """y = R x, for BA heads of one row: contiguous memory, and one load of its cos and sin."""
    C: tl.constexpr = E // 2
    i_t = tl.program_id(0).to(tl.int64)  # int64: T * A * E passes 2^31 at long contexts
    o_a = tl.program_id(1).to(tl.int64) * BA + tl.arange(0, BA)
    m_a = (o_a < A)[:, None]
    o_c = tl.arange(0, C)
    b_cos = tl.load(cos + i_t * C + o_c)[None, :]  # [1, C]
    b_sin = tl.load(sin + i_t * C + o_c)[None, :]
    o_x = i_t * (A * E) + o_a[:, None] * E + o_c
    b_lo = tl.load(x + o_x, mask=m_a, other=0.0).to(tl.float32)  # [BA, C]
    b_hi = tl.load(x + o_x + C, mask=m_a, other=0.0).to(tl.float32)
    b_turned_lo = b_lo * b_cos - b_hi * b_sin
    b_turned_hi = b_hi * b_cos + b_lo * b_sin
    tl.store(y + o_x, b_turned_lo.to(y.dtype.element_ty), mask=m_a)
    tl.store(y + o_x + C, b_turned_hi.to(y.dtype.element_ty), mask=m_a)


@triton.jit
def _store_unrotated(
    b_x, x, o_t, m_t, cos, sin, stride: tl.constexpr, E: tl.constexpr, BT: tl.constexpr
):
    """Rows o_t of x = R^T b_x: a gradient as it is before the rotation."""
    C: tl.constexpr = E // 2
    b_lo, b_hi = tl.split(tl.permute(tl.reshape(b_x, [BT, 2, C]), [0, 2, 1]))  # [BT, C] each
    b_lo, b_hi = _turn(b_lo, b_hi, cos, sin, o_t, m_t, -1, C)
    o_x = o_t[:, None] * stride + tl.arange(0, C)
    tl.store(x + o_x, b_lo.to(x.dtype.element_ty), mask=m_t[:, None])
    tl.store(x + o_x + C, b_hi.to(x.dtype.element_ty), mask=m_t[:, None])


@triton.jit
def _load_tile(k, v, o_n, length, MASK: tl.constexpr, stride: tl.constexpr, E: tl.constexpr):
    """Rows o_n of a conversation's keys and values, [BN, E] each. MASK: some lie beyond its end."""
    o_kv = o_n.to(tl.int64)[:, None] * stride + tl.arange(0, E)
    if MASK:
        m_n = (o_n < length)[:, None]
        b_k = tl.load(k + o_kv, mask=m_n, other=0.0)
        b_v = tl.load(v + o_kv, mask=m_n, other=0.0)
    else:
        b_k = tl.load(k + o_kv)
        b_v = tl.load(v + o_kv)
    return b_k, b_v


@triton.jit
def _fwd_tiles(
    b_o, b_m, b_l, b_q, k, v, o_m, length, begin, end, scale,
    MASK: tl.constexpr, stride: tl.constexpr, E: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Take the keys begin to end of a conversation into the running output, maximum and sum.
    MASK: some of them come after their query."""
    for i_n in range(begin, end, BN):
        o_n = i_n + tl.arange(0, BN)
        b_k, b_v = _load_tile(k, v, o_n, length, MASK, stride, E)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
        if MASK:
            b_s = tl.where(o_m[:, None] >= o_n, b_s, float("-inf"))
        # scaled after the maximum: then scale and subtraction are one instruction an element
        b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_scale = tl.exp2(b_m - b_new)
        b_l = b_l * b_scale + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_scale[:, None], input_precision="ieee")
        b_m = b_new
    return b_o, b_m, b_l


@triton.jit(do_not_specialize=["T", "N"])
def _fwd_kernel(
    q, k, v, cos, sin, cu_seqlens, plan, o, lse, scale, T, N,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n, first, start, length = _planned(plan, cu_seqlens, T, N)
    if n < 0:
        return
    i_h = tl.program_id(1).to(tl.int64)
    o_e = tl.arange(0, E)
    o_m = first + tl.arange(0, BM)  # within the conversation
    m_m = o_m < length
    o_t = start + o_m
    at_o = o + i_h * E + o_t[:, None] * (H * E) + o_e
    if n == N:
        tl.store(at_o, tl.zeros([BM, E], dtype=o.dtype.element_ty), mask=m_m[:, None])
        tl.store(lse + i_h * T + o_t, tl.zeros([BM], dtype=tl.float32), mask=m_m)
        return
    o_q = i_h * E + o_t[:, None] * (H * E) + tl.arange(0, E // 2)
    b_lo = tl.load(q + o_q, mask=m_m[:, None], other=0.0).to(tl.float32)  # [BM, C]
    b_hi = tl.load(q + o_q + E // 2, mask=m_m[:, None], other=0.0).to(tl.float32)
    b_lo, b_hi = _turn(b_lo, b_hi, cos, sin, o_t, m_m, 1, E // 2)
    b_q = tl.reshape(tl.permute(tl.join(b_lo, b_hi), [0, 2, 1]), [BM, E]).to(q.dtype.element_ty)
    k += start * (G * E) + i_h // (H // G) * E
    v += start * (G * E) + i_h // (H // G) * E
    b_o = tl.zeros([BM, E], dtype=tl.float32)
    b_m = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BM], dtype=tl.float32)
    end = tl.minimum(first + BM, length)
    b_o, b_m, b_l = _fwd_tiles(
        b_o, b_m, b_l, b_q, k, v, o_m, length, 0, first, scale, False, G * E, E, BN
    )
    b_o, b_m, b_l = _fwd_tiles(
        b_o, b_m, b_l, b_q, k, v, o_m, length, first, end, scale, True, G * E, E, BN
    )
    tl.store(at_o, (b_o / b_l[:, None]).to(o.dtype.element_ty), mask=m_m[:, None])
    tl.store(lse + i_h * T + o_t, b_m + tl.log2(b_l), mask=m_m)  # in units of log 2, like s


@triton.jit
def _dq_tiles(
    b_dq, b_q, b_do, b_lse, b_delta, k, v, o_m, length, begin, end, scale,
    MASK: tl.constexpr, stride: tl.constexpr, E: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    for i_n in range(begin, end, BN):
        o_n = i_n + tl.arange(0, BN)
        b_k, b_v = _load_tile(k, v, o_n, length, MASK, stride, E)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BM, BN]
        if MASK:
            b_s = tl.where(o_m[:, None] >= o_n, b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit(do_not_specialize=["T", "N"])
def _dq_kernel(
    q, k, v, o, do, lse, delta, cos, sin, cu_seqlens, plan, dq, scale, norm, T, N,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q and k are rotated. norm = 1 / sqrt(E), scale = norm * log2(e). The program that owns a row
    also writes its delta, which the other backward kernel reads."""
    n, first, start, length = _planned(plan, cu_seqlens, T, N)
    if n < 0:
        return
    i_h = tl.program_id(1).to(tl.int64)
    o_m = first + tl.arange(0, BM)
    m_m = o_m < length
    o_t = start + o_m
    o_te = i_h * E + o_t[:, None] * (H * E) + tl.arange(0, E)
    if n == N:
        tl.store(dq + o_te, tl.zeros([BM, E], dtype=dq.dtype.element_ty), mask=m_m[:, None])
        return
    b_q = tl.load(q + o_te, mask=m_m[:, None], other=0.0)  # [BM, E]
    b_do = tl.load(do + o_te, mask=m_m[:, None], other=0.0)
    b_o = tl.load(o + o_te, mask=m_m[:, None], other=0.0)
    b_lse = tl.load(lse + i_h * T + o_t, mask=m_m, other=0.0)  # [BM]
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + i_h * T + o_t, b_delta, mask=m_m)
    k += start * (G * E) + i_h // (H // G) * E
    v += start * (G * E) + i_h // (H // G) * E
    end = tl.minimum(first + BM, length)
    b_dq = tl.zeros([BM, E], dtype=tl.float32)
    b_dq = _dq_tiles(
        b_dq, b_q, b_do, b_lse, b_delta, k, v, o_m, length, 0, first, scale, False, G * E, E, BN
    )
    b_dq = _dq_tiles(
        b_dq, b_q, b_do, b_lse, b_delta, k, v, o_m, length, first, end, scale, True, G * E, E, BN
    )
    _store_unrotated(b_dq * norm, dq + i_h * E, o_t, m_m, cos, sin, H * E, E, BM)


@triton.jit(do_not_specialize=["T", "N"])
def _dkv_kernel(
    q, k, v, do, lse, delta, cos, sin, cu_seqlens, plan, dk, dv, scale, norm, T, N,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """q and k are rotated. The plan goes by the rows before a block; a block of keys works for the
    rows after it, so a conversation's blocks are taken from its end."""
    n, first, start, length = _planned(plan, cu_seqlens, T, N)
    if n < 0:
        return
    i_g = tl.program_id(1).to(tl.int64)
    first = (length - 1) - (length - 1) % BN - first
    o_n = first + tl.arange(0, BN)
    m_n = o_n < length
    o_t = start + o_n
    o_te = i_g * E + o_t[:, None] * (G * E) + tl.arange(0, E)
    if n == N:
        b_zero = tl.zeros([BN, E], dtype=dk.dtype.element_ty)
        tl.store(dk + o_te, b_zero, mask=m_n[:, None])
        tl.store(dv + o_te, b_zero, mask=m_n[:, None])
        return
    b_k = tl.load(k + o_te, mask=m_n[:, None], other=0.0)  # [BN, E]
    b_v = tl.load(v + o_te, mask=m_n[:, None], other=0.0)
    b_dk = tl.zeros([BN, E], dtype=tl.float32)
    b_dv = tl.zeros([BN, E], dtype=tl.float32)
    o_e = tl.arange(0, E)
    tiles = tl.cdiv(length - first, BM)
    # the tiles of all the query heads that share these keys: two nested loops would spill
    for i in range(0, H // G * tiles):
        i_h = i_g * (H // G) + i // tiles
        o_m = first + ((i % tiles).to(tl.int64) * BM).to(tl.int32) + tl.arange(0, BM)
        m_m = o_m < length
        o_q = (start + o_m)[:, None] * (H * E) + i_h * E + o_e
        # [BM, E]; rows beyond the conversation, q = do = 0, add nothing
        b_q = tl.load(q + o_q, mask=m_m[:, None], other=0.0)
        b_do = tl.load(do + o_q, mask=m_m[:, None], other=0.0)
        b_lse = tl.load(lse + i_h * T + start + o_m, mask=m_m, other=0.0)  # [BM]
        b_delta = tl.load(delta + i_h * T + start + o_m, mask=m_m, other=0.0)
        # [BN, BM], the scores transposed
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
        b_p = tl.exp2(tl.where(o_m >= o_n[:, None], b_s, float("-inf")) - b_lse)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    tl.store(dv + o_te, b_dv.to(dv.dtype.element_ty), mask=m_n[:, None])
    _store_unrotated(b_dk * norm, dk + i_g * E, o_t, m_n, cos, sin, G * E, E, BN)


def _launch(x, which):
    """(rows that a program owns, what the kernel is launched with) of forward 0, dq 1, dk and dv 2
    on the GPU that holds x."""
    name = arch(x)
    table = LAUNCH[name]
    if x.dtype == torch.float32 and name != "interpreter":
        table = LAUNCH_FP32
    BM, BN, warps, stages = table[which]
    if x.shape[-1] == 32:
        # as little work a tile as the head is small; at 64 columns sm_100 spills
        BN = min(BN, 32)
    return BM, {"BM": BM, "BN": BN, "num_warps": warps, "num_stages": stages}


def _plan(cu_seqlens, T, BM):
    """int32 [blocks, 2], see _plan_kernel."""
    N = len(cu_seqlens) - 1
    # at most floor(T / BM) full blocks, and a last one of each conversation
    plan = cu_seqlens.new_empty(T // BM + N + 1, 2)
    with on_device_of(plan):
        _plan_kernel[(len(plan),)](cu_seqlens, plan, T, N, BM, 128)
    return plan


def _rotate(x, cos, sin):
    """R x, a copy."""
    T, A, E = x.shape
    y = torch.empty_like(x)
    BA = min(triton.next_power_of_2(A), 32)
    with on_device_of(x):
        _rotate_kernel[(T, triton.cdiv(A, BA))](x, y, cos, sin, A, E, BA, num_warps=8)
    return y


@torch.library.custom_op("crlft::rotary_attention", mutates_args=())
def rotary_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(o, k', lse)."""
    T, H, E = q.shape
    G = k.shape[1]
    N = len(cu_seqlens) - 1
    q, k, v, cos, sin, cu_seqlens = (x.contiguous() for x in (q, k, v, cos, sin, cu_seqlens))
    k = _rotate(k, cos, sin)
    BM, tiles = _launch(q, 0)
    plan = _plan(cu_seqlens, T, BM)
    o = torch.empty_like(q)
    lse = q.new_empty(H, T, dtype=torch.float32)
    scale = E**-0.5 * LOG2E
    with on_device_of(q):
        _fwd_kernel[(len(plan), H)](
            q, k, v, cos, sin, cu_seqlens, plan, o, lse, scale, T, N, H, G, E, **tiles
        )
    return o, k, lse


@rotary_attention_op.register_fake
def _(q, k, v, cos, sin, cu_seqlens):
    T, H, _E = q.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    rotated_k = torch.empty_like(k, memory_format=torch.contiguous_format)
    return o, rotated_k, q.new_empty(H, T, dtype=torch.float32)


@torch.library.custom_op("crlft::rotary_attention_bwd", mutates_args=())
def rotary_attention_bwd_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) from q as it came and k rotated."""
    T, H, E = q.shape
    G = k.shape[1]
    N = len(cu_seqlens) - 1
    norm = E**-0.5
    scale = norm * LOG2E
    q, v, cos, sin, cu_seqlens, do = (x.contiguous() for x in (q, v, cos, sin, cu_seqlens, do))

    q = _rotate(q, cos, sin)
    tables = (cos, sin, cu_seqlens)
    sizes = (scale, norm, T, N, H, G, E)

    # dq first: it also writes delta
    BM, tiles = _launch(q, 1)
    plan = _plan(cu_seqlens, T, BM)
    dq = torch.empty_like(q)
    delta = torch.empty_like(lse)
    with on_device_of(q):
        _dq_kernel[(len(plan), H)](q, k, v, o, do, lse, delta, *tables, plan, dq, *sizes, **tiles)

    # here the rows that a program owns are keys
    BN, tiles = _launch(q, 2)
    tiles["BM"], tiles["BN"] = tiles["BN"], tiles["BM"]
    if BN != BM:
        plan = _plan(cu_seqlens, T, BN)
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    inputs = (q, k, v, do, lse, delta)
    with on_device_of(q):
        _dkv_kernel[(len(plan), G)](*inputs, *tables, plan, dk, dv, *sizes, **tiles)
    return dq, dk, dv


@rotary_attention_bwd_op.register_fake
def _(q, k, v, cos, sin, cu_seqlens, o, lse, do):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, _k, v, cos, sin, cu_seqlens = inputs
    o, k, lse = output
    # no zeros the size of k for the gradient of k' that nobody asks for
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, cos, sin, cu_seqlens, o, lse)


def _backward(ctx, do, _dk, _dlse):
    dq, dk, dv = rotary_attention_bwd_op(*ctx.saved_tensors, do)
    return dq, dk, dv, None, None, None


rotary_attention_op.register_autograd(_backward, setup_context=_save)


def rotary_attention(
    q_THE: torch.Tensor,
    k_TGE: torch.Tensor,
    v_TGE: torch.Tensor,
    cos_TC: torch.Tensor,
    sin_TC: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """o_THE. Triton on CUDA tensors with a head size of 32, 64 or 128, rotary_attention_ref
    elsewhere.

    ValueError: shapes or dtypes that do not belong together. cu_seqlens itself is not read here (on
    a GPU that is a sync): it begins with 0, does not fall, and ends at most at T.
    """
    _check_shapes(q_THE, k_TGE, v_TGE, cos_TC, sin_TC)
    E = q_THE.shape[-1]
    if on_gpu(q_THE) and E not in HEAD_SIZES:
        warn_once(
            f"rotary_attention: no kernel for head size {E}, only for {HEAD_SIZES}; "
            "the PyTorch reference runs instead"
        )
    if not on_gpu(q_THE) or E not in HEAD_SIZES:
        return rotary_attention_ref(q_THE, k_TGE, v_TGE, cos_TC, sin_TC, cu_seqlens)

    name = "rotary_attention"
    same_dtype = q_THE.dtype == k_TGE.dtype == v_TGE.dtype
    check(name, same_dtype, "q, k and v differ in dtype")
    fp32_tables = cos_TC.dtype == sin_TC.dtype == torch.float32
    check(name, fp32_tables, "cos and sin are fp32")
    not_int32 = f"cu_seqlens is {cu_seqlens.dtype}, not int32"
    check(name, cu_seqlens.dtype == torch.int32, not_int32)
    o_THE, _, _ = rotary_attention_op(q_THE, k_TGE, v_TGE, cos_TC, sin_TC, cu_seqlens)
    return o_THE


def _check_shapes(q_THE, k_TGE, v_TGE, cos_TC, sin_TC):
    name = "rotary_attention"
    shapes = (
        f"q {tuple(q_THE.shape)}, k {tuple(k_TGE.shape)}, v {tuple(v_TGE.shape)}, "
        f"cos {tuple(cos_TC.shape)}"
    )
    T, H, E = q_THE.shape
    G = k_TGE.shape[1]
    heads_fit = k_TGE.shape == v_TGE.shape == (T, G, E) and H % G == 0
    check(name, heads_fit, f"{shapes}; want [T, H, E] and twice [T, G, E], G dividing H")
    tables_fit = cos_TC.shape == sin_TC.shape == (T, E // 2)
    check(name, tables_fit, f"{shapes}; want cos and sin [T, E / 2]")
