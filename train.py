"""C-RLFT: fine-tune a LLaMA-2 on conversations of mixed quality. The same code on a laptop's CPU and on GPU nodes.

    python train.py --data out/demo/train.safetensors --model toy --out out/demo --steps 1500
    torchrun --nproc_per_node=8 train.py --data train.safetensors --model llama-2-13b-hf --out out/openchat
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ..
    python train.py plot out/demo

    python train.py --dry_run --model llama-2-13b --ranks 8 --batch_tokens 262144 --steps 2000

The method is `train_step`: the sum of w * nll over the step's micro-batches, divided once by the whole step's sum of w (Eq. 6).
Around it: FSDP2, AdamW, a cosine, a log line, and support/. Run the same command again to resume.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from data import Prepared
from model import RECOMPUTE, SIZES, Model
from packing import ahead, flat, pack
from recipe import (
    PRESETS,
    RESUME_MAY_CHANGE,
    TrainConfig,
    all_steps,
    epoch_steps,
    finetune_lr,
    lr_at,
)
from support.budget import (
    FitConfig,
    check_fit,
    fit,
    gauges,
    memory_by_rank,
    out_of_memory,
    train_flops,
)
from support.checkpoint import Checkpoints
from support.cli import one_line, parse_args, run
from support.export import export
from support.files import sha256
from support.hf import RandomWeights, SafetensorsWeights, check_manifest, load_weights, read_config
from support.metrics import Log, ledger, log, log_line, plot
from support.ranks import (
    Signals,
    local_rows,
    on_first_rank,
    rank,
    rank_and_world,
    start_group,
    together,
)

# ---- setting up


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


# ---- the run


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
    start_group(store, alone=config.exact or config.dtype != "float32", timeout=config.timeout)
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
    checkpoints = Checkpoints(
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
    if rank() == 0:
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
    me, world = rank_and_world()
    loader = ahead(my_batches(data, steps[start:], me, world), pin=device.type == "cuda")
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
    if rank() == 0:
        try:
            plot(out)
        except ImportError as error:
            log(str(error))
    log(memory_by_rank(device, checkpoints))
    log(f"exported to {out / 'hf'}; chat with `python sample.py {out / 'hf'}`")


def dry_run(config):
    """Print what a run needs; nothing is loaded."""
    check_fit(config)
    data = Prepared(config.data) if config.data else None
    config, model_config = resolve(
        dataclasses.replace(config, dtype=config.dtype or "bfloat16"), data
    )
    if data is None:
        return fit(config, model_config)
    linear, head, quadratic = train_flops(model_config)
    rows = data.split(config.val_fraction)[0]
    steps = all_steps(data, rows, config, (linear + head, quadratic))[0]
    used = flat(steps)
    fit(config, model_config, len(steps), data.lengths[used], data.supervised[used].sum())


def main(argv):
    if argv[:1] == ["plot"]:
        if len(argv) != 2:
            raise ValueError("plot takes the --out folder of a run")
        return plot(argv[1])
    if "--dry_run" in argv:
        if int(os.environ.get("RANK", 0)) == 0:
            dry_run(parse_args(FitConfig, [word for word in argv if word != "--dry_run"]))
        return
    with together(one_line) as store:
        config = parse_args(TrainConfig, argv)
        if not config.data or not config.model or not config.out:
            missing = next(name for name in ("data", "model", "out") if not getattr(config, name))
            raise ValueError(
                f"--{missing} is missing; the demo's two commands are `python -m paper.toy --out out/demo` and "
                "`python train.py --data out/demo/train.safetensors --model toy --out out/demo --steps 1500`"
            )
        with Signals() as signals:
            try:
                train(config, signals, store)
            except (RuntimeError, MemoryError) as error:
                if not (line := out_of_memory(error)):
                    raise
                raise ValueError(line) from None


if __name__ == "__main__":
    run(main)
