"""SwiGLU, the gate of LLaMA's MLP: y = silu(gate) * up, silu(g) = g / (1 + exp(-g)).

Shapes: gate, up and y are [T, F], T tokens, F ffn width, all of the caller's dtype.
"""

import torch.nn.functional as F


def swiglu_ref(gate_TF, up_TF):
    return F.silu(gate_TF) * up_TF


def swiglu(gate_TF, up_TF):
    """y_TF = silu(gate_TF) * up_TF."""
    return swiglu_ref(gate_TF, up_TF)
