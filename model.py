"""LLaMA, and nothing else: the model, and its cache for generation.

Its descendants are the same model with a field or two more: Mistral, Llama-3, SmolLM2 (Config).

Training runs on packed conversations: one flat row of T tokens without padding, in which
cu_seqlens says where each conversation starts. The head ends in C-RLFT's loss (Eq. 6), a weighted
sum that train.py divides once, by the sum of the whole step's weights.

    config = dataclasses.replace(SIZES["small"], vocab_size=32001)
    model = Model(config)     # its values mean nothing yet: load_weights in support/hf.py fills all
    losses = model(tokens_T, positions_T, cu_seqlens, labels_T, weights_T)
    losses.loss_sum / losses.weight_sum

Parameters carry Hugging Face names (model.layers.0.self_attn.q_proj.weight). These names are a file
format: because we keep them, a Hugging Face directory of weights loads without renaming.

Shapes in this file: T packed tokens, N conversations, R rows with a loss weight, D width, H query
heads, G key-value heads, E head size, C = E / 2 rotation pairs, U ffn width, V vocab; in generation
B prompts, S cache slots, L layers.
"""

import math
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

from kernels import attention_without_cudnn
from kernels.cross_entropy import linear_cross_entropy
from kernels.rms_norm import rms_norm
from kernels.rotary_attention import rotary_attention, rotate
from kernels.swiglu import swiglu

# ---- sizes


@dataclass(frozen=True)
class RopeScaling:
    """How Llama-3.1 and 3.2 stretch RoPE to contexts longer than pre-training's: `stretched`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Config:
    """The fields of a LLaMA config.json that the computation needs. Names are as in that file."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # None: hidden_size / num_attention_heads
    head_dim: int | None = None
    # whether the head's matrix is the embedding's: one tensor, its gradient the sum of both uses
    tie_word_embeddings: bool = False
    rope_scaling: RopeScaling | None = None

    @property
    def head_size(self) -> int:
        """E, the width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


# The presets of --model. The first two are ours, for a laptop; the others are Meta's.
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
        """(norm of x + residual, x + residual), both [T, D].

        One kernel computes both, so the sum is not read from memory a second time.
        """
        return rms_norm(x_TD, self.weight, self.eps, residual_TD)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        self.H = config.num_attention_heads
        self.G = config.num_key_value_heads
        self.E = config.head_size
        # With G < H (grouped queries) H / G query heads share a pair of key and value heads.
        self.q_proj = nn.Linear(D, self.H * self.E, bias=False)
        self.k_proj = nn.Linear(D, self.G * self.E, bias=False)
        self.v_proj = nn.Linear(D, self.G * self.E, bias=False)
        self.o_proj = nn.Linear(self.H * self.E, D, bias=False)

    def forward(
        self,
        x_TD: Tensor,
        cos_TC: Tensor,
        sin_TC: Tensor,
        cu_seqlens: Tensor | None,
        cache: "LayerCache | None",
    ) -> Tensor:
        """o_TD. Where each token looks back depends on the pass:

        training   at the tokens of its own conversation, in this pass; there is no cache
        prefill    at the tokens of its own prompt, in this pass; the cache is written, not read
        decoding   at all tokens of its prompt, in the cache; T = B, one new token of each prompt
        """
        q_THE = self.q_proj(x_TD).view(-1, self.H, self.E)
        k_TGE = self.k_proj(x_TD).view(-1, self.G, self.E)
        v_TGE = self.v_proj(x_TD).view(-1, self.G, self.E)

        # The cache keeps keys already rotated, each by its own position (RoPE): so no later pass
        # has to rotate them again.
        if cache is not None:
            cache.write(rotate(k_TGE, cos_TC, sin_TC), v_TGE)

        # rotary_attention rotates q and k itself. By cu_seqlens it lets a token look only within
        # its own conversation or prompt.
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
        self.gate_proj = nn.Linear(D, U, bias=False)
        self.up_proj = nn.Linear(D, U, bias=False)
        self.down_proj = nn.Linear(U, D, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TU = self.gate_proj(x_TD)
        up_TU = self.up_proj(x_TD)
        return self.down_proj(swiglu(gate_TU, up_TU))


# Which activations of a block the backward pass computes again, so that they need no memory.
RECOMPUTE = (
    # no activation: all are kept
    "none",
    # the activations that take no matmul and no attention
    "cheap",
    # all activations: only the block's input is kept
    "all",
)


class Block(nn.Module):
    # One of RECOMPUTE. Training sets another one if it has to save memory.
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
        """compute(*args); `recompute` says what the backward pass computes again."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(*args)

        # A block draws no random numbers, so the generator's state need not be saved.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        if self.recompute == "cheap":
            policy = partial(keep, self.mlp.down_proj.in_features)
            options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(self.compute, *args, **options)


# The operations that recompute = "cheap" does not compute again, because they take long: every
# matmul and the attention.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.crlft.rotary_attention.default,
    # attention's name on a CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def keep(U: int, _context, op, *args, **_) -> CheckpointPolicy:
    """The policy of recompute = "cheap". torch calls it for each operation `op` of a block, with
    the operation's inputs `args`: is the result kept, or computed again?
    """
    # The result of down_proj, [T, D], is the block's last. No gradient needs it, so it is not kept,
    # though it is a matmul. down_proj is the only matmul of a block whose input is U wide.
    is_down_proj = op == torch.ops.aten.mm.default and args[0].shape[1] == U
    if op in KEPT and not is_down_proj:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# ---- model


class Decoder(nn.Module):
    """What Hugging Face calls `model`: embedding, blocks, last norm. Its result is hidden_TD."""

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
        cache_pass: "CachePass | None" = None,
    ) -> Tensor:
        # RoPE: rotation pair c turns by the angle position * theta^(-2c / E). The angles are fp32,
        # also in a bf16 model: in bf16 the positions 256 and 257 are the same number.
        E = self.config.head_size
        exponent_C = torch.arange(0, E, 2, device=tokens_T.device).float()
        frequency_C = 1.0 / self.config.rope_theta ** (exponent_C / E)
        if self.config.rope_scaling is not None:
            frequency_C = stretched(frequency_C, self.config.rope_scaling)
        angle_TC = positions_T[:, None].float() * frequency_C
        cos_TC = angle_TC.cos()
        sin_TC = angle_TC.sin()

        # All layers use the same cos and sin. Each layer has its own part of the cache.
        x_TD = self.embed_tokens(tokens_T)
        for i, block in enumerate(self.layers):
            layer_cache = None if cache_pass is None else cache_pass.layer(i)
            x_TD = block(x_TD, cos_TC, sin_TC, cu_seqlens, layer_cache)
        return self.norm(x_TD)


def stretched(frequency_C: Tensor, scaling: RopeScaling) -> Tensor:
    """The frequencies of Llama-3.1 (rope_type llama3).

    A pair that turns many times within the original context tells near positions apart, and stays
    as it is. A pair that turns less than once there is slowed down by `factor`: in a context that
    much longer it turns as far as before. Between the two, a mixture.
    """
    turns_C = scaling.original_max_position_embeddings * frequency_C / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # the share that stays: 0 below `low` turns, 1 above `high`
    share_C = ((turns_C - low) / (high - low)).clamp(0, 1)
    return share_C * frequency_C + (1 - share_C) * frequency_C / scaling.factor


class Losses(NamedTuple):
    """What a micro-batch adds to its step: the sum of Eq. 6 and that of its weights, and two
    measurements of each row for the log.

    loss_sum     fp32 scalar, the sum of w * nll over the rows
    weight_sum   fp32 scalar, the sum of w over the rows
    nll_T        fp32 [T], each row's -log pi(label)
    correct_T    fp32 [T], 1 where the label was the likeliest token, and else 0

    nll_T and correct_T have no gradient. In rows without a weight they are 0.
    """

    loss_sum: Tensor
    weight_sum: Tensor
    nll_T: Tensor
    correct_T: Tensor


class Model(nn.Module):
    """Decoder and head. Training calls the model itself, and gets Losses. Generation calls
    `prefill` once, and then `decode` for each token. `hidden` gives the states before the head.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Where the config says so, make the head's matrix and the embedding's one parameter.

        To be called again after `to_empty`, which gives each module a tensor of its own.
        """
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

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
        rows_R: int64, the rows with a weight, as a Batch of packing.py has them. If None, they are
        looked for on the device, and the caller waits for the device.
        """
        # The kernel is given the head's matrix, not logits: a T x V tensor never exists.
        hidden_TD = self.hidden(tokens_T, positions_T, cu_seqlens)
        loss_sum, nll_T, correct_T = linear_cross_entropy(
            hidden_TD, self.lm_head.weight, labels_T, weights_T, rows_R
        )
        return Losses(loss_sum, weights_T.sum(), nll_T, correct_T)

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """hidden_TD, the states after the last norm; `model.lm_head(hidden_TD)` are the logits."""
        return self.model(tokens_T, positions_T, cu_seqlens)

    @torch.no_grad()
    def prefill(
        self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor, cache: "KVCache"
    ) -> Tensor:
        """logits_BV, fp32, after the last token of each of B packed prompts.

        The cache holds the prompts afterwards.
        """
        cache_pass = cache.prefill_pass(positions_T, cu_seqlens)
        hidden_TD = self.model(tokens_T, positions_T, cu_seqlens, cache_pass)
        # Only the token after each prompt is asked for: the head gets B rows, not T.
        last_B = cu_seqlens[1:].long() - 1
        return self.lm_head(hidden_TD[last_B]).float()

    @torch.no_grad()
    def decode(self, tokens_B: Tensor, cache: "KVCache") -> Tensor:
        """logits_BV, fp32, after one more token of each prompt: tokens_B, int64."""
        # A prompt of 5 tokens has the positions 0 to 4; its next token is at position 5.
        positions_B = cache.length_B
        cache_pass = cache.decode_pass()
        hidden_BD = self.model(tokens_B, positions_B, None, cache_pass)
        return self.lm_head(hidden_BD).float()


# ---- cache


class KVCache:
    """The rotated keys and the values of B prompts, for generation.

    Prompt b fills slots 0 to length_B[b] - 1 of row b. Before a forward pass, call prefill_pass or
    decode_pass: it sets length_B to the lengths after the pass, and returns a CachePass, which
    says where the tokens of the pass go.
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
        shape = (L, batch, G, slots, config.head_size)
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
        """The pass over one more token of each prompt, which goes to the first slot not used."""
        row_B = torch.arange(len(self.length_B), device=self.length_B.device)
        slot_B = self.length_B
        # Not `+= 1`, which would change slot_B too, and the positions in Model.decode: they are
        # the old length_B.
        self.length_B = self.length_B + 1
        return CachePass(self, row_B, slot_B, decoding=True)


class CachePass:
    """The cache in one forward pass: token t goes to slot slot_T[t] of row row_T[t]."""

    def __init__(self, cache: KVCache, row_T: Tensor, slot_T: Tensor, decoding: bool):
        self.cache = cache
        self.row_T = row_T
        self.slot_T = slot_T
        self.decoding = decoding

        # For decoding. Prompts are of unequal length: after the last token of a shorter prompt come
        # slots without a key, and the mask hides them.
        length_B = cache.length_B
        self.used = int(length_B.max())
        mask_BS = torch.arange(self.used, device=length_B.device) < length_B[:, None]
        self.mask_B11S = mask_BS[:, None, None]

    def layer(self, i: int) -> "LayerCache":
        return LayerCache(self, self.cache.k_LBGSE[i], self.cache.v_LBGSE[i])


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the cache, in one pass."""

    cache_pass: CachePass
    k_BGSE: Tensor
    v_BGSE: Tensor

    @property
    def decoding(self) -> bool:
        return self.cache_pass.decoding

    def write(self, k_TGE: Tensor, v_TGE: Tensor) -> None:
        """Write the keys and values of the pass's tokens into the cache."""
        row_T, slot_T = self.cache_pass.row_T, self.cache_pass.slot_T
        # With `:` between two index tensors PyTorch puts T first: both sides are [T, G, E].
        self.k_BGSE[row_T, :, slot_T] = k_TGE
        self.v_BGSE[row_T, :, slot_T] = v_TGE

    def attend(self, q_BHE: Tensor) -> Tensor:
        """o_BHE: each prompt's one query looks at all keys that the cache holds of the prompt."""
        B, H, E = q_BHE.shape
        G = self.k_BGSE.shape[1]
        used = self.cache_pass.used
        # The H / G query heads that share a key head stand where other calls have tokens: so the
        # keys are read once for all of them.
        with attention_without_cudnn():
            o_BGHE = F.scaled_dot_product_attention(
                q_BHE.reshape(B, G, H // G, E),
                self.k_BGSE[:, :, :used],
                self.v_BGSE[:, :, :used],
                attn_mask=self.cache_pass.mask_B11S,
            )
        return o_BGHE.reshape(B, H, E)
