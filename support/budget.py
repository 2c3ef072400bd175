"""What a run needs: FLOPs, memory, the table of --dry_run.

L layers, D width, H query heads, G kv heads, E head size, U ffn width, V vocab
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kernels.cross_entropy import CHUNK_BYTES
from model import RECOMPUTE, Config
from packing import micro_batches_of
from recipe import TrainConfig
from support.hf import parameter_shapes

GIB = 2**30

# ---- FLOPs

# Dense bf16, by words in the device's name; the first that fits counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}


class TrainFlops(NamedTuple):
    """FLOPs of a forward and a backward pass, split by what they grow with.

    per_token       FLOPs a token: 6 * L * (weights of one block). A weight costs 2 forward (a
                    product and a sum), and 4 backward (for its input's gradient and its own).
    per_supervised  FLOPs a supervised token: 6 * D * V. Only such rows reach the head.
    per_square      FLOPs for each unit of a conversation's length^2: 6 * L * H * E. Scores and
                    their products with v take 2 * 2 * H * E * length^2 a block; causal attention
                    computes half of them; the backward pass costs twice the forward pass.
    """

    per_token: int
    per_supervised: int
    per_square: int

    def total(self, tokens: int, supervised: int, squares: float) -> float:
        """FLOPs of so many tokens and supervised tokens; squares: the sum of length^2."""
        of_tokens = self.per_token * tokens
        of_supervised = self.per_supervised * supervised
        return of_tokens + of_supervised + self.per_square * squares

    @property
    def plan_cost(self) -> tuple[int, int]:
        """(FLOPs a token, FLOPs for each unit of length^2), as the planner weighs conversations.

        It takes every token for a supervised one.
        """
        return self.per_token + self.per_supervised, self.per_square


def train_flops(config: Config) -> TrainFlops:
    """The FLOPs of this model's matmuls and attention. All else is small beside them."""
    L, D = config.num_hidden_layers, config.hidden_size
    H, G = config.num_attention_heads, config.num_key_value_heads
    E = config.head_size
    U, V = config.intermediate_size, config.vocab_size
    # q and o are as wide as the query heads, k and v as the kv heads
    attention = 2 * D * H * E + 2 * D * G * E
    # gate, up, down
    mlp = 3 * D * U
    return TrainFlops(
        per_token=6 * L * (attention + mlp),
        per_supervised=6 * D * V,
        per_square=6 * L * H * E,
    )


def peak_flops() -> float | None:
    """FLOPs a second of this GPU, dense bf16; None where it is not in the table."""
    device_name = torch.cuda.get_device_name()
    for word, peak in PEAK_FLOPS.items():
        if word in device_name:
            return peak
    return None


# ---- memory by part


def activation_width(config: Config, recompute: str) -> int:
    """How many numbers a block keeps of each token until its backward pass.

    As on a GPU, where the kernels run. Their fp32 log-sum-exps are not counted.
    """
    D, U = config.hidden_size, config.intermediate_size
    q_width = config.num_attention_heads * config.head_size
    kv_width = config.num_key_value_heads * config.head_size
    if recompute == "all":
        # the block's input
        return D
    if recompute == "cheap":
        # input and o_proj's output; q and o; k, rotated k, v; gate and up
        return 2 * D + 2 * q_width + 3 * kv_width + 2 * U
    # input, residual and both their norms; q and o; rotated k, v; gate, up, their product
    return 4 * D + 2 * q_width + 2 * kv_width + 3 * U


class OptimizerState(NamedTuple):
    """What an optimizer keeps of the weights."""

    name: str  # as the table of --dry_run calls it
    bytes: float  # for each number of a parameter


def optimizer_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """What this optimizer keeps of a parameter. It is built over one small parameter, and steps.

    Asked, not known beforehand: another optimizer in train.py needs no change here.
    """
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    # A number that it keeps of the whole parameter, such as its count of steps, weighs nothing.
    kept = {}
    for name, value in optimizer.state[parameter].items():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            kept[name] = value.nbytes
    moments = {"exp_avg", "exp_avg_sq"}
    what = "two moments" if kept.keys() == moments else "state"
    name = f"{type(optimizer).__name__}'s {what}"
    return OptimizerState(name, sum(kept.values()) / parameter.numel())


def needs_fsdp(config: TrainConfig) -> bool:
    """Does a process alone need FSDP? In plain fp32 it runs without: nothing is gathered, and
    nothing reduced.
    """
    return config.exact or config.offload or config.dtype != "float32"


def memory_parts(
    config: TrainConfig, model_config: Config, ranks: int, state: OptimizerState
) -> dict[str, dict[str, float]]:
    """{part: {way to recompute: bytes on each GPU}} when memory is fullest.

    That is the start of the backward pass: all activations are there, and the first gradients.
    """
    size_of = sizes(model_config)
    whole = sum(size_of.values())
    of_block = [size for name, size in size_of.items() if name.startswith("model.layers.0.")]
    block = sum(of_block)
    head = size_of["model.embed_tokens.weight"]
    # FSDP takes what is in no block as one group: embedding, head, and the last norm. A tied head
    # is the embedding.
    matrices = 1 if model_config.tie_word_embeddings else 2
    root = matrices * head + model_config.hidden_size
    number = getattr(torch, config.dtype).itemsize

    alone = ranks == 1 and not needs_fsdp(config)
    gathered, reduced = 0, 0
    if not alone:
        gathered = number * (2 * block + root)
        # A group's gradients as they are computed, and again in the dtype of the sum. Their sum is
        # cut into shards; one rank holds the only one, as large as what went in.
        summed = 8 if config.exact else 4
        copies = 2 if ranks == 1 else 1
        reduced = (number + summed * copies) * max(block, root)

    logits = number * model_config.vocab_size * config.micro_tokens
    chunk = min(CHUNK_BYTES["cpu" if alone else "cuda"], logits)
    # With --offload weights, gradients and moments are in the host's memory: see host_parts. Here
    # are the gradients of a step's micro-batches until the last (copied_once in train.py), and the
    # matrix that FSDP is just bringing, which it makes bf16 only here.
    kept = whole / ranks
    so_far = arriving = 0
    if config.offload:
        kept = 0
        arriving = max(of_block)
        so_far = whole if config.batch_tokens > config.micro_tokens else 0
    parts = {
        "weights, fp32, sharded": 4 * kept,
        "gradients, fp32, sharded": 4 * kept,
        f"{state.name}, sharded": state.bytes * kept,
        "gradients of the step so far, fp32": 4 * so_far,
        "one matrix on its way, fp32": 4 * arriving,
        "gradient sums in fp64, sharded": 8 * whole / ranks if config.exact else 0,
        "gathered: two blocks, embedding, head": gathered,
        "gradients of one group in reduction": reduced,
        "head's gradient, chunk of logits": 4 * head + chunk,
    }

    # Only the activations depend on what is computed twice.
    rows = {part: dict.fromkeys(RECOMPUTE, size) for part, size in parts.items()}
    rows["activations"] = {}
    for recompute in RECOMPUTE:
        numbers = activation_numbers(model_config, recompute)
        rows["activations"][recompute] = config.micro_tokens * numbers * number
    return rows


def sizes(model_config: Config) -> dict[str, int]:
    """{name: how many numbers the parameter has}"""
    return {name: math.prod(shape) for name, shape in parameter_shapes(model_config).items()}


def pinned_bytes(size: int) -> int:
    """What PyTorch's allocator takes for a tensor of so many bytes in pinned memory: the next power
    of two.
    """
    return 1 << (size - 1).bit_length()


def host_parts(model_config: Config, state: OptimizerState) -> dict[str, float]:
    """{part: bytes} of what --offload keeps in the host's memory.

    FSDP pins each sharded parameter and each gradient by itself. The optimizer does not pin.
    """
    numbers = sizes(model_config).values()
    pinned = sum(pinned_bytes(4 * n) for n in numbers)
    return {
        "weights, fp32, pinned": pinned,
        "gradients, fp32, pinned": pinned,
        state.name: state.bytes * sum(numbers),
    }


def activation_numbers(config: Config, recompute: str) -> int:
    """How many numbers of each token there are while the last block is in its backward pass."""
    width = activation_width(config, recompute)
    kept = config.num_hidden_layers * width
    # what this one block computes again
    rebuilt = activation_width(config, "none") - width
    # the gradients that flow through it
    gradients = 4 * config.hidden_size + 3 * config.intermediate_size
    return kept + rebuilt + gradients


# ---- the dry run

# The rest is for CUDA's context, NCCL and fragmentation.
USABLE_MEMORY = 0.92
# Tokens of a conversation where no --data says it.
ASSUMED_LENGTH = 1500


@dataclass(frozen=True)
class FitConfig(TrainConfig):
    """--dry_run: memory and time of a run on `ranks` GPUs like this one.

    Without --data it takes --steps steps of batch_tokens each.
    """

    # GPUs of the run
    ranks: int = 1
    # what one GPU can compute in a second, dense bf16, in 1e12 FLOPs: A100 312; H100, H200 989
    tflops: float = 312.0
    # memory of one GPU
    gb: float = 80.0
    # FLOPs that the method needs (recomputation not counted), as a share of what the GPU could do
    mfu: float = 0.45


def check_fit(config: FitConfig) -> None:
    """ValueError: flags without which nobody can tell what a run needs."""
    if not config.model or not (config.data or config.steps):
        raise ValueError(
            "--dry_run wants --model, and --data or --steps; for example --model llama-2-13b "
            "--ranks 8 --batch_tokens 262144 --steps 2000"
        )
    # The bounds keep the hours finite.
    for name in ("ranks", "tflops", "gb"):
        value = getattr(config, name)
        if not 1e-6 < value <= 1e9:
            raise ValueError(f"--{name} {value} is not above 0 and at most 1e9")
    if not 1e-6 < config.mfu <= 1:
        raise ValueError(f"--mfu {config.mfu} is not above 0 and at most 1")


@dataclass(frozen=True)
class Workload:
    """All that a run will have trained on at its end."""

    steps: int
    tokens: int
    supervised: int  # of these tokens
    squares: float  # sum of length^2 over the conversations, for attention
    source: str  # of these numbers, for the printed line


def assumed_work(config: FitConfig) -> Workload:
    """Without --data: full steps, every token supervised, every conversation of the same length."""
    tokens = config.steps * config.batch_tokens
    source = f"without --data: all supervised, conversations of {ASSUMED_LENGTH:,}"
    return Workload(config.steps, tokens, tokens, tokens * float(ASSUMED_LENGTH), source)


def planned_work(config: FitConfig, steps: int, lengths: np.ndarray, supervised: int) -> Workload:
    """With --data: what the plan of the whole run holds."""
    tokens = lengths.sum()
    squares = (lengths.astype(float) ** 2).sum()
    source = f"{config.data}: {supervised / tokens:.0%} supervised"
    return Workload(steps, tokens, supervised, squares, source)


def print_budget(
    config: FitConfig,
    model_config: Config,
    optimizer: torch.optim.Optimizer,
    steps: int | None = None,
    lengths: np.ndarray | None = None,
    supervised: int | None = None,
) -> None:
    """Print what a run needs; nothing is loaded.

    config and model_config as `resolve` gives them; optimizer as the run would build it, but over
    one small parameter. With --data: the number of steps of the whole run, the lengths of its
    conversations and how many of their tokens are supervised.
    """
    if lengths is None:
        work = assumed_work(config)
    else:
        work = planned_work(config, steps, lengths, supervised)
    parameters = sum(sizes(model_config).values())
    print(
        f"{config.model}: {parameters:,} parameters in {config.dtype} on "
        f"{config.ranks} x {config.gb:g} GB, micro-batches of {config.micro_tokens:,} tokens"
    )
    state = optimizer_state(optimizer)
    print_memory(config, model_config, state)
    if config.offload:
        print_host(model_config, state)
    print_time(config, train_flops(model_config), work)


def print_memory(config: FitConfig, model_config: Config, state: OptimizerState) -> None:
    """The table: a line a part, a column for each way to recompute."""
    print_row("GiB on each rank, by --recompute", RECOMPUTE)
    total = dict.fromkeys(RECOMPUTE, 0.0)
    for part, size_of in memory_parts(config, model_config, config.ranks, state).items():
        # Rounded before they are added, so that a reader who adds up the column gets the sum.
        gib = {how: round(size_of[how] / GIB, 2) for how in RECOMPUTE}
        for how in RECOMPUTE:
            total[how] += gib[how]
        if any(gib.values()):
            print_row(f"  {part}", [f"{gib[how]:.2f}" for how in RECOMPUTE])
    print_row("sum", [f"{total[how]:.2f}" for how in RECOMPUTE])

    usable = USABLE_MEMORY * config.gb * 1e9
    verdict = {True: "yes", False: "no"}
    fits = [verdict[total[how] * GIB < usable] for how in RECOMPUTE]
    print_row(f"within {USABLE_MEMORY:.0%} of {config.gb:g} GB", fits)


def print_host(model_config: Config, state: OptimizerState) -> None:
    """--offload: what lies in the host's memory, and how much of that is rounding."""
    print("GiB in the host's memory")
    parts = host_parts(model_config, state)
    for part, size in parts.items():
        print_row(f"  {part}", [f"{size / GIB:.2f}"])
    total = sum(parts.values())
    print_row("sum", [f"{total / GIB:.2f}"])
    unrounded = (4 + 4 + state.bytes) * sum(sizes(model_config).values())
    print(
        f"that is {total / 1e9:,.0f} GB, or {unrounded / 1e9:,.0f} if PyTorch did not round pinned "
        "tensors up to powers of two"
    )


def print_row(title: str, cells: list[str]) -> None:
    columns = [f"{cell:>8}" for cell in cells]
    print(f"{title:40}" + "".join(columns))


def print_time(config: FitConfig, flops: TrainFlops, work: Workload) -> None:
    """How long the run takes, and how much of that the ranks wait for one another."""
    needed = flops.total(work.tokens, work.supervised, work.squares)
    without_waiting = needed / (config.ranks * config.tflops * 1e12 * config.mfu)

    # The ranks take a step's micro-batches in turns. In the last turn some may have none.
    micro_batches = micro_batches_of(config.batch_tokens, config.micro_tokens)
    turns = math.ceil(micro_batches / config.ranks)
    seconds = without_waiting * turns * config.ranks / micro_batches
    if turns * config.ranks > micro_batches:
        idle = 1 - micro_batches / turns / config.ranks
        print(
            f"a step has {micro_batches} micro-batches: {config.ranks} ranks take {turns} turns "
            f"and are idle {idle:.0%} of the time"
        )

    duration = f"{seconds / 3600:,.1f} hours" if seconds > 3600 else f"{seconds:.0f} seconds"
    print(
        f"{work.steps:,} steps, {work.tokens:,} tokens ({work.source}): {needed:.3g} FLOPs / "
        f"({config.ranks} x {config.tflops:g} TFLOP/s x MFU {config.mfu:.0%}) = {duration}"
    )


# ---- while a run goes on


class Memory(NamedTuple):
    """Bytes of this process; 0 where the system does not tell."""

    own: int  # now, of its own: pages of mapped files are not counted
    peak: int  # with the pages of mapped files
    device_peak: int  # on the GPU


def memory(device: torch.device) -> Memory:
    """What this process holds and held at most."""
    kilobytes = {"RssAnon": 0, "VmHWM": 0}
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            key, value = line.split(":", 1)
            if key in kilobytes:
                kilobytes[key] = int(value.split()[0])
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Memory(kilobytes["RssAnon"] * 1024, kilobytes["VmHWM"] * 1024, on_device)


def memory_by_rank(device: torch.device, checkpoints) -> str:
    """A line for the log. The checkpoints' group is used, since it is on the CPU."""
    of_ranks = checkpoints.gather(memory(device))
    columns = []
    for title, sizes in zip(("host", "peak with mapped files", "device peak"), zip(*of_ranks)):
        if any(sizes):
            gib = [f"{size / GIB:.2f}" for size in sizes]
            columns.append(" ".join([title, *gib]))
    return "memory, GiB by rank: " + "; ".join(columns)


def usage_text(
    device: torch.device, line: dict, lengths: np.ndarray, flops: TrainFlops, world: int
) -> str:
    """Of a step, for the terminal: peak memory, and on a GPU that we know its MFU.

    MFU: the FLOPs that the method needs, attention by the real lengths, as a share of the peak.
    """
    held = memory(device)
    text = f" {(held.device_peak or held.peak) / GIB:.1f} GiB"
    peak = peak_flops() if device.type == "cuda" else None
    if peak:
        squares = float((lengths.astype(np.float64) ** 2).sum())
        needed = flops.total(line["tokens"], line["supervised_tokens"], squares)
        text = f" MFU {needed / line['seconds'] / world / peak:.0%}" + text
    return text


OUT_OF_MEMORY = "can't allocate memory", "out of memory", "ALLOC_FAILED"


def out_of_memory(error: Exception) -> str | None:
    """What the user can do, where a run failed for want of memory; else None."""
    is_type = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    # the CPU's allocator, pinning and CUDA's libraries raise plain RuntimeErrors
    if not is_type and not any(words in str(error) for words in OUT_OF_MEMORY):
        return None
    tried = re.search(r"[Tt]ried to allocate \S+ \w+", str(error))
    reason = tried[0] if tried else error
    return (
        f"rank {os.environ.get('RANK', 0)} is out of memory ({reason}): lower --micro_tokens, set "
        "--recompute cheap or all, take more ranks or, on one GPU, --offload; the same flags with "
        "--dry_run show where it goes"
    )
