"""Every kernel against what a user would pick instead, in bf16, forward and backward, on one GPU.

    python -m kernels.bench                              all kernels at LLaMA-2's shapes
    python -m kernels.bench rms_norm --T 16384 --D 5120  one kernel at your own shape
    python -m kernels.bench --check                      the script itself, on a CPU: every case
                                                         once at small shapes, no times
    python -m kernels.bench --cpu                        head and loss on one CPU thread in fp32
    python -m kernels.bench --show results/bench.json    the table of an earlier run

Ours and the peers run in turn, --runs times each (timing.py says how). Every time is a share of a
ceiling measured in the same run: a copy that moves as many bytes for the kernels that move memory,
an 8192^3 bf16 matmul for those that multiply. Bytes and FLOPs are those of each kernel's docstring,
so a peer that moves more bytes shows as slower, not as faster. Beside every time stands the largest
error of an output or gradient against the definition in fp32; none of ours may be above 1.05 times
plain PyTorch's in bf16 (marked WORSE; exit status 1).

The most telling case of each kernel comes first, then the second of each, and so on, so that
--minutes never cuts a whole kernel: a case is not begun where one as long as the longest would not
end in time. Results are written to --out after each case, with the clocks and the power of the GPU
just after it; the table and a picture lie beside them.
"""

import argparse
import functools
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path

import torch
from torch._functorch import config as functorch

from kernels.cases import absent, cases, why
from kernels.timing import (
    Clock,
    copy_rate,
    errors_of,
    machine,
    matmul_rate,
    nvidia_smi,
    once,
    outputs_of,
    seconds_of,
    timed,
)

CASES = cases()
DEFAULTS = {}
for _case in CASES.values():
    DEFAULTS.update(_case.SIZES)


# ---- one case


def run_case(kernel: str, shape: dict, device: str, ceilings: dict, runs: int) -> list[dict]:
    """A row for each implementation and direction."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def make(*sizes):
        return torch.randn(*sizes, generator=generator, device=device).to(dtype)

    case = CASES[kernel].case_of(make, device, **shape)
    with torch.no_grad():
        outputs = outputs_of(case.peers["ours"], case.inputs)
    upstream = []
    for x in outputs:
        # a loss is a scalar, whose gradient is 1
        upstream.append(torch.ones_like(x) if x.ndim == 0 else make(*x.shape))

    inputs32 = [x.float() for x in case.inputs]
    upstream32 = [x.float() for x in upstream]
    reference, _ = once(case.definition, inputs32, upstream32, device)
    tried = {}
    for name, function in case.peers.items():
        try:
            tried[name] = try_peer(case, function, reference, upstream, device)
        except Exception as broken:
            # a peer of another version may break in any way; ours may not
            if name == "ours":
                raise
            absent[f"{kernel}: {name}"] = why(broken)
    del reference

    rows = []
    for direction, cost in case.costs.items():
        functions = {name: found["functions"][direction] for name, found in tried.items()}
        parts = case.parts.get(direction, {})
        functions |= {name: functools.partial(f, *case.inputs) for name, f in parts.items()}
        times = seconds_of(functions, runs, device)
        ceiling = ceilings["flops"]
        if cost.unit == "bytes":
            ceiling = copy_rate(cost.amount, runs, device)
        for name, seconds in times.items():
            row = {"kernel": kernel, "shape": shape, "direction": direction}
            row |= row_of(name, seconds, cost, ceiling, name in parts)
            row |= accuracy_of(name, tried, case.not_compared)
            rows.append(row)
    return rows


def try_peer(case, function, reference, upstream, device) -> dict:
    """Errors, peak memory, and a function to time for each direction, called twice already."""
    results, peak = once(function, case.inputs, upstream, device)
    errors = errors_of(results, reference)
    del results
    functions = {}
    for direction in case.costs:
        functions[direction] = timed(direction, function, case.inputs, upstream)
        for _ in range(2):
            functions[direction]()
    return {"errors": errors, "peak": peak, "functions": functions}


def row_of(name, seconds, cost, ceiling, is_part) -> dict:
    rate = None if is_part else cost.amount / seconds.median
    return {
        "implementation": name,
        "milliseconds": seconds.median * 1e3,
        "min_milliseconds": seconds.least * 1e3,
        "p90_milliseconds": seconds.most_of_ten * 1e3,
        "unit": cost.unit,
        "rate": rate,
        "ceiling": ceiling,
        "share": rate and rate / ceiling,
    }


def accuracy_of(name, tried, not_compared) -> dict:
    row = {"error": None, "worse": False, "peak_bytes": None}
    if name not in tried:
        return row
    row["peak_bytes"] = tried[name]["peak"]
    if name not in not_compared:
        row["error"] = max(tried[name]["errors"])
    if name == "ours":
        pairs = zip(tried["ours"]["errors"], tried["torch"]["errors"])
        row["worse"] = any(ours > 1e-6 + 1.05 * plain for ours, plain in pairs)
    return row


# ---- all cases


def in_turn(kernel: str | None, own: dict) -> list[tuple[str, dict]]:
    """(kernel, sizes): the first case of each, then the second of each, .."""
    if own:
        return [(kernel, own)]
    if kernel:
        return [(kernel, shape) for shape in CASES[kernel].SHAPES]
    lists = []
    for name, case in CASES.items():
        lists.append([(name, shape) for shape in case.SHAPES])
    pairs = []
    for one_round in zip_longest(*lists):
        pairs += [pair for pair in one_round if pair]
    return pairs


def measure(args: argparse.Namespace, own: dict, out: Path) -> dict:
    device = "cpu" if args.check else "cuda"
    ceilings = {
        "bytes": copy_rate(2**31, args.runs, device),
        "flops": matmul_rate(args.runs, device),
    }
    results = machine("python -m kernels.bench") | {
        "runs": args.runs,
        "absent": absent,
        "ceiling": ceilings,
        "rows": [],
    }
    clock = Clock(args.minutes)
    for kernel, shape in in_turn(args.kernel, own):
        if not clock.has_time():
            absent[f"{kernel} {shape}"] = f"not begun within --minutes {args.minutes}"
            continue
        sizes = CASES[kernel].SIZES | shape
        if args.check:
            sizes |= CASES[kernel].SMALL
        rows = run_case(kernel, sizes, device, ceilings, args.runs)
        if not args.check:
            busy = nvidia_smi()
            for row in rows:
                row |= {"sm_clock": busy.get("sm_clock"), "power": busy.get("power")}
        first = not results["rows"]
        results["rows"] += rows
        out.write_text(json.dumps(results, indent=1))
        if args.check:
            print(check_line(rows))
        else:
            # the head of the table once, then rows only
            lines = table(results | {"rows": rows}).splitlines()
            print("\n".join(lines if first else lines[4:]), flush=True)
            torch.cuda.empty_cache()
    out.write_text(json.dumps(results, indent=1))
    return results


def check_line(rows: list[dict]) -> str:
    shape = " ".join(f"{name}={size}" for name, size in rows[0]["shape"].items())
    words = []
    for row in rows:
        verdict = "ok"
        if row["error"] is None:
            verdict = "not compared"
        elif row["worse"]:
            verdict = "WORSE"
        words.append(f"{row['implementation']} {row['direction']} {verdict}")
    return f"{rows[0]['kernel']} {shape}: {', '.join(words)}"


# ---- what is shown


def table(results: dict) -> str:
    """The rows as a Markdown table, under a line that says where and how they were measured."""
    ceiling = results["ceiling"]
    lines = [
        f"{results['device']}, torch {results['torch']}, triton {results['triton']}; "
        f"copy {ceiling['bytes'] / 1e12:.2f} TB/s, matmul {ceiling['flops'] / 1e12:.0f} TFLOP/s; "
        f"`{results['command']}`",
        "",
        "| kernel | shape | | implementation | ms | rate | of ceiling | error | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        lines.append(f"| {' | '.join(cells_of(row))} |")
    for peer, reason in results["absent"].items():
        lines.append(f"not run: {peer} ({reason})")
    return "\n".join(lines)


def cells_of(row: dict) -> list[str]:
    rate = ""
    share = ""
    if row["rate"] is not None:
        digits, unit = (2, "TB/s") if row["unit"] == "bytes" else (0, "TFLOP/s")
        rate = f"{row['rate'] / 1e12:.{digits}f} {unit}"
        share = f"{row['share']:.0%}"
    error = ""
    if row["error"] is not None:
        error = f"{row['error']:.1e}"
        if row["worse"]:
            error += " WORSE"
    peak = ""
    if row["peak_bytes"] is not None:
        peak = f"{row['peak_bytes'] / 1e6:,.0f}"
    shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    names = [row["kernel"], shape, row["direction"], row["implementation"]]
    return [*names, f"{row['milliseconds']:.3f}", rate, share, error, peak]


def draw(results: dict, path: Path) -> None:
    """Each case's share of its ceiling, a bar for each implementation. Nothing but a line where
    matplotlib is missing."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: pip install matplotlib")
        return

    shares = {}
    for row in results["rows"]:
        sizes = [f"{name}={size}" for name, size in row["shape"].items() if name != "T"]
        label = f"{row['kernel']} {row['direction']}\n{' '.join(sizes)}"
        if row["share"] is not None:
            shares.setdefault(label, {})[row["implementation"]] = row["share"]
    if not shares:
        return
    names = {}
    for case in shares.values():
        names.update(dict.fromkeys(case))
    figure, axes = plt.subplots(figsize=(10, 0.16 * len(shares) * len(names) + 1))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        offset = (i - len(names) / 2) * height
        at = [j + offset for j in range(len(shares))]
        widths = [case.get(name, 0) for case in shares.values()]
        axes.barh(at, widths, height, label=name)
    axes.set_yticks(range(len(shares)), shares, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("share of the ceiling measured in the same run")
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


# ---- head and loss on a CPU


def cpu_loss(job: tuple) -> dict:
    """{seconds, peak_bytes} of one forward and backward pass of head and loss, in a process of its
    own: its peak is the case's."""
    name, supervised, (T, D, V) = job
    torch.set_num_threads(1)

    def make(*sizes):
        return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))

    def resident():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    case = CASES["cross_entropy"].case_of(make, "cpu", T, D, V, supervised)
    leaves = [x.requires_grad_() for x in case.inputs]
    before = resident()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.autograd.grad(case.peers[name](*leaves), leaves)
        seconds.append(time.perf_counter() - start)
    row = {"implementation": name, "supervised": supervised, "T": T, "D": D, "V": V}
    return row | {"seconds": statistics.median(seconds), "peak_bytes": resident() - before}


def cpu_losses(out: Path) -> None:
    """Ours and plain PyTorch, all tokens supervised and 60%; written to out."""
    sizes = (4096, 512, 32001)
    jobs = []
    for supervised in (1.0, 0.6):
        jobs += [(name, supervised, sizes) for name in ("ours", "torch")]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = pool.map(cpu_loss, jobs, chunksize=1)
    about = {"command": "python -m kernels.bench --cpu", "torch": torch.__version__}
    about |= {"dtype": "float32", "threads": 1, "rows": rows}
    out.write_text(json.dumps(about, indent=1))
    for row in rows:
        print(
            f"{row['implementation']:5s} {row['supervised']:.0%} supervised: "
            f"{row['seconds']:.2f} s, {row['peak_bytes'] / 2**20:,.0f} MiB"
        )


# ---- the command line


def parse() -> tuple[argparse.Namespace, dict]:
    """(flags, the sizes that were given)."""
    parser = argparse.ArgumentParser(
        prog="kernels.bench", usage=argparse.SUPPRESS, description=__doc__.splitlines()[0]
    )
    parser.add_argument("kernel", nargs="?", choices=CASES)
    for name, default in DEFAULTS.items():
        text = f"with a kernel that has it ({', '.join(kernels_with(name))})"
        parser.add_argument(f"--{name}", type=type(default), help=text)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=8, help="for all cases")
    text = "results/bench.json, or results/cpu_loss.json with --cpu"
    parser.add_argument("--out", type=Path, help=f"default: {text}")
    parser.add_argument("--check", action="store_true", help="run every case once on a CPU")
    parser.add_argument("--cpu", action="store_true", help="time head and loss on a CPU")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="print the table of a results file"
    )
    args = parser.parse_args()
    own = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    if "H" in own:
        own.setdefault("G", own["H"])
    check_sizes(parser, args, own)
    return args, own


def kernels_with(size: str) -> list[str]:
    return [kernel for kernel, case in CASES.items() if size in case.SIZES]


def check_sizes(parser: argparse.ArgumentParser, args: argparse.Namespace, own: dict) -> None:
    for name in own:
        if args.kernel is None or name not in CASES[args.kernel].SIZES:
            kernels = " or ".join(kernels_with(name))
            parser.error(f"--{name} goes with {kernels}; name the kernel first")
    sizes = [value for name, value in own.items() if name not in ("lengths", "seed")]
    if any(value <= 0 for value in sizes):
        parser.error("sizes are positive")
    uneven = own.get("H", 32) % own.get("G", 32) or own.get("E", 32) % 2
    if uneven or own.get("supervised", 1) > 1:
        parser.error("--H is a multiple of --G, --E is even, --supervised is at most 1")
    if args.runs < 1:
        parser.error("--runs is at least 1")
    lengths = own.get("lengths", "sharegpt")
    is_number = lengths.isdecimal() and int(lengths) > 0
    if lengths not in ("sharegpt", "short") and not is_number:
        parser.error(f"--lengths {lengths}: sharegpt, short or a number of tokens")
    if args.show and not args.show.is_file():
        parser.error(f"--show {args.show}: no such file")


def main() -> None:
    args, own = parse()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    if args.out is None:
        args.out = Path("results/cpu_loss.json" if args.cpu else "results/bench.json")
    if args.cpu:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        cpu_losses(args.out)
        return
    if not args.check and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was timed (--check runs every case once on the CPU)")
        return

    # torch.compile's backward would refuse retain_graph, by which it is timed
    functorch.donated_buffer = False
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json" if args.check else args.out
        out.parent.mkdir(parents=True, exist_ok=True)
        results = measure(args, own, out)
        out.with_suffix(".md").write_text(table(results) + "\n")
        draw(results, out.with_suffix(".png"))
    if not args.check:
        for peer, reason in absent.items():
            print(f"not run: {peer} ({reason})")
        print(f"{out} written, and its table and picture beside it")
    worse = {row["kernel"] for row in results["rows"] if row["worse"]}
    if worse:
        names = ", ".join(sorted(worse))
        sys.exit(f"kernels.bench: ours have a larger error than the peers: {names}")


if __name__ == "__main__":
    main()
