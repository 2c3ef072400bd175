"""Rotary attention at the sizes that are timed and compiled, beside its peers."""

import math
from inspect import signature

import torch

from kernels.cases import optional
from kernels.rotary_attention import _rotate as rotation
from kernels.rotary_attention import (
    rotary_attention,
    rotary_attention_bwd_op,
    rotary_attention_op,
    rotary_attention_ref,
    rotate,
)

LESSON = 3  # its place in the reports

# bench.py: what its flags set, with their defaults; LLaMA-2 7B, 13B and 70B; --check.
SIZES = dict(T=16384, H=32, G=32, E=128, lengths="sharegpt", seed=0)
SHAPES = [
    *(dict(H=32, G=32, lengths="sharegpt", seed=seed) for seed in range(3)),
    dict(H=32, G=32, lengths="short"),
    dict(H=32, G=32, lengths="4096"),
    dict(H=40, G=40, lengths="sharegpt"),
    dict(H=64, G=8, lengths="sharegpt"),
]
SMALL = dict(T=96, H=4, G=2, E=32)

# compile.py: LLaMA-2 7B, 13B, 70B and 1.1B, the toy, and a T that 16 does not divide.
COMPILED = [
    dict(E=128, H=32, G=32),
    dict(E=128, H=64, G=8),
    dict(E=64, H=32, G=4),
    dict(E=32, H=3, G=3),
    dict(E=128, H=32, G=32, T=17),
]


def conversation_lengths(kind, T, seed):
    """Lengths that sum to T: "sharegpt", log-normal of mean 1,500 clipped at 4,096; "short", of mean 200; or a number, all alike."""
    if kind.isdigit():
        lengths = [int(kind)] * (T // int(kind) + 1)
    else:
        g, mean = torch.Generator().manual_seed(seed), {"sharegpt": 1500, "short": 200}[kind]
        lengths = (
            (torch.randn(T, generator=g) * 0.8 + math.log(mean) - 0.32)
            .exp()
            .clamp(16, 4096)
            .int()
            .tolist()
        )
    ends = torch.tensor([0, *lengths]).cumsum(0)
    ends = [*ends[ends < T].tolist(), T]
    return [b - a for a, b in zip(ends, ends[1:])]


def peers_of(make, device, T, H, G, E, lengths, seed):
    lengths = conversation_lengths(lengths, T, seed)
    positions = torch.cat([torch.arange(n) for n in lengths])
    angle = positions[:, None] / 10000 ** (torch.arange(0, E, 2) / E)
    cos, sin = angle.cos().float().to(device), angle.sin().float().to(device)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    tables, longest = (cos, sin, cu_seqlens), max(lengths)
    # SDPA, a conversation at a time
    peers = {
        "ours": lambda q, k, v: rotary_attention(q, k, v, *tables),
        "torch": lambda q, k, v: rotary_attention_ref(q, k, v, *tables),
    }
    if varlen := optional(device, "torch.nn.attention.varlen", "varlen_attn"):
        has = signature(varlen).parameters
        options = (dict(window_size=(-1, 0)) if "window_size" in has else dict(is_causal=True)) | (
            dict(enable_gqa=True) if "enable_gqa" in has else {}
        )
        wide = (
            (lambda x: x)
            if H == G or "enable_gqa" in has
            else lambda x: x.repeat_interleave(H // G, 1)
        )
        packed = lambda q, k, v: varlen(
            q, wide(k), wide(v), cu_seqlens, cu_seqlens, longest, longest, **options
        )
        peers["varlen_attn without RoPE"] = packed
        peers["varlen_attn after RoPE"] = lambda q, k, v: packed(
            rotate(q, cos, sin), rotate(k, cos, sin), v
        )
    elif flex := optional(device, "torch.nn.attention.flex_attention", "flex_attention"):
        from torch.nn.attention.flex_attention import create_block_mask

        conversation = torch.repeat_interleave(
            torch.arange(len(lengths)), torch.tensor(lengths)
        ).to(device)
        mask = create_block_mask(
            lambda b, h, i, j: (conversation[i] == conversation[j]) & (i >= j),
            None,
            None,
            T,
            T,
            device=device,
        )
        flexed = torch.compile(flex, dynamic=False)
        heads = lambda x: x.transpose(0, 1)[None]
        peers["flex_attention after RoPE"] = lambda q, k, v: flexed(
            heads(rotate(q, cos, sin)),
            heads(rotate(k, cos, sin)),
            heads(v),
            block_mask=mask,
            enable_gqa=H != G,
        )[0].transpose(0, 1)
    # what RoPE costs: ours spends this much of its time on writing rotated keys (backward: queries)
    if device == "cuda":
        peers["of it: rotating k"] = lambda q, k, v: rotation(k, cos, sin)
        peers["of it: rotating q"] = lambda q, k, v: rotation(q, cos, sin)
    squares = sum(n * n for n in lengths)
    cost = dict(forward=dict(flops=2 * H * E * squares), backward=dict(flops=5 * H * E * squares))
    return (
        (make(T, H, E), make(T, G, E), make(T, G, E)),
        peers,
        lambda q, k, v: rotary_attention_ref(q, k, v, *tables),
        cost,
    )


def launch(dtype, E, H, G, T=16):
    q, k = torch.ones(T, H, E, dtype=dtype), torch.ones(T, G, E, dtype=dtype)
    cos, cu_seqlens = torch.ones(T, E // 2), torch.tensor([0, 3, T], dtype=torch.int32)
    o, k, lse = rotary_attention_op(q, k, k, cos, cos, cu_seqlens)
    rotary_attention_bwd_op(q, k, k, cos, cos, cu_seqlens, o, lse, o)
