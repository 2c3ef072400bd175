"""LLaMA-2, and nothing else: the model, and its cache for generation.

Training runs on packed conversations: one flat row of T tokens without padding, in which
cu_seqlens says where each conversation starts. The head ends in C-RLFT's loss (Eq. 6), a weighted
sum that train.py divides once, by the sum of the whole step's weights.

    config = dataclasses.replace(SIZES["small"], vocab_size=32001)
    losses = Model(config)(tokens_T, positions_T, cu_seqlens, labels_T, weights_T)
    losses.loss_sum / losses.weight_sum

Parameters carry Hugging Face names (model.layers.0.self_attn.q_proj.weight): they are a file
format, and so a directory of weights loads without renaming.

Shapes: T packed tokens, N conversations, R rows with a weight, D width, H query heads,
G key-value heads, E head size, C = E / 2 rotation pairs, U ffn width, V vocab, K any width;
in generation B prompts, S cache slots, L layers.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernels.cpu_linear import project
from kernels.cross_entropy import linear_cross_entropy
from kernels.rms_norm import rms_norm
from kernels.rotary_attention import rotary_attention, rotate
from kernels.swiglu import swiglu

# ---- sizes


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
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# The first two are ours, for a laptop; the others are Meta's.
SIZES = {
    "toy": Config(96, 256, 3, 3, 3),
    "small": Config(192, 512, 6, 3, 3),
    "llama-2-7b": Config(4096, 11008, 32, 32, 32),
    "llama-2-13b": Config(5120, 13824, 40, 40, 40),
    "llama-2-34b": Config(8192, 22016, 48, 64, 8),
    "llama-2-70b": Config(8192, 28672, 80, 64, 8),
}

# ---- layers


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, row by row: kernels/rms_norm.py."""

    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps)

    def add_and_norm(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum). One kernel does both: the sum is not read a second time."""
        return rms_norm(x_TD, self.weight, self.eps, residual_TD)


class Linear(nn.Linear):
    """A matrix without a bias, [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x_TK: Tensor) -> Tensor:
        return project(x_TK, self.weight)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        self.H = config.num_attention_heads
        self.G = config.num_key_value_heads
        self.E = config.head_dim
        # With G < H (grouped queries) H / G query heads share a pair of key and value heads.
        self.q_proj = Linear(D, self.H * self.E)
        self.k_proj = Linear(D, self.G * self.E)
        self.v_proj = Linear(D, self.G * self.E)
        self.o_proj = Linear(self.H * self.E, D)

    def forward(
        self,
        x_TD: Tensor,
        cos_TC: Tensor,
        sin_TC: Tensor,
        cu_seqlens: Tensor | None,
        cache: "LayerCache | None",
    ) -> Tensor:
        """Every token looks back: to where, is decided by what the pass is for.

        training   within its conversation, in this pass          no cache
        prefill    within its prompt, in this pass                the cache is only filled
        decoding   at all that the cache holds of its prompt      T = B, a token of each prompt
        """
        q_THE = self.q_proj(x_TD).view(-1, self.H, self.E)
        k_TGE = self.k_proj(x_TD).view(-1, self.G, self.E)
        v_TGE = self.v_proj(x_TD).view(-1, self.G, self.E)

        # Keys are kept as they will be looked at: rotated, each by its own position (RoPE).
        if cache is not None:
            cache.write(rotate(k_TGE, cos_TC, sin_TC), v_TGE)

        # rotary_attention rotates q and k itself, and lets no token look beyond cu_seqlens.
        decoding = cache is not None and cache.decoding
        if decoding:
            o_THE = cache.attend(rotate(q_THE, cos_TC, sin_TC))
        else:
            o_THE = rotary_attention(q_THE, k_TGE, v_TGE, cos_TC, sin_TC, cu_seqlens)
        return self.o_proj(o_THE.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        U = config.intermediate_size
        self.gate_proj = Linear(D, U)
        self.up_proj = Linear(D, U)
        self.down_proj = Linear(U, D)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TU = self.gate_proj(x_TD)
        up_TU = self.up_proj(x_TD)
        return self.down_proj(swiglu(gate_TU, up_TU))


# What of a block's activations is not kept for the backward pass, but computed again there:
# nothing; what takes no matmul; everything but the block's input.
RECOMPUTE = ("none", "cheap", "all")


class Block(nn.Module):
    recompute = "none"

    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def compute(
        self,
        x_TD: Tensor,
        cos_TC: Tensor,
        sin_TC: Tensor,
        cu_seqlens: Tensor | None,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        # x_TD is the residual stream: attention and MLP each read its norm and add to it.
        y_TD = self.input_layernorm(x_TD)
        attn_TD = self.self_attn(y_TD, cos_TC, sin_TC, cu_seqlens, cache)
        y_TD, x_TD = self.post_attention_layernorm.add_and_norm(attn_TD, x_TD)
        return x_TD + self.mlp(y_TD)

    def forward(self, *args) -> Tensor:
        """compute(*args), with less memory where `recompute` says so."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(*args)

        # A block draws no random numbers, so their state need not be saved.
        how = {"use_reentrant": False, "preserve_rng_state": False}
        if self.recompute == "cheap":
            policy = partial(keep, self.mlp.down_proj.in_features)
            how["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(self.compute, *args, **how)


# What takes long to compute again: every matmul and the attention.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.crlft.rotary_attention.default,
    # what a CPU takes in their place
    torch.ops.aten.mkldnn_linear.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def keep(U: int, _context, op, *args, **_) -> CheckpointPolicy:
    """Whether recompute = "cheap" keeps the result of this operation, which has these inputs.

    down_proj's result [T, D] ends the block. No gradient needs it, so it is not kept either.
    """
    is_down_proj = op == torch.ops.aten.mm.default and args[0].shape[1] == U
    if op in KEPT and not is_down_proj:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# ---- model


class Decoder(nn.Module):
    """What Hugging Face calls `model`: embedding, blocks, last norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        cu_seqlens: Tensor | None,
        cache: "CachePass | None" = None,
    ) -> Tensor:
        # RoPE: pair c of a head turns by position * theta^(-2c / E). In fp32 whatever the model's
        # dtype is: bf16 cannot tell positions 256 and 257 from each other.
        E = self.config.head_dim
        exponent_C = torch.arange(0, E, 2, device=tokens_T.device).float()
        frequency_C = 1.0 / self.config.rope_theta ** (exponent_C / E)
        angle_TC = positions_T[:, None].float() * frequency_C
        cos_TC = angle_TC.cos()
        sin_TC = angle_TC.sin()

        # The tables are the same for all layers; the cache has a part for each.
        x_TD = self.embed_tokens(tokens_T)
        for i, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layer(i)
            x_TD = block(x_TD, cos_TC, sin_TC, cu_seqlens, layer_cache)
        return self.norm(x_TD)


class Losses(NamedTuple):
    """What a micro-batch adds to its step: Eq. 6 before its one division, and what the log wants.

    loss_sum, weight_sum: fp32 scalars, the sums of w * nll and of w. nll_T, correct_T: fp32 [T],
    of each row -log pi(label) and whether the label was the likeliest token, without gradient;
    0 in rows without a weight.
    """

    loss_sum: Tensor
    weight_sum: Tensor
    nll_T: Tensor
    correct_T: Tensor


class Model(nn.Module):
    """Three ways in: a call for the losses, `hidden` for the states, `prefill` and `decode`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        cu_seqlens: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        rows_R: Tensor | None = None,
    ) -> Losses:
        """The losses of a packed micro-batch; row t predicts labels_T[t] and counts weights_T[t].

        tokens_T, positions_T, labels_T: int64. weights_T: fp32. cu_seqlens: int32 [N + 1].
        rows_R: int64, the rows with a weight. A Batch of packing.py knows them; without them they
        are looked for on the device, and the step waits for it.
        """
        # The kernel takes the head's matrix, not logits: a T x V tensor never exists.
        hidden_TD = self.hidden(tokens_T, positions_T, cu_seqlens)
        loss_sum, nll_T, correct_T = linear_cross_entropy(
            hidden_TD, self.lm_head.weight, labels_T, weights_T, rows_R
        )
        return Losses(loss_sum, weights_T.sum(), nll_T, correct_T)

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """hidden_TD, the last layer's normed states: `model.lm_head(hidden_TD)` are the logits."""
        return self.model(tokens_T, positions_T, cu_seqlens)

    @torch.no_grad()
    def prefill(
        self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor, cache: "KVCache"
    ) -> Tensor:
        """logits_BV, fp32, after the last token of each of B packed prompts; the cache then holds
        them."""
        filled = cache.prefill_pass(positions_T, cu_seqlens)
        hidden_TD = self.model(tokens_T, positions_T, cu_seqlens, filled)
        # Only what follows a prompt is asked for: the head sees B rows, not T.
        last_B = cu_seqlens[1:].long() - 1
        return self.lm_head(hidden_TD[last_B]).float()

    @torch.no_grad()
    def decode(self, tokens_B: Tensor, cache: "KVCache") -> Tensor:
        """logits_BV, fp32, after one more token of each prompt."""
        # the next position of a prompt of 5 tokens, 0 to 4, is 5
        positions_B = cache.length_B
        grown = cache.decode_pass()
        hidden_BD = self.model(tokens_B, positions_B, None, grown)
        return self.lm_head(hidden_BD).float()


# ---- cache


class KVCache:
    """Rotated keys and the values of B prompts: prompt b fills slots 0 to length_B[b] - 1 of row b.

    A forward pass is announced to it first, by prefill_pass or decode_pass. These set the lengths
    to those after the pass, and return where its tokens go.
    """

    def __init__(
        self,
        config: Config,
        batch: int,
        slots: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        L, G = config.num_hidden_layers, config.num_key_value_heads
        shape = (L, batch, G, slots, config.head_dim)
        self.k_LBGSE = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBGSE = torch.zeros(shape, device=device, dtype=dtype)
        self.length_B = torch.zeros(batch, dtype=torch.long, device=device)

    def prefill_pass(self, positions_T: Tensor, cu_seqlens: Tensor) -> "CachePass":
        """The pass over B packed prompts: every token goes to the slot of its position."""
        self.length_B = cu_seqlens.diff().long()
        row_B = torch.arange(len(self.length_B), device=positions_T.device)
        row_T = row_B.repeat_interleave(self.length_B)
        return CachePass(self, row_T, positions_T, decoding=False)

    def decode_pass(self) -> "CachePass":
        """The pass over one token more of each prompt, which goes to the slot after its last."""
        row_B = torch.arange(len(self.length_B), device=self.length_B.device)
        slot_B = self.length_B
        self.length_B = self.length_B + 1
        return CachePass(self, row_B, slot_B, decoding=True)


class CachePass:
    """The cache in one forward pass: token t goes to slot slot_T[t] of row row_T[t]."""

    def __init__(self, cache: KVCache, row_T: Tensor, slot_T: Tensor, decoding: bool):
        self.cache = cache
        self.row_T = row_T
        self.slot_T = slot_T
        self.decoding = decoding

        # Prompts are of unequal length: behind a shorter one's last token lie slots without a key.
        length_B = cache.length_B
        self.used = int(length_B.max())
        mask_BS = torch.arange(self.used, device=length_B.device) < length_B[:, None]
        self.mask_B11S = mask_BS[:, None, None]

    def layer(self, i: int) -> "LayerCache":
        return LayerCache(self, self.cache.k_LBGSE[i], self.cache.v_LBGSE[i])


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a CachePass."""

    of_pass: CachePass
    k_BGSE: Tensor
    v_BGSE: Tensor

    @property
    def decoding(self) -> bool:
        return self.of_pass.decoding

    def write(self, k_TGE: Tensor, v_TGE: Tensor) -> None:
        """Keep the pass's keys and values, in place."""
        row_T, slot_T = self.of_pass.row_T, self.of_pass.slot_T
        self.k_BGSE[row_T, :, slot_T] = k_TGE
        self.v_BGSE[row_T, :, slot_T] = v_TGE

    def attend(self, q_BHE: Tensor) -> Tensor:
        """o_BHE: each prompt's one query looks at all keys that the cache holds of the prompt."""
        used = self.of_pass.used
        o_BH1E = F.scaled_dot_product_attention(
            q_BHE[:, :, None],
            self.k_BGSE[:, :, :used],
            self.v_BGSE[:, :, :used],
            attn_mask=self.of_pass.mask_B11S,
            enable_gqa=True,
        )
        return o_BH1E[:, :, 0]
