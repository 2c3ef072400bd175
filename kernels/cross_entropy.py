"""Linear layer and weighted cross-entropy in one pass: the loss of C-RLFT (Eq. 6).

    z_t = W h_t                                logits of row t, one for each of V tokens
    nll_t = log sum_v exp(z_tv) - z_t,label    -log pi(y_t | x, c)
    loss = sum_t w_t nll_t                     w_t = exp(r_c / beta): a sum; the caller divides it once, by the step's sum of w

    dz_t = w_t (softmax(z_t) - onehot(label_t))
    dh_t = W^T dz_t        dW = sum_t dz_t h_t^T

Rows of weight 0 are left out, not multiplied by 0: they cost nothing, and an infinite logit there cannot make a NaN.
Both gradients are linear in the scalar that comes from above, so they are made in the forward pass, a chunk of rows at a time:
a matmul writes the chunk's logits, one kernel reads each row twice and leaves dz in its place, two matmuls take dz to dh and dW,
and the next chunk overwrites it: no T x V matrix ever exists. Saved for backward: dh in the caller's dtype, and dW in fp32, which
is also the accumulator of the chunks; the backward pass multiplies both by the scalar in fp32, and rounds. dz and dh hold w_t
before that scalar: in fp16, weights far above 1 can overflow (65,504) where w_t divided by their sum would not.

Shapes: hidden [T, D], weight [V, D] of one dtype; labels int64 [T], in [0, V) where the weight is not 0; weights fp32 [T];
R <= T rows have a weight. nll, correct, loss in fp32.
FLOPs: 6 R D V in three matmuls (16.3 ms at 790 TFLOP/s for 16,384 rows of 4,096 and V = 32,001). Bytes beyond those of the
matmuls' inputs and results: 3 R V elements for the softmax (read twice, written once; 3.1 GB in bf16, 1 ms at 3 TB/s), and each
chunk reads and writes dW in fp32 (1 GB, so chunks are large: four here). Memory: one chunk of logits, 0.26 GB, and its rows.

Alignment: V is odd once a token is added (32,001), and a logits row of 2 V bytes would start off every 16-byte border, where
matmuls fall back to slower loads. The rows of the logits buffer are therefore padded to a multiple of 64 elements (0.2% more
memory, no copy). W's rows are D long and aligned as they are: padding W itself to 32,064 rows would copy it, 0.5 GB of traffic
a call, and is not done.
"""

import torch
import torch.nn.functional as F

from kernels import check, on_gpu, tl, triton

# of logits alive at once: 512 rows of fp32, 4,096 of bf16 at V = 32,001
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**28}


def linear_cross_entropy_ref(hidden_TD, weight_VD, labels_T, weights_T):
    """The definition, holding all logits: (loss, nll_T, correct_T), nll and correct 0 where the weight is 0."""
    rows_R = weights_T.nonzero()[:, 0]
    logits_RV = F.linear(hidden_TD[rows_R], weight_VD).float()
    nll_R = F.cross_entropy(logits_RV, labels_T[rows_R], reduction="none")
    correct_R = (logits_RV.gather(1, labels_T[rows_R, None])[:, 0] == logits_RV.amax(-1)).float()
    scatter = lambda x_R: torch.zeros_like(weights_T).index_copy(0, rows_R, x_R.detach())
    return (weights_T[rows_R] * nll_R).sum(), scatter(nll_R), scatter(correct_R)


def softmax_gradient_ref(z_rS, labels_r, weights_r, V):
    """(nll_r, correct_r) of r rows of logits, in the first V of S columns; they become their dz in place."""
    z_rV = z_rS[:, :V]
    labels_r1, weights_r1 = labels_r[:, None], weights_r[:, None]
    z32_rV = z_rV.float()  # in fp32, z itself
    z32_rV -= z32_rV.amax(-1, keepdim=True)
    label_z_r1 = z32_rV.gather(1, labels_r1)
    sum_r1 = z32_rV.exp_().sum(-1, keepdim=True)
    z32_rV.mul_(weights_r1 / sum_r1).scatter_add_(1, labels_r1, -weights_r1)
    z_rV.copy_(z32_rV)
    return (sum_r1.log() - label_z_r1)[:, 0], (label_z_r1[:, 0] == 0).float()


# i_ program index, o_ offsets, m_ mask, b_ block held in registers; bare names are pointers, or
# scalars in registers.


@triton.jit
def _softmax_kernel(
    z, labels, weights, nll, correct, S: tl.constexpr, V: tl.constexpr, BV: tl.constexpr
):
    i_r = tl.program_id(0).to(tl.int64)  # int64: rows * V passes 2^31
    z += i_r * S
    label = tl.load(labels + i_r)
    weight = tl.load(weights + i_r)
    z_label = tl.load(z + label).to(tl.float32)
    # a running maximum and sum for each lane: one reduction at the end
    b_m = tl.full([BV], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BV], dtype=tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        # [BV]; a mask at S, a multiple of 64, keeps loads 16 bytes wide
        b_z = tl.load(z + o_v, mask=o_v < S, other=0.0).to(tl.float32)
        b_z = tl.where(o_v < V, b_z, float("-inf"))
        b_new = tl.maximum(b_m, b_z)
        # a lane beyond V: exp(-inf - -inf) would be NaN
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_l = b_l * tl.exp(b_m - b_shift) + tl.exp(b_z - b_shift)
        b_m = b_new
    m = tl.max(b_m, 0)
    total = tl.sum(b_l * tl.exp(b_m - m), 0)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_z = tl.load(z + o_v, mask=o_v < S, other=0.0).to(tl.float32)
        b_dz = weight * (tl.exp(b_z - m) / total - (o_v == label).to(tl.float32))
        tl.store(z + o_v, b_dz.to(z.dtype.element_ty), mask=o_v < S)  # beyond V: nobody reads it
    tl.store(nll + i_r, tl.log(total) + (m - z_label))
    tl.store(correct + i_r, (z_label == m).to(tl.float32))


def softmax_gradient(z_rS, labels_r, weights_r, V):
    if not on_gpu(z_rS):
        return softmax_gradient_ref(z_rS, labels_r, weights_r, V)
    nll_r, correct_r = torch.empty_like(weights_r), torch.empty_like(weights_r)
    _softmax_kernel[(len(z_rS),)](
        z_rS, labels_r, weights_r, nll_r, correct_r, z_rS.shape[1], V, 4096, num_warps=8
    )
    return nll_r, correct_r


def _add_product(dweight_VD, dz_rV, h_rD):
    """dW += dz^T h, products of the caller's dtype summed in fp32."""
    if dz_rV.dtype == torch.float32 or not dz_rV.is_cuda:
        dweight_VD.addmm_(dz_rV.t().float(), h_rD.float())
    else:
        torch.addmm(dweight_VD, dz_rV.t(), h_rD, out_dtype=torch.float32, out=dweight_VD)


@torch.library.custom_op("crlft::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    rows: torch.Tensor,
    grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, nll_T, correct_T, dhidden_TD, dweight_VD), the last two empty unless grad."""
    V, D = weight.shape
    nll, correct = torch.zeros_like(weights), torch.zeros_like(weights)
    dhidden = hidden.new_zeros(hidden.shape if grad else 0)
    dweight = weight.new_zeros(weight.shape if grad else 0, dtype=torch.float32)
    S = -(-V // 64) * 64
    fit = CHUNK_BYTES[hidden.device.type] // (S * hidden.element_size())
    chunk = min(max(fit // 128 * 128, 128), len(rows))
    z_chunk = hidden.new_empty(chunk, S)
    for rows_r in rows.split(max(chunk, 1)):
        h_rD, weights_r = hidden[rows_r], weights[rows_r]
        z_rS = z_chunk[: len(rows_r)]
        z_rV = torch.mm(h_rD, weight.t(), out=z_rS[:, :V])
        nll[rows_r], correct[rows_r] = softmax_gradient(z_rS, labels[rows_r], weights_r, V)
        if grad:
            dhidden[rows_r] = z_rV @ weight
            _add_product(dweight, z_rV, h_rD)
    return (weights[rows] * nll[rows]).sum(), nll, correct, dhidden, dweight


@linear_cross_entropy_op.register_fake
def _(hidden, weight, labels, weights, rows, grad):
    dhidden, dweight = (
        hidden.new_empty(hidden.shape if grad else 0),
        weight.new_empty(weight.shape if grad else 0, dtype=torch.float32),
    )
    return (
        weights.new_empty(()),
        torch.empty_like(weights),
        torch.empty_like(weights),
        dhidden,
        dweight,
    )


@torch.library.custom_op("crlft::linear_cross_entropy_bwd", mutates_args=())
def linear_cross_entropy_bwd_op(
    dhidden: torch.Tensor, dweight: torch.Tensor, dloss: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both times dloss, which stays fp32: 1 / weight_sum rounded to bf16 would scale the whole gradient by up to 0.2%."""
    # a tensor of two dimensions, unlike a scalar, makes the product fp32
    dloss_11 = dloss.reshape(1, 1)
    return tuple(
        torch.mul(x, dloss_11, out=x.new_empty(x.shape, dtype=dtype)) for x in (dhidden, dweight)
    )


@linear_cross_entropy_bwd_op.register_fake
def _(dhidden, dweight, dloss, dtype):
    return dhidden.new_empty(dhidden.shape), dweight.new_empty(dweight.shape, dtype=dtype)


def _save(ctx, inputs, output):
    _loss, nll, correct, dhidden, dweight = output
    ctx.mark_non_differentiable(nll, correct, dhidden, dweight)
    # no zeros the size of dhidden and dweight for the gradients that nobody asks for
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dweight)
    ctx.dtype = inputs[1].dtype


def _backward(ctx, dloss, *_):
    return (
        *linear_cross_entropy_bwd_op(*ctx.saved_tensors, dloss, ctx.dtype),
        None,
        None,
        None,
        None,
    )


linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)


def linear_cross_entropy(hidden_TD, weight_VD, labels_T, weights_T, rows_R=None):
    """(loss, nll_T, correct_T): the weighted sum in fp32, and for the log each supervised row's nll and whether its label
    has the largest logit (both fp32, 0 elsewhere, without gradient).

    rows_R: int64 indices of the rows with a weight other than 0, when the caller knows them (on a GPU, asking costs a sync).
    Triton for the softmax on CUDA tensors, softmax_gradient_ref elsewhere. ValueError: shapes or dtypes that do not belong together.
    """
    shapes = f"hidden {tuple(hidden_TD.shape)}, weight {tuple(weight_VD.shape)}, labels {tuple(labels_T.shape)}, weights {tuple(weights_T.shape)}"
    check(
        "linear_cross_entropy",
        hidden_TD.shape[1:] == weight_VD.shape[1:] and hidden_TD.ndim == 2,
        f"{shapes}; want [T, D] and [V, D]",
    )
    check(
        "linear_cross_entropy",
        labels_T.shape == weights_T.shape == hidden_TD.shape[:1],
        f"{shapes}; want a label and a weight a row",
    )
    check(
        "linear_cross_entropy",
        hidden_TD.dtype == weight_VD.dtype,
        f"hidden is {hidden_TD.dtype}, weight {weight_VD.dtype}",
    )
    check(
        "linear_cross_entropy",
        weights_T.dtype == torch.float32,
        f"weights are {weights_T.dtype}, not fp32 (0.1 in bf16 is 0.1001)",
    )
    if rows_R is None:
        rows_R = weights_T.nonzero()[:, 0]
    grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return linear_cross_entropy_op(hidden_TD, weight_VD, labels_T, weights_T, rows_R, grad)[:3]
