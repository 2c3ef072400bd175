"""RMSNorm with an optional residual add, forward and backward in one pass over each row.

    h = x + residual                     (h = x without a residual)
    r = 1 / sqrt(mean(h^2) + eps)        one number per row, fp32, saved for backward
    y = w * round(h * r)                 round = cast to the dtype of x, as LLaMA-2 does

    With g = w * dy and n = h * r, and dh what comes back along the residual stream:
    dx = dresidual = r * (g - n * mean(g * n)) + dh
    dw = sum over rows of dy * n         each program sums its own rows in fp32; no atomics,
                                         so the same inputs give the same bits

Shapes: T tokens, D model width; x, residual, y, h [T, D] and w [D] of one dtype. Arithmetic in
fp32. Bytes, in units of T x D elements: forward 2 (read x, write y), with a residual 4; backward 3
(read h, dy, write dx), with a residual 4, and PROGRAMS x D fp32 for the partial dw. A few FLOPs
per element: memory-bound on every GPU.
"""

from typing import Optional

import torch

from kernels import arch, check, on_device_of, on_gpu, tl, triton

# Backward programs, two per multiprocessor: enough loads in flight, few rows of partial dw. Rows
# above 4,096 take so many registers that only one fits, and a second would wait for it: half as
# many then. sm_90 as measured on an H100, 2026-11-27 (results/gpu_tune_d331a37.json).
PROGRAMS = {"sm_80": 216, "sm_90": 264, "sm_100": 296, "gfx942": 608, "interpreter": 3}
# of a program; more gain nothing, and lose 6% of the backward pass at 5,120 (H100)
MOST_WARPS = 8


def rms_norm_ref(
    x_TD: torch.Tensor, w_D: torch.Tensor, eps: float, residual_TD: torch.Tensor | None = None
):
    """The definition in plain PyTorch: y_TD, or (y_TD, h_TD) with a residual."""
    h_TD = x_TD if residual_TD is None else x_TD + residual_TD
    h32_TD = h_TD.float()
    n_TD = h32_TD * torch.rsqrt(h32_TD.square().mean(-1, keepdim=True) + eps)
    y_TD = w_D * n_TD.to(x_TD.dtype)
    return y_TD if residual_TD is None else (y_TD, h_TD)


# i_ program index, o_ offsets, m_ mask, b_ block held in registers; bare names are pointers.


@triton.jit
def _fwd_kernel(x, residual, w, y, h, r, eps, D: tl.constexpr, BD: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)  # int64: T * D passes 2^31 at long contexts
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_h = tl.load(x + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    if residual is not None:
        b_h += tl.load(residual + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        # what is normed is the stream as it is stored
        b_h = b_h.to(h.dtype.element_ty).to(tl.float32)
        tl.store(h + i_t * D + o_d, b_h.to(h.dtype.element_ty), mask=m_d)
    b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    b_r = tl.rsqrt(tl.sum(b_h * b_h, 0) / D + eps)
    b_n = (b_h * b_r).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + i_t * D + o_d, (b_w * b_n).to(y.dtype.element_ty), mask=m_d)
    tl.store(r + i_t, b_r)


# T is another number in every batch: Triton is not to compile a kernel for some of them.
@triton.jit(do_not_specialize=["T"])
def _bwd_kernel(h, w, r, dy, dh, dx, dw_partial, T, D: tl.constexpr, BD: tl.constexpr):
    i_p = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    b_dw = tl.zeros([BD], dtype=tl.float32)
    # rows p, p + P, ..; the next is on its way while one is summed
    for i_t in tl.range(i_p, T, tl.num_programs(0), num_stages=2):
        b_h = tl.load(h + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_r = tl.load(r + i_t)
        b_n = b_h * b_r
        b_g = b_w * b_dy
        b_dx = b_r * (b_g - b_n * (tl.sum(b_g * b_n, 0) / D))
        if dh is not None:
            b_dx += tl.load(dh + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(dx + i_t * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m_d)
        # after the store: before it, fp16 at D = 4,096 spills (kernels.compile)
        b_dw += b_dy * b_n
    tl.store(dw_partial + i_p * D + o_d, b_dw, mask=m_d)


def _shape(D):
    """What both kernels are launched with for rows of D elements."""
    BD = triton.next_power_of_2(D)
    # 8 elements a thread, one 16-byte load of bf16, as long as MOST_WARPS are enough for that
    num_warps = min(max(BD // 256, 1), MOST_WARPS)
    return {"D": D, "BD": BD, "num_warps": num_warps}


@torch.library.custom_op("crlft::rms_norm", mutates_args=())
def rms_norm_op(
    x: torch.Tensor, residual: Optional[torch.Tensor], w: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, r). Without a residual h is empty: the stream is then x itself, and an operator
    may not return one of its inputs."""
    T, D = x.shape
    x = x.contiguous()
    w = w.contiguous()
    y = torch.empty_like(x)
    r = x.new_empty(T, dtype=torch.float32)
    if residual is None:
        h = x.new_empty(0)
    else:
        h = torch.empty_like(x)
        residual = residual.contiguous()
    with on_device_of(x):
        _fwd_kernel[(T,)](x, residual, w, y, h, r, eps, **_shape(D))
    return y, h, r


@rms_norm_op.register_fake
def _(x, residual, w, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if residual is None else torch.empty_like(y)
    # x.shape[0] stays a symbol under torch.compile, len(x) becomes a number: a graph for each T
    r = x.new_empty(x.shape[0], dtype=torch.float32)
    return y, h, r


@torch.library.custom_op("crlft::rms_norm_bwd", mutates_args=())
def rms_norm_bwd_op(
    h: torch.Tensor, w: torch.Tensor, r: torch.Tensor, dy: torch.Tensor, dh: Optional[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dw). dh is None where nothing comes back along the residual stream."""
    T, D = h.shape
    h = h.contiguous()
    w = w.contiguous()
    dy = dy.contiguous()
    dh = None if dh is None else dh.contiguous()
    programs = PROGRAMS[arch(h)] if D <= 4096 else PROGRAMS[arch(h)] // 2
    dx = torch.empty_like(h)
    dw_partial = h.new_empty(programs, D, dtype=torch.float32)
    with on_device_of(h):
        _bwd_kernel[(programs,)](h, w, r, dy, dh, dx, dw_partial, T, **_shape(D))
    return dx, dw_partial.sum(0).to(w.dtype)


@rms_norm_bwd_op.register_fake
def _(h, w, r, dy, dh):
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    return dx, dw


def _save(ctx, inputs, output):
    x, residual, w, _eps = inputs
    _y, h, r = output
    ctx.has_residual = residual is not None
    # no zeros for r's gradient, nor for h's where nobody used it
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h if ctx.has_residual else x, w, r)


def _backward(ctx, dy, dh, _dr):
    h, w, r = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(h)
    if not ctx.has_residual:
        # h was an empty tensor, and so is its gradient
        dh = None
    dx, dw = rms_norm_bwd_op(h, w, r, dy, dh)
    dresidual = dx if ctx.has_residual else None
    return dx, dresidual, dw, None


rms_norm_op.register_autograd(_backward, setup_context=_save)


def rms_norm(
    x_TD: torch.Tensor,
    w_D: torch.Tensor,
    eps: float = 1e-5,
    residual_TD: torch.Tensor | None = None,
):
    """y_TD; with a residual (y_TD, h_TD), h = x + residual being the stream to carry on with.

    Triton on CUDA tensors, rms_norm_ref elsewhere. ValueError: shapes or dtypes that do not
    belong together.
    """
    shapes = f"x is {tuple(x_TD.shape)}, w {tuple(w_D.shape)}; want [T, D] and [D]"
    check("rms_norm", x_TD.ndim == 2 and w_D.shape == x_TD.shape[1:], shapes)
    same_shape = residual_TD is None or residual_TD.shape == x_TD.shape
    check("rms_norm", same_shape, "x and residual differ in shape")
    if not on_gpu(x_TD):
        return rms_norm_ref(x_TD, w_D, eps, residual_TD)

    same_dtype = x_TD.dtype == w_D.dtype
    if residual_TD is not None:
        same_dtype = same_dtype and residual_TD.dtype == x_TD.dtype
    check("rms_norm", same_dtype, "x, w and residual differ in dtype")
    y_TD, h_TD, _ = rms_norm_op(x_TD, residual_TD, w_D, eps)
    return y_TD if residual_TD is None else (y_TD, h_TD)
