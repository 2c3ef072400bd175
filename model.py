"""LLaMA-2 in one file: the model and its cache for generation.

Training runs on packed conversations: one flat row of T tokens, no padding, cu_seqlens saying where each conversation
starts. The head ends in C-RLFT's loss (Eq. 6), a weighted sum that train.py divides once by the whole step's weights.

    model = Model(SIZES["small"] with a vocab_size);  model(tokens_T, positions_T, cu_seqlens, labels_T, weights_T)
    -> (loss_sum, weight_sum)

Shapes: T packed tokens, N conversations, D width, H query heads, G key-value heads, E head size, C = E / 2 rotation pairs,
F ffn width, V vocab, R rows with a weight; in generation B prompts, S cache slots, L layers.
Parameters carry Hugging Face names (model.layers.0.self_attn.q_proj.weight): they are a file format.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernels.cpu_linear import HAVE_ONEDNN, OneDNNLinear
from kernels.cross_entropy import linear_cross_entropy
from kernels.rms_norm import rms_norm
from kernels.rotary_attention import rotary_attention, rotate
from kernels.swiglu import swiglu


@dataclass(frozen=True)
class Config:
    """The fields of a LLaMA config.json that shape the computation, under its names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


SIZES = {
    "toy": Config(96, 256, 3, 3, 3),
    "small": Config(192, 512, 6, 3, 3),
    "llama-2-7b": Config(4096, 11008, 32, 32, 32),
    "llama-2-13b": Config(5120, 13824, 40, 40, 40),
    "llama-2-34b": Config(8192, 22016, 48, 64, 8),
    "llama-2-70b": Config(8192, 28672, 80, 64, 8),
}


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x_TD, residual_TD=None):
        return rms_norm(x_TD, self.weight, self.eps, residual_TD)


class Linear(nn.Linear):
    """nn.Linear without a bias; in training, many rows of fp32 on a CPU go to oneDNN."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x_TK):
        eager_cpu = (
            x_TK.device.type == "cpu"
            and x_TK.dtype == torch.float32
            and not torch.compiler.is_compiling()
        )
        if eager_cpu and HAVE_ONEDNN and torch.is_grad_enabled() and len(x_TK) >= 64:
            return OneDNNLinear.apply(x_TK, self.weight)
        return super().forward(x_TK)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        self.H, self.G, self.E = config.num_attention_heads, config.num_key_value_heads, E
        self.q_proj = Linear(D, self.H * E)
        self.k_proj = Linear(D, self.G * E)
        self.v_proj = Linear(D, self.G * E)
        self.o_proj = Linear(self.H * E, D)

    def forward(self, x_TD, cos_TC, sin_TC, cu_seqlens, cache):
        q_THE = self.q_proj(x_TD).view(-1, self.H, self.E)
        k_TGE = self.k_proj(x_TD).view(-1, self.G, self.E)
        v_TGE = self.v_proj(x_TD).view(-1, self.G, self.E)
        if cache is not None:
            cache.write(rotate(k_TGE, cos_TC, sin_TC), v_TGE)
        if cu_seqlens is not None:
            o_THE = rotary_attention(q_THE, k_TGE, v_TGE, cos_TC, sin_TC, cu_seqlens)
        else:
            o_THE = cache.attend(rotate(q_THE, cos_TC, sin_TC))
        return self.o_proj(o_THE.flatten(1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, F)
        self.up_proj = Linear(D, F)
        self.down_proj = Linear(F, D)

    def forward(self, x_TD):
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


# what of a block's activations is rebuilt in the backward pass
RECOMPUTE = ("none", "cheap", "all")
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.crlft.rotary_attention.default,
    torch.ops.aten.mkldnn_linear.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}  # the CPU's


def keep(down_width, _context, op, *args, **_):
    """The policy of recompute = cheap: outputs of matmuls and attention stay, but down_proj's, which no gradient needs."""
    down = op == torch.ops.aten.mm.default and args[0].shape[1] == down_width
    return (
        CheckpointPolicy.MUST_SAVE if op in KEPT and not down else CheckpointPolicy.PREFER_RECOMPUTE
    )


class Block(nn.Module):
    recompute = "none"

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, *args):
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(*args)
        if self.recompute == "all":
            return checkpoint(self.compute, *args, use_reentrant=False, preserve_rng_state=False)
        contexts = partial(
            create_selective_checkpoint_contexts, partial(keep, self.mlp.down_proj.in_features)
        )
        return checkpoint(
            self.compute, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )

    def compute(self, x_TD, cos_TC, sin_TC, cu_seqlens, cache=None):
        attn_TD = self.self_attn(self.input_layernorm(x_TD), cos_TC, sin_TC, cu_seqlens, cache)
        y_TD, x_TD = self.post_attention_layernorm(attn_TD, residual_TD=x_TD)
        return x_TD + self.mlp(y_TD)


class Decoder(nn.Module):
    """What Hugging Face calls `model`: embedding, blocks, last norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)

    def forward(self, tokens_T, positions_T, cu_seqlens, cache=None):
        c_C = torch.arange(0, self.config.head_dim, 2, device=tokens_T.device).float()
        frequency_C = 1.0 / self.config.rope_theta ** (c_C / self.config.head_dim)
        angle_TC = positions_T[:, None].float() * frequency_C
        cos_TC, sin_TC = angle_TC.cos(), angle_TC.sin()
        x_TD = self.embed_tokens(tokens_T)
        for i, block in enumerate(self.layers):
            layer = None if cache is None else cache.layer(i)
            x_TD = block(x_TD, cos_TC, sin_TC, cu_seqlens, layer)
        return self.norm(x_TD)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        tokens_T,
        positions_T,
        cu_seqlens,
        labels_T=None,
        weights_T=None,
        *,
        rows_R=None,
        per_row=False,
    ):
        """(loss_sum, weight_sum), fp32 scalars: sum of w * nll, and of w (Eq. 6 before its one division).

        tokens_T, positions_T, labels_T int64 [T]; weights_T fp32 [T]: row t predicts labels_T[t] and counts weights_T[t].
        cu_seqlens int32 [N + 1]. rows_R: see kernels/cross_entropy.py; a batch of data.py has it.
        per_row adds nll_T and correct_T to the result (0 in rows without a weight).
        Without labels the result is hidden_TD, the last layer's normed states: `model.lm_head(hidden_TD)` are the logits.
        """
        hidden_TD = self.model(tokens_T, positions_T, cu_seqlens)
        if labels_T is None:
            return hidden_TD
        loss_sum, nll_T, correct_T = linear_cross_entropy(
            hidden_TD, self.lm_head.weight, labels_T, weights_T, rows_R
        )
        result = loss_sum, weights_T.sum()
        return (*result, nll_T, correct_T) if per_row else result

    @torch.no_grad()
    def prefill(self, tokens_T, positions_T, cu_seqlens, cache):
        """logits_BV after the last token of each of the B packed prompts; the cache then holds them all."""
        row_B = torch.arange(len(cu_seqlens) - 1, device=tokens_T.device)
        length_B = cu_seqlens.diff().long()
        cache.place(row_B.repeat_interleave(length_B), positions_T, length_B)
        hidden_TD = self.model(tokens_T, positions_T, cu_seqlens, cache=cache)
        return self.lm_head(hidden_TD[cu_seqlens[1:].long() - 1]).float()

    @torch.no_grad()
    def decode(self, tokens_B, cache):
        """logits_BV after one more token of each prompt."""
        positions_B = cache.length_B
        cache.place(
            torch.arange(len(tokens_B), device=tokens_B.device), positions_B, positions_B + 1
        )
        return self.lm_head(self.model(tokens_B, positions_B, None, cache=cache)).float()


class KVCache:
    """Rotated keys and the values of B prompts of unequal length, prompt b in slots 0 to length_B[b] - 1 of row b."""

    def __init__(self, config, batch, slots, device=None, dtype=torch.float32):
        shape = config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim
        self.k_LBGSE, self.v_LBGSE = (
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)
        )
        self.length_B = torch.zeros(batch, dtype=torch.long, device=device)

    def place(self, row_T, slot_T, length_B):
        """Token t of the coming forward pass goes to slot_T[t] of row_T[t]; length_B are the lengths after it."""
        self.row_T, self.slot_T, self.length_B = row_T, slot_T, length_B
        self.used = int(length_B.max())
        self.mask_B11S = (torch.arange(self.used, device=length_B.device) < length_B[:, None])[
            :, None, None
        ]

    def layer(self, i):
        return LayerCache(self, self.k_LBGSE[i], self.v_LBGSE[i])


@dataclass
class LayerCache:
    cache: KVCache
    k_BGSE: torch.Tensor
    v_BGSE: torch.Tensor

    def write(self, k_TGE, v_TGE):
        self.k_BGSE[self.cache.row_T, :, self.cache.slot_T] = k_TGE
        self.v_BGSE[self.cache.row_T, :, self.cache.slot_T] = v_TGE

    def attend(self, q_BHE):
        n = self.cache.used
        k_BGSE, v_BGSE = self.k_BGSE[:, :, :n], self.v_BGSE[:, :, :n]
        mask = self.cache.mask_B11S
        return F.scaled_dot_product_attention(
            q_BHE[:, :, None], k_BGSE, v_BGSE, attn_mask=mask, enable_gqa=True
        )[:, :, 0]
