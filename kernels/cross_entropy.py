"""Linear layer and weighted cross-entropy in one pass: the loss of C-RLFT (Eq. 6).

    z_t = W h_t                                logits of row t, one for each of V tokens
    nll_t = log sum_v exp(z_tv) - z_t,label    -log pi(y_t | x, c)
    loss = sum_t w_t nll_t                     w_t = exp(r_c / beta): a sum; the caller divides it once, by the step's sum of w

    dz_t = w_t (softmax(z_t) - onehot(label_t))
    dh_t = W^T dz_t        dW = sum_t dz_t h_t^T

Rows of weight 0 are left out, not multiplied by 0: they cost nothing, and an infinite logit there cannot make a NaN.
Both gradients are linear in the scalar that comes from above, so they are made in the forward pass, CHUNK rows at a time:
a chunk's logits become its dz in place and are gone before the next chunk; no T x V matrix ever exists.

Shapes: hidden [T, D], weight [V, D] of one dtype; labels int64 [T]; weights fp32 [T]; R <= T rows have a weight.
"""

import torch
import torch.nn.functional as F

CHUNK = 512  # rows of logits alive at once: 66 MB in fp32 at V = 32,001


def linear_cross_entropy_ref(hidden_TD, weight_VD, labels_T, weights_T):
    """The definition, holding all logits: (loss, nll_T, correct_T), nll and correct 0 where the weight is 0."""
    rows_R = weights_T.nonzero()[:, 0]
    logits_RV = F.linear(hidden_TD[rows_R], weight_VD).float()
    nll_R = F.cross_entropy(logits_RV, labels_T[rows_R], reduction="none")
    correct_R = (logits_RV.gather(1, labels_T[rows_R, None])[:, 0] == logits_RV.amax(-1)).float()
    scatter = lambda x_R: torch.zeros_like(weights_T).index_copy(0, rows_R, x_R.detach())
    return (weights_T[rows_R] * nll_R).sum(), scatter(nll_R), scatter(correct_R)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, labels_T, weights_T, rows_R):
        need_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        nll_T, correct_T = torch.zeros_like(weights_T), torch.zeros_like(weights_T)
        if need_grad:
            dhidden_TD = torch.zeros_like(hidden_TD)
            dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for rows in rows_R.split(CHUNK):  # r rows of one chunk in the names below
            h_rD, labels_r1, w_r1 = hidden_TD[rows], labels_T[rows, None], weights_T[rows, None]
            z_rV = (h_rD @ weight_VD.t()).float()
            z_rV -= z_rV.amax(-1, keepdim=True)
            label_z_r1 = z_rV.gather(1, labels_r1)
            correct_T[rows] = (label_z_r1[:, 0] == 0).float()  # the label has the largest logit
            sum_r1 = z_rV.exp_().sum(-1, keepdim=True)
            nll_T[rows] = (sum_r1.log() - label_z_r1)[:, 0]
            if need_grad:
                dz_rV = z_rV.mul_(w_r1 / sum_r1).scatter_add_(1, labels_r1, -w_r1)
                dz_rV = dz_rV.to(hidden_TD.dtype)
                dhidden_TD[rows] = dz_rV @ weight_VD
                if hidden_TD.dtype == torch.float32:
                    dweight_VD.addmm_(dz_rV.t(), h_rD)
                else:
                    dweight_VD += dz_rV.t() @ h_rD
        if need_grad:
            ctx.save_for_backward(dhidden_TD, dweight_VD)
            ctx.dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nll_T, correct_T)
        return (weights_T[rows_R] * nll_T[rows_R]).sum(), nll_T, correct_T

    @staticmethod
    def backward(ctx, dloss, _dnll, _dcorrect):
        dhidden_TD, dweight_VD = ctx.saved_tensors
        # dloss stays fp32: 1 / weight_sum rounded to bf16 would scale the whole gradient by up to 0.2%.
        return (dhidden_TD.float() * dloss).to(dhidden_TD.dtype), (dweight_VD * dloss).to(ctx.dtype), None, None, None


def linear_cross_entropy(hidden_TD, weight_VD, labels_T, weights_T, rows_R=None):
    """(loss, nll_T, correct_T): the weighted sum in fp32, and for the log each supervised row's nll and whether its label
    has the largest logit (both fp32, 0 elsewhere, without gradient).

    rows_R: int64 indices of the rows with a weight other than 0, when the caller knows them (on a GPU, asking costs a sync).
    """
    if rows_R is None:
        rows_R = weights_T.nonzero()[:, 0]
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, weights_T, rows_R)
