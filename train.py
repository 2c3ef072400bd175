r"""C-RLFT: fine-tune a LLaMA-2 on conversations of mixed quality, on a laptop or on GPU nodes.

    python train.py --data out/demo/train.safetensors --model toy --out out/demo --steps 1500
    python train.py plot out/demo

    torchrun --nproc_per_node=8 train.py \
        --data train.safetensors --model llama-2-13b-hf --out out/openchat
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train.py --data train.safetensors --model llama-2-13b-hf --out out/openchat

    python train.py --dry_run --model llama-2-13b --ranks 8 --batch_tokens 262144 --steps 2000

--model names a preset or a base. A preset is a name in SIZES of model.py (toy, llama-2-13b, ..):
the run trains that size from random weights. A base is a Hugging Face directory (llama-2-13b-hf
above): the run fine-tunes the weights in it.

The method is `train_step`: the sum of w * nll over a step's micro-batches (Eq. 6), divided once by
the whole step's sum of w, as the public trainer does. Around it stand FSDP2, AdamW, a cosine for
the learning rate, the log, and support/. The same command again resumes the run.

Words: a step is one update of the optimizer. Its micro-batches are dealt to the ranks in turn. In
a round each rank computes one micro-batch.

Shapes: T packed tokens of a micro-batch, R its rows with a loss weight.
"""

import support.threads  # noqa: F401, first: how threads wait is said before torch is loaded

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from data import NO_DIGESTS, Prepared
from model import RECOMPUTE, SIZES, Block, Config, Losses, Model
from packing import MOST_MICRO_BATCHES, Batch, ahead, flat, micro_batches_of, pack
from recipe import (
    FINETUNE_BATCH_TOKENS,
    MICRO_TOKENS,
    PRESETS,
    PRETRAIN_LR,
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
    memory_by_rank,
    needs_fsdp,
    out_of_memory,
    print_budget,
    train_flops,
    usage_text,
)
from support.checkpoint import Checkpoints
from support.cli import ENDED_BY_CTRL_C, check_help, one_line, parse_args, run
from support.export import export
from support.files import file_sha256, written_whole
from support.hf import (
    RandomWeights,
    SafetensorsWeights,
    check_manifest,
    check_tokenizer,
    load_weights,
    not_listed,
    read_config,
)
from support.lock import only_run
from support.metrics import Log, ledger, log, log_line, planning, plot
from support.ranks import (
    Signals,
    from_all_ranks,
    local_rows,
    on_first_rank,
    rank_and_world,
    start_group,
    together,
)

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
    """One optimizer step over this rank's micro-batches; returns the norm of the whole gradient.

    weight_sum is the whole step's, of all ranks and micro-batches: the loss is a sum until it is
    divided, here, once. No rank divides by the weights that it happens to have, so a conversation
    counts the same wherever it lands.

    tally gets the step's sums for the log. exact: the ExactSums of --exact, or None.
    FloatingPointError: the loss or the gradient is not finite; nothing was updated.
    """
    for batch in batches:
        batch = batch.to(device)
        # `_` is the weight sum of this micro-batch alone: we divide by that of the step.
        loss_sum, _, nll_T, correct_T = forward(model, batch)

        # Without --exact, .grad adds up the micro-batches. With --exact, ExactSums does: its hook
        # replaces each new gradient by the total so far, so .grad has to be empty before.
        if exact:
            optimizer.zero_grad()

        # FSDP adds up the ranks' gradients in this call: after every micro-batch, not once a step.
        # Otherwise each rank would have to hold the gradient of the whole model. (The one rank of
        # --offload does: see copied_once.)
        (loss_sum / weight_sum).backward()
        tally.add(batch, loss_sum, nll_T, correct_T)

    # .grad now has the step's gradient. The next step's totals begin empty.
    if exact:
        exact.totals.clear()

    # The part of each gradient that this rank keeps: a view, so that clipping it clips .grad. The
    # second value says which rows these are; here it does not matter.
    gradients = []
    for parameter in model.parameters():
        mine, _ = local_rows(parameter.grad)
        gradients.append(mine)
    norm = clip_gradients(gradients, clip)

    tally.reduce()
    if not (math.isfinite(tally.loss_sum) and math.isfinite(norm)):
        loss = tally.loss_sum / weight_sum
        raise FloatingPointError(f"loss {loss} and gradient norm {norm} are not both finite")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def forward(model: Model, batch: Batch) -> Losses:
    """The model's losses of a Batch."""
    return model(*batch.inputs)


def clip_gradients(gradients: list[Tensor], clip: float) -> float:
    """Scale this rank's gradient shards so that the norm over all ranks is at most clip.

    Returns the norm before scaling. It is summed in fp64. Where the gradient is cut into shards
    changes the order of this sum, and so only the last digits of the fp64 norm; the factor, which
    is fp32, has no room for them. So the step does not depend on where the gradient is cut.
    """
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    square = torch.stack(norms).square().sum()
    if dist.is_initialized():
        dist.all_reduce(square)
    norm = square.sqrt()

    # No `if norm > clip`: a factor of 1 changes nothing, and so the scaling is queued before the
    # step waits for the device, in `.item()`.
    scale = (clip / norm).clamp(max=1.0).float()
    for g in gradients:
        g.mul_(scale)
    return norm.item()


class Tally:
    """What the log wants to know of a step: sums over its rows, added up over the ranks at its end.

    loss_sum   the sum of w * nll
    loss       for each class: the sum of nll over its supervised tokens
    accuracy   for each class: the number of its supervised tokens that were predicted right
    count      for each class: the number of its supervised tokens
    stop       above 0 if the run is to stop; not a measurement. A rank that a signal has asked by
               then adds 1. It is added up like the rest, so all ranks learn of it in the same step

    asked() -> whether a signal has asked this rank. It is called where the sums are reduced.
    """

    # What metrics.jsonl has as NAME_by_class. To add a metric, add its name here, and to `add` a
    # line that gives its value in each row.
    PER_CLASS = ("loss", "accuracy")

    def __init__(
        self, classes: int, device: torch.device, asked: Callable[[], bool] = lambda: False
    ):
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.asked = asked
        self.sums = {"loss_sum": zeros(1), "stop": zeros(1)}
        for name in (*self.PER_CLASS, "count"):
            self.sums[name] = zeros(classes)

    def add(self, batch: Batch, loss_sum: Tensor, nll_T: Tensor, correct_T: Tensor) -> None:
        """Add a micro-batch to the sums. nll_T, correct_T: as Losses of model.py has them."""
        values_of_rows = {
            "loss": nll_T[batch.rows_R],
            "accuracy": correct_T[batch.rows_R],
            "count": torch.ones_like(batch.class_R),
        }
        assert values_of_rows.keys() == {*self.PER_CLASS, "count"}, "a name, and a line here"
        for name, value_R in values_of_rows.items():
            self.sums[name].index_add_(0, batch.class_R, value_R.double())
        self.sums["loss_sum"] += loss_sum.detach()

    def reduce(self) -> None:
        """Add up over the ranks, once. Afterwards the sums and `stop` are Python numbers."""
        # Only now: a signal that has come while the step was computed stops the run after it.
        self.sums["stop"] += float(self.asked())

        # one vector, so that one collective adds up everything
        lengths = [len(x) for x in self.sums.values()]
        vector = torch.cat(list(self.sums.values()))
        if dist.is_initialized():
            dist.all_reduce(vector)

        # A step waits for the device here and at the gradient norm, and nowhere else.
        parts = vector.cpu().split(lengths)
        self.sums = {name: part.tolist() for name, part in zip(self.sums, parts)}
        (self.loss_sum,) = self.sums["loss_sum"]
        (self.stop,) = self.sums["stop"]

    def supervised(self) -> float:
        """The supervised tokens that were trained on: counted on the device, not in the plan."""
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
    """--exact: the same bits on any number of ranks.

    A step's gradients are added up in fp64, over the ranks and the rounds, and become fp32 once,
    at the end of the step.

    Why the bits are the same: the order of a sum matters only where the sum has to be shortened. A
    gradient has 24 bits, a sum in fp64 has 53. So nothing is shortened, in whatever order the ranks
    add, unless one gradient is more than 2^29 times another (in bf16 2^45).

    When it fails: if one gradient is that much larger, the last bit of the fp32 result can differ,
    in about one of 2^29 sums; more often only where gradients nearly cancel.

    Why a hook: FSDP itself would turn each round's gradients into fp32, and add the rounds in fp32.
    For each part of the model, FSDP calls the hook before that, with the round's sum over the
    ranks, in fp64. The hook replaces this sum by the total of all rounds so far.
    """

    def __init__(self):
        # {a part of the model, as in `shard`: its total so far in this step, fp64}
        self.totals = {}

    def add(self, part: FSDPModule, reduced: Tensor) -> None:
        """The hook. reduced: the part's gradients of this round, flat fp64, changed in place."""
        before = self.totals.get(part)
        if before is None:
            # A rank that is idle in a round (see my_batches) adds 0.0, and so turns -0.0 into 0.0.
            # On another number of ranks none is idle: this line does the same there.
            reduced += 0.0
        else:
            reduced += before
            # FSDP allocates `reduced` on the CUDA stream of its reduce-scatter, but calls this hook
            # on another stream. `before` is freed when it is replaced below. record_stream keeps
            # its memory from being used again until this stream has read it.
            if before.is_cuda:
                before.record_stream(torch.cuda.current_stream())
        self.totals[part] = reduced


# ---- model and optimizer


class Built(NamedTuple):
    model: Model
    optimizer: torch.optim.Optimizer
    exact: ExactSums | None  # None without --exact


def build(config: TrainConfig, model_config: Config, device: torch.device) -> Built:
    """The model on its device, each rank with its shard, and its optimizer. The parameters have no
    values yet: load_weights or a checkpoint fills them.
    """
    # On "meta" parameters take no memory: no rank ever holds the whole model.
    with torch.device("meta"):
        model = Model(model_config)
    for block in model.model.layers:
        block.recompute = config.recompute
        if config.compile:
            compile_block(block)
    exact = ExactSums() if config.exact else None
    if dist.is_initialized():
        shard(model, config, device, exact)
    # With --offload the parameters stay on the CPU. FSDP brings each part to the device when it is
    # computed.
    model.to_empty(device="cpu" if config.offload else device)
    model.tie()
    return Built(model, make_optimizer(model.parameters(), config), exact)


def compile_block(block: Block) -> None:
    """Compile the block's forward or its compute, by the block's `recompute`:

    none    compiled(compute)
    cheap   compiled(checkpoint(compute)). The checkpoint decides operation by operation what is
            computed again, so the compiler has to see both
    all     checkpoint(compiled(compute)). The compiled function simply runs a second time
    """
    # `dynamic`: every micro-batch has another T.
    method = "forward" if block.recompute == "cheap" else "compute"
    setattr(block, method, torch.compile(getattr(block, method), dynamic=True))


def shard(model: Model, config: TrainConfig, device: torch.device, exact: ExactSums | None) -> None:
    """FSDP2: each rank keeps a shard, some rows, of every parameter.

    FSDP gathers and reduces the model in parts: each block is one, all other parameters another.
    """
    # Inputs are not cast: loss weights and RoPE tables stay fp32 (0.1 in bf16 is 0.1001).
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.dtype),
        reduce_dtype=torch.float64 if exact else torch.float32,
        cast_forward_inputs=False,
    )
    where = offload_policy(config, device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=where)
        # FSDP would divide the gradients by the number of ranks. We want their sum: train_step
        # divides, once. The factor 1.0 says so; the second call makes the collective a plain SUM,
        # since gloo knows no sum with a factor in it. A call for the model does not reach its
        # blocks: each part gets both calls.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        # FSDP names this hook after the all-reduce of a two-dimensional mesh. It calls it also
        # here, where the mesh has one dimension: after the reduce-scatter.
        if exact:
            part.set_all_reduce_hook(partial(exact.add, part))


def offload_policy(config: TrainConfig, device: torch.device) -> OffloadPolicy:
    """Where FSDP keeps the shards and their gradients: --offload, in the host's memory."""
    if not config.offload:
        return OffloadPolicy()
    # from pinned memory a GPU copies at its full rate
    return CPUOffloadPolicy(pin_memory=device.type == "cuda")


def make_optimizer(parameters: Iterable, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over this rank's shards. --dry_run makes one too, to see how much memory it takes.

    AdamW updates each number by itself, so its result is the same wherever the shards are cut.
    --exact needs that: it would not hold with an optimizer that looks at whole matrices.
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

    A rank for which the last round has none gets an idle one instead, of weight 0. It adds exact
    zeros, and takes part in the collectives that the other ranks wait in.
    """
    # Any few tokens would do, since they weigh 0. Two, so that there is one to predict.
    tokens, weights = data.conversation(0)
    idle = [(tokens[:2], weights[:2] * 0)]
    for step in steps:
        for number in range(me, rounds(step, world) * world, world):
            yield data.batch(step[number]) if number < len(step) else pack(idle)


def rounds(step: list, world: int) -> int:
    """How many micro-batches of a step each rank computes, idle ones included."""
    return math.ceil(len(step) / world)


def copied_once(model: Model, batches: Iterator[Batch], steps: Iterable) -> Iterator[Batch]:
    """--offload: the same batches, all those of `steps` on one rank. Before each, FSDP is told
    whether it is the last of its step.

    If it is not, FSDP keeps the sum of the gradients on the device: fp32, 4 bytes a parameter. With
    the last one it copies the sum into the host's memory. Otherwise it would copy the gradients of
    each micro-batch. From a step's second on, the backward pass would wait for each copy, and for
    the CPU, which adds it to those before.
    """
    for step in steps:
        for number in range(1, len(step) + 1):
            model.set_requires_gradient_sync(number == len(step))
            yield next(batches)


@torch.no_grad()
def validate(model: Model, data: Prepared, steps: list, device: torch.device) -> dict:
    """{val_loss, val_loss_by_class} over the held-out prompts; val_loss is weighted as in training.

    steps: the held-out conversations, planned like those of an epoch.
    """
    tally = Tally(len(data.classes), device)
    me, world = rank_and_world()
    for batch in my_batches(data, steps, me, world):
        batch = batch.to(device)
        loss_sum, _, nll_T, correct_T = forward(model, batch)
        tally.add(batch, loss_sum, nll_T, correct_T)
    tally.reduce()

    # FSDP keeps the root's parameters gathered after a forward pass, for the backward pass. Here
    # none follows.
    if isinstance(model, FSDPModule):
        model.reshard()
    return {
        "val_loss": tally.loss_sum / data.weight_sums[flat(steps)].sum(),
        "val_loss_by_class": tally.by_class(data.classes)["loss_by_class"],
    }


# ---- setting up: are the settings possible, and do model and data belong together?


class Bound(NamedTuple):
    """A setting must have least <= value < below. If not, the error says "is not", and `words`."""

    least: float
    below: float
    words: str


# AdamW computes in fp32, whose numbers go from 1e-38 to 3e38: outside of that a step would be 0 or
# infinite, and some room is left for products.
FP32 = Bound(1e-30, 1e30, "from 1e-30 to below 1e30: AdamW computes in fp32")
COUNT = Bound(1, 10**9, "above 0 and below 1e9")
SHARE = Bound(0, 1, "from 0 to below 1")
BOUNDS = {
    "steps": Bound(1, 10**6 + 1, "from 1 to 1,000,000: all are planned before the first"),
    "epochs": COUNT,
    "batch_tokens": COUNT,
    "micro_tokens": COUNT,
    "lr": FP32,
    "pretrain_lr": FP32,
    "min_lr": SHARE,
    "warmup": SHARE,
    "beta1": SHARE,
    "beta2": SHARE,
    "eps": FP32,
    "weight_decay": SHARE,
    "clip": FP32,
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

# The vocabulary where there are no data: Llama-2's 32,000 tokens and <|end_of_turn|>.
LLAMA_VOCAB = 32_001


def resolve(config: TrainConfig, data: Prepared | None) -> tuple[TrainConfig, Config]:
    """(the settings with their defaults filled in, the model's config).

    Three settings may still be None. `steps` stays None where the run is given in epochs. The `lr`
    of a base, and the `pretrain_lr` that it follows from, are known once the steps are planned: see
    set_up.

    data: None for a --dry_run without --data. Llama-2's vocabulary and the preset's or base's own
    context are then assumed.
    ValueError: a setting is out of its bounds, or model and data do not belong together.
    """
    check_settings(config)
    check_learning_rate(config)
    if config.model in SIZES:
        model_config = preset_config(config.model, data)
        lr, batch_tokens = PRESETS[config.model]
    elif Path(config.model).is_dir():
        model_config = base_config(config, data)
        # set_up computes it from the planned steps
        lr = None
        batch_tokens = FINETUNE_BATCH_TOKENS
    else:
        names = ", ".join(SIZES)
        raise ValueError(f"--model {config.model!r} is neither a directory nor one of {names}")

    # Defaults. Where the user has set a value, it stays.
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
    if config.batch_tokens > MOST_MICRO_BATCHES * config.micro_tokens:
        raise ValueError(
            f"--batch_tokens {config.batch_tokens} is more than {MOST_MICRO_BATCHES:,} "
            f"micro-batches of --micro_tokens {config.micro_tokens}; raise --micro_tokens"
        )
    if data:
        check_lengths(config, model_config, data)
    return config, model_config


def check_settings(config: TrainConfig) -> None:
    """ValueError: a setting is out of its BOUNDS, or not one of its CHOICES; --compile finds no
    compiler.
    """
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


def check_learning_rate(config: TrainConfig) -> None:
    """ValueError: --pretrain_lr is given where no learning rate is computed from it."""
    if config.pretrain_lr is None:
        return
    if config.lr is not None:
        raise ValueError(
            f"--lr {config.lr:g} is the learning rate itself, --pretrain_lr "
            f"{config.pretrain_lr:g} is what it is computed from; give one of them"
        )
    if config.model in SIZES:
        raise ValueError(
            f"--pretrain_lr {config.pretrain_lr:g} is for a base; {config.model} is trained from "
            "random weights, --lr sets its learning rate"
        )


def check_offload(config: TrainConfig, ranks: int) -> None:
    """ValueError: --offload with something that it does not go with."""
    if not config.offload:
        return
    if ranks > 1:
        raise ValueError(
            f"--offload is for one rank, not {ranks}: more ranks shard what it moves to the host; "
            "leave it out, or start one process"
        )
    if config.exact:
        raise ValueError(
            "--offload does not go with --exact, which has to see the gradients of each "
            "micro-batch, not their sum; leave one out"
        )
    if config.async_save:
        raise ValueError(
            "--offload does not go with --async_save, which would copy what is in the host's "
            "memory already; leave one out"
        )


def vocab_of(data: Prepared | None) -> int:
    """How many tokens the data's tokenizer has, <|end_of_turn|> included."""
    return data.vocab_size if data else LLAMA_VOCAB


def preset_config(name: str, data: Prepared | None) -> Config:
    """A preset's sizes, with the vocabulary and the context that the data need."""
    size = SIZES[name]
    max_len = data.meta["max_len"] if data else size.max_position_embeddings
    return dataclasses.replace(size, vocab_size=vocab_of(data), max_position_embeddings=max_len)


def base_config(config: TrainConfig, data: Prepared | None) -> Config:
    """The config of a Hugging Face directory, with a row for <|end_of_turn|> added if it has none.

    ValueError: the directory's tokenizer is not the one that the data were prepared with.
    """
    base = read_config(config.model)
    vocab = vocab_of(data)
    # The base may lack <|end_of_turn|>, the last token of the data's tokenizer: hence the - 1.
    if base.vocab_size < vocab - 1:
        raise ValueError(
            f"{config.model}: vocab_size {base.vocab_size} is below the {vocab - 1} tokens of the "
            "data's tokenizer; prepare the data with this model's tokenizer"
        )
    if data:
        check_tokenizer(config.model, data.meta["tokenizer_sha256"], config.data)
    return dataclasses.replace(base, vocab_size=max(vocab, base.vocab_size))


def check_lengths(config: TrainConfig, model_config: Config, data: Prepared) -> None:
    """ValueError: a conversation may not fit the model's context or a micro-batch."""
    # The context is the base's and cannot be raised: so only the conversations there are must fit.
    longest = data.lengths.max()
    context = model_config.max_position_embeddings
    if longest > context:
        raise ValueError(
            f"{config.data}: a conversation of {longest} tokens, but the model's context is "
            f"{context}; prepare with --max_len {context}"
        )
    # --micro_tokens can be raised: so it must do for every conversation that there might be. Then
    # the same flags serve all data prepared with this max_len.
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

    config: TrainConfig  # see resolve
    model_config: Config
    data: Prepared
    device: torch.device
    # int64 arrays of conversations
    train_on: Any
    held_out: Any
    # The steps of all epochs. A step is a list of micro-batches, a micro-batch an int64 array of
    # conversations.
    steps: list
    # The number of the last step of each epoch, the run's first step being 1. Where --steps ends
    # the run within an epoch, that epoch's end lies beyond the last step.
    epoch_ends: list
    val_steps: list  # the held-out conversations, in the form of `steps`
    why_lr: str  # how the learning rate comes about, for the log

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def last(self) -> int:
        """The number of the last step, the first being 1."""
        return len(self.steps)


# LLaMA-2 34B and 70B, which are this wide, were pre-trained at half the others' PRETRAIN_LR.
WIDE = 8192
PRETRAIN_LR_WIDE = 1.5e-4


def set_up(config: TrainConfig, store: dist.Store | None) -> Setup:
    """Open the data, check that all belongs together, start the process group, check the data, plan
    every step."""
    log(f"opening {config.data}")
    data = Prepared(config.data)
    config, model_config = resolve(config, data)
    # On a CPU the number of threads decides in which order a sum is added up.
    if config.exact:
        torch.set_num_threads(1)
    device = choose_device()
    # Mixed precision, exact sums and offloading are done by FSDP, which needs a process group even
    # for a process alone.
    start_group(store, alone=needs_fsdp(config), timeout=config.timeout)
    _, world = rank_and_world()
    check_offload(config, world)
    check_data(data)

    train_on, held_out = data.split(config.val_fraction)
    if len(train_on) == 0:
        raise ValueError(
            f"{config.data}: every prompt falls into --val_fraction {config.val_fraction}; lower it"
        )
    cost = train_flops(model_config).plan_cost
    epochs = config.epochs
    if config.steps:
        epochs = math.ceil(config.steps * config.batch_tokens / data.lengths[train_on].sum())
    with planning(epochs, len(train_on)) as say:
        steps, epoch_ends = all_steps(data, train_on, config, cost, say)
    val_steps = []
    if len(held_out) > 0:
        val_steps = epoch_steps(data, held_out, config, epoch=0, cost=cost)

    # The learning rate of a base, Sec. 4.1: that of its pre-training, times
    # sqrt(supervised tokens of a step / 4e6 tokens of a pre-training step).
    why_lr = f"lr {config.lr}"
    if config.lr is None:
        is_wide = model_config.hidden_size >= WIDE
        usual = PRETRAIN_LR_WIDE if is_wide else PRETRAIN_LR
        pretrain_lr = config.pretrain_lr or usual
        supervised = data.supervised[flat(steps)].sum() / len(steps)
        lr, why_lr = finetune_lr(supervised, pretrain_lr)
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


def check_data(data: Prepared) -> None:
    """ValueError, on all ranks: the data are not as they were prepared, on some node.

    The ranks of a node, who see the same file, share its pieces.
    """
    size, _ = data.file.state
    log(f"checking its {size / 1e6:,.1f} MB")
    if not data.has_digests:
        log(NO_DIGESTS.format(path=data.path))
    # torchrun's words for: which rank of its node this is, of how many, and which node it is
    part = 0
    parts = 1
    node = "0"
    if dist.is_initialized() and "LOCAL_WORLD_SIZE" in os.environ:
        part = int(os.environ["LOCAL_RANK"])
        parts = int(os.environ["LOCAL_WORLD_SIZE"])
        node = os.environ["GROUP_RANK"]

    # what is wrong here is told to the other ranks before anybody stops
    found = {}
    problem = None
    try:
        found = data.check_pieces(part, parts)
    except ValueError as error:
        problem = error
    pieces_of = collections.defaultdict(dict)
    for its_node, its_found, its_problem in from_all_ranks((node, found, problem)):
        if its_problem:
            raise its_problem
        pieces_of[its_node].update(its_found)
    # one node whose file has other bytes is found by all
    for pieces in pieces_of.values():
        data.check_digests(pieces)


def base_weights(setup: Setup) -> SafetensorsWeights:
    """The base's weights, with rows for the template's tokens that the base was not trained on."""
    data = setup.data
    tokens, ordinary = data.template_tokens()
    weights = SafetensorsWeights(setup.config.model, setup.model_config, tokens, ordinary)
    if weights.untrained:
        names = " ".join(data.tokenizer.piece(i) for i in weights.untrained)
        log(f"{setup.config.model} was not trained on {names}: their rows start as the mean")
    return weights


def steps_sha256(steps: list) -> str:
    """Hash of steps: of which conversations form each micro-batch of each step, in which order."""
    digest = hashlib.sha256()
    for step in steps:
        # The lengths show where each micro-batch ends, and the end of their line where the step
        # begins: no two plans give the same bytes.
        lengths = [len(micro_batch) for micro_batch in step]
        digest.update(f"{lengths}\n".encode())
        for micro_batch in step:
            digest.update(micro_batch.astype("<i8").tobytes())
    return digest.hexdigest()


def check_ranks_plan_alike(mine: str) -> None:
    """mine: this rank's plan_sha256. ValueError: rank 0's is another, so the ranks would not train
    on each conversation once.
    """
    me, _ = rank_and_world()
    first = on_first_rank(lambda: mine)
    if mine != first:
        raise ValueError(
            f"rank {me} plans other steps than rank 0 (plan_sha256 {mine[:12]}, not {first[:12]}); "
            "all ranks need the same --data, flags and code"
        )


def base_sha256(model: str) -> str | None:
    """Hash of the content of a base, whatever its folder is called; None for a preset.

    ValueError: the folder has a manifest, and a file is not as the manifest says.
    """
    if model in SIZES:
        return None
    folder = Path(model)
    # without a manifest a line says so
    check_manifest(folder)
    names = []
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" or path.suffix == ".safetensors":
            names.append(path.name)
    manifest = folder / "manifest.json"
    if manifest.is_file():
        # The files that it lists are as it says, so its own hash stands for theirs.
        names = not_listed(folder, names)
        if not names:
            return file_sha256(manifest)
        names = [manifest.name, *names]
    hashes = " ".join(file_sha256(folder / name) for name in names)
    return hashlib.sha256(hashes.encode()).hexdigest()


def fields_of(model_config: Config) -> dict:
    """The config's fields, without those that are None or False.

    So a field that a base does not use changes nothing: older checkpoints still resume.
    """
    fields = dataclasses.asdict(model_config)
    return {name: value for name, value in fields.items() if value not in (None, False)}


def settings_of(setup: Setup, optimizer: torch.optim.Optimizer) -> dict:
    """All that decides the run's numbers. It is written to run.json, and all of it but
    RESUME_MAY_CHANGE must be the same where a run resumes from a checkpoint.

    Data, base and plan are here by a hash of their content: a resumed run must not go on with other
    data, another base, another planner or another optimizer.
    """
    config = setup.config
    settings = dataclasses.asdict(config)
    settings["steps"] = setup.last
    settings["model_config"] = fields_of(setup.model_config)

    # The data were compared with the digests that their own hash is made of. A file without digests
    # is read again: by rank 0, which reads the large files, and sends the hashes to the others.
    data_sha256 = setup.data.meta.get("sha256")
    settings["data_sha256"] = data_sha256 or on_first_rank(lambda: file_sha256(config.data))
    settings["model_sha256"] = on_first_rank(lambda: base_sha256(config.model))

    # Each rank has planned for itself, all steps of the run.
    settings["plan_sha256"] = steps_sha256(setup.steps)
    check_ranks_plan_alike(settings["plan_sha256"])
    settings["optimizer"] = type(optimizer).__name__
    return settings


def checkpoints_of(setup: Setup, settings: dict) -> Checkpoints:
    """The run's checkpoints. One whose `identity` is another is refused."""
    identity = {key: value for key, value in settings.items() if key not in RESUME_MAY_CHANGE}
    config = setup.config
    root = setup.out / "checkpoints"
    return Checkpoints(root, identity, config.keep, config.async_save, config.timeout)


# ---- the run

REMAINS = "a checkpoint remains, the same command resumes"

# A step whose loss or gradient is not finite may be an accident. Ten in a row are not.
MOST_IN_A_ROW = 10
# How many conversations of such a step the message names; metrics.jsonl has all.
NAMED = 8


def train(config: TrainConfig, signals: Signals, store: dist.Store | None) -> None:
    """A whole run: set up, train, export. If --out holds a checkpoint, the run goes on from it.

    store: shared by the ranks that torchrun started; None for a process alone.
    """
    setup = set_up(config, store)
    # If the base cannot be read, the run stops here, before anything is written.
    if setup.config.model in SIZES:
        initial = RandomWeights(setup.model_config, setup.config.seed)
    else:
        initial = base_weights(setup)
    # Before a checkpoint is read, or anything written; and before memory is taken, which a run that
    # has just been killed may still hold.
    with only_run(setup.out):
        train_from_newest(setup, initial, signals)


def train_from_newest(
    setup: Setup, initial: RandomWeights | SafetensorsWeights, signals: Signals
) -> None:
    """The run in its folder, which no other run writes to meanwhile.

    initial: the weights before the first step, where there is no checkpoint.
    """
    built = build(setup.config, setup.model_config, setup.device)
    settings = settings_of(setup, built.optimizer)
    checkpoints = checkpoints_of(setup, settings)
    # The newest checkpoint and its step: None and 0 if there is none.
    path, start = checkpoints.newest()

    hf = setup.out / "hf"
    if start == setup.last and (hf / "manifest.json").is_file():
        log(
            f"{setup.out}: this run is finished, {setup.last} steps; chat with "
            f"`python sample.py {hf}`, or give another --out"
        )
        return

    write_settings(setup, settings)
    if path:
        checkpoints.load(path, built.model, built.optimizer)
        log(f"resuming from {path}")
    else:
        # local_rows: each rank fills only its own shard.
        load_weights(built.model, initial, local_rows)
    log(opening_line(setup, built.model))
    # now and after the loop: how much memory each rank takes, copies of --async_save among it
    log(memory_by_rank(setup.device, checkpoints))

    training_loop(setup, built, checkpoints, start, signals)

    export(hf, built.model, setup.model_config, setup.data, getattr(torch, setup.config.dtype))
    draw_losses(setup)
    log(memory_by_rank(setup.device, checkpoints))
    log(f"exported to {hf}; chat with `python sample.py {hf}`")


def write_settings(setup: Setup, settings: dict) -> None:
    """run.json, on rank 0."""
    me, _ = rank_and_world()
    if me == 0:
        (setup.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings | {"torch": torch.__version__}, indent=1)
        path = setup.out / "run.json"
        with written_whole(path) as partial:
            partial.write_text(text)


def opening_line(setup: Setup, model: Model) -> str:
    """The first line of the log: the sizes of model, data and steps, and the learning rate."""
    config = setup.config
    # numel is that of the whole parameter, also where this rank has a shard.
    parameters = sum(p.numel() for p in model.parameters())
    micro_batches = micro_batches_of(config.batch_tokens, config.micro_tokens)
    return (
        f"{parameters:,} parameters, {len(setup.train_on):,} conversations to train on, "
        f"{len(setup.held_out):,} held out, {setup.last} steps of up to {micro_batches} x "
        f"{config.micro_tokens:,} tokens; {setup.why_lr}"
    )


def training_loop(
    setup: Setup, built: Built, checkpoints: Checkpoints, start: int, signals: Signals
) -> None:
    """The steps after `start`, each with its line in the log; a checkpoint every save_every steps.

    Ends after the last step, or by SystemExit after a signal. Either way a checkpoint of that step
    is then on the disk.
    """
    model, optimizer, exact = built
    config, data = setup.config, setup.data
    device = setup.device
    _, world = rank_and_world()
    metrics = Log(setup.out, start, setup.last)
    flops = train_flops(setup.model_config)
    loader = batches_after(start, setup, model)
    # From here on a signal does not end the process at once: see the end of the loop.
    signals.in_loop = True
    if owes_validation(setup, metrics, start):
        validate_or_stop(setup, model, start, metrics, signals)

    for step in range(start + 1, setup.last + 1):
        micro_batches = setup.steps[step - 1]
        conversations = flat([micro_batches])
        lr = lr_at(step, setup.last, config)
        set_learning_rate(optimizer, lr)

        # The method: forward, backward, one division by the step's weight sum, one update. A step
        # that fails has also taken all its batches from the loader: it fails after the last.
        began = time.perf_counter()
        tally = Tally(len(data.classes), device, asked=lambda: signals.asked)
        batches = itertools.islice(loader, rounds(micro_batches, world))
        weight_sum = data.weight_sums[conversations].sum()
        try:
            norm = train_step(
                model, optimizer, batches, device, weight_sum, config.clip, tally, exact
            )
        except FloatingPointError as error:
            # No update was made. The run may stop here, so a save under way is finished first.
            optimizer.zero_grad()
            checkpoints.wait()
            skip_or_stop(step, error, conversations.tolist(), config, metrics)
        else:
            seconds = time.perf_counter() - began
            # a dict: metrics.write prints it and keeps it
            measured = log_line(step, data, conversations, tally, norm, lr, seconds)
            memory_and_mfu = usage_text(device, measured, data.lengths[conversations], flops, world)
            metrics.write(measured, memory_and_mfu)

        # what is not done in every step
        stop = tally.stop > 0
        if step in setup.epoch_ends:
            log_epoch(setup, step)
        if is_validated(step, setup) and not stop:
            stop = validate_or_stop(setup, model, step, metrics, signals)
        if step % config.save_every == 0 or step == setup.last or stop:
            checkpoints.save(step, model, optimizer)
        if stop:
            leave(step, checkpoints)

    checkpoints.wait()
    signals.in_loop = False


def batches_after(start: int, setup: Setup, model: Model) -> Iterator[Batch]:
    """This rank's micro-batches of the steps after `start`, in order. A thread makes the next ones
    while the device computes.
    """
    me, world = rank_and_world()
    to_come = setup.steps[start:]
    batches = my_batches(setup.data, to_come, me, world)
    loader = ahead(batches, pin=setup.device.type == "cuda")
    return copied_once(model, loader, to_come) if setup.config.offload else loader


def is_validated(step: int, setup: Setup) -> bool:
    """Does a validation come after this step?"""
    is_due = step % setup.config.val_every == 0 or step == setup.last
    return bool(setup.val_steps) and is_due


def validate_or_stop(setup: Setup, model: Model, step: int, metrics: Log, signals: Signals) -> bool:
    """Validate, unless a signal has come. True: a signal has come, before or meanwhile.

    A validation may take longer than the time that is left to a preempted job.
    """
    if signals.asked_on_any_rank():
        return True
    found = validate(model, setup.data, setup.val_steps, setup.device)
    metrics.write({"step": step} | found)
    return signals.asked_on_any_rank()


def owes_validation(setup: Setup, metrics: Log, start: int) -> bool:
    """Has a signal left out the validation of the step that the run goes on from?"""
    if start == 0 or not is_validated(start, setup):
        return False
    return on_first_rank(lambda: start not in metrics.validated)


def leave(step: int, checkpoints: Checkpoints) -> NoReturn:
    """A rank has received a signal (Ctrl-C, a preempted node). The step's save has begun."""
    checkpoints.wait()
    log(f"stopped by a signal after step {step}; {REMAINS}")
    sys.exit(ENDED_BY_CTRL_C)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def skip_or_stop(
    step: int, error: Exception, conversations: list[int], config: TrainConfig, metrics: Log
) -> None:
    """A step's loss or gradient is not finite: write that down, and go on or stop the run.

    ValueError: the run stops, by --nonfinite stop, or after MOST_IN_A_ROW such steps in a row.
    """
    too_many = metrics.in_a_row + 1 == MOST_IN_A_ROW
    must_stop = config.nonfinite == "stop" or too_many
    metrics.write_nonfinite(step, error, conversations, skipped=not must_stop)
    if must_stop:
        after = f" after {MOST_IN_A_ROW} such steps in a row" if too_many else ""
        raise ValueError(
            f"step {step}: {error}, the run stops{after}; look at conversations "
            f"{conversations[:NAMED]}.. of {config.data} (all {len(conversations)} in "
            "metrics.jsonl); --nonfinite skip leaves such steps out, or begin another --out "
            "with a lower --lr"
        )


def log_epoch(setup: Setup, step: int) -> None:
    """A line after an epoch that accounts for every token of the data."""
    epoch = setup.epoch_ends.index(step) + 1
    counts = ledger(setup.data, setup.train_on, setup.held_out)
    log(f"epoch {epoch} done after step {step}: {counts}")


def draw_losses(setup: Setup) -> None:
    """loss.png, on rank 0. If matplotlib is missing, a line says so, and the run does not fail."""
    me, _ = rank_and_world()
    if me == 0:
        try:
            plot(setup.out)
        except ImportError as error:
            log(str(error))


# ---- the command line


def dry_run(config: FitConfig) -> None:
    """--dry_run: print the memory and the time that a run needs; no weights are loaded."""
    check_fit(config)
    check_offload(config, config.ranks)
    data = Prepared(config.data) if config.data else None
    if data and not data.has_digests:
        log(NO_DIGESTS.format(path=data.path))
    # The run is planned for GPUs, also where this command runs on a CPU. --recompute needs no
    # default here: print_budget shows all three.
    config = dataclasses.replace(config, dtype=config.dtype or "bfloat16")
    config, model_config = resolve(config, data)

    # One small parameter is enough to see how much the optimizer keeps for each number.
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
    """ValueError: a flag that every run needs is missing."""
    for name in ("data", "model", "out"):
        if not getattr(config, name):
            raise ValueError(
                f"--{name} is missing; the demo's two commands are "
                "`python -m paper.toy --out out/demo` and `python train.py --data "
                "out/demo/train.safetensors --model toy --out out/demo --steps 1500`"
            )


def main(argv: list[str]) -> None:
    if argv[:1] == ["plot"]:
        check_help(argv[1:])
        if len(argv) != 2:
            raise ValueError("plot takes the --out folder of a run")
        print(f"drew {plot(argv[1])}")
        return
    if "--dry_run" in argv:
        # under torchrun only rank 0 prints
        if int(os.environ.get("RANK", 0)) == 0:
            words = [word for word in argv if word != "--dry_run"]
            dry_run(parse_args(FitConfig, words))
        return

    # `store` is the ranks' common Store, from which the process group is made. When a rank fails,
    # the first to fail prints why, and all leave. one_line turns an error that a user can cause
    # into one line; any other error is printed with its traceback.
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
