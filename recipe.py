"""The recipe, Sec. 4.1 of the paper: the settings of a run, its learning rate, and the steps of all
its epochs.

    AdamW, beta 0.9 and 0.95, eps 1e-5, weight decay 0.1
    5 epochs of batches of 200k tokens; conversations of at most 4,096 tokens
    learning rate 6.7e-5, by a cosine down to 10% of it

The paper gives neither warm-up nor clipping: 5% of the steps and a norm of 1 are the public
trainer's. `finetune_lr` tells how 6.7e-5 follows from the size of a batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from packing import Steps, flat, plan


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. The defaults are the paper's, where it gives them (Sec. 4.1).

    None is for what depends on the model, the data or the machine: `resolve` and `set_up` in
    train.py fill it in.
    """

    # a file that `data.py prepare` wrote
    data: str = ""
    # a Hugging Face directory to fine-tune, or a preset to train from random weights
    model: str = ""
    # a folder for checkpoints, metrics and the trained model
    out: str = ""

    # optimizer steps of the run, instead of --epochs
    steps: int | None = None
    # passes over the data
    epochs: int = 5
    # tokens of an optimizer step, at most
    # default: 262,144, the paper's 200k supervised if 3 in 4 are; a preset has its own
    batch_tokens: int | None = None
    # tokens of a micro-batch, at most: what must fit on one GPU
    # default: 16,384, or --batch_tokens if that is less
    micro_tokens: int | None = None

    # the highest learning rate
    # default: by the supervised tokens of a step; a preset has its own
    lr: float | None = None
    # the learning rate of the base's pre-training, from which --lr is computed
    # default: LLaMA-2's, 3e-4, or 1.5e-4 where the model is as wide as 34B and 70B
    pretrain_lr: float | None = None
    # the last learning rate, as a share of --lr
    min_lr: float = 0.1
    # steps of linear warm-up, as a share of all steps
    warmup: float = 0.05
    # AdamW: decay of the mean of the gradients
    beta1: float = 0.9
    # AdamW: decay of the mean of their squares
    beta2: float = 0.95
    # AdamW: added to the divisor of the update
    eps: float = 1e-5
    # AdamW: share of a weight that an update takes away, times the learning rate
    weight_decay: float = 0.1
    # the highest norm of a gradient; a longer one is scaled down to it
    clip: float = 1.0
    # of the order of the conversations, and of random weights
    seed: int = 0

    # of computing: float32 or bfloat16; weights and AdamW's moments are always float32
    # default: bfloat16 on GPUs, float32 on CPUs
    dtype: str | None = None
    # what a block computes again in the backward pass, to save memory: none, cheap or all
    # cheap is all that takes no matrix product
    # default: all on GPUs, none on CPUs
    recompute: str | None = None
    # compile the blocks by torch.compile
    compile: bool = False
    # the same bits on any number of ranks: gradients are summed in fp64
    exact: bool = False
    # one GPU: weights, gradients and AdamW's moments live in the host's memory, AdamW runs there
    offload: bool = False
    # what to do with a step whose loss or gradient is not finite: stop or skip
    nonfinite: str = "stop"

    # share of the prompts that is held out for validation
    val_fraction: float = 0.01
    # steps from one validation to the next
    val_every: int = 100
    # steps from one checkpoint to the next
    save_every: int = 500
    # checkpoints to keep
    keep: int = 2
    # train on while a checkpoint is written, from a copy of the state in host memory
    async_save: bool = False
    # seconds that a rank waits for the others before the run fails
    timeout: int = 1800


# Training from random weights: (learning rate, tokens of a step). LLaMA-2's are those of its own
# pre-training; those of the two small models are ours.
PRESETS = {
    "toy": (2e-3, 1536),
    "small": (1e-3, 4096),
    "llama-2-7b": (3e-4, 2**22),
    "llama-2-13b": (3e-4, 2**22),
    "llama-2-34b": (1.5e-4, 2**22),
    "llama-2-70b": (1.5e-4, 2**22),
}

# What a resumed run may change. All other settings belong to a run's identity: with another value
# its checkpoint would be continued as something else.
RESUME_MAY_CHANGE = (
    # these are names: what lies under them is compared by its content
    "data",
    "model",
    "out",
    # the number of steps is compared instead
    "epochs",
    # the learning rate is compared instead
    "pretrain_lr",
    # how fast a step is, and how much memory it takes
    "recompute",
    "compile",
    "offload",
    # what is measured and kept on the way
    "val_every",
    "save_every",
    "keep",
    "async_save",
    # what is done when something fails
    "nonfinite",
    "timeout",
)


# Packed tokens of a step where the model is a base: the public trainer's 8 GPUs x 8 x 4,096. If
# some 3 in 4 of them are supervised, that is the paper's 200k (Sec. 4.1).
FINETUNE_BATCH_TOKENS = 262_144
# Tokens of a micro-batch, for presets and bases.
MICRO_TOKENS = 16_384


# ---- the learning rate

# LLaMA-2 7B and 13B were pre-trained with this learning rate (34B and 70B with 1.5e-4) and with
# batches of so many tokens.
PRETRAIN_LR = 3e-4
PRETRAIN_TOKENS = 4e6


def finetune_lr(supervised_tokens: float, pretrain_lr: float = PRETRAIN_LR) -> tuple[float, str]:
    """(learning rate, how it comes about): the base model's own, scaled by the square root of the
    ratio of the batch sizes (Sec. 4.1).

    supervised_tokens: the mean number in a step. It is what the paper's 200k tokens count, as we
    read it: 3e-4 * sqrt(200k / 4M) = 6.7e-5, the paper's learning rate.
    """
    lr = pretrain_lr * math.sqrt(supervised_tokens / PRETRAIN_TOKENS)
    ratio = f"{supervised_tokens:,.0f} supervised tokens a step / 4e6"
    return lr, f"lr {lr:.3g} = {pretrain_lr:g} * sqrt({ratio})"


def lr_at(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step` of `steps`, the first being 1.

    It rises in a line to config.lr, and then falls by a cosine to min_lr * lr in the last step.
    """
    warmup = max(1, round(config.warmup * steps))
    if step <= warmup:
        return config.lr * step / warmup
    # half a turn, from where the warm-up ends to the last step
    angle = math.pi * (step - warmup) / max(1, steps - warmup)
    # from 1 to 0
    cosine = 0.5 + 0.5 * math.cos(angle)
    return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)


# ---- the steps


class PlanData(Protocol):
    """What `plan` has to know of a file's conversations, all [N]: a `data.Prepared` has it."""

    lengths: np.ndarray
    class_ids: np.ndarray
    weight_sums: np.ndarray


def epoch_steps(
    data: PlanData,
    conversations: np.ndarray,
    config: TrainConfig,
    epoch: int,
    cost: tuple[float, float],
) -> Steps:
    """The steps of one epoch of these conversations: int64, rising, indices into data."""
    planned = plan(
        lengths=data.lengths[conversations],
        class_ids=data.class_ids[conversations],
        weight_sums=data.weight_sums[conversations],
        seed=config.seed,
        epoch=epoch,
        batch_tokens=config.batch_tokens,
        micro_tokens=config.micro_tokens,
        cost=cost,
    )
    # plan numbers what it is given from 0: back to the numbers that data has
    steps = []
    for step in planned:
        steps.append([conversations[micro] for micro in step])
    # the promises of an epoch: each conversation once, and no micro-batch too full
    assert np.array_equal(np.sort(flat(steps)), conversations)
    for step in steps:
        assert max(data.lengths[micro].sum() for micro in step) <= config.micro_tokens
    return steps


def all_steps(
    data: PlanData,
    conversations: np.ndarray,
    config: TrainConfig,
    cost: tuple[float, float],
    say: Callable[[int], None] = lambda epoch: None,
) -> tuple[Steps, list[int]]:
    """(the steps of the whole run, [the number of steps up to the end of each epoch]).

    They follow from data and config alone. So a resumed run makes them again, and goes on in them
    where it stopped. say(k) is called before epoch k, from 1, is planned. ValueError: they are too
    many to plan.
    """
    steps = []
    epoch_ends = []
    while not is_whole(steps, epoch_ends, config):
        epoch = len(epoch_ends)
        say(epoch + 1)
        steps += epoch_steps(data, conversations, config, epoch, cost)
        epoch_ends.append(len(steps))
        if epoch == 0:
            check_epochs(len(conversations), len(steps), config)
    # config.steps may end within an epoch; None cuts nothing
    return steps[: config.steps], epoch_ends


# All steps of a run are planned before its first. 100 million conversations, summed over the
# epochs, take each rank 5 to 15 minutes and 2 GB: more is refused. Each epoch also costs as much as
# some 3,000 conversations, however few it has.
MOST_PLANNED = 100_000_000
EPOCH_COUNTS_AS = 3000
# never refused, however large the data are
FEW_EPOCHS = 10


def check_epochs(conversations: int, steps_of_one: int, config: TrainConfig) -> None:
    """ValueError: a run of more than FEW_EPOCHS that would plan more than MOST_PLANNED in all.

    conversations, steps_of_one: of one epoch.
    """
    epochs, flag = config.epochs, f"--epochs {config.epochs:,}"
    if config.steps:
        epochs = math.ceil(config.steps / steps_of_one)
        flag = f"--steps {config.steps:,}, which is {epochs:,} epochs,"
    most = max(FEW_EPOCHS, MOST_PLANNED // (conversations + EPOCH_COUNTS_AS))
    if epochs > most:
        raise ValueError(
            f"{flag} of {conversations:,} conversations is too much to plan; at most --epochs "
            f"{most} or --steps {most * steps_of_one}"
        )


def is_whole(steps: Steps, epoch_ends: list[int], config: TrainConfig) -> bool:
    """Do these steps and epochs make the whole run? --steps goes before --epochs."""
    if config.steps:
        return len(steps) >= config.steps
    return len(epoch_ends) >= config.epochs
