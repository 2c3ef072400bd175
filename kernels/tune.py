"""Which tiles, warps and blocks are fastest here: every value of every knob, one knob at a time.

    python -m kernels.tune                      on a GPU: writes results/gpu_tune.json as it goes
    python -m kernels.tune --check              the script itself on a CPU: writes and times nothing

The knobs stand in kernels/cases/NAME.py. Each value, today's first, is set, the kernel called once
(which compiles it), its largest error against the definition taken, and its time beside the
others'. The best value is kept while the next knob is turned. The last lines, which also lie in
gpu_tune.txt, are what to write into the kernels' files; a knob's error must stay what it was.

A knob is not begun where one as long as the longest would not end within --minutes. The exit status
is 1 where no value of some knob ran.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from kernels import arch
from kernels.cases import Case, Knob, cases, why
from kernels.timing import Clock, errors_of, machine, once, outputs_of, seconds_of, timed

CASES = cases()


def tune_knob(case: Case, knob: Knob, runs: int, device: str) -> list[dict]:
    """A row for each value: its time and error, or why there is none. The best stays set."""
    chip = arch(torch.empty(0, device=device))
    upstream = upstream_of(case)
    inputs32 = [x.float() for x in case.inputs]
    reference, _ = once(case.definition, inputs32, [x.float() for x in upstream], device)
    ours = case.peers["ours"]
    directions = [name for name in case.costs if knob.direction in (name, "both")]
    now = None if device == "cpu" else knob.read(chip)
    rows = []
    for value in values_of(knob, now):
        row = {"knob": knob.name, "place": knob.place(chip), "value": value, "now": value == now}
        rows.append(row)
        try:
            # on a CPU there are no tiles to set: the references run
            if device == "cuda":
                knob.turn(chip, value)
            results, _ = once(ours, case.inputs, upstream, device)
            row["error"] = max(errors_of(results, reference))
            functions = {name: timed(name, ours, case.inputs, upstream) for name in directions}
            times = seconds_of(functions, runs, device)
            row["milliseconds"] = 1e3 * sum(t.median for t in times.values())
        except Exception as error:
            # more shared memory than the chip has, a layout that the compiler refuses
            row["why_not"] = why(error)
    # today's value comes first; what is further from the definition than it is wrong, however fast
    most = 1e-6 + 1.05 * rows[0].get("error", math.inf)
    for row in rows:
        if row.get("error", 0) > most:
            row["why_not"] = f"error {row['error']:.1e}"
    right = [row for row in rows if "why_not" not in row]
    best = min(right, key=lambda row: row["milliseconds"], default=None)
    if best:
        best["best"] = True
    if device == "cuda":
        knob.turn(chip, best["value"] if best else now)
    return rows


def values_of(knob: Knob, now: object) -> list:
    """Today's value first, then the others. now: None on a CPU, which has no value of its own."""
    others = [value for value in knob.values if value != now]
    return others if now is None else [now, *others]


def upstream_of(case: Case) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = outputs_of(case.peers["ours"], case.inputs)
    return [torch.ones_like(x) if x.ndim == 0 else torch.randn_like(x) for x in outputs]


def line_of(kernel: str, row: dict, device: str) -> str:
    result = row.get("why_not")
    if result is None:
        time = f"{row['milliseconds']:.4f} ms, " if device == "cuda" else ""
        result = f"{time}error {row['error']:.1e}"
    marks = ""
    if row["now"]:
        marks += "  <- now"
    if row.get("best") and device == "cuda":
        marks += "  <- best"
    return f"{kernel:16s} {row['knob']:18s} {row['value']!s:18s} {result}{marks}"


def to_paste(results: dict) -> list[str]:
    """What to write into the kernels' files."""
    lines = [f"# {results['device']}, {results['date']}, {results['command']}"]
    for row in results["rows"]:
        if row.get("best"):
            lines.append(f"kernels/{row['kernel']}.py    {row['place']} = {row['value']}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=6, help="for all knobs")
    parser.add_argument("--out", type=Path, default=Path("results/gpu_tune.json"))
    parser.add_argument("--check", action="store_true", help="on a CPU, without a time")
    args = parser.parse_args()
    device = "cpu" if args.check else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to tune (--check runs the script on the CPU)")
        return 0

    results = machine("python -m kernels.tune") | {"runs": args.runs, "not_begun": [], "rows": []}
    failed = []
    clock = Clock(args.minutes)
    for kernel, module in CASES.items():
        for knob in module.KNOBS:
            if not clock.has_time():
                results["not_begun"].append(f"{kernel}: {knob.name}")
                continue
            rows = tune_knob(case_for(module, device), knob, args.runs, device)
            if not any(row.get("best") for row in rows):
                failed.append(f"{kernel}: {knob.name}")
            for row in rows:
                results["rows"].append({"kernel": kernel} | row)
                print(line_of(kernel, row, device), flush=True)
            if device == "cuda":
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(results, indent=1))
                args.out.with_suffix(".txt").write_text("\n".join(to_paste(results)) + "\n")
    if device == "cuda":
        print("\n" + "\n".join(to_paste(results)))
    for knob in results["not_begun"]:
        print(f"not begun within --minutes {args.minutes}: {knob}")
    for knob in failed:
        print(f"no value ran: {knob}")
    return 1 if failed else 0


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
    sys.exit(main())
