"""What a run needs: FLOPs, memory, the dry run."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kernels.cross_entropy import CHUNK_BYTES
from model import RECOMPUTE
from recipe import TrainConfig
from support.hf import parameter_shapes

# dense bf16, by a word in the device's name
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


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


@dataclass(frozen=True)
class FitConfig(TrainConfig):
    """--dry_run: the memory and time of a run on `ranks` GPUs like this one. Without --data: --steps of batch_tokens each."""

    ranks: int = 1
    tflops: float = 312.0  # of one GPU, dense bf16: A100 312; H100, H200 989
    gb: float = 80.0  # of one GPU
    # share of the FLOPs that the method needs (recomputation not counted) of those the GPU could do
    mfu: float = 0.45


def memory_parts(config, model_config, ranks):
    """{part: bytes on each GPU} at the fullest moment, the start of the backward pass; activations once for each RECOMPUTE."""
    size = {name: math.prod(shape) for name, shape in parameter_shapes(model_config).items()}
    whole, tokens = sum(size.values()), config.micro_tokens
    block = sum(n for name, n in size.items() if name.startswith("model.layers.0."))
    head, D, V, b = (
        size["lm_head.weight"],
        model_config.hidden_size,
        model_config.vocab_size,
        getattr(torch, config.dtype).itemsize,
    )
    # no FSDP: nothing is gathered or reduced
    alone = ranks == 1 and config.dtype == "float32" and not config.exact
    width = lambda how: activation_width(model_config, how)
    kept = {how: tokens * model_config.num_hidden_layers * width(how) * b for how in RECOMPUTE}
    # of the one block that is in its backward pass
    rebuilt = {how: tokens * (width("none") - width(how)) * b for how in RECOMPUTE}
    return {
        "weights, fp32, sharded": 4 * whole / ranks,
        "gradients, fp32, sharded": 4 * whole / ranks,
        "AdamW's two moments, sharded": 8 * whole / ranks,
        "gradient sums in fp64, sharded": 8 * whole / ranks if config.exact else 0,
        "gathered: two blocks, embedding, head": 0 if alone else b * (2 * block + 2 * head + D),
        "gradients of one group in reduction": 0
        if alone
        else (b + (8 if config.exact else 4) * (1 + (ranks == 1))) * max(block, 2 * head + D),
        "head's gradient, chunk of logits": 4 * head
        + min(CHUNK_BYTES["cpu" if alone else "cuda"], b * V * tokens),
        "activations": {
            how: kept[how]
            + rebuilt[how]
            + tokens * (4 * D + 3 * model_config.intermediate_size) * b
            for how in RECOMPUTE
        },
    }


def check_fit(config):
    """ValueError: flags without which a run's needs can't be told."""
    if not config.model or not (config.data or config.steps):
        raise ValueError(
            "--dry_run wants --model, and --data or --steps; for example --model llama-2-13b --ranks 8 --batch_tokens 262144 --steps 2000"
        )
    for name in ("ranks", "tflops", "gb", "mfu"):
        if not 1e-6 < getattr(config, name) <= (1 if name == "mfu" else 1e9):
            raise ValueError(
                f"--{name} {getattr(config, name)} is not above 0"
                + " and at most 1" * (name == "mfu")
            )


def fit(config, model_config, count=None, lengths=None, supervised=None):
    """Print what a run needs; nothing is loaded.

    config and model_config as `resolve` gives them. With --data: the steps of the whole run, the
    lengths of its conversations and how many of their tokens are supervised.
    """
    linear, head, quadratic = train_flops(model_config)
    if lengths is not None:
        tokens, squares = lengths.sum(), (lengths.astype(float) ** 2).sum()
        about = f"{config.data}: {supervised / tokens:.0%} supervised"
    else:
        count, tokens = config.steps, config.steps * config.batch_tokens
        supervised, squares, about = (
            tokens,
            tokens * 1500.0,
            "without --data: all supervised, conversations of 1,500",
        )
    parameters = sum(math.prod(shape) for shape in parameter_shapes(model_config).values())
    print(
        f"{config.model}: {parameters:,} parameters in {config.dtype} on {config.ranks} x {config.gb:g} GB, micro-batches of {config.micro_tokens:,} tokens"
    )
    parts = memory_parts(config, model_config, config.ranks)
    print(f"{'GiB on each rank, by --recompute':40}" + "".join(f"{how:>8}" for how in RECOMPUTE))
    total = dict.fromkeys(RECOMPUTE, 0.0)
    for name, x in parts.items():
        row = {how: round((x[how] if isinstance(x, dict) else x) / 2**30, 2) for how in RECOMPUTE}
        total = {how: total[how] + row[how] for how in RECOMPUTE}
        if any(row.values()):
            print(f"  {name:38}" + "".join(f"{row[how]:8.2f}" for how in RECOMPUTE))
    print(f"{'sum':40}" + "".join(f"{total[how]:8.2f}" for how in RECOMPUTE))
    # the rest: CUDA's context, NCCL, fragmentation
    fits = {how: total[how] * 2**30 < 0.92 * config.gb * 1e9 for how in RECOMPUTE}
    print(
        f"{f'within 92% of {config.gb:g} GB':40}"
        + "".join(f"{'yes' if fits[how] else 'no':>8}" for how in RECOMPUTE)
    )
    flops = linear * tokens + head * supervised + quadratic * squares
    micro = max(1, config.batch_tokens // config.micro_tokens)
    turns = -(-micro // config.ranks)  # of the ranks through a step's micro-batches
    seconds = (
        flops / (config.ranks * config.tflops * 1e12 * config.mfu) * turns * config.ranks / micro
    )
    if turns * config.ranks > micro:
        print(
            f"a step has {micro} micro-batches: {config.ranks} ranks take {turns} turns and are idle {1 - micro / turns / config.ranks:.0%} of the time"
        )
    print(
        f"{count:,} steps, {tokens:,} tokens ({about}): {flops:.3g} FLOPs / ({config.ranks} x {config.tflops:g} TFLOP/s x MFU {config.mfu:.0%}) = "
        + (f"{seconds / 3600:,.1f} hours" if seconds > 3600 else f"{seconds:.0f} seconds")
    )


def peak_flops():
    """Of this GPU, dense bf16; None where it is not in the table."""
    return next(
        (peak for word, peak in PEAK_FLOPS.items() if word in torch.cuda.get_device_name()), None
    )


def memory(device):
    """Bytes of this process: memory of its own, peak with the mapped pages of files, peak on the device; 0 where that is not known."""
    status = Path("/proc/self/status")
    fields = (
        dict(line.split(":", 1) for line in status.read_text().splitlines())
        if status.is_file()
        else {}
    )
    own, peak = (int(fields.get(key, "0").split()[0]) * 2**10 for key in ("RssAnon", "VmHWM"))
    return own, peak, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def memory_by_rank(device, ranks):
    names = ("host", "peak with mapped files", "device peak")
    columns = zip(names, zip(*ranks.gather(memory(device))))
    return "memory, GiB by rank: " + "; ".join(
        name + "".join(f" {x / 2**30:.2f}" for x in row) for name, row in columns if any(row)
    )


def gauges(device, line, lengths, flops, world):
    """For the terminal: peak memory, and on a GPU that we know MFU, the FLOPs of `train_flops` (real attention) over its peak."""
    _, host, on_device = memory(device)
    text = f" {(on_device or host) / 2**30:.1f} GiB"
    if device.type == "cuda" and (peak := peak_flops()):
        done = (
            flops[0] * line["tokens"]
            + flops[1] * line["supervised_tokens"]
            + flops[2] * float((lengths.astype(np.float64) ** 2).sum())
        )
        text = f" MFU {done / line['seconds'] / world / peak:.0%}" + text
    return text


def out_of_memory(error):
    """What to do about it, where this is why the run failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(
        error
    ):
        tried = re.search(r"[Tt]ried to allocate \S+ \w+", str(error))
        return (
            f"rank {os.environ.get('RANK', 0)} is out of memory ({tried[0] if tried else error}): lower --micro_tokens, set --recompute "
            "cheap or all, or take more ranks; the same flags with --dry_run show where it goes"
        )
