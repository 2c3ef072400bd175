"""The product of a linear layer, x W^T: by oneDNN where it is faster, and else by F.linear.

For fp32 on a CPU F.linear calls MKL. On an AMD CPU oneDNN took half its time; on another, which has
AVX-512, MKL took 0.3 to 0.85 of oneDNN's (one thread, forward and backward, 768 x 96 x 96 to
4,096 x 768 x 2,048). So oneDNN is for CPUs without AVX-512.

PyTorch reaches oneDNN only through its own tensor layout, which autograd does not follow. So the two
products of the backward pass are written out:

    y = x W^T        dx = dy W        dW = dy^T x

No Triton here: this is a CPU's lesson.

Shapes: T rows, K inputs, N outputs; in one product M rows and N columns over K.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HAVE_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
PREFER_ONEDNN = torch.backends.mkldnn.is_available() and not HAVE_AVX512

# With fewer rows, copying W into oneDNN's layout takes longer than is won.
LEAST_ROWS = 64


def onednn(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a b^T, fp32 on a CPU, without a gradient."""
    return F.linear(a_MK.contiguous().to_mkldnn(), b_NK.contiguous().to_mkldnn()).to_dense()


class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        return onednn(x_TK, weight_NK)

    @staticmethod
    def backward(ctx, dy_TN: Tensor) -> tuple[Tensor, Tensor]:
        x_TK, weight_NK = ctx.saved_tensors
        dx_TK = onednn(dy_TN, weight_NK.t())
        dweight_NK = onednn(dy_TN.t(), x_TK.t())
        return dx_TK, dweight_NK


def project(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T, [T, N], of the inputs' dtype, on any device; differentiable.

    On a GPU this is F.linear. On a CPU without AVX-512 it is oneDNN's product in fp32 training with
    LEAST_ROWS or more rows, and F.linear elsewhere.
    """
    # torch.compile is given F.linear, and chooses for itself.
    eager = not torch.compiler.is_compiling()
    fp32_on_cpu = x_TK.device.type == "cpu" and x_TK.dtype == torch.float32
    # Generation has few rows, and keeps its matrices in an order that MKL likes (sample.py).
    training = torch.is_grad_enabled()
    if PREFER_ONEDNN and eager and fp32_on_cpu and training and len(x_TK) >= LEAST_ROWS:
        return OneDNNLinear.apply(x_TK, weight_NK)
    return F.linear(x_TK, weight_NK)
