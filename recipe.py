"""Sec. 4.1: the settings of a run, the presets, the learning rate, the steps of every epoch."""

import math
from dataclasses import dataclass

import numpy as np

from packing import flat, plan


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


def finetune_lr(supervised_tokens, pretrain_lr=3e-4):
    """(lr, how): the base model's pre-training LR at 4M tokens, scaled by the square root of the batch-size ratio (Sec. 4.1).

    What counts is supervised tokens per step: 200k of them give the paper's 6.7e-5. LLaMA-2 34B and 70B have 1.5e-4.
    """
    lr = pretrain_lr * math.sqrt(supervised_tokens / 4e6)
    return (
        lr,
        f"lr {lr:.3g} = {pretrain_lr:g} * sqrt({supervised_tokens:,.0f} supervised tokens a step / 4e6)",
    )


def lr_at(step, steps, config):
    """Learning rate of optimizer step `step`, from 1: linear warm-up, then a cosine from lr to min_lr * lr."""
    warmup = max(1, round(config.warmup * steps))
    if step <= warmup:
        return config.lr * step / warmup
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)


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
