"""Linear layer and weighted cross-entropy in one pass: the loss of C-RLFT (Eq. 6).

    z_t = M h_t                                logits of row t, one for each of V tokens; M is
                                               lm_head's matrix
    nll_t = log sum_v exp(z_tv) - z_t,label    -log pi(y_t | x, c)
    loss = sum_t w_t nll_t                     w_t = exp(r_c / beta), the loss weight. A sum: the
                                               caller divides it once, by the step's sum of w

    dz_t = w_t (softmax(z_t) - onehot(label_t))
    dh_t = M^T dz_t        dM = sum_t dz_t h_t^T

Rows of weight 0 are left out, not multiplied by 0: they cost nothing, and an infinite logit there
cannot make a NaN. Both gradients are linear in the scalar that comes from above, so they are made
in the forward pass, a chunk of rows at a time: a matmul writes the chunk's logits, one kernel reads
each row twice and leaves dz in its place, two matmuls take dz to dh and dM, and the next chunk
overwrites it: no T x V matrix ever exists. Saved for backward: dh in the caller's dtype, and dM in
fp32, which is also the accumulator of the chunks; the backward pass multiplies both by the scalar
in fp32, and rounds. dz and dh hold w_t before that scalar: in fp16, weights far above 1 can
overflow (65,504) where w_t divided by their sum would not.

Shapes: hidden [T, D], matrix [V, D] of one dtype; labels int64 [T], in [0, V) where the weight is
not 0; weights fp32 [T]; R <= T rows have a weight; r rows of a chunk; S columns of the logits'
memory, a multiple of 64, W of them in use (S on a GPU, V elsewhere). nll, correct, loss in fp32.
FLOPs: 6 R D V in three matmuls (16.3 ms at 790 TFLOP/s for 16,384 rows of 4,096 and V = 32,001).
Bytes beyond those of the matmuls' inputs and results: 3 R V elements for the softmax (read twice,
written once; 3.1 GB in bf16, 1 ms at 3 TB/s), and each chunk reads and writes dM in fp32 (1 GB, so
chunks are large: four here). Memory: one chunk of logits, 0.26 GB, its rows, and on a GPU a copy
of M where V is no multiple of 64.

Alignment: V is odd once a token is added (32,001), and then no row of logits, and no column of M,
starts on a 16-byte border. On an H100 the matmul of the logits ran at 101 TFLOP/s with 32,001 and
at 787 with 32,064, that of dh at 148 and 823, that of dM at 153 and 721 (results/gpu_check.json).
So on a GPU M is copied once a call into S rows, S the next multiple of 64, with zeros behind V:
0.5 GB of traffic, 0.2 ms, for 69 ms saved. Logits beyond V are not read; their dz is 0.
"""

import torch
import torch.nn.functional as F

from kernels import check, on_device_of, on_gpu, tl, triton

# Bytes of logits alive at once: 512 rows of fp32, 4,096 of bf16 at V = 32,001.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**28}
# Rows of logits in elements: 64 of bf16 are a cache line.
ALIGNMENT = 64
# Logits that a program of the softmax reads at a time, and its warps: within 1% of the fastest that
# was tried on an H100, 2026-11-27 (results/gpu_tune_d331a37.json).
BLOCK = 4096
WARPS = 8


def linear_cross_entropy_ref(
    hidden_TD: torch.Tensor,
    matrix_VD: torch.Tensor,
    labels_T: torch.Tensor,
    weights_T: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, holding all logits: (loss, nll_T, correct_T), nll and correct 0 where the
    weight is 0."""
    rows_R = weights_T.nonzero()[:, 0]
    labels_R = labels_T[rows_R]
    logits_RV = F.linear(hidden_TD[rows_R], matrix_VD).float()
    nll_R = F.cross_entropy(logits_RV, labels_R, reduction="none")
    label_logit_R = logits_RV.gather(1, labels_R[:, None])[:, 0]
    correct_R = (label_logit_R == logits_RV.amax(-1)).float()

    loss = (weights_T[rows_R] * nll_R).sum()
    zeros_T = torch.zeros_like(weights_T)
    nll_T = zeros_T.index_copy(0, rows_R, nll_R.detach())
    correct_T = zeros_T.index_copy(0, rows_R, correct_R.detach())
    return loss, nll_T, correct_T


def softmax_gradient_ref(z_rS, labels_r, weights_r, V):
    """(nll_r, correct_r) of r rows of logits, in the first V of S columns; they become their dz
    in place."""
    z_rV = z_rS[:, :V]
    labels_r1 = labels_r[:, None]
    weights_r1 = weights_r[:, None]
    # in fp32 this is z itself, not a copy
    z32_rV = z_rV.float()
    z32_rV -= z32_rV.amax(-1, keepdim=True)
    label_z_r1 = z32_rV.gather(1, labels_r1)
    sum_r1 = z32_rV.exp_().sum(-1, keepdim=True)
    z32_rV.mul_(weights_r1 / sum_r1)
    z32_rV.scatter_add_(1, labels_r1, -weights_r1)
    z_rV.copy_(z32_rV)
    nll_r1 = sum_r1.log() - label_z_r1
    # the maximum was subtracted: a label that has it stands at 0
    correct_r = (label_z_r1[:, 0] == 0).float()
    return nll_r1[:, 0], correct_r


# i_ program index, o_ offsets, m_ mask, b_ block held in registers; bare names are pointers, or
# scalars in registers.


@triton.jit
def _softmax_kernel(
    z, labels, weights, nll, correct, S: tl.constexpr, V: tl.constexpr, BV: tl.constexpr
):
    """Row i_r: its nll, whether the label is the largest, and dz in place of z; V <= S columns."""
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    # whole blocks need no mask: only what is left of a row does
    WHOLE: tl.constexpr = V // BV * BV
    i_r = tl.program_id(0).to(tl.int64)  # int64: rows * V passes 2^31
    z += i_r * S
    # one comparison an element and column: in 32 bits
    label = tl.load(labels + i_r).to(tl.int32)
    weight = tl.load(weights + i_r)
    z_label = tl.load(z + label).to(tl.float32)

    # A running maximum and sum for each lane, one reduction at the end. The larger of maximum and
    # element goes on, the smaller is counted by exp(smaller - larger): one exponential an element.
    # The start is no -inf, because -inf - -inf is NaN.
    b_m = tl.full([BV], -1e30, dtype=tl.float32)
    b_l = tl.zeros([BV], dtype=tl.float32)
    for i_v in range(0, WHOLE, BV):
        b_z = tl.load(z + i_v + tl.arange(0, BV)).to(tl.float32)  # [BV]
        b_new = tl.maximum(b_m, b_z)
        b_less = tl.exp2((tl.minimum(b_m, b_z) - b_new) * LOG2E)
        b_l = tl.where(b_z > b_m, b_l * b_less + 1, b_l + b_less)
        b_m = b_new
    if WHOLE < V:
        # a mask at S, a multiple of 64, keeps loads 16 bytes wide
        o_v = WHOLE + tl.arange(0, BV)
        b_z = tl.load(z + o_v, mask=o_v < S, other=0.0).to(tl.float32)
        b_z = tl.where(o_v < V, b_z, float("-inf"))
        b_new = tl.maximum(b_m, b_z)
        b_l = b_l * tl.exp2((b_m - b_new) * LOG2E) + tl.exp2((b_z - b_new) * LOG2E)
        b_m = b_new
    m = tl.max(b_m, 0)
    total = tl.sum(b_l * tl.exp2((b_m - m) * LOG2E), 0)

    share = weight / total
    for i_v in range(0, WHOLE, BV):
        o_v = i_v + tl.arange(0, BV)
        b_z = tl.load(z + o_v).to(tl.float32)
        b_dz = tl.exp2((b_z - m) * LOG2E) * share - tl.where(o_v == label, weight, 0.0)
        tl.store(z + o_v, b_dz.to(z.dtype.element_ty))
    if WHOLE < V:
        o_v = WHOLE + tl.arange(0, BV)
        b_z = tl.load(z + o_v, mask=o_v < S, other=0.0).to(tl.float32)
        b_dz = tl.exp2((b_z - m) * LOG2E) * share - tl.where(o_v == label, weight, 0.0)
        # zeros beyond V: the matmuls that follow read all S columns
        b_dz = tl.where(o_v < V, b_dz, 0.0)
        tl.store(z + o_v, b_dz.to(z.dtype.element_ty), mask=o_v < S)
    tl.store(nll + i_r, tl.log2(total) * LN2 + (m - z_label))
    tl.store(correct + i_r, (z_label == m).to(tl.float32))


def softmax_gradient(z_rS, labels_r, weights_r, V):
    """(nll_r, correct_r) of r rows of logits, which become their dz in place: the kernel on a
    GPU, softmax_gradient_ref elsewhere."""
    if not on_gpu(z_rS):
        return softmax_gradient_ref(z_rS, labels_r, weights_r, V)
    r, S = z_rS.shape
    nll_r = torch.empty_like(weights_r)
    correct_r = torch.empty_like(weights_r)
    with on_device_of(z_rS):
        _softmax_kernel[(r,)](
            z_rS, labels_r, weights_r, nll_r, correct_r, S, V, BLOCK, num_warps=WARPS
        )
    return nll_r, correct_r


def _padded(matrix_VD):
    """M with zeros behind it up to a multiple of 64 rows on a GPU, M itself elsewhere."""
    V = matrix_VD.shape[0]
    if not on_gpu(matrix_VD) or V % ALIGNMENT == 0:
        return matrix_VD
    return F.pad(matrix_VD, (0, 0, 0, _aligned(V) - V))


def _aligned(V):
    return -(-V // ALIGNMENT) * ALIGNMENT


def _add_product(dmatrix_WD, dz_rW, h_rD):
    """dM += dz^T h, products of the caller's dtype summed in fp32."""
    if dz_rW.device.type == "cpu" or dz_rW.dtype == torch.float32:
        dmatrix_WD.addmm_(dz_rW.t().float(), h_rD.float())
    else:
        torch.addmm(dmatrix_WD, dz_rW.t(), h_rD, out_dtype=torch.float32, out=dmatrix_WD)


@torch.library.custom_op("crlft::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: torch.Tensor,
    matrix: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    rows: torch.Tensor,
    grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, nll_T, correct_T, dhidden_TD, dmatrix_VD), the last two empty unless grad."""
    V = matrix.shape[0]
    matrix_WD = _padded(matrix)
    W = matrix_WD.shape[0]
    nll = torch.zeros_like(weights)
    correct = torch.zeros_like(weights)
    dhidden = hidden.new_zeros(hidden.shape if grad else 0)
    dmatrix = matrix.new_zeros(matrix_WD.shape if grad else 0, dtype=torch.float32)

    # as many rows as fit into the chunk's bytes, in whole tiles of a matmul
    S = _aligned(V)
    fit = CHUNK_BYTES[hidden.device.type] // (S * hidden.element_size())
    chunk_rows = min(max(fit // 128 * 128, 128), len(rows))
    z_chunk = hidden.new_empty(chunk_rows, S)
    # No column from W on is written. oneDNN's bf16 matmul reads them all the same, and multiplies
    # them by 0: a NaN that the memory happens to hold would get into the gradient.
    z_chunk[:, W:] = 0

    for rows_r in rows.split(max(chunk_rows, 1)):
        h_rD = hidden[rows_r]
        z_rS = z_chunk[: len(rows_r)]
        z_rW = torch.mm(h_rD, matrix_WD.t(), out=z_rS[:, :W])
        nll[rows_r], correct[rows_r] = softmax_gradient(z_rS, labels[rows_r], weights[rows_r], V)
        if grad:
            # z_rW now holds dz
            dhidden[rows_r] = z_rW @ matrix_WD
            _add_product(dmatrix, z_rW, h_rD)
    loss = (weights[rows] * nll[rows]).sum()
    return loss, nll, correct, dhidden, dmatrix[:V]


@linear_cross_entropy_op.register_fake
def _(hidden, matrix, labels, weights, rows, grad):
    loss = weights.new_empty(())
    nll = torch.empty_like(weights)
    correct = torch.empty_like(weights)
    dhidden = hidden.new_empty(hidden.shape if grad else 0)
    dmatrix = matrix.new_empty(matrix.shape if grad else 0, dtype=torch.float32)
    return loss, nll, correct, dhidden, dmatrix


@torch.library.custom_op("crlft::linear_cross_entropy_bwd", mutates_args=())
def linear_cross_entropy_bwd_op(
    dhidden: torch.Tensor, dmatrix: torch.Tensor, dloss: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both times dloss, rounded to dtype. dloss stays fp32: 1 / weight_sum rounded to bf16 would
    scale the whole gradient by up to 0.2%."""
    # a tensor of two dimensions, unlike a scalar, makes the product fp32
    dloss_11 = dloss.reshape(1, 1)
    rounded_dhidden = dhidden.new_empty(dhidden.shape, dtype=dtype)
    rounded_dmatrix = dmatrix.new_empty(dmatrix.shape, dtype=dtype)
    torch.mul(dhidden, dloss_11, out=rounded_dhidden)
    torch.mul(dmatrix, dloss_11, out=rounded_dmatrix)
    return rounded_dhidden, rounded_dmatrix


@linear_cross_entropy_bwd_op.register_fake
def _(dhidden, dmatrix, dloss, dtype):
    return dhidden.new_empty(dhidden.shape), dmatrix.new_empty(dmatrix.shape, dtype=dtype)


def _save(ctx, inputs, output):
    _loss, nll, correct, dhidden, dmatrix = output
    ctx.mark_non_differentiable(nll, correct, dhidden, dmatrix)
    # no zeros the size of dhidden and dmatrix for the gradients that nobody asks for
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dmatrix)
    ctx.dtype = inputs[1].dtype


def _backward(ctx, dloss, *_):
    dhidden, dmatrix = linear_cross_entropy_bwd_op(*ctx.saved_tensors, dloss, ctx.dtype)
    return dhidden, dmatrix, None, None, None, None


linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    matrix_VD: torch.Tensor,
    labels_T: torch.Tensor,
    weights_T: torch.Tensor,
    rows_R: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, nll_T, correct_T): the weighted sum in fp32, and for the log each supervised row's
    nll and whether its label has the largest logit (both fp32, 0 elsewhere, without gradient).

    rows_R: int64 indices of the rows with a weight other than 0, when the caller knows them (on a
    GPU, asking costs a sync). Triton for the softmax on CUDA tensors, softmax_gradient_ref
    elsewhere. ValueError: shapes or dtypes that do not belong together.
    """
    _check_inputs(hidden_TD, matrix_VD, labels_T, weights_T)
    if rows_R is None:
        rows_R = weights_T.nonzero()[:, 0]
    grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or matrix_VD.requires_grad)
    loss, nll_T, correct_T, _, _ = linear_cross_entropy_op(
        hidden_TD, matrix_VD, labels_T, weights_T, rows_R, grad
    )
    return loss, nll_T, correct_T


def _check_inputs(hidden_TD, matrix_VD, labels_T, weights_T):
    name = "linear_cross_entropy"
    shapes = (
        f"hidden {tuple(hidden_TD.shape)}, matrix {tuple(matrix_VD.shape)}, "
        f"labels {tuple(labels_T.shape)}, weights {tuple(weights_T.shape)}"
    )
    same_width = hidden_TD.ndim == 2 and hidden_TD.shape[1:] == matrix_VD.shape[1:]
    check(name, same_width, f"{shapes}; want [T, D] and [V, D]")
    one_a_row = labels_T.shape == weights_T.shape == hidden_TD.shape[:1]
    check(name, one_a_row, f"{shapes}; want a label and a weight a row")
    same_dtype = hidden_TD.dtype == matrix_VD.dtype
    check(name, same_dtype, f"hidden is {hidden_TD.dtype}, matrix {matrix_VD.dtype}")
    not_fp32 = f"weights are {weights_T.dtype}, not fp32 (0.1 in bf16 is 0.1001)"
    check(name, weights_T.dtype == torch.float32, not_fp32)
