"""RMSNorm with an optional residual add.

    h = x + residual                     (h = x without a residual)
    r = 1 / sqrt(mean(h^2) + eps)        one number per row, fp32
    y = w * round(h * r)                 round = cast to the dtype of x, as LLaMA-2 does

Shapes: T tokens, D model width. Arithmetic in fp32; memory holds the caller's dtype.
"""

import torch


def rms_norm_ref(x_TD, w_D, eps, residual_TD=None):
    h_TD = x_TD if residual_TD is None else x_TD + residual_TD
    h32_TD = h_TD.float()
    n_TD = h32_TD * torch.rsqrt(h32_TD.square().mean(-1, keepdim=True) + eps)
    y_TD = w_D * n_TD.to(x_TD.dtype)
    return y_TD if residual_TD is None else (y_TD, h_TD)


def rms_norm(x_TD, w_D, eps=1e-5, residual_TD=None):
    """y_TD; with a residual (y_TD, h_TD), h = x + residual being the stream to carry on with."""
    return rms_norm_ref(x_TD, w_D, eps, residual_TD)
