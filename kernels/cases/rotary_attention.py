"""Rotary attention at the sizes that are timed, tuned and compiled, beside its peers."""

import math
from inspect import signature

import torch

from kernels import rotary_attention as module
from kernels.cases import Case, Cost, Knob, compiled, optional
from kernels.rotary_attention import (
    rotary_attention,
    rotary_attention_bwd_op,
    rotary_attention_op,
    rotary_attention_ref,
    rotate,
)

LESSON = 3
SIZES = {"T": 16384, "H": 32, "G": 32, "E": 128, "lengths": "sharegpt", "seed": 0}
# LLaMA-2 7B's heads with conversations as people have them, then long and short ones; 70B's, 13B's
SHAPES = [
    {"H": 32, "G": 32, "lengths": "sharegpt", "seed": 0},
    {"H": 32, "G": 32, "lengths": "4096"},
    {"H": 64, "G": 8, "lengths": "sharegpt"},
    {"H": 32, "G": 32, "lengths": "short"},
    {"H": 32, "G": 32, "lengths": "sharegpt", "seed": 1},
    {"H": 32, "G": 32, "lengths": "sharegpt", "seed": 2},
    {"H": 40, "G": 40, "lengths": "sharegpt"},
]
SMALL = {"T": 96, "H": 4, "G": 2, "E": 32}
# LLaMA-2 7B, 70B, 1.1B, the toy, and a T that 16 does not divide
COMPILED = [
    {"E": 128, "H": 32, "G": 32},
    {"E": 128, "H": 64, "G": 8},
    {"E": 64, "H": 32, "G": 4},
    {"E": 32, "H": 3, "G": 3},
    {"E": 128, "H": 32, "G": 32, "T": 17},
]


def tiles(name, direction, values, which):
    """The knob of one kernel's tiles: an entry in the GPU's row of LAUNCH."""

    def turn(arch, value):
        row = list(module.LAUNCH[arch])
        row[which] = value
        module.LAUNCH[arch] = tuple(row)

    return Knob(
        name,
        direction,
        values,
        place=lambda arch: f'LAUNCH["{arch}"][{which}]',
        read=lambda arch: module.LAUNCH[arch][which],
        turn=turn,
    )


# (rows owned, rows read at a time, warps, stages); the second divides the first
FORWARD_TILES = ((128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3))
DQ_TILES = ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 3))
DKV_TILES = ((128, 32, 8, 3), (128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3))
KNOBS = [
    tiles("forward tiles", "forward", FORWARD_TILES, 0),
    tiles("dq tiles", "backward", DQ_TILES, 1),
    tiles("dk, dv tiles", "backward", DKV_TILES, 2),
]


def conversation_lengths(kind, T, seed):
    """Lengths that sum to T: "sharegpt", log-normal of mean 1,500 clipped at 4,096; "short", of
    mean 200; or a number, all alike."""
    if kind.isdigit():
        lengths = [int(kind)] * (T // int(kind) + 1)
    else:
        mean = {"sharegpt": 1500, "short": 200}[kind]
        spread = 0.8
        normal = torch.randn(T, generator=torch.Generator().manual_seed(seed))
        # the mean of exp(mu + spread * normal) is exp(mu + spread^2 / 2)
        drawn = (normal * spread + math.log(mean) - spread**2 / 2).exp()
        lengths = drawn.clamp(16, 4096).int().tolist()
    ends = torch.tensor([0, *lengths]).cumsum(0)
    ends = [*ends[ends < T].tolist(), T]
    return [end - start for start, end in zip(ends, ends[1:])]


def case_of(make, device, T, H, G, E, lengths, seed):
    lengths = conversation_lengths(lengths, T, seed)
    positions = torch.cat([torch.arange(n) for n in lengths])
    angle = positions[:, None] / 10000 ** (torch.arange(0, E, 2) / E)
    cos = angle.cos().float().to(device)
    sin = angle.sin().float().to(device)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()

    def ours(q, k, v):
        return rotary_attention(q, k, v, cos, sin, cu_seqlens)

    def plain(q, k, v):
        # scaled_dot_product_attention, a conversation at a time
        return rotary_attention_ref(q, k, v, cos, sin, cu_seqlens)

    peers = {"ours": ours, "torch": plain}
    without_rope = packed_peers(device, cu_seqlens, max(lengths), H // G)
    for name, packed in without_rope.items():
        peers[f"{name} without RoPE"] = packed
    if "varlen_attn" in without_rope:
        packed = without_rope["varlen_attn"]

        def rotated(q, k, v):
            return packed(rotate(q, cos, sin), rotate(k, cos, sin), v)

        peers["varlen_attn after RoPE"] = rotated
        peers["varlen_attn after compiled RoPE"] = after_compiled(packed, cos, sin, device)
    if device == "cuda":
        peers["flex_attention after RoPE"] = flex(lengths, cos, sin, H != G)

    squares = sum(n * n for n in lengths)
    return Case(
        inputs=(make(T, H, E), make(T, G, E), make(T, G, E)),
        peers=peers,
        definition=plain,
        costs={
            "forward": Cost("flops", 2 * H * E * squares),
            "backward": Cost("flops", 5 * H * E * squares),
        },
        parts=rotations(cos, sin) if device == "cuda" else {},
        not_compared=tuple(name for name in peers if "without" in name),
    )


def rotations(cos, sin):
    """What RoPE costs: so much of our time goes into writing rotated keys, then queries."""

    def keys(_q, k, _v):
        return module._rotate(k, cos, sin)

    def queries(q, _k, _v):
        return module._rotate(q, cos, sin)

    return {"forward": {"of it: rotating k": keys}, "backward": {"of it: rotating q": queries}}


def packed_peers(device, cu_seqlens, longest, group):
    """{name: packed causal attention of (q, k, v)}: PyTorch's own, and flash-attn's where it is.

    (torch's activate_flash_attention_impl makes varlen_attn call the last two: the same kernels.)
    """
    peers = {}
    varlen = optional(device, "torch.nn.attention.varlen", "varlen_attn")
    if varlen:
        peers["varlen_attn"] = varlen_peer(varlen, cu_seqlens, longest, group)
    ends = (cu_seqlens, cu_seqlens, longest, longest)
    packages = {
        "FA2": "flash_attn",
        "FA3": "flash_attn_interface",
        "FA4": "flash_attn.cute",
    }
    for name, package in packages.items():
        attention = optional(device, package, "flash_attn_varlen_func")
        if attention:
            peers[name] = lambda q, k, v, f=attention: f(q, k, v, *ends, causal=True)
    return peers


def varlen_peer(varlen, cu_seqlens, longest, group):
    """torch 2.11 has is_causal or a window, and no grouped heads; later ones have both."""
    has = signature(varlen).parameters
    options = {"window_size": (-1, 0)} if "window_size" in has else {"is_causal": True}
    grouped = "enable_gqa" in has
    if grouped:
        options["enable_gqa"] = True

    def packed(q, k, v):
        if group > 1 and not grouped:
            k = k.repeat_interleave(group, 1)
            v = v.repeat_interleave(group, 1)
        return varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)

    return packed


def after_compiled(packed, cos, sin, device):
    rotation = compiled(lambda q, k: (rotate(q, cos, sin), rotate(k, cos, sin)), device)

    def attention(q, k, v):
        q, k = rotation(q, k)
        return packed(q, k, v)

    return attention


def flex(lengths, cos, sin, grouped):
    """FlexAttention with a mask of whole conversations."""
    attention = optional("cuda", "torch.nn.attention.flex_attention", "flex_attention")
    block_mask = optional("cuda", "torch.nn.attention.flex_attention", "create_block_mask")
    T = sum(lengths)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()

    def seen(_batch, _head, i, j):
        return (numbers[i] == numbers[j]) & (i >= j)

    mask = block_mask(seen, None, None, T, T, device="cuda")
    attention = torch.compile(attention, dynamic=False)

    def heads_first(x):
        return x.transpose(0, 1)[None]

    def rotated(q, k, v):
        q = heads_first(rotate(q, cos, sin))
        k = heads_first(rotate(k, cos, sin))
        o = attention(q, k, heads_first(v), block_mask=mask, enable_gqa=grouped)
        return o[0].transpose(0, 1)

    return rotated


def launch(dtype, E, H, G, T=16):
    q = torch.ones(T, H, E, dtype=dtype)
    k = torch.ones(T, G, E, dtype=dtype)
    cos = torch.ones(T, E // 2)
    cu_seqlens = torch.tensor([0, 3, T], dtype=torch.int32)
    o, k, lse = rotary_attention_op(q, k, k, cos, cos, cu_seqlens)
    rotary_attention_bwd_op(q, k, k, cos, cos, cu_seqlens, o, lse, o)
