"""C-RLFT: fine-tune a LLaMA-2 on conversations of mixed quality. The same code on a laptop's CPU and on GPU nodes.

    python train.py --data out/demo/train.safetensors --model toy --out out/demo --steps 1500
    torchrun --nproc_per_node=8 train.py --data train.safetensors --model llama-2-13b-hf --out out/openchat
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ..
    python train.py plot out/demo

    python train.py --dry_run --model llama-2-13b --ranks 8 --batch_tokens 262144 --steps 2000

The method is `train_step`: the sum of w * nll over the step's micro-batches, divided once by the whole step's sum of w (Eq. 6).
Around it: FSDP2, AdamW, a cosine, a log line, and checkpoint.py. Run the same command again to resume.
"""

import base64
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import checkpoint
from checkpoint import on_first_rank, sha256
from data import (
    Prepared,
    ahead,
    finetune_lr,
    flat,
    one_line,
    pack,
    parse_args,
    plan,
    run,
    write_tokenizer,
)
from model import (
    CHUNK_BYTES,
    RECOMPUTE,
    SIZES,
    Model,
    RandomWeights,
    SafetensorsWeights,
    activation_width,
    check_manifest,
    config_json,
    load_weights,
    parameter_shapes,
    read_config,
    train_flops,
    write_manifest,
    write_weights,
)


@dataclass(frozen=True)
class TrainConfig:
    """Defaults are the paper's (Sec. 4.1). None: the model's own, see `resolve`."""

    data: str = ""  # a file that `python data.py prepare` wrote
    # a Hugging Face directory to fine-tune, or a preset to train from random weights
    model: str = ""
    out: str = ""
    steps: int | None = None  # instead of epochs
    epochs: int = 5
    batch_tokens: int | None = None  # packed tokens of an optimizer step, at most
    # packed tokens of a micro-batch, at most: what must fit on one GPU
    micro_tokens: int | None = None
    lr: float | None = None
    min_lr: float = 0.1  # share of lr at the end of the cosine
    warmup: float = 0.05  # share of the steps
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    # of compute: bfloat16 on GPUs, float32 on CPUs; weights and AdamW's moments are fp32
    dtype: str | None = None
    # of a block in the backward pass: none, cheap (what takes no matmul), all; default on GPUs: all
    recompute: str | None = None
    compile: bool = False  # the blocks, by torch.compile
    exact: bool = False  # the same bits on any number of ranks: gradients are summed in fp64
    nonfinite: str = "stop"  # or skip: what to do with a step whose loss or gradient is not finite
    val_fraction: float = 0.01  # of the prompts
    val_every: int = 100
    save_every: int = 500
    keep: int = 2  # checkpoints
    async_save: bool = False  # train on while a copy of the state in host memory is written
    timeout: int = 1800  # seconds that a rank waits for the others before the job fails


PRESETS = {  # (lr, batch_tokens) from random weights; LLaMA's are its pre-training's
    "toy": (2e-3, 1536),
    "small": (1e-3, 4096),
    "llama-2-7b": (3e-4, 2**22),
    "llama-2-13b": (3e-4, 2**22),
    "llama-2-34b": (1.5e-4, 2**22),
    "llama-2-70b": (1.5e-4, 2**22),
}
RESUME_MAY_CHANGE = (
    "data",
    "model",
    "out",
    "epochs",
    "recompute",
    "compile",
    "nonfinite",
    "val_every",
    "save_every",
    "keep",
    "async_save",
    "timeout",
)  # data and model by name: their content is compared; epochs: steps says it
# dense bf16, by a word in the device's name
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def lr_at(step, steps, config):
    """Learning rate of optimizer step `step`, from 1: linear warm-up, then a cosine from lr to min_lr * lr."""
    warmup = max(1, round(config.warmup * steps))
    if step <= warmup:
        return config.lr * step / warmup
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)


# ---- setting up


def log(text):
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text)


def resolve(config, data):
    """(config without None but for lr and steps, model config); ValueError where the parts do not belong together.

    data: a Prepared, or None for what Llama-2's tokenizer and context would give.
    """
    if config.steps and config.steps > 10**6:
        # all are planned before the first
        raise ValueError(f"--steps {config.steps:,} is above 1,000,000")
    for name in ("warmup", "min_lr", "val_fraction", "beta1", "beta2", "weight_decay"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)} is not from 0 to below 1")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"--seed {config.seed} is not from 0 to 2^63 - 1")
    for name in (
        "steps",
        "epochs",
        "batch_tokens",
        "micro_tokens",
        "lr",
        "eps",
        "clip",
        "val_every",
        "save_every",
        "keep",
        "timeout",
    ):
        value = getattr(config, name)
        if value is not None and not 0 < value < (1e9 if isinstance(value, int) else math.inf):
            raise ValueError(
                f"--{name} {value} is not above 0" + " and below 1e9" * isinstance(value, int)
            )
    for name, allowed in (
        ("recompute", (None, *RECOMPUTE)),
        ("nonfinite", ("stop", "skip")),
        ("dtype", (None, "float32", "bfloat16")),
    ):
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"--{name} {getattr(config, name)!r} is not one of {', '.join(filter(None, allowed))}"
            )
    if (
        config.compile
        and not torch.cuda.is_available()
        and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    ):
        raise ValueError("--compile needs a C++ compiler on a CPU, and finds none; install g++")
    cuda, vocab = torch.cuda.is_available(), data.tokenizer.eot + 1 if data else 32001
    if config.model in SIZES:
        max_len = data.meta["max_len"] if data else SIZES[config.model].max_position_embeddings
        model_config = dataclasses.replace(
            SIZES[config.model], vocab_size=vocab, max_position_embeddings=max_len
        )
        lr, batch_tokens = PRESETS[config.model]
    elif Path(config.model).is_dir():
        file = read_config(config.model)
        if file.vocab_size < vocab - 1:
            raise ValueError(
                f"{config.model}: vocab_size {file.vocab_size} is below the {vocab - 1} tokens of the data's tokenizer; "
                "prepare the data with this model's tokenizer.model"
            )
        own = Path(config.model) / "tokenizer.model"
        if (
            data
            and own.is_file()
            and hashlib.sha256(own.read_bytes()).hexdigest() != data.meta["tokenizer_sha256"]
        ):
            raise ValueError(
                f"{own} is not the tokenizer of {config.data}; prepare the data with it"
            )
        # the row of <|end_of_turn|>
        model_config = dataclasses.replace(file, vocab_size=max(vocab, file.vocab_size))
        lr, batch_tokens = None, 262_144
    else:
        raise ValueError(
            f"--model {config.model!r} is neither a directory nor one of {', '.join(SIZES)}"
        )
    if data and data.lengths.max() > model_config.max_position_embeddings:
        raise ValueError(
            f"{config.data}: a conversation of {data.lengths.max()} tokens, but the model's context is "
            f"{model_config.max_position_embeddings}; prepare with --max_len {model_config.max_position_embeddings}"
        )
    batch_tokens = config.batch_tokens or batch_tokens
    config = dataclasses.replace(
        config,
        batch_tokens=batch_tokens,
        micro_tokens=min(config.micro_tokens or 16_384, batch_tokens),
        lr=config.lr or lr,
        dtype=config.dtype or ("bfloat16" if cuda else "float32"),
        recompute=config.recompute or ("all" if cuda else "none"),
    )
    if data and data.meta["max_len"] > config.micro_tokens:
        raise ValueError(
            f"{config.data} has conversations of up to max_len {data.meta['max_len']}, more than --micro_tokens "
            f"{config.micro_tokens}; raise it (and --batch_tokens), or prepare with a smaller --max_len"
        )
    return config, model_config


def base_sha256(model):
    """What tells one base from another, whatever its folder is called; None for a preset. ValueError: not as its manifest has it."""
    if model in SIZES:
        return None
    check_manifest(model)
    manifest = Path(model) / "manifest.json"
    if manifest.is_file():
        return sha256(manifest)
    files = sorted(
        p for p in Path(model).iterdir() if p.name == "config.json" or p.suffix == ".safetensors"
    )
    return hashlib.sha256(" ".join(map(sha256, files)).encode()).hexdigest()


def build(config, model_config, device):
    """(model on its device, each rank with its shard and no values yet; AdamW over it; its ExactSums with --exact, else None)."""
    with torch.device("meta"):
        model = Model(model_config)
    for block in model.model.layers:
        block.recompute = config.recompute
        # inside a whole recomputation; around a partial one, which the compiler has to see
        if config.compile:
            name = "forward" if config.recompute == "cheap" else "compute"
            setattr(block, name, torch.compile(getattr(block, name), dynamic=True))
    exact = ExactSums() if config.exact else None
    if dist.is_initialized():
        # Inputs are not cast: loss weights and RoPE tables stay fp32 (0.1 in bf16 is 0.1001).
        policy = MixedPrecisionPolicy(
            getattr(torch, config.dtype),
            torch.float64 if exact else torch.float32,
            cast_forward_inputs=False,
        )
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
            # gradients are summed: train_step divides, once. Neither call is recursive.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            if exact:
                part.set_all_reduce_hook(partial(exact.add, part))
    model.to_empty(device=device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return model, optimizer, exact


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_rows(parameter):
    """(this rank's rows of the parameter, index of the first): FSDP2 cuts dimension 0 as torch.chunk does."""
    if not hasattr(parameter, "to_local"):
        return parameter, 0
    rank, world = rank_and_world()
    return parameter.to_local(), rank * -(-parameter.shape[0] // world)


# ---- the method


def forward(model, batch):
    return model(
        batch.tokens_T,
        batch.positions_T,
        batch.cu_seqlens,
        batch.labels_T,
        batch.weights_T,
        rows_R=batch.rows_R,
        per_row=True,
    )


class ExactSums:
    """--exact: gradients summed in fp64 over ranks and micro-batches, and rounded to fp32 once.

    fp32 numbers sum up exactly in fp64 unless one is 2^29 times another (bf16: 2^45); and then, where they do not nearly cancel,
    the last bit of the rounded sum changes with odds of about 2^-29. So the order of the sum is free, and a step's fixed
    micro-batches give the same bits on any number of ranks. FSDP would round after each round of micro-batches and add in fp32; its hook, which sees a group's fp64 sum
    over the ranks before that, adds up the rounds here and hands out the total.
    """

    def __init__(self):
        self.totals = {}

    def add(self, part, reduced):
        before = self.totals.get(part)
        # + 0.0 makes 0.0 of -0.0, as the sum with an idle rank's 0.0 does
        reduced += 0.0 if before is None else before
        if before is not None and before.is_cuda:
            # not to be used again before this stream has added it
            before.record_stream(torch.cuda.current_stream())
        self.totals[part] = reduced


def train_step(model, optimizer, batches, device, weight_sum, clip, tally, exact=None):
    """One optimizer step; returns the gradient norm. Adds to tally, which then has this rank's share of the log's sums.

    weight_sum is of the whole step, all ranks and micro-batches: the loss is a sum until it is divided, here, once. No rank
    divides by weights of its own, so that a conversation counts the same wherever it lands.
    """
    for batch in batches:
        batch = batch.to(device)
        loss_sum, _, nll_T, correct_T = forward(model, batch)
        if exact:
            optimizer.zero_grad()  # the total so far comes again, with this micro-batch's share
        (loss_sum / weight_sum).backward()  # FSDP sums over the ranks
        tally.add(batch, loss_sum, nll_T, correct_T)
    if exact:
        exact.totals.clear()
    norm = clip_gradients([local_rows(p.grad)[0] for p in model.parameters()], clip)
    tally.reduce()
    if not (math.isfinite(tally.loss_sum) and math.isfinite(norm)):
        raise FloatingPointError(
            f"loss {tally.loss_sum / weight_sum} and gradient norm {norm} are not both finite"
        )
    optimizer.step()
    optimizer.zero_grad()
    return norm


def clip_gradients(gradients, clip):
    """Scale this rank's gradient shards so that the norm over all ranks is at most clip; returns the norm before.

    Summed in fp64, the norm does not depend on how the gradient is sharded, and so neither does the step.
    """
    square = (
        torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients])
        .square()
        .sum()
    )
    if dist.is_initialized():
        dist.all_reduce(square)
    norm = square.sqrt()
    for g in gradients:
        g.mul_((clip / norm).clamp(max=1.0).float())
    return norm.item()


class Tally:
    """Sums for the log: loss_sum, and per class nll, correct and count of supervised tokens; one reduction over the ranks."""

    def __init__(self, classes, device, stop=False):
        self.sums = torch.zeros(2 + 3 * classes, dtype=torch.float64, device=device)
        self.sums[1] = float(stop)

    def add(self, batch, loss_sum, nll_T, correct_T):
        nll, correct, count = self.sums[2:].view(3, -1)
        self.sums[0] += loss_sum.detach()
        nll.index_add_(0, batch.class_R, nll_T[batch.rows_R].double())
        correct.index_add_(0, batch.class_R, correct_T[batch.rows_R].double())
        count.index_add_(0, batch.class_R, torch.ones_like(batch.class_R, dtype=torch.float64))

    def reduce(self):
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        # with the gradient norm, the step's only waits for the device
        self.loss_sum, self.stop, *by_class = self.sums.tolist()
        n = len(by_class) // 3
        self.nll, self.correct, self.count = by_class[:n], by_class[n : 2 * n], by_class[2 * n :]

    def by_class(self, classes, sums):
        return {c.name: s / n if n else None for c, s, n in zip(classes, sums, self.count)}


def my_batches(data, steps, rank, world):
    """This rank's micro-batches, rounds(step, world) of each step. A rank without one in the last round gets two tokens of
    weight 0: it adds exact zeros, and joins the collectives that the others wait in."""
    idle = [(data.tokens[:2], data.weights[:2] * 0)]
    for step in steps:
        for i in range(rank, rounds(step, world) * world, world):
            yield data.batch(step[i]) if i < len(step) else pack(idle)


def rounds(step, world):
    return -(-len(step) // world)


@torch.no_grad()
def validate(model, data, steps, device):
    """{val_loss, val_loss_by_class} over held-out prompts, weighted as in training."""
    tally = Tally(len(data.classes), device)
    weight_sum = data.weight_sums[flat(steps)].sum()
    for batch in my_batches(data, steps, *rank_and_world()):
        batch = batch.to(device)
        loss_sum, _, nll_T, correct_T = forward(model, batch)
        tally.add(batch, loss_sum, nll_T, correct_T)
    tally.reduce()
    if isinstance(model, FSDPModule):
        model.reshard()  # a forward pass without a backward leaves the root's parameters gathered
    return {
        "val_loss": tally.loss_sum / weight_sum,
        "val_loss_by_class": tally.by_class(data.classes, tally.nll),
    }


# ---- what a run needs


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


def fit(config):
    """Print what a run needs; nothing is loaded."""
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
    data = Prepared(config.data) if config.data else None
    config, model_config = resolve(
        dataclasses.replace(config, dtype=config.dtype or "bfloat16"), data
    )
    linear, head, quadratic = train_flops(model_config)
    if data:
        rows = data.split(config.val_fraction)[0]
        steps = all_steps(data, rows, config, (linear + head, quadratic))[0]
        used = flat(steps)
        tokens, supervised, squares = (
            data.lengths[used].sum(),
            data.supervised[used].sum(),
            (data.lengths[used].astype(float) ** 2).sum(),
        )
        count, about = len(steps), f"{config.data}: {supervised / tokens:.0%} supervised"
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


# ---- the run


def epoch_steps(data, conversations, config, epoch, cost):
    """plan() over these conversations of the data, and proof that each is used once."""
    planned = plan(
        data.lengths[conversations],
        data.class_ids[conversations],
        data.weight_sums[conversations],
        config.seed,
        epoch,
        config.batch_tokens,
        config.micro_tokens,
        cost,
    )
    steps = [[conversations[micro] for micro in step] for step in planned]
    assert np.array_equal(np.sort(flat(steps)), conversations)
    return steps


def all_steps(data, conversations, config, cost):
    """(steps of the whole run, where each epoch ends): a pure function of data and config, so a resumed run goes on in it."""
    steps, ends = [], []
    while len(steps) < config.steps if config.steps else len(ends) < config.epochs:
        steps += epoch_steps(data, conversations, config, len(ends), cost)
        ends.append(len(steps))
    return steps[: config.steps], ends


def read_metrics(path, until=math.inf):
    """The whole lines of a metrics.jsonl, up to a step; a crash may have torn the last."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [
        line
        for line in lines
        if isinstance(line, dict) and "step" in line and line["step"] <= until
    ]


class Log:
    """metrics.jsonl, and a progress bar or, off a terminal, a line now and then; on rank 0."""

    def __init__(self, out, start, steps):
        self.first, self.every, self.steps, self.skipped, self.in_a_row = (
            checkpoint.rank() == 0,
            max(1, steps // 20),
            steps,
            0,
            0,
        )
        if self.first:
            path = Path(out) / "metrics.jsonl"
            unfinished = path.with_name("metrics.partial")
            kept = read_metrics(path, until=start)  # steps after the checkpoint are taken again
            self.skipped = sum("skipped" in line for line in kept)
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
            unfinished.replace(path)
            self.file = open(path, "a", buffering=1)
            self.bar = tqdm(
                total=steps, initial=start, unit="step", disable=None, dynamic_ncols=True
            )

    def write(self, line, tail=""):
        if "loss" in line:
            self.in_a_row = 0
        if not self.first:
            return
        self.file.write(json.dumps(line) + "\n")
        if "skipped" in line:
            self.bar.update()
            return log(
                f"step {line['step']} skipped, {line['skipped']} so far: {line['nonfinite']}"
            )
        if "nonfinite" in line:
            return
        classes = lambda key: " ".join(
            f"{name} {x:.3f}" for name, x in line[key].items() if x is not None
        )
        if "val_loss" in line:
            return log(
                f"step {line['step']}: validation loss {line['val_loss']:.4f} ({classes('val_loss_by_class')})"
            )
        text = (
            f"loss {line['loss']:.4f} ({classes('loss_by_class')}) lr {line['lr']:.2e} {line['tokens_per_s']:,.0f} tokens/s "
            f"{line['supervised_tokens'] / line['tokens']:.0%} supervised{tail}"
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and (line["step"] % self.every == 0 or line["step"] in (1, self.steps)):
            print(f"step {line['step']}/{self.steps} {text}", flush=True)

    def nonfinite(self, step, error, conversations, config):
        """Log a step that was not taken. Returns why the run must stop, or None where such steps are skipped; the tenth in a row stops it."""
        self.in_a_row += 1
        stop = config.nonfinite == "stop" or self.in_a_row == 10
        self.skipped += not stop
        self.write(
            {"step": step, "nonfinite": str(error), "conversations": conversations.tolist()}
            | ({} if stop else {"skipped": self.skipped})
        )
        if stop:
            return (
                f"step {step}: {error}, the run stops{' after 10 such steps in a row' * (self.in_a_row == 10)}; look at conversations "
                f"{conversations[:8].tolist()}.. of {config.data} (all {len(conversations)} in metrics.jsonl); --nonfinite skip leaves such "
                "steps out, or begin another --out with a lower --lr"
            )


def ledger(data, train_on, held_out):
    trained, held = data.lengths[train_on].sum(), data.lengths[held_out].sum()
    return (
        f"{len(train_on):,} conversations once each, {trained:,} tokens ({data.supervised[train_on].sum():,} supervised) "
        f"+ {held:,} held out = {trained + held:,} of the file"
    )


def log_line(step, data, conversations, tally, norm, lr, seconds):
    """The line of metrics.jsonl of an optimizer step."""
    tokens, supervised, weight_sum = (
        x[conversations].sum().item() for x in (data.lengths, data.supervised, data.weight_sums)
    )
    assert sum(tally.count) == supervised, "the step trained on other tokens than were planned"
    return {
        "step": step,
        "loss": tally.loss_sum / weight_sum,
        "loss_by_class": tally.by_class(data.classes, tally.nll),
        "accuracy_by_class": tally.by_class(data.classes, tally.correct),
        "lr": lr,
        "grad_norm": norm,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "weight_sum": weight_sum,
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
    }


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


def train(config, signals, store):
    data = Prepared(config.data)
    config, model_config = resolve(config, data)
    if config.exact:
        torch.set_num_threads(1)  # a sum's order on a CPU depends on their number
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs here, none for process {device.index + 1}; lower --nproc_per_node"
        )
    if cuda:
        torch.cuda.set_device(device)
    checkpoint.start_group(
        store, alone=config.exact or config.dtype != "float32", timeout=config.timeout
    )
    train_on, held_out = data.split(config.val_fraction)
    if len(train_on) == 0:
        raise ValueError(
            f"{config.data}: every prompt falls into --val_fraction {config.val_fraction}; lower it"
        )
    flops = train_flops(model_config)
    cost = flops[0] + flops[1], flops[2]
    steps, epoch_ends = all_steps(data, train_on, config, cost)
    val_steps = epoch_steps(data, held_out, config, 0, cost) if len(held_out) else []
    reason = f"lr {config.lr}"
    if config.lr is None:
        lr, reason = finetune_lr(
            data.supervised[flat(steps)].sum() / len(steps),
            1.5e-4 if model_config.hidden_size >= 8192 else 3e-4,
        )
        config = dataclasses.replace(config, lr=lr)

    out, last = Path(config.out), len(steps)
    settings = dataclasses.asdict(config) | {
        "steps": last,
        "model_config": dataclasses.asdict(model_config),
        "data_sha256": on_first_rank(lambda: sha256(config.data)),
        "model_sha256": on_first_rank(lambda: base_sha256(config.model)),
    }
    identity = {key: value for key, value in settings.items() if key not in RESUME_MAY_CHANGE}
    checkpoints = checkpoint.Checkpoints(
        out / "checkpoints", identity, config.keep, config.async_save, config.timeout
    )
    path, start = checkpoints.newest()
    if start == last and (out / "hf" / "manifest.json").is_file():
        return log(
            f"{out}: this run is finished, {last} steps; chat with `python sample.py {out / 'hf'}`, or give another --out"
        )
    fresh = (
        RandomWeights(model_config, config.seed)
        if config.model in SIZES
        else SafetensorsWeights(config.model, model_config)
    )
    model, optimizer, exact = build(config, model_config, device)
    if checkpoint.rank() == 0:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "run.json").write_text(json.dumps(settings | {"torch": torch.__version__}, indent=1))
    if path:
        checkpoints.load(path, model, optimizer)
        log(f"resuming from {path}")
    else:
        load_weights(model, fresh, local_rows)
    log(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_on):,} conversations to train on, "
        f"{len(held_out):,} held out, {last} steps of up to {max(1, config.batch_tokens // config.micro_tokens)} x {config.micro_tokens:,} tokens; {reason}"
    )
    log(memory_by_rank(device, checkpoints))

    metrics = Log(out, start, last)
    rank, world = rank_and_world()
    loader = ahead(my_batches(data, steps[start:], rank, world), pin=device.type == "cuda")
    signals.in_loop = True
    for step in range(start + 1, last + 1):
        began, used = time.perf_counter(), flat(steps[step - 1 : step])
        tally, lr = (
            Tally(len(data.classes), device, stop=signals.received is not None),
            lr_at(step, last, config),
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = itertools.islice(loader, rounds(steps[step - 1], world))
        try:
            norm = train_step(
                model,
                optimizer,
                batches,
                device,
                data.weight_sums[used].sum(),
                config.clip,
                tally,
                exact,
            )
        except FloatingPointError as error:
            optimizer.zero_grad()
            if problem := metrics.nonfinite(step, error, used, config):
                checkpoints.wait()
                raise ValueError(problem) from None
        else:
            line = log_line(step, data, used, tally, norm, lr, time.perf_counter() - began)
            metrics.write(line, gauges(device, line, data.lengths[used], flops, world))
        if step in epoch_ends:
            log(
                f"epoch {epoch_ends.index(step) + 1} done after step {step}: {ledger(data, train_on, held_out)}"
            )
        if val_steps and (step % config.val_every == 0 or step == last):
            metrics.write({"step": step} | validate(model, data, val_steps, device))
        if step % config.save_every == 0 or step == last or tally.stop:
            checkpoints.save(step, model, optimizer)
        if tally.stop and step < last:
            checkpoints.wait()
            log(
                f"stopped by a signal after step {step}; a checkpoint remains, the same command resumes"
            )
            sys.exit(130)

    checkpoints.wait()
    signals.in_loop = False
    export(out / "hf", model, model_config, data, getattr(torch, config.dtype))
    if checkpoint.rank() == 0:
        try:
            plot(out)
        except ImportError as error:
            log(str(error))
    log(memory_by_rank(device, checkpoints))
    log(f"exported to {out / 'hf'}; chat with `python sample.py {out / 'hf'}`")


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


def export(folder, model, model_config, data, dtype):
    """Write the Hugging Face directory, read it back, compare every value, then give it its name."""
    unfinished, first, tokenizer = (
        folder.with_name("hf.partial"),
        checkpoint.rank() == 0,
        data.tokenizer,
    )
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    try:
        whole = (
            (name, p.full_tensor() if hasattr(p, "full_tensor") else p)
            for name, p in model.named_parameters()
        )
        write_weights(unfinished, model_config, whole, dtype, write=first)
        if first:
            generation = {
                "bos_token_id": tokenizer.bos,
                "eos_token_id": [tokenizer.eot, tokenizer.eos],
            }
            for name, content in (
                ("config.json", config_json(model_config, dtype, tokenizer.bos, tokenizer.eos)),
                ("generation_config.json", generation),
            ):
                (unfinished / name).write_text(json.dumps(content, indent=1))
            # first user messages by 32 bits of their hash: evaluate.py asks what was trained on
            prompts = np.unique(data.group).astype(np.uint32)
            write_tokenizer(
                unfinished,
                tokenizer,
                data.meta | {"prompts": base64.b64encode(prompts.tobytes()).decode()},
            )
            write_manifest(unfinished)
            check_manifest(unfinished)
        checkpoint.barrier()
        written = SafetensorsWeights(unfinished, model_config)
        for name, parameter in model.named_parameters():
            local, start = local_rows(parameter)
            if local.numel():
                same = torch.equal(
                    written.rows(name, start, start + len(local)),
                    local.detach().to("cpu", dtype).float(),
                )
                assert same, f"{folder}: {name} reads back other values than were written"
        checkpoint.barrier()
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    except (OSError, SafetensorError):
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def plot(folder):
    """loss.png from metrics.jsonl."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "no loss.png: `pip install matplotlib`, then `python train.py plot DIR`"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the --out of a run")
    lines = read_metrics(path)
    if not lines:
        raise ValueError(f"{path}: no step in it yet")
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for prefix, style in (("", "-"), ("val_", "o--")):
        for name in next(
            (line[prefix + "loss_by_class"] for line in lines if prefix + "loss_by_class" in line),
            (),
        ):
            points = [
                (line["step"], line[prefix + "loss_by_class"][name])
                for line in lines
                if prefix + "loss_by_class" in line
            ]
            axes.plot(
                *zip(*points),
                style,
                linewidth=1,
                markersize=3,
                label=f"{name}, {'held-out prompts' if prefix else 'training'}",
            )
    axes.set(xlabel="optimizer step", ylabel="nll per supervised token", title=str(folder))
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(folder) / "loss.png", dpi=120)


def main(argv):
    if argv[:1] == ["plot"]:
        if len(argv) != 2:
            raise ValueError("plot takes the --out folder of a run")
        return plot(argv[1])
    if "--dry_run" in argv:
        if int(os.environ.get("RANK", 0)) == 0:
            fit(parse_args(FitConfig, [word for word in argv if word != "--dry_run"]))
        return
    with checkpoint.together(one_line) as store:
        config = parse_args(TrainConfig, argv)
        if not config.data or not config.model or not config.out:
            missing = next(name for name in ("data", "model", "out") if not getattr(config, name))
            raise ValueError(
                f"--{missing} is missing; the demo's two commands are `python -m paper.toy --out out/demo` and "
                "`python train.py --data out/demo/train.safetensors --model toy --out out/demo --steps 1500`"
            )
        with checkpoint.Signals() as signals:
            try:
                train(config, signals, store)
            except (RuntimeError, MemoryError) as error:
                if not (line := out_of_memory(error)):
                    raise
                raise ValueError(line) from None


if __name__ == "__main__":
    run(main)
