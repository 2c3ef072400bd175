"""A whole training step beside transformers': the same conversations, the same AdamW, an untied head.

    python -m paper.step                    this CPU, one thread, a process for each contestant, in turn   -> results/step_cpu.json
    python -m paper.step --model 13b        a GPU: 8 layers of LLaMA-2-13B's width, 16,384 packed tokens    -> results/step_gpu_13b.json

Contestants: ours; ours in plain PyTorch (the kernels' references; on a GPU only); transformers packed (rows filled first-fit
decreasing, positions from 0 in each conversation, a block-diagonal mask, so the same numbers) and padded; on a GPU both with
Liger's kernels. On the CPU time is process CPU time; memory is the peak above the level before the model is built.
tokens/s counts real tokens. MFU = FLOPs that the batch needs (`train_flops`: 6 per weight of a matmul and token, the head's per
supervised token, attention within conversations, its causal half) / seconds / the GPU's dense bf16 peak.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import kernels.rms_norm
import kernels.rotary_attention
import kernels.swiglu
from model import SIZES, Config
from packing import flat, pack, plan
from paper.packing import sharegpt_like
from recipe import TrainConfig
from support.budget import peak_flops, train_flops
from support.cli import parse_args, run
from support.ranks import local_rows, start_group
from train import Tally, build, train_step

WIDTHS = {  # config of the model, conversations, tokens of a row, rows of a step
    "cpu": (Config(288, 768, 6, 6, 6, 32000, 2048), 64, 1024, 4),
    "7b": (SIZES["llama-2-7b"], 88, 4096, 4),
    "13b": (SIZES["llama-2-13b"], 88, 4096, 4),
}
SUPERVISED = {"cpu": (1.0, 0.6), "cuda": (0.6,)}
CONTESTANTS = {
    "cpu": ("ours", "transformers, packed", "transformers, padded"),
    "cuda": (
        "ours",
        "ours, plain PyTorch",
        "transformers, packed",
        "transformers + Liger, packed",
        "transformers + Liger, padded",
    ),
}


@dataclass(frozen=True)
class StepConfig:
    model: str = "cpu"  # or 7b, 13b: widths
    layers: int = 8  # of a GPU's model
    rounds: int = 3
    recompute: str = "none"
    conversations: int | None = None
    contestant: str | None = None  # set by the parent process
    supervised: float | None = None


def workload(config, supervised):
    """A row of WIDTHS with its conversations, (tokens, weights), in them. The answer is the last part of a conversation."""
    model_config, n, row, rows = WIDTHS[config.model]
    n, rng = config.conversations or n, np.random.default_rng(0)
    if config.model == "cpu":  # log-normal, mean 350 before the cut
        lengths = np.clip(rng.lognormal(np.log(350) - 0.8**2 / 2, 0.8, n), 8, 1024).astype(int)
    else:
        lengths, model_config = (
            sharegpt_like(n, 0)[0],
            dataclasses.replace(model_config, num_hidden_layers=config.layers),
        )
    weights = lambda n: (np.arange(n) >= round(n * (1 - supervised))).astype(np.float32)
    return (
        model_config,
        [(rng.integers(0, 32000, n).astype(np.int32), weights(n)) for n in lengths],
        row,
        rows,
    )


def our_steps(config, model_config, conversations, row, rows, device):
    """A function for each step; train.py's own model, optimizer and step."""
    how = TrainConfig(
        dtype="bfloat16" if device.type == "cuda" else "float32",
        recompute=config.recompute,
        lr=1e-4,
    )
    start_group(None, alone=device.type == "cuda", timeout=600)
    model, optimizer, _ = build(how, model_config, device)
    for p in model.parameters():
        torch.nn.init.normal_(local_rows(p)[0].detach(), std=0.02)
    lengths, sums = (
        np.array([len(t) for t, _ in conversations]),
        np.array([w.sum() for _, w in conversations]),
    )
    linear, head, quadratic = train_flops(model_config)
    planned = plan(
        lengths,
        np.zeros(len(lengths), int),
        sums,
        0,
        0,
        row * rows,
        row * rows,
        (linear + head, quadratic),
    )

    def step(rows):
        batch = pack([conversations[i] for i in rows])
        return lambda: train_step(
            model,
            optimizer,
            [batch],
            device,
            batch.weights_T.sum().item(),
            1.0,
            Tally(1, device),
        )

    return [step(flat([s])) for s in planned]


def peer_steps(name, model_config, conversations, row, rows, device):
    """transformers' model on the same conversations: fp32 masters under autocast on a GPU, clipped, as ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if "Liger" in name:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    with device:
        model = (
            LlamaForCausalLM(
                LlamaConfig(
                    **dataclasses.asdict(model_config), use_cache=False, attn_implementation="sdpa"
                )
            )
            .float()
            .train()
        )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1e-4,
        betas=(0.9, 0.95),
        eps=1e-5,
        weight_decay=0.1,
        fused=device.type == "cuda",
    )
    if "padded" in name:
        filled = [[c] for c in conversations]
    else:
        filled, room = [], []
        for c in sorted(conversations, key=lambda c: -len(c[0])):
            fits = next((i for i, left in enumerate(room) if left >= len(c[0])), len(room))
            if fits == len(room):
                filled.append([])
                room.append(row)
            filled[fits].append(c)
            room[fits] -= len(c[0])

    def batch(group):
        ids, labels, positions = (
            torch.zeros(len(group), row, dtype=torch.long),
            torch.full((len(group), row), -100),
            torch.zeros(len(group), row, dtype=torch.long),
        )
        which = torch.full((len(group), row), -1)
        for r, members in enumerate(group):
            start = 0
            for j, (tokens, weights) in enumerate(members):
                here, x = slice(start, start + len(tokens)), torch.from_numpy(tokens).long()
                ids[r, here], positions[r, here], which[r, here] = x, torch.arange(len(x)), j
                labels[r, here] = x.where(torch.from_numpy(weights) > 0, -100)
                labels[r, start] = -100  # nothing predicts a conversation's first token
                start += len(tokens)
        mask = which >= 0
        if "packed" in name:
            mask = (
                (which[:, :, None] == which[:, None, :])
                & torch.ones(row, row, dtype=torch.bool).tril()
            )[:, None]
        return {
            k: v.to(device)
            for k, v in dict(
                input_ids=ids, labels=labels, position_ids=positions, attention_mask=mask
            ).items()
        }

    def step(group):
        inputs = batch(group)

        def go():
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return go

    return [step(filled[i : i + rows]) for i in range(0, len(filled), rows)]


def contest(config):
    """One contestant's line: an epoch of steps after a first one to warm up."""
    torch.set_num_threads(1)
    device = torch.device("cpu" if config.model == "cpu" else "cuda")
    model_config, conversations, row, rows = workload(config, config.supervised)
    peak, resident = 0, lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
    if "transformers" in config.contestant:
        import transformers  # noqa: F401, before the level is read
    level = resident()

    def watch():
        nonlocal peak
        while True:
            peak = max(peak, resident() - level)
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    if config.contestant == "ours, plain PyTorch":
        for module in (kernels.rms_norm, kernels.rotary_attention, kernels.swiglu):
            module.on_gpu = lambda _: False
    ours = config.contestant.startswith("ours")
    steps = (
        our_steps(config, model_config, conversations, row, rows, device)
        if ours
        else peer_steps(config.contestant, model_config, conversations, row, rows, device)
    )
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    steps[0]()
    began = clock()
    for step in steps:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - began
    lengths = np.array([len(t) for t, _ in conversations])
    linear, head, quadratic = train_flops(model_config)
    supervised = sum(int(w[1:].sum()) for _, w in conversations)
    flops = (
        linear * lengths.sum() + head * supervised + quadratic * (lengths.astype(float) ** 2).sum()
    )
    line = {
        "contestant": config.contestant,
        "supervised": config.supervised,
        "tokens": int(lengths.sum()),
        "steps": len(steps),
        "seconds": seconds,
        "tokens_per_s": lengths.sum() / seconds,
        "tflops": flops / seconds / 1e12,
        "peak_bytes": peak if device.type == "cpu" else torch.cuda.max_memory_allocated(),
    }
    if device.type == "cuda":
        line["mfu"] = peak_flops() and flops / seconds / peak_flops()
    print(json.dumps(line), flush=True)


def main(argv):
    config = parse_args(StepConfig, argv)
    if config.contestant:
        return contest(config)
    if config.model not in WIDTHS:
        raise ValueError(f"--model {config.model!r} is not one of {', '.join(WIDTHS)}")
    if config.model != "cpu" and not torch.cuda.is_available():
        raise ValueError(
            f"--model {config.model} needs a GPU; without --model the step is timed on this CPU"
        )
    device, lines = "cpu" if config.model == "cpu" else "cuda", []
    out = Path("results") / (
        "step_cpu.json" if device == "cpu" else f"step_gpu_{config.model}.json"
    )
    about = {
        "command": " ".join(["python -m paper.step", *argv]),
        "torch": torch.__version__,
        "threads": 1,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "rows": lines,
    }
    for _ in range(config.rounds):
        for supervised in SUPERVISED[device]:
            for name in CONTESTANTS[device]:
                done = subprocess.run(
                    [
                        sys.executable,
                        "-m",
                        "paper.step",
                        *argv,
                        "--contestant",
                        name,
                        "--supervised",
                        str(supervised),
                    ],
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    print(f"{name}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
                    continue
                lines.append(json.loads(done.stdout.splitlines()[-1]))
                print(
                    f"{supervised:4.0%} supervised  {name:30} {lines[-1]['tokens_per_s']:9.0f} tokens/s {lines[-1]['peak_bytes'] / 2**20:9.0f} MiB"
                    + (f" MFU {lines[-1]['mfu']:.0%}" if lines[-1].get("mfu") else ""),
                    flush=True,
                )
                out.parent.mkdir(exist_ok=True)
                out.write_text(json.dumps(about, indent=1) + "\n")
    for supervised in SUPERVISED[device]:
        mine = {
            name: statistics.median(
                x["tokens_per_s"]
                for x in lines
                if (x["contestant"], x["supervised"]) == (name, supervised)
            )
            for name in CONTESTANTS[device]
            if any(x["contestant"] == name for x in lines)
        }
        print(
            f"{supervised:.0%} supervised, ours over: "
            + ", ".join(
                f"{name} {mine['ours'] / x:.2f}" for name, x in mine.items() if name != "ours"
            )
        )


if __name__ == "__main__":
    run(main)
