"""LLaMA-2 in one file: the model, its cache for generation, and Hugging Face checkpoints in and out.

Training runs on packed conversations: one flat row of T tokens, no padding, cu_seqlens saying where each conversation
starts. The head ends in C-RLFT's loss (Eq. 6), a weighted sum that train.py divides once by the whole step's weights.

    model = Model(SIZES["small"] with a vocab_size);  model(tokens_T, positions_T, cu_seqlens, labels_T, weights_T)
    -> (loss_sum, weight_sum)

Shapes: T packed tokens, N conversations, D width, H query heads, G key-value heads, E head size, C = E / 2 rotation pairs,
F ffn width, V vocab, R rows with a weight; in generation B prompts, S cache slots, L layers.
Parameters carry Hugging Face names (model.layers.0.self_attn.q_proj.weight): they are a file format.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernels.cross_entropy import CHUNK_BYTES, linear_cross_entropy  # noqa: F401, train.py counts the chunk
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


def train_flops(config):
    """(per token, per supervised token, per squared length of a conversation): FLOPs of a forward and backward pass.

    6 for each weight of a matmul, the head's only where a label counts; causal attention computes half of
    length^2 scores and of their products with v, 2 * 2 * D * length^2 / 2, three times over (forward, and twice backward).
    """
    D, E, L = config.hidden_size, config.head_dim, config.num_hidden_layers
    projections = 2 * D * config.num_attention_heads * E + 2 * D * config.num_key_value_heads * E
    return (
        6 * L * (projections + 3 * D * config.intermediate_size),
        6 * D * config.vocab_size,
        6 * L * config.num_attention_heads * E,
    )


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x_TD, residual_TD=None):
        return rms_norm(x_TD, self.weight, self.eps, residual_TD)


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


def activation_width(config, recompute):
    """Numbers that a block keeps for each token until its backward pass (on a GPU, fp32 log-sum-exps aside)."""
    D, F, Q, K = (
        config.hidden_size,
        config.intermediate_size,
        *(n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)),
    )
    # input, residual and both their norms; q, rotated k, v, o; gate, up, their product
    return {
        "none": 4 * D + 2 * Q + 2 * K + 3 * F,
        # input; q, k, v; o, rotated k; o_proj's output; gate, up
        "cheap": 2 * D + 2 * Q + 3 * K + 2 * F,
        "all": D,
    }[recompute]


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


# ---- Hugging Face directories

UNSUPPORTED = {  # field of config.json: the values under which this file computes the same thing
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


def read_json(path):
    """The object in a JSON file of such a directory; ValueError names the file that is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; fetch the file again")
    return content


def read_config(folder):
    """Config of a Hugging Face LLaMA directory. ValueError names the field that model.py does not compute."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json; give a Hugging Face LLaMA directory")
    fields = read_json(path)
    rope = fields.get("rope_parameters") or {}  # transformers 5; 4 has rope_theta at the top level
    for field, allowed in UNSUPPORTED.items():
        if fields.get(field) not in allowed and field in fields:
            raise ValueError(
                f"{path}: {field} = {fields[field]!r} is not supported, only {allowed[0]!r}"
            )
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"{path}: rope_parameters.rope_type = {rope['rope_type']!r} is not supported, only 'default'"
        )
    fields["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta"))
    if fields["rope_theta"] is None:
        print(f"{path}: no rope_theta; taking 10000, LLaMA-2's", file=sys.stderr)
        fields["rope_theta"] = 10000.0
    if fields.get("num_key_value_heads") is None:  # as old as LLaMA-1
        fields["num_key_value_heads"] = fields.get("num_attention_heads")
    names = [field.name for field in dataclasses.fields(Config)]
    if missing := [name for name in names if name not in fields]:
        raise ValueError(f"{path}: no {missing[0]}; add the field")
    for field in dataclasses.fields(Config):
        value = fields[field.name]
        if not isinstance(value, (int, field.type)) or not value > 0:
            raise ValueError(
                f"{path}: {field.name} = {value!r} is not {'a whole number' if field.type is int else 'a number'} above 0; fetch the file again"
            )
    config = Config(**{name: fields[name] for name in names})
    if fields.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"{path}: head_dim = {fields['head_dim']} is not supported, only hidden_size / num_attention_heads"
        )
    for a, b in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if fields[a] % fields[b]:
            raise ValueError(f"{path}: {a} = {fields[a]} is not a multiple of {b} = {fields[b]}")
    return config


def config_json(config, dtype, bos_id, eos_id):
    """config.json as transformers 4 and 5 and vLLM read it: both spell rope and dtype their own way."""
    dtype = str(dtype).removeprefix("torch.")
    return dataclasses.asdict(config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "head_dim": config.head_dim,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


def parameter_shapes(config):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Model(config).named_parameters()}


class RandomWeights:
    """Fresh weights: norms 1, matrices normal(0, 0.02), the two that feed the residual stream scaled by 1 / sqrt(2 L).

    Like SafetensorsWeights a source of rows. A parameter's values depend on its name and the seed, not on who asks.
    """

    def __init__(self, config, seed):
        self.config, self.seed, self.shapes = config, seed, parameter_shapes(config)

    def rows(self, name, start, stop):
        """Rows start to stop of the parameter, fp32."""
        if len(self.shapes[name]) == 1:
            return torch.ones(stop - start)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if residual else 0.02
        return (torch.randn(self.shapes[name], generator=generator) * std)[start:stop]


class SafetensorsWeights:
    """The weights of a Hugging Face directory (one safetensors file, or many and an index), read by rows.

    config is the one to train: with more tokens than the files have rows, each added row of embed_tokens and lm_head is the
    mean of the file's (`<|end_of_turn|>` starts as the average token). ValueError: what is missing, foreign or misshapen.
    """

    def __init__(self, folder, config):
        folder, self.files = Path(folder), {}
        self.shapes, file_vocab = parameter_shapes(config), read_config(folder).vocab_size
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(
                isinstance(name, str) for name in files.values()
            ):
                raise ValueError(
                    f"{index}: no weight_map of tensors to files; fetch the file again"
                )
            names = sorted(set(files.values()))
        else:
            names = ["model.safetensors"]
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder}: no {name}; model.py reads safetensors (convert a .bin with transformers)"
                )
            try:
                file = safe_open(folder / name, "pt")
            except SafetensorError as error:
                raise ValueError(f"{folder / name}: {error}; fetch the file again") from None
            self.files |= {
                key: file for key in file.keys() if not key.endswith("rotary_emb.inv_freq")
            }
        shapes = parameter_shapes(dataclasses.replace(config, vocab_size=file_vocab))
        for key in sorted(shapes.keys() | self.files.keys()):
            if key not in self.files:
                raise ValueError(f"{folder}: no tensor {key} in {', '.join(names)}")
            if key not in shapes:
                raise ValueError(
                    f"{folder}: tensor {key} is no part of the model that config.json describes"
                )
            slice_ = self.files[key].get_slice(key)
            if tuple(slice_.get_shape()) != shapes[key]:
                raise ValueError(
                    f"{folder}: {key} is {slice_.get_shape()}, config.json says {list(shapes[key])}"
                )
            if slice_.get_dtype() not in ("F32", "F16", "BF16"):
                raise ValueError(
                    f"{folder}: {key} is stored as {slice_.get_dtype()}; F32, F16 and BF16 are read"
                )

    def rows(self, name, start, stop):
        """Rows start to stop of the parameter, fp32."""
        slice_ = self.files[name].get_slice(name)
        have = slice_.get_shape()[0]
        parts = [slice_[start : min(stop, have)].float()] if start < have else []
        if stop > have:  # only the two V x D tensors can be short: the constructor checked
            sum_D = torch.zeros(slice_.get_shape()[1], dtype=torch.float64)
            # added up as it goes: results kept in a list would pin the allocator's holes, 100 MB of
            # them
            for i in range(0, have, 512):
                sum_D += slice_[i : i + 512].double().sum(0)
            parts.append((sum_D / have).float().expand(stop - max(start, have), -1))
        return torch.cat(parts)


@torch.no_grad()
def load_weights(model, source, shard=lambda parameter: (parameter, 0)):
    """Fill every parameter from the source. `shard(parameter)` -> (the local rows, the first one's index); train.py's knows FSDP."""
    for name, parameter in model.named_parameters():
        local, start = shard(parameter)
        if local.numel():
            local.copy_(source.rows(name, start, start + len(local)))


def load_model(folder, device="cpu", dtype=torch.float32):
    """The model of a Hugging Face directory, ready to sample; its manifest is verified when there is one."""
    check_manifest(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Model(config)
    model.to(dtype).to_empty(device=device)  # in this order: never fp32 on the device
    load_weights(model, SafetensorsWeights(folder, config))
    return model.eval().requires_grad_(False)


def write_weights(folder, config, tensors, dtype, write=True, shard_bytes=5 * 2**30):
    """Write (name, tensor) pairs as model-0000i-of-0000n.safetensors and index, a shard in memory at a time.

    tensors comes in the order of named_parameters. Under FSDP every rank iterates (each pair is a collective), one writes.
    """
    size = {
        name: math.prod(shape) * dtype.itemsize for name, shape in parameter_shapes(config).items()
    }
    file_of, number, filled = {}, 1, 0
    for name in size:
        if filled and filled + size[name] > shard_bytes:
            number, filled = number + 1, 0
        file_of[name], filled = number, filled + size[name]
    file_of = {name: f"model-{i:05d}-of-{number:05d}.safetensors" for name, i in file_of.items()}
    shard = {}
    for name, tensor in tensors:
        if write:
            shard[name] = tensor.detach().to("cpu", dtype).contiguous()
            if len(shard) == list(file_of.values()).count(file_of[name]):
                save_file(shard, Path(folder) / file_of[name], metadata={"format": "pt"})
                shard = {}
        del tensor
    if write:
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": file_of}
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder):
    """manifest.json: {file: {bytes, sha256}} of all that stands in the folder."""
    files = sorted(p for p in Path(folder).iterdir() if p.name != "manifest.json")
    manifest = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (Path(folder) / "manifest.json").write_text(json.dumps(manifest, indent=1))


def check_manifest(folder):
    """ValueError names the first file that is not as manifest.json has it; a directory without one is said."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return print(f"{folder}: no manifest.json, files not verified", file=sys.stderr)
    for name, entry in read_json(path).items():
        file = path.with_name(name)
        entry = entry if isinstance(entry, dict) else {}
        if (
            not file.is_file()
            or os.path.getsize(file) != entry.get("bytes")
            or sha256(file) != entry.get("sha256")
        ):
            raise ValueError(
                f"{file}: missing or not as manifest.json has it; fetch or export the directory again"
            )
