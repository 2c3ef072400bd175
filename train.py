r"""C-RLFT: fine-tune a LLaMA-2 on conversations of mixed quality, on a laptop or on GPU nodes.

    python train.py --data out/demo/train.safetensors --model toy --out out/demo --steps 1500
    python train.py plot out/demo

    torchrun --nproc_per_node=8 train.py \
        --data train.safetensors --model llama-2-13b-hf --out out/openchat
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train.py --data train.safetensors --model llama-2-13b-hf --out out/openchat

    python train.py --dry_run --model llama-2-13b --ranks 8 --batch_tokens 262144 --steps 2000

The method is `train_step`: the sum of w * nll over a step's micro-batches, divided once by the
whole step's sum of w (Eq. 6). Around it stand FSDP2, AdamW, a cosine, a line of the log, and
support/. The same command again resumes the run.

Shapes: T packed tokens of a micro-batch, R its rows with a weight.
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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from data import Prepared
from model import RECOMPUTE, SIZES, Block, Config, Losses, Model
from packing import Batch, ahead, flat, pack
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
    gauges,
    memory_by_rank,
    out_of_memory,
    print_budget,
    train_flops,
)
from support.checkpoint import Checkpoints
from support.cli import one_line, parse_args, run
from support.export import export
from support.files import file_sha256
from support.hf import RandomWeights, SafetensorsWeights, check_manifest, load_weights, read_config
from support.metrics import Log, ledger, log, log_line, plot
from support.ranks import Signals, local_rows, on_first_rank, rank_and_world, start_group, together

# ---- the method


def train_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    device: torch.device,
    weight_sum: float,
    clip: float,
    tally: "Tally",
    exact: "ExactSums | None" = None,
) -> float:
    """One optimizer step over this rank's micro-batches; returns the gradient norm of all ranks.

    weight_sum is the whole step's, of all ranks and micro-batches: the loss is a sum until it is
    divided, here, once. No rank divides by the weights that it happens to have, so a conversation
    counts the same wherever it lands.

    tally gets the step's sums for the log. exact: the ExactSums of --exact, or None.
    FloatingPointError: the loss or the gradient is not finite; nothing was updated.
    """
    for batch in batches:
        batch = batch.to(device)
        loss_sum, _, nll_T, correct_T = forward(model, batch)

        # The backward pass adds to the gradient that is there. With --exact it hands out the total
        # of all micro-batches so far: with the old gradient these would count twice.
        if exact:
            optimizer.zero_grad()

        # FSDP adds up the ranks' gradients in this call.
        (loss_sum / weight_sum).backward()
        tally.add(batch, loss_sum, nll_T, correct_T)
    if exact:
        exact.totals.clear()

    norm = clip_gradients([local_rows(p.grad)[0] for p in model.parameters()], clip)
    tally.reduce()
    if not (math.isfinite(tally.loss_sum) and math.isfinite(norm)):
        loss = tally.loss_sum / weight_sum
        raise FloatingPointError(f"loss {loss} and gradient norm {norm} are not both finite")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def forward(model: Model, batch: Batch) -> Losses:
    return model(
        batch.tokens_T,
        batch.positions_T,
        batch.cu_seqlens,
        batch.labels_T,
        batch.weights_T,
        batch.rows_R,
    )


def clip_gradients(gradients: list[Tensor], clip: float) -> float:
    """Scale this rank's gradient shards so that the norm over all ranks is at most clip.

    Returns the norm before. It is summed in fp64: where the gradient is cut into shards moves only
    its last digits, far below what the fp32 factor can hold. So the step does not depend on it.
    """
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    square = torch.stack(norms).square().sum()
    if dist.is_initialized():
        dist.all_reduce(square)
    norm = square.sqrt()

    # On the device throughout: whether to scale is not asked, which would wait for it.
    scale = (clip / norm).clamp(max=1.0).float()
    for g in gradients:
        g.mul_(scale)
    return norm.item()


class Tally:
    """What the log wants to know of a step: sums over its rows, added up over the ranks at its end.

    loss_sum is the sum of w * nll. Per class and over its supervised tokens: the sums that
    PER_CLASS names, and `count`, how many tokens they are.
    `stop` is no measurement. A rank that has got a signal raises it; it travels with the sums, so
    all ranks learn in the same step that the run is to stop.
    """

    # A new metric is a name here, and a line in `add` that says what a row gives. metrics.jsonl
    # has it as NAME_by_class.
    PER_CLASS = ("loss", "accuracy")

    def __init__(self, classes: int, device: torch.device, stop: bool = False):
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.sums = {"loss_sum": zeros(1), "stop": zeros(1) + float(stop)}
        for name in (*self.PER_CLASS, "count"):
            self.sums[name] = zeros(classes)

    def add(self, batch: Batch, loss_sum: Tensor, nll_T: Tensor, correct_T: Tensor) -> None:
        """Count in a micro-batch. nll_T, correct_T: as Losses of model.py has them."""
        of_rows = {
            "loss": nll_T[batch.rows_R],
            "accuracy": correct_T[batch.rows_R],
            "count": torch.ones_like(batch.class_R),
        }
        for name, value_R in of_rows.items():
            self.sums[name].index_add_(0, batch.class_R, value_R.double())
        self.sums["loss_sum"] += loss_sum.detach()

    def reduce(self) -> None:
        """Add up over the ranks. From here on all sums are Python numbers; so is `stop`."""
        # one vector, so that one collective adds up everything
        lengths = [len(x) for x in self.sums.values()]
        vector = torch.cat(list(self.sums.values()))
        if dist.is_initialized():
            dist.all_reduce(vector)

        # Here and at the gradient norm, and nowhere else, a step waits for the device.
        parts = vector.cpu().split(lengths)
        self.sums = {name: part.tolist() for name, part in zip(self.sums, parts)}
        (self.loss_sum,) = self.sums["loss_sum"]
        (self.stop,) = self.sums["stop"]

    def supervised(self) -> float:
        """Supervised tokens of the step, by what was trained on."""
        return sum(self.sums["count"])

    def by_class(self, classes: list) -> dict[str, dict[str, float | None]]:
        """{"loss_by_class": {class name: mean over its supervised tokens}, ..}.

        None for a class that has no supervised token in this step.
        """
        found = {}
        for name in self.PER_CLASS:
            means = {}
            for c, total, count in zip(classes, self.sums[name], self.sums["count"]):
                means[c.name] = total / count if count else None
            found[f"{name}_by_class"] = means
        return found


class ExactSums:
    """--exact: add up a step's gradients in fp64, and round to fp32 once, at its end.

    Why this gives the same bits on any number of ranks: the order of a sum matters only through
    rounding. A gradient has 24 bits, a sum in fp64 has 53. So nothing is rounded unless one
    gradient is more than 2^29 times another (in bf16 2^45); and then, where they do not nearly
    cancel, the last bit of the result changes about once in 2^29 sums.

    Why a hook: FSDP itself would round to fp32 after every round of micro-batches, and add in
    fp32. The hook is given each group's fp64 sum over the ranks before that, and puts the total of
    all rounds so far in its place.
    """

    def __init__(self):
        # {part of the model that FSDP reduces as one: its total so far, fp64}
        self.totals = {}

    def add(self, part: FSDPModule, reduced: Tensor) -> None:
        """The hook. reduced: the part's gradients of this round, flat, changed in place."""
        before = self.totals.get(part)
        if before is None:
            # -0.0 becomes 0.0, as it does where an idle rank's 0.0 is added
            reduced += 0.0
        else:
            reduced += before
            # FSDP calls this on a CUDA stream of its own. The old total's memory must not be
            # given to others before this stream has read it.
            if before.is_cuda:
                before.record_stream(torch.cuda.current_stream())
        self.totals[part] = reduced


# ---- model and optimizer


class Built(NamedTuple):
    model: Model
    optimizer: torch.optim.Optimizer
    exact: ExactSums | None  # of --exact


def build(config: TrainConfig, model_config: Config, device: torch.device) -> Built:
    """The model on its device, each rank with its shard and no values yet, and its optimizer."""
    # Without memory at first: no rank ever holds the whole model.
    with torch.device("meta"):
        model = Model(model_config)
    for block in model.model.layers:
        block.recompute = config.recompute
        if config.compile:
            compile_block(block)
    exact = ExactSums() if config.exact else None
    if dist.is_initialized():
        shard(model, config, device, exact)
    model.to_empty(device=device)
    return Built(model, make_optimizer(model.parameters(), config), exact)


def compile_block(block: Block) -> None:
    """Compile the part of a block that its kind of recomputation leaves to the compiler."""
    # A partial recomputation is chosen operation by operation, so the compiler has to see it and
    # gets the whole forward. A full one runs the block a second time, and goes around the compiled
    # function. `dynamic`: every micro-batch has another T.
    method = "forward" if block.recompute == "cheap" else "compute"
    setattr(block, method, torch.compile(getattr(block, method), dynamic=True))


def shard(model: Model, config: TrainConfig, device: torch.device, exact: ExactSums | None) -> None:
    """FSDP2: each rank keeps a part of each block's and of the other parameters."""
    # Inputs are not cast: loss weights and RoPE tables stay fp32 (0.1 in bf16 is 0.1001).
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.dtype),
        reduce_dtype=torch.float64 if exact else torch.float32,
        cast_forward_inputs=False,
    )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
        # FSDP would divide the gradients by the number of ranks. They are summed here: train_step
        # divides, once. Neither call reaches the parts of a part, so each part gets both.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        if exact:
            part.set_all_reduce_hook(partial(exact.add, part))


def make_optimizer(parameters: Iterable, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over this rank's shards. --dry_run builds it too, and asks it what it keeps.

    It works number by number, and so gives the same result wherever the shards are cut. --exact
    rests on that: with an optimizer that looks at whole matrices it would not keep its promise.
    """
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


# ---- a rank's micro-batches, and validation


def my_batches(data: Prepared, steps: Iterable, me: int, world: int) -> Iterator[Batch]:
    """The micro-batches of rank `me`, rounds(step, world) of each step: the ranks take turns.

    A rank without one in the last round gets two tokens of weight 0. It adds exact zeros, and
    joins the collectives that the others wait in.
    """
    idle = [(data.tokens[:2], data.weights[:2] * 0)]
    for step in steps:
        for number in range(me, rounds(step, world) * world, world):
            yield data.batch(step[number]) if number < len(step) else pack(idle)


def rounds(step: list, world: int) -> int:
    """How many turns it takes the ranks to go through a step's micro-batches."""
    return math.ceil(len(step) / world)


@torch.no_grad()
def validate(model: Model, data: Prepared, steps: list, device: torch.device) -> dict:
    """{val_loss, val_loss_by_class} over held-out prompts, weighted as in training."""
    tally = Tally(len(data.classes), device)
    me, world = rank_and_world()
    for batch in my_batches(data, steps, me, world):
        batch = batch.to(device)
        loss_sum, _, nll_T, correct_T = forward(model, batch)
        tally.add(batch, loss_sum, nll_T, correct_T)
    tally.reduce()

    # A forward pass leaves the root's parameters gathered, for a backward pass that does not come.
    if isinstance(model, FSDPModule):
        model.reshard()
    return {
        "val_loss": tally.loss_sum / data.weight_sums[flat(steps)].sum(),
        "val_loss_by_class": tally.by_class(data.classes)["loss_by_class"],
    }


# ---- setting up: what belongs together


class Bound(NamedTuple):
    """least <= value < below; `words` follow "is not" in the message."""

    least: float
    below: float
    words: str


# Python's smallest number above 0 stands for "above 0".
POSITIVE = Bound(math.ulp(0.0), math.inf, "above 0")
COUNT = Bound(1, 10**9, "above 0 and below 1e9")
SHARE = Bound(0, 1, "from 0 to below 1")
BOUNDS = {
    "steps": Bound(1, 10**6 + 1, "from 1 to 1,000,000: all are planned before the first"),
    "epochs": COUNT,
    "batch_tokens": COUNT,
    "micro_tokens": COUNT,
    "lr": POSITIVE,
    "min_lr": SHARE,
    "warmup": SHARE,
    "beta1": SHARE,
    "beta2": SHARE,
    "eps": POSITIVE,
    "weight_decay": SHARE,
    "clip": POSITIVE,
    "seed": Bound(0, 2**63, "from 0 to 2^63 - 1"),
    "val_fraction": SHARE,
    "val_every": COUNT,
    "save_every": COUNT,
    "keep": COUNT,
    "timeout": COUNT,
}
CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "recompute": RECOMPUTE,
    "nonfinite": ("stop", "skip"),
}

# For a base from a directory, the paper's (Sec. 4.1).
FINETUNE_BATCH_TOKENS = 262_144
MICRO_TOKENS = 16_384
# Llama-2's tokens and <|end_of_turn|>, where there are no data to say it.
LLAMA_VOCAB = 32_001


def resolve(config: TrainConfig, data: Prepared | None) -> tuple[TrainConfig, Config]:
    """(config without None, but for steps and a base's lr; the model's config).

    data: None stands for what Llama-2's tokenizer and context would give.
    ValueError: a setting is out of its bounds, or the parts do not belong together.
    """
    check_settings(config)
    if config.model in SIZES:
        model_config = preset_config(config.model, data)
        lr, batch_tokens = PRESETS[config.model]
    elif Path(config.model).is_dir():
        model_config = base_config(config, data)
        # the learning rate follows from the supervised tokens of a step, once they are planned
        lr = None
        batch_tokens = FINETUNE_BATCH_TOKENS
    else:
        names = ", ".join(SIZES)
        raise ValueError(f"--model {config.model!r} is neither a directory nor one of {names}")

    # What the user has set stays.
    on_gpu = torch.cuda.is_available()
    dtype = "bfloat16" if on_gpu else "float32"
    recompute = "all" if on_gpu else "none"
    batch_tokens = config.batch_tokens or batch_tokens
    config = dataclasses.replace(
        config,
        batch_tokens=batch_tokens,
        micro_tokens=min(config.micro_tokens or MICRO_TOKENS, batch_tokens),
        lr=config.lr or lr,
        dtype=config.dtype or dtype,
        recompute=config.recompute or recompute,
    )
    if data:
        check_lengths(config, model_config, data)
    return config, model_config


def check_settings(config: TrainConfig) -> None:
    for name, bound in BOUNDS.items():
        value = getattr(config, name)
        if value is not None and not bound.least <= value < bound.below:
            raise ValueError(f"--{name} {value} is not {bound.words}")
    for name, allowed in CHOICES.items():
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise ValueError(f"--{name} {value!r} is not one of {', '.join(allowed)}")

    # torch.compile writes Triton for a GPU, and C++ for a CPU.
    if config.compile and not torch.cuda.is_available():
        compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
        if not any(shutil.which(name) for name in compilers):
            raise ValueError("--compile needs a C++ compiler on a CPU, and finds none; install g++")


def vocab_of(data: Prepared | None) -> int:
    return data.tokenizer.eot + 1 if data else LLAMA_VOCAB


def preset_config(name: str, data: Prepared | None) -> Config:
    """A preset's sizes, with a vocabulary and a context as the data need them."""
    size = SIZES[name]
    max_len = data.meta["max_len"] if data else size.max_position_embeddings
    return dataclasses.replace(size, vocab_size=vocab_of(data), max_position_embeddings=max_len)


def base_config(config: TrainConfig, data: Prepared | None) -> Config:
    """Of a Hugging Face directory, with a row for <|end_of_turn|>; its tokenizer is the data's."""
    base = read_config(config.model)
    vocab = vocab_of(data)
    # The base itself need not know <|end_of_turn|>, the last of them.
    if base.vocab_size < vocab - 1:
        raise ValueError(
            f"{config.model}: vocab_size {base.vocab_size} is below the {vocab - 1} tokens of the "
            "data's tokenizer; prepare the data with this model's tokenizer.model"
        )
    tokenizer = Path(config.model) / "tokenizer.model"
    if data and tokenizer.is_file() and file_sha256(tokenizer) != data.meta["tokenizer_sha256"]:
        raise ValueError(
            f"{tokenizer} is not the tokenizer of {config.data}; prepare the data with it"
        )
    return dataclasses.replace(base, vocab_size=max(vocab, base.vocab_size))


def check_lengths(config: TrainConfig, model_config: Config, data: Prepared) -> None:
    """Every conversation fits the model's context and a micro-batch."""
    longest, context = data.lengths.max(), model_config.max_position_embeddings
    if longest > context:
        raise ValueError(
            f"{config.data}: a conversation of {longest} tokens, but the model's context is "
            f"{context}; prepare with --max_len {context}"
        )
    max_len = data.meta["max_len"]
    if max_len > config.micro_tokens:
        raise ValueError(
            f"{config.data} has conversations of up to max_len {max_len}, more than --micro_tokens "
            f"{config.micro_tokens}; raise it (and --batch_tokens), or prepare with a smaller "
            "--max_len"
        )


def choose_device() -> torch.device:
    """This process's own GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    count = torch.cuda.device_count()
    if device.index >= count:
        raise ValueError(
            f"{count} GPUs here, none for process {device.index + 1}; lower --nproc_per_node"
        )
    torch.cuda.set_device(device)
    return device


# ---- setting up: the plan of the run, and what a checkpoint must share with it


@dataclass(frozen=True)
class Setup:
    """What is settled before the first step. A conversation is its number in `data`."""

    config: TrainConfig  # resolved
    model_config: Config
    data: Prepared
    device: torch.device
    # Arrays of conversations, int64.
    train_on: Any
    held_out: Any
    # Of all epochs. A step is a list of micro-batches, a micro-batch an array of conversations.
    steps: list
    epoch_ends: list  # the last step of each epoch
    val_steps: list
    why_lr: str

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def last(self) -> int:
        return len(self.steps)


# Models of this width, LLaMA-2 34B and 70B, were pre-trained at half the learning rate.
WIDE = 8192
PRETRAIN_LR, PRETRAIN_LR_WIDE = 3e-4, 1.5e-4


def set_up(config: TrainConfig, store: dist.Store | None) -> Setup:
    """Open the data, check that all belongs together, start the process group, plan every step."""
    data = Prepared(config.data)
    config, model_config = resolve(config, data)
    # A sum's order on a CPU depends on the number of threads.
    if config.exact:
        torch.set_num_threads(1)
    device = choose_device()
    # FSDP does mixed precision and exact sums, and needs a group even for one process.
    needs_fsdp = config.exact or config.dtype != "float32"
    start_group(store, alone=needs_fsdp, timeout=config.timeout)

    train_on, held_out = data.split(config.val_fraction)
    if len(train_on) == 0:
        raise ValueError(
            f"{config.data}: every prompt falls into --val_fraction {config.val_fraction}; lower it"
        )
    cost = train_flops(model_config).plan_cost
    steps, epoch_ends = all_steps(data, train_on, config, cost)
    val_steps = epoch_steps(data, held_out, config, 0, cost) if len(held_out) else []

    why_lr = f"lr {config.lr}"
    if config.lr is None:
        wide = model_config.hidden_size >= WIDE
        supervised = data.supervised[flat(steps)].sum() / len(steps)
        lr, why_lr = finetune_lr(supervised, PRETRAIN_LR_WIDE if wide else PRETRAIN_LR)
        config = dataclasses.replace(config, lr=lr)
    return Setup(
        config=config,
        model_config=model_config,
        data=data,
        device=device,
        train_on=train_on,
        held_out=held_out,
        steps=steps,
        epoch_ends=epoch_ends,
        val_steps=val_steps,
        why_lr=why_lr,
    )


def plan_sha256(steps: list) -> str:
    """Of which conversations form each micro-batch of each step, and in which order."""
    digest = hashlib.sha256()
    for step in steps:
        # The lengths say where a micro-batch ends, the line where the step does.
        lengths = [len(micro_batch) for micro_batch in step]
        digest.update(f"{lengths}\n".encode())
        for micro_batch in step:
            digest.update(micro_batch.astype("<i8").tobytes())
    return digest.hexdigest()


def check_ranks_plan_alike(plan: str) -> None:
    """ValueError on a rank whose plan_sha256 is not rank 0's: conversations would be lost."""
    me, _ = rank_and_world()
    first = on_first_rank(lambda: plan)
    if plan != first:
        raise ValueError(
            f"rank {me} plans other steps than rank 0 (plan_sha256 {plan[:12]}, not {first[:12]}); "
            "all ranks need the same --data, flags and code"
        )


def base_sha256(model: str) -> str | None:
    """The content of a base, whatever its folder is called; None for a preset.

    ValueError: the files are not as the folder's manifest has them.
    """
    if model in SIZES:
        return None
    check_manifest(model)
    manifest = Path(model) / "manifest.json"
    if manifest.is_file():
        return file_sha256(manifest)
    files = []
    for path in sorted(Path(model).iterdir()):
        if path.name == "config.json" or path.suffix == ".safetensors":
            files.append(path)
    hashes = " ".join(file_sha256(path) for path in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


def settings_of(setup: Setup, optimizer: torch.optim.Optimizer) -> dict:
    """All that decides the run's numbers, for run.json; most of it for a checkpoint's identity.

    What is read from code and files stands here by content: a resumed run must not go on with
    other data, another base, another planner or another optimizer.
    """
    config = setup.config
    settings = dataclasses.asdict(config)
    settings["steps"] = setup.last
    settings["model_config"] = dataclasses.asdict(setup.model_config)

    # One rank reads the large files, and tells the others.
    settings["data_sha256"] = on_first_rank(lambda: file_sha256(config.data))
    settings["model_sha256"] = on_first_rank(lambda: base_sha256(config.model))

    # The plan, which every rank has made for itself.
    settings["plan_sha256"] = plan_sha256(setup.steps[: setup.epoch_ends[0]])
    check_ranks_plan_alike(settings["plan_sha256"])
    settings["optimizer"] = type(optimizer).__name__
    return settings


def checkpoints_of(setup: Setup, settings: dict) -> Checkpoints:
    identity = {key: value for key, value in settings.items() if key not in RESUME_MAY_CHANGE}
    config = setup.config
    root = setup.out / "checkpoints"
    return Checkpoints(root, identity, config.keep, config.async_save, config.timeout)


# ---- the run

# The exit status of a shell's command that Ctrl-C has ended.
SIGNALLED = 130
REMAINS = "a checkpoint remains, the same command resumes"


def train(config: TrainConfig, signals: Signals, store: dist.Store | None) -> None:
    """A run from its settings to the export; it goes on where --out holds a checkpoint.

    store: of the ranks that torchrun started, None for a process alone.
    """
    setup = set_up(config, store)
    built = build(setup.config, setup.model_config, setup.device)
    settings = settings_of(setup, built.optimizer)
    checkpoints = checkpoints_of(setup, settings)
    path, start = checkpoints.newest()

    hf = setup.out / "hf"
    if start == setup.last and (hf / "manifest.json").is_file():
        log(
            f"{setup.out}: this run is finished, {setup.last} steps; chat with "
            f"`python sample.py {hf}`, or give another --out"
        )
        return

    # A base that cannot be read stops here, before anything is written.
    if setup.config.model in SIZES:
        initial = RandomWeights(setup.model_config, setup.config.seed)
    else:
        initial = SafetensorsWeights(setup.config.model, setup.model_config)
    write_settings(setup, settings)
    if path:
        checkpoints.load(path, built.model, built.optimizer)
        log(f"resuming from {path}")
    else:
        load_weights(built.model, initial, local_rows)
    log(opening_line(setup, built.model))
    log(memory_by_rank(setup.device, checkpoints))

    training_loop(setup, built, checkpoints, start, signals)

    export(hf, built.model, setup.model_config, setup.data, getattr(torch, setup.config.dtype))
    draw_losses(setup)
    log(memory_by_rank(setup.device, checkpoints))
    log(f"exported to {hf}; chat with `python sample.py {hf}`")


def write_settings(setup: Setup, settings: dict) -> None:
    me, _ = rank_and_world()
    if me == 0:
        (setup.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings | {"torch": torch.__version__}, indent=1)
        (setup.out / "run.json").write_text(text)


def opening_line(setup: Setup, model: Model) -> str:
    config = setup.config
    parameters = sum(p.numel() for p in model.parameters())
    micro_batches = max(1, config.batch_tokens // config.micro_tokens)
    return (
        f"{parameters:,} parameters, {len(setup.train_on):,} conversations to train on, "
        f"{len(setup.held_out):,} held out, {setup.last} steps of up to {micro_batches} x "
        f"{config.micro_tokens:,} tokens; {setup.why_lr}"
    )


def training_loop(
    setup: Setup, built: Built, checkpoints: Checkpoints, start: int, signals: Signals
) -> None:
    """The steps after `start`, each with its line in the log; a checkpoint now and then.

    Ends with the last checkpoint on the disk: after the last step, or (SystemExit) after a signal.
    """
    model, optimizer, exact = built
    config, data = setup.config, setup.data
    device = setup.device
    me, world = rank_and_world()
    metrics = Log(setup.out, start, setup.last)
    flops = train_flops(setup.model_config)
    # A thread makes the next micro-batches while the device computes.
    batches_to_come = my_batches(data, setup.steps[start:], me, world)
    loader = ahead(batches_to_come, pin=device.type == "cuda")
    signals.in_loop = True

    for step in range(start + 1, setup.last + 1):
        micro_batches = setup.steps[step - 1]
        conversations = flat([micro_batches])
        is_last = step == setup.last

        lr = lr_at(step, setup.last, config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # the method: forward, backward, one division by the step's weight sum, one update
        began = time.perf_counter()
        tally = Tally(len(data.classes), device, stop=signals.received is not None)
        batches = itertools.islice(loader, rounds(micro_batches, world))
        weight_sum = data.weight_sums[conversations].sum()
        try:
            norm = train_step(
                model, optimizer, batches, device, weight_sum, config.clip, tally, exact
            )
        except FloatingPointError as error:
            # No update was made. The step is left out, or the run stops here; a save in the
            # background must be whole before that.
            optimizer.zero_grad()
            checkpoints.wait()
            metrics.not_taken(step, error, conversations, config)
        else:
            seconds = time.perf_counter() - began
            line = log_line(step, data, conversations, tally, norm, lr, seconds)
            tail = gauges(device, line, data.lengths[conversations], flops, world)
            metrics.write(line, tail)

        # what happens now and then
        if step in setup.epoch_ends:
            log_epoch(setup, step)
        if setup.val_steps and (step % config.val_every == 0 or is_last):
            metrics.write({"step": step} | validate(model, data, setup.val_steps, device))
        if step % config.save_every == 0 or is_last or tally.stop:
            checkpoints.save(step, model, optimizer)

        # a signal came (Ctrl-C, a preempted node): the checkpoint above is what remains
        if tally.stop and not is_last:
            checkpoints.wait()
            log(f"stopped by a signal after step {step}; {REMAINS}")
            sys.exit(SIGNALLED)

    checkpoints.wait()
    signals.in_loop = False


def log_epoch(setup: Setup, step: int) -> None:
    epoch = setup.epoch_ends.index(step) + 1
    counts = ledger(setup.data, setup.train_on, setup.held_out)
    log(f"epoch {epoch} done after step {step}: {counts}")


def draw_losses(setup: Setup) -> None:
    """loss.png, where matplotlib is installed; a run does not fail for want of a picture."""
    me, _ = rank_and_world()
    if me == 0:
        try:
            plot(setup.out)
        except ImportError as error:
            log(str(error))


# ---- the command line


def dry_run(config: FitConfig) -> None:
    """Print what a run needs; nothing is loaded."""
    check_fit(config)
    data = Prepared(config.data) if config.data else None
    # The question is about GPUs, wherever it is asked.
    config = dataclasses.replace(config, dtype=config.dtype or "bfloat16")
    config, model_config = resolve(config, data)

    # One small parameter is enough to see what the optimizer keeps of each number.
    probe = torch.nn.Parameter(torch.zeros(16, 16))
    optimizer = make_optimizer([probe], dataclasses.replace(config, lr=config.lr or 0.0))
    if data is None:
        print_budget(config, model_config, optimizer)
        return
    train_on, _ = data.split(config.val_fraction)
    steps, _ = all_steps(data, train_on, config, train_flops(model_config).plan_cost)
    used = flat(steps)
    supervised = data.supervised[used].sum()
    print_budget(config, model_config, optimizer, len(steps), data.lengths[used], supervised)


def check_given(config: TrainConfig) -> None:
    for name in ("data", "model", "out"):
        if not getattr(config, name):
            raise ValueError(
                f"--{name} is missing; the demo's two commands are "
                "`python -m paper.toy --out out/demo` and `python train.py --data "
                "out/demo/train.safetensors --model toy --out out/demo --steps 1500`"
            )


def main(argv: list[str]) -> None:
    if argv[:1] == ["plot"]:
        if len(argv) != 2:
            raise ValueError("plot takes the --out folder of a run")
        plot(argv[1])
        return
    if "--dry_run" in argv:
        # under torchrun, once
        if int(os.environ.get("RANK", 0)) == 0:
            words = [word for word in argv if word != "--dry_run"]
            dry_run(parse_args(FitConfig, words))
        return

    # Of all ranks, the first that fails says why; all leave.
    with together(one_line) as store:
        config = parse_args(TrainConfig, argv)
        check_given(config)
        with Signals() as signals:
            try:
                train(config, signals, store)
            except (RuntimeError, MemoryError) as error:
                remedy = out_of_memory(error)
                if remedy is None:
                    raise
                raise ValueError(remedy) from None


if __name__ == "__main__":
    run(main)
