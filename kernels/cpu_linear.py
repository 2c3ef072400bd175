"""A linear layer by oneDNN, for fp32 on a CPU."""

import torch
import torch.nn.functional as F

HAVE_ONEDNN = torch.backends.mkldnn.is_available()


def onednn(a_MK, b_NK):
    """a @ b.T, fp32 on a CPU, by oneDNN: on the AMD CPU of README.md twice as fast as F.linear's MKL. No autograd of its own works here."""
    return F.linear(a_MK.contiguous().to_mkldnn(), b_NK.contiguous().to_mkldnn()).to_dense()


class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, weight_NK):
        ctx.save_for_backward(x_TK, weight_NK)
        return onednn(x_TK, weight_NK)

    @staticmethod
    def backward(ctx, dy_TN):
        x_TK, weight_NK = ctx.saved_tensors
        return onednn(dy_TN, weight_NK.t()), onednn(dy_TN.t(), x_TK.t())
