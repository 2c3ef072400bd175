"""Every kernel against what a user would pick instead, in bf16, forward and backward, on one GPU.

    python -m kernels.bench                                   all kernels, LLaMA-2 7B, 13B and 70B shapes
    python -m kernels.bench rms_norm --T 16384 --D 5120       one kernel at your own shape
    python -m kernels.bench --check                           the script itself, on a CPU: every case once at small shapes, no times
    python -m kernels.bench --cpu                             head and loss on one CPU thread in fp32: time and memory
    python -m kernels.bench --show results/bench.json         the table of an earlier run

Ours and the peers run in turn, --runs times each, the L2 cache flushed before every run; a time is the median by CUDA events.
Every time is a share of the ceiling measured in the same run: a copy of 1 GiB (bytes read and written) for the kernels that move
memory, an 8192^3 bf16 matmul for those that multiply. Bytes and FLOPs are those of each kernel's docstring, so a peer that moves
more bytes shows as slower, not as faster. Beside every time stands the largest error of an output or gradient against the definition
in fp32; none of ours may be above 1.05 times plain PyTorch's in bf16 (marked WORSE; exit status 1). Each case is written to --out as
soon as it is done, and no case is begun after --minutes.
"""

import argparse
import functools
import json
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch._functorch import config as functorch

from kernels import triton
from kernels.cases import absent, cases

CASES = cases()
DEFAULTS = {name: size for case in CASES.values() for name, size in case.SIZES.items()}


# ---- measuring


def fresh(inputs):
    """Copies that require gradients: some peers write into their inputs in the backward pass."""
    return [x.detach().clone().requires_grad_() for x in inputs]


def outputs_of(f, inputs):
    outputs = f(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def errors_of(ours, ref):
    """The relative error by norm of each output and gradient; inf where anything is not finite."""
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(ours, ref)]
    return [e if math.isfinite(e) else math.inf for e in errors]


def medians(functions, runs, device):
    """{name: seconds}, the functions in turn, the L2 flushed before each run. On a CPU each is called once: nothing is timed there."""
    if device == "cpu":
        for f in functions.values():
            f()
        return dict.fromkeys(functions, 1.0)
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")  # 256 MiB, more than any L2
    for f in functions.values():
        for _ in range(3):
            f()
    events = {name: [] for name in functions}
    for _ in range(runs):
        for name, f in functions.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            f()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3
        for name, pairs in events.items()
    }


def ceilings(runs, device):
    """{bytes: B/s of a copy, flops: FLOP/s of a matmul}, measured now."""
    size, width = (2**28, 8192) if device == "cuda" else (2**10, 64)
    a, b = torch.randn(size, device=device), torch.empty(size, device=device)
    m = [torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2)]
    seconds = medians(dict(bytes=lambda: b.copy_(a), flops=lambda: m[0] @ m[1]), runs, device)
    return dict(bytes=2 * a.nbytes / seconds["bytes"], flops=2 * width**3 / seconds["flops"])


def once(f, inputs, upstream, device):
    """(outputs then gradients, peak bytes beyond the inputs and the upstream gradients; None on a CPU)."""
    inputs, before = fresh(inputs), 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    outputs = outputs_of(f, inputs)
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    return [*(x.detach() for x in outputs), *gradients], peak


def timed(direction, f, inputs, upstream):
    """A function to time: the forward pass under autograd, the backward pass of a kept graph, or both."""
    leaves = fresh(inputs)
    if direction == "forward":
        return lambda: f(*leaves)
    if direction == "both":
        return lambda: torch.autograd.grad(outputs_of(f, leaves), leaves, upstream)
    outputs = outputs_of(f, leaves)
    return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def run_case(kernel, shape, device, ceiling, runs):
    """[a row per implementation and direction]."""
    g = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    make = lambda *shape: torch.randn(*shape, generator=g, device=device).to(dtype)
    inputs, peers, definition, costs = CASES[kernel].peers_of(make, device, **shape)
    with torch.no_grad():
        upstream = [
            torch.ones_like(x) if x.ndim == 0 else make(*x.shape)
            for x in outputs_of(peers["ours"], inputs)
        ]
    ref, _ = once(definition, [x.float() for x in inputs], [u.float() for u in upstream], device)
    rows, errors, peaks, functions = [], {}, {}, {direction: {} for direction in costs}
    for name, f in peers.items():
        try:
            if name.startswith("of it"):  # a part of ours, without a gradient
                functions["backward" if name.endswith("q") else "forward"][name] = (
                    functools.partial(f, *inputs)
                )
                continue
            results, peaks[name] = once(f, inputs, upstream, device)
            # without RoPE it computes something else
            errors[name] = None if "without" in name else errors_of(results, ref)
            del results
            made = {direction: timed(direction, f, inputs, upstream) for direction in costs}
            for run in made.values():
                run(), run()
            for direction, run in made.items():
                functions[direction][name] = run
        except Exception as broken:  # a peer of another version may break in any way; ours may not
            if name == "ours":
                raise
            absent[f"{kernel}: {name}"] = (
                f"{type(broken).__name__}: {(str(broken) or '-').splitlines()[0]}"
            )
    del ref
    worse = any(
        ours > 1e-6 + 1.05 * torchs for ours, torchs in zip(errors["ours"], errors["torch"])
    )
    for direction, cost in costs.items():
        seconds = medians(functions[direction], runs, device)
        ((unit, amount),) = cost.items()
        for name in functions[direction]:
            part = name.startswith("of it")
            rate = None if part else amount / seconds[name]
            rows.append(
                dict(
                    kernel=kernel,
                    shape=shape,
                    direction=direction,
                    implementation=name,
                    milliseconds=seconds[name] * 1e3,
                    unit=unit,
                    rate=rate,
                    share=rate and rate / ceiling[unit],
                    error=max(errors[name]) if errors.get(name) else None,
                    worse=name == "ours" and worse,
                    peak_bytes=peaks.get(name),
                )
            )
    return rows


def table(results):
    """The rows as a Markdown table, under a line that says where and how they were measured."""
    ceiling = results["ceiling"]
    lines = [
        f"{results['device']}, torch {results['torch']}, triton {results['triton']}; copy {ceiling['bytes'] / 1e12:.2f} TB/s, "
        f"matmul {ceiling['flops'] / 1e12:.0f} TFLOP/s; `{results['command']}`",
        "",
        "| kernel | shape | | implementation | ms | rate | of ceiling | error | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
        rate = (
            ""
            if row["rate"] is None
            else f"{row['rate'] / 1e12:.2f} TB/s"
            if row["unit"] == "bytes"
            else f"{row['rate'] / 1e12:.0f} TFLOP/s"
        )
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        err = "" if row["error"] is None else f"{row['error']:.1e}" + " WORSE" * row["worse"]
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        lines.append(
            f"| {row['kernel']} | {shape} | {row['direction']} | {row['implementation']} | {row['milliseconds']:.3f} | {rate} | {share} | {err} | {peak} |"
        )
    return "\n".join(
        [*lines, *(f"not run: {peer} ({why})" for peer, why in results["absent"].items())]
    )


def draw(results, path):
    """Each case's share of its ceiling, a bar per implementation."""
    import matplotlib.pyplot as plt

    cases = {}
    for row in results["rows"]:
        label = f"{row['kernel']} {row['direction']}\n" + " ".join(
            f"{k}={v}" for k, v in row["shape"].items() if k != "T"
        )
        if row["share"] is not None:
            cases.setdefault(label, {})[row["implementation"]] = row["share"]
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    figure, axes = plt.subplots(figsize=(10, 0.16 * len(cases) * len(names) + 1))
    for i, name in enumerate(names):
        at = [j + (i - len(names) / 2) * 0.8 / len(names) for j in range(len(cases))]
        axes.barh(at, [case.get(name, 0) for case in cases.values()], 0.8 / len(names), label=name)
    axes.set_yticks(range(len(cases)), cases, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("share of the ceiling measured in the same run")
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def cpu_loss(job):
    """{seconds, peak_bytes} of one forward and backward pass of head and loss, in a process of its own: its peak is the case's."""
    name, supervised, (T, D, V) = job
    torch.set_num_threads(1)
    make = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    inputs, peers, *_ = CASES["cross_entropy"].peers_of(make, "cpu", T, D, V, supervised)
    leaves = [x.requires_grad_() for x in inputs]
    resident = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, seconds = resident(), []
    for _ in range(3):
        start = time.perf_counter()
        torch.autograd.grad(peers[name](*leaves), leaves)
        seconds.append(time.perf_counter() - start)
    return dict(
        implementation=name,
        supervised=supervised,
        T=T,
        D=D,
        V=V,
        seconds=statistics.median(seconds),
        peak_bytes=resident() - before,
    )


def cpu_losses(out):
    """Ours and plain PyTorch, all tokens supervised and 60%; written to out."""
    jobs = [
        (name, supervised, (4096, 512, 32001))
        for supervised in (1.0, 0.6)
        for name in ("ours", "torch")
    ]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = pool.map(cpu_loss, jobs, chunksize=1)
    out.write_text(
        json.dumps(
            dict(
                command="python -m kernels.bench --cpu",
                torch=torch.__version__,
                dtype="float32",
                threads=1,
                rows=rows,
            ),
            indent=1,
        )
    )
    for row in rows:
        print(
            f"{row['implementation']:5s} {row['supervised']:.0%} supervised: {row['seconds']:.2f} s, {row['peak_bytes'] / 2**20:,.0f} MiB"
        )


def parse():
    parser = argparse.ArgumentParser(
        prog="kernels.bench", usage=argparse.SUPPRESS, description=__doc__.splitlines()[0]
    )
    parser.add_argument("kernel", nargs="?", choices=CASES)
    for name, default in DEFAULTS.items():
        parser.add_argument(
            f"--{name}",
            type=type(default),
            help=f"with a kernel that has it ({', '.join(k for k, case in CASES.items() if name in case.SIZES)})",
        )
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=8, help="begin no case after so many")
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"))
    parser.add_argument("--check", action="store_true", help="run every case once on a CPU")
    parser.add_argument("--cpu", action="store_true", help="time head and loss on a CPU")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="print the table of a results file"
    )
    args = parser.parse_args()
    own = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    if "H" in own:
        own.setdefault("G", own["H"])
    for name in own:
        if args.kernel is None or name not in CASES[args.kernel].SIZES:
            parser.error(
                f"--{name} goes with {' or '.join(k for k, case in CASES.items() if name in case.SIZES)}; name the kernel first"
            )
    if any(value <= 0 for name, value in own.items() if name not in ("lengths", "seed")):
        parser.error("sizes are positive")
    if own.get("H", 32) % own.get("G", 32) or own.get("E", 32) % 2 or own.get("supervised", 1) > 1:
        parser.error("--H is a multiple of --G, --E is even, --supervised is at most 1")
    if args.runs < 1:
        parser.error("--runs is at least 1")
    if (
        not own.get("lengths", "1").isdigit()
        and own["lengths"] not in ("sharegpt", "short")
        or own.get("lengths") == "0"
    ):
        parser.error(f"--lengths {own['lengths']}: sharegpt, short or a number of tokens")
    if args.show and not args.show.is_file():
        parser.error(f"--show {args.show}: no such file")
    return args, own


def main():
    args, own = parse()
    if args.show:
        return print(table(json.loads(args.show.read_text())))
    if args.cpu:
        return cpu_losses(Path("results/cpu_loss.json"))
    device = "cpu" if args.check else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return print(
            "no CUDA GPU here: nothing was timed (--check runs every case once on the CPU)"
        )
    # torch.compile's backward would refuse retain_graph, by which it is timed
    functorch.donated_buffer = False
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json" if args.check else args.out
        out.parent.mkdir(parents=True, exist_ok=True)
        results = dict(
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            torch=torch.__version__,
            triton=getattr(triton, "__version__", None),
            command=" ".join(["python -m kernels.bench", *sys.argv[1:]]),
            runs=args.runs,
            absent=absent,
            ceiling=ceilings(args.runs, device),
            rows=[],
        )
        began = time.monotonic()
        for kernel in [args.kernel] if args.kernel else CASES:
            for case in [own] if own else CASES[kernel].SHAPES:
                if time.monotonic() - began > 60 * args.minutes:
                    absent[f"{kernel} {case}"] = f"not begun within --minutes {args.minutes}"
                    continue
                sizes = CASES[kernel].SIZES | case | (CASES[kernel].SMALL if args.check else {})
                rows = run_case(
                    kernel,
                    sizes,
                    device,
                    results["ceiling"],
                    args.runs,
                )
                results["rows"] += rows
                out.write_text(json.dumps(results, indent=1))
                if args.check:
                    shape = " ".join(f"{k}={v}" for k, v in rows[0]["shape"].items())
                    print(
                        f"{kernel} {shape}: "
                        + ", ".join(
                            f"{row['implementation']} {row['direction']} {'not compared' if row['error'] is None else 'WORSE' if row['worse'] else 'ok'}"
                            for row in rows
                        )
                    )
                else:
                    print(
                        "\n".join(
                            table(results | dict(rows=rows)).splitlines()[
                                2 if len(rows) == len(results["rows"]) else 4 :
                            ]
                        ),
                        flush=True,
                    )
                    torch.cuda.empty_cache()
        draw(results, out.with_suffix(".png"))
        if not args.check:
            print("\n".join(f"not run: {peer} ({why})" for peer, why in absent.items()))
            print(f"{out} and {out.with_suffix('.png')} written")
    if worse := [row for row in results["rows"] if row["worse"]]:
        sys.exit(
            f"kernels.bench: {len(worse)} of ours have a larger error than the peers: {', '.join(sorted({row['kernel'] for row in worse}))}"
        )


if __name__ == "__main__":
    main()
