"""Which tiles, warps and blocks are fastest here: every value of every knob, one knob at a time.

    python -m kernels.tune                      on a GPU: writes results/gpu_tune.json as it goes
    python -m kernels.tune --check              the script itself on a CPU: nothing is timed

The knobs stand in kernels/cases/NAME.py. Each value is set, the kernel called once (which compiles
it), its largest error against the definition taken, and its time beside the others'. The best value
is kept while the next knob is turned. The last lines are what to write into the kernel's table; a
knob's error must stay what it was.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from kernels.cases import Case, Knob, cases, why
from kernels.timing import errors_of, machine, once, outputs_of, seconds_of, timed

CASES = cases()


def tune_knob(case: Case, knob: Knob, runs: int, device: str) -> list[dict]:
    """A row for each value: its time and error, or why there is none. The best stays set."""
    upstream = upstream_of(case)
    inputs32 = [x.float() for x in case.inputs]
    reference, _ = once(case.definition, inputs32, [x.float() for x in upstream], device)
    ours = case.peers["ours"]
    directions = [name for name in case.costs if knob.direction in (name, "both")]
    rows = []
    for value in knob.values:
        row = {"knob": knob.name, "value": value}
        rows.append(row)
        try:
            # on a CPU there are no tiles to set: the references run
            if device == "cuda":
                knob.turn(value)
            results, _ = once(ours, case.inputs, upstream, device)
            row["error"] = max(errors_of(results, reference))
            functions = {name: timed(name, ours, case.inputs, upstream) for name in directions}
            times = seconds_of(functions, runs, device)
            row["milliseconds"] = 1e3 * sum(t.median for t in times.values())
        except Exception as error:
            # more shared memory than the chip has, a layout that the compiler refuses
            row["why_not"] = why(error)
    timed_rows = [row for row in rows if "milliseconds" in row]
    best = min(timed_rows, key=lambda row: row["milliseconds"])
    best["best"] = True
    if device == "cuda":
        knob.turn(best["value"])
    return rows


def upstream_of(case: Case) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = outputs_of(case.peers["ours"], case.inputs)
    return [torch.ones_like(x) if x.ndim == 0 else torch.randn_like(x) for x in outputs]


def line_of(kernel: str, row: dict) -> str:
    result = row.get("why_not")
    if result is None:
        result = f"{row['milliseconds']:.4f} ms, error {row['error']:.1e}"
    mark = "  <- best" if row.get("best") else ""
    return f"{kernel:16s} {row['knob']:18s} {row['value']!s:18s} {result}{mark}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=6, help="begin no knob after so many")
    parser.add_argument("--out", type=Path, default=Path("results/gpu_tune.json"))
    parser.add_argument("--check", action="store_true", help="on a CPU, without a time")
    args = parser.parse_args()
    device = "cpu" if args.check else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to tune (--check runs the script on the CPU)")
        return

    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = machine("python -m kernels.tune") | {"runs": args.runs, "rows": []}
    began = time.monotonic()
    for kernel, module in CASES.items():
        for knob in module.KNOBS:
            if time.monotonic() - began > 60 * args.minutes:
                print(f"{kernel}: {knob.name} not begun within --minutes {args.minutes}")
                continue
            for row in tune_knob(case_for(module, device), knob, args.runs, device):
                results["rows"].append({"kernel": kernel} | row)
                print(line_of(kernel, row), flush=True)
            args.out.write_text(json.dumps(results, indent=1))
    print("\nthe best of each:")
    for row in results["rows"]:
        if row.get("best"):
            print(line_of(row["kernel"], row))


def case_for(module, device: str) -> Case:
    """The kernel's most telling case, drawn anew, so that no two knobs share a graph."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def make(*sizes):
        return torch.randn(*sizes, generator=generator, device=device).to(dtype)

    sizes = module.SIZES | module.SHAPES[0]
    if device == "cpu":
        sizes |= module.SMALL
    return module.case_of(make, device, **sizes)


if __name__ == "__main__":
    main()
