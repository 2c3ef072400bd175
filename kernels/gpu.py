"""Facts of this GPU, every kernel checked on it, and a search for races.

    python -m kernels.gpu --out results/      gpu_check.json, gpu_check.log, gpu_check.xml
    python -m kernels.gpu --check             only a small case of each kernel, on whatever is here

Facts: versions, clocks, the rate of a copy and of the loss's three matmuls with a vocabulary of
32,001 and of 32,064 columns. Then `pytest -m gpu`, in parallel where pytest-xdist is installed.
Then compute-sanitizer's racecheck on a small case of all four kernels, where that tool is found.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from kernels.cases import cases, why
from kernels.timing import (
    Clock,
    copy_rate,
    fresh,
    machine,
    matmul_rate,
    outputs_of,
    seconds_of,
)

ROOT = Path(__file__).parent.parent
RACE_MINUTES = 1


def loss_matmuls(rows=4096, width=4096) -> dict:
    """TFLOP/s of the loss's matmuls, by vocabulary: an odd one is why cross_entropy.py pads."""
    rates = {}
    for vocabulary in (32001, 32064):
        hidden = torch.randn(rows, width, device="cuda").bfloat16()
        matrix = torch.randn(vocabulary, width, device="cuda").bfloat16()
        logits = torch.randn(rows, vocabulary, device="cuda").bfloat16()
        dmatrix = torch.zeros(vocabulary, width, device="cuda")
        products = matmuls_of(hidden, matrix, logits, dmatrix)
        for name, seconds in seconds_of(products, 10, "cuda").items():
            rates[f"{name}, {vocabulary}"] = 2 * rows * width * vocabulary / seconds.median / 1e12
    return rates


def matmuls_of(hidden, matrix, logits, dmatrix) -> dict:
    def add_product():
        # products of bf16, summed in fp32
        torch.addmm(dmatrix, logits.t(), hidden, out_dtype=torch.float32, out=dmatrix)

    return {
        "logits": lambda: hidden @ matrix.t(),
        "dhidden": lambda: logits @ matrix,
        "dmatrix": add_product,
    }


def run_tests(out: Path, limit: float) -> dict:
    """pytest's own last line, and the failures."""
    if not importlib.util.find_spec("pytest"):
        return {"exit": "pytest is not installed: no kernel was checked", "failures": []}
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--junitxml", out / "gpu_check.xml"]
    if importlib.util.find_spec("xdist"):
        # each worker holds a CUDA context and its own references
        words += ["-n", str(min(8, os.cpu_count()))]
    log = out / "gpu_check.log"
    with open(log, "w") as file:
        # all that is marked gpu
        words += ["tests/test_triton.py"]
        try:
            code = subprocess.run(
                words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit:.0f} s"
    lines = log.read_text().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit": code, "summary": lines[-1] if lines else "", "failures": failures}


def run_racecheck() -> dict:
    tool = shutil.which("compute-sanitizer")
    if not tool:
        return {"absent": "compute-sanitizer is not on the PATH"}
    words = [tool, "--tool", "racecheck", "--error-exitcode", "1"]
    words += [sys.executable, "-m", "kernels.gpu", "--check"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=ROOT, timeout=60 * RACE_MINUTES
        )
    except subprocess.TimeoutExpired:
        return {"exit": f"stopped after {RACE_MINUTES} min"}
    summary = re.findall(r"RACECHECK SUMMARY: (.*)", done.stdout)
    return {"exit": done.returncode, "summary": summary[-1] if summary else done.stdout[-300:]}


def small_case(device: str) -> None:
    """Each kernel once, forward and backward, at small sizes: what racecheck watches."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def make(*sizes):
        return torch.randn(*sizes, device=device).to(dtype)

    for kernel, module in cases().items():
        sizes = module.SIZES | module.SHAPES[0] | module.SMALL
        if kernel == "rotary_attention":
            # the head size of LLaMA-2, and several blocks of 128 rows
            sizes |= {"E": 128, "T": 431}
        case = module.case_of(make, device, **sizes)
        leaves = fresh(case.inputs)
        outputs = outputs_of(case.peers["ours"], leaves)
        sum(x.float().sum() for x in outputs).backward()
        print(f"{kernel}: {[round(x.grad.float().norm().item(), 4) for x in leaves]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="kernels.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--check", action="store_true", help="only a small case of each kernel")
    args = parser.parse_args()
    if args.check:
        small_case("cuda" if torch.cuda.is_available() else "cpu")
        return 0
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to check (--check runs small cases on the CPU)")
        return 0

    clock = Clock(args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "gpu_check.json"
    results = machine("python -m kernels.gpu")

    def note(name, value):
        results[name] = value
        file.write_text(json.dumps(results, indent=1))
        print(f"{name}: {json.dumps(value, indent=1)}", flush=True)

    note("copy, TB/s", copy_rate(2**31, 10, "cuda") / 1e12)
    note("matmul, TFLOP/s", matmul_rate(10, "cuda") / 1e12)
    try:
        note("matmuls of the loss, TFLOP/s", loss_matmuls())
    except Exception as error:
        # an older torch has no out_dtype: the tests below will say what that breaks
        note("matmuls of the loss, TFLOP/s", why(error))
    if not importlib.util.find_spec("xdist"):
        note("absent", "pytest-xdist: the tests run one after the other")
    tests = run_tests(args.out, max(1, clock.left - 60 * RACE_MINUTES))
    note("tests", tests)
    races = run_racecheck()
    note("racecheck", races)
    # without the tool there is no status
    return 0 if tests["exit"] == 0 and races.get("exit", 0) == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
