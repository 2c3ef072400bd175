"""Compile every kernel ahead of time, for GPUs that are not there, and read the result.

    python -m kernels.compile                     all kernels, all architectures
    python -m kernels.compile --arch sm_90 --kernel rotary_attention --dtype bf16
    python -m kernels.compile --dtype bf16 --shapes 1 --out counts.json

Each operator runs once on small CPU tensors with its launches diverted to the compiler, so what is
compiled is what training launches: the same arguments, the same tiles. A line for each kernel:
registers, spills (loads and stores of local memory in the machine code), shared memory, tensor-core
instructions, and below it what is wrong. "instructions 2384 (377, 562)" are those of the whole
kernel and of its innermost loops, which are what a thread does for each tile.

On the NVIDIA targets a bf16 or fp16 kernel fails that spills or multiplies matrices off the tensor
cores; any kernel fails there that wants more shared memory than the chip has, and everywhere one
that multiplies fp32 as plain TF32, or whose address depends on a 32-bit product (it would wrap at
2^31 elements). fp32 is for correctness: a spill there is printed. gfx942 (AMD MI300) must compile.
Exit status 1 on a failure.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels.cases import cases

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# sm_80's row also serves GPUs of 99 KB (8.6, 8.9, 12.0)
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TENSOR_CORE = {
    "sm_80": r"\bHMMA\b",
    "sm_90": r"\bHGMMA\b",
    "sm_100": r"\bUTCHMMA\b|\bHMMA\b",
    "gfx942": "v_mfma",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


CASES = cases()


class _Driver:
    """What triton.jit asks of a GPU driver before it compiles."""

    def __init__(self, name):
        self.name = name

    def get_current_device(self):
        return self.name

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS[self.name]


def compile_case(name: str, case: Callable, dtype: str, shape: dict) -> list[tuple]:
    """[(kernel's name, triton's compiled kernel)] for every launch of the case."""
    done = []
    run = triton.JITFunction.run

    def divert(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        done.append((self.fn.__name__, kernel))

    triton.runtime.driver.set_active(_Driver(name))
    triton.JITFunction.run = divert
    for kernel_file in CASES:
        module = importlib.import_module(f"kernels.{kernel_file}")
        module.on_gpu = lambda x: True
        module.arch = lambda x: name
    try:
        case(DTYPES[dtype], **shape)
    finally:
        triton.JITFunction.run = run
    # a kernel that was launched twice with the same arguments is one
    return list({kernel.hash: (kernel_name, kernel) for kernel_name, kernel in done}.values())


def disassemble(cubin: bytes) -> tuple[int, str]:
    """(registers, SASS) by the tools that Triton's package carries."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)

        def output(tool, option):
            words = [tools / tool, option, file.name]
            return subprocess.run(words, capture_output=True, text=True, check=True).stdout

        usage = output("cuobjdump", "--dump-resource-usage")
        sass = output("nvdisasm", "-c")
    return int(re.search(r"REG:(\d+)", usage)[1]), sass


def int32_products(ttir: str) -> list[str]:
    """32-bit products (and shifts) in Triton's IR that reach an address."""
    flow = _Flow(ttir)
    before = None
    # a loop carries a value back to its head: go round until nothing new is found
    while before != len(flow.tainted):
        before = len(flow.tainted)
        flow.walk()
    return flow.products_in_addresses()


class _Flow:
    """Data flow forward from each 32-bit product through the lines of one kernel's IR."""

    def __init__(self, ttir):
        self.lines = [line.strip() for line in ttir.splitlines()]
        # value -> the line of the product that it comes from
        self.tainted = {}
        # a block's label -> the values that it receives
        self.heads = {}
        for line in self.lines:
            for label, arguments in re.findall(r"^(\^bb\d+)\((.*)\):", line):
                self.heads[label] = re.findall(r"(%\w+):", arguments)

    def walk(self):
        # the open loops and branches: (their results, the values that a round starts with)
        regions = []
        for line in self.lines:
            results, _, body = line.partition(" = ") if line.startswith("%") else ("", "", line)
            targets = _names_of(results)
            closes = line.startswith("}") and not line.startswith(("} else", "})"))
            if closes and regions:
                regions.pop()
            if re.match(r"scf\.(for|if|while)", body):
                carried = re.findall(r"(%\w+) = (%[\w#]+)", body)
                inner = [name for name, _ in carried]
                self.copy([start for _, start in carried], inner)
                regions.append((targets, inner))
            elif line.startswith("scf.yield") and regions:
                for receivers in regions[-1]:
                    self.copy(_values(line), receivers)
            elif line.startswith("cf."):
                for label, passed in re.findall(r"(\^bb\d+)\(([^)]*)\)", line):
                    self.copy(_values(passed), self.heads.get(label, []))
            elif targets and not body.startswith(("tt.load", "arith.cmpi")):
                self.through(line, body, targets)

    def copy(self, sources, targets):
        for source, target in zip(sources, targets):
            if source in self.tainted:
                self.tainted[target] = self.tainted[source]

    def through(self, line, body, targets):
        """An operation hands its operands' product on; a 32-bit product begins here."""
        origins = [self.tainted[value] for value in _values(body) if value in self.tainted]
        origin = origins[0] if origins else None
        # the type is what stands behind attributes, whose own types are none of the product's
        without_attributes = re.sub(r"\{[^}]*\}", "", body)
        is_int32 = re.search(r": (?:tensor<[\dx]*x)?i32", without_attributes)
        if re.match(r"arith\.(muli|shli)", body) and is_int32:
            origin = line
        if origin:
            self.tainted.update(dict.fromkeys(targets, origin))

    def products_in_addresses(self):
        found = set()
        for line in self.lines:
            if " = tt.addptr " in line:
                _, _, body = line.partition(" = ")
                offset = _values(body)[1]
                if offset in self.tainted:
                    found.add(self.tainted[offset])
        return sorted(found)


def _values(text):
    return re.findall(r"%[\w#]+", text)


def _names_of(results):
    """%a -> [%a]; %a:2 -> [%a#0, %a#1]."""
    match = re.match(r"(%\w+)(?::(\d+))?", results)
    if not match:
        return []
    if match[2]:
        return [f"{match[1]}#{i}" for i in range(int(match[2]))]
    return [match[1]]


def plain_tf32(ttir: str) -> list[str]:
    """Products of fp32 matrices that a GPU would make of TF32, ten bits of mantissa."""
    found = []
    for line in ttir.splitlines():
        is_tf32 = re.search(r"inputPrecision = tf32\b", line)
        if "tt.dot" in line and is_tf32 and re.search(r"xf32[^-]*->", line):
            found.append(line.strip())
    return found


LABEL = re.compile(r"(\.L\w+):")
# nvdisasm's lines have an address in a comment, LLVM's have none
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*);|((?:s|v|ds|global|buffer|flat|scratch)_\w.*)")
BRANCH = re.compile(r"(?:\bBRA\b|s_c?branch\w*\b).*?(\.L\w+)")
# a loop with fewer instructions waits for something
WAITS = 16


def instructions(code: str) -> tuple[int, list[int]]:
    """How many there are, and how many in each loop that has no loop within but waiting.

    A loop reaches from a label to the last branch that goes back to it.
    """
    count = 0
    labels = {}
    loops = {}
    for line in code.splitlines():
        line = line.strip()
        if label := LABEL.match(line):
            labels[label[1]] = count
        elif INSTRUCTION.match(line):
            count += 1
            branch = BRANCH.search(line)
            if branch and count - labels.get(branch[1], count) >= WAITS:
                loops[labels[branch[1]]] = count
    innermost = []
    for begin, end in loops.items():
        if not any(begin < other < end for other in loops):
            innermost.append(end - begin)
    return count, innermost


@dataclass
class Report:
    """What the machine code of one kernel says."""

    registers: int
    spills: int
    shared: int
    instructions: int
    # of each innermost loop
    loops: list[int]
    tensor_core: int
    wrong: list[str]


def inspect_kernel(name: str, dtype: str, kernel) -> Report:
    asm = kernel.asm
    shared = kernel.metadata.shared
    if name == "gfx942":
        code = asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count: *(\d+)", code)[1])
        spills = int(re.search(r"\.vgpr_spill_count: *(\d+)", code)[1])
    else:
        registers, code = disassemble(asm["cubin"])
        spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    tensor_core = len(re.findall(TENSOR_CORE[name], code))
    report = Report(registers, spills, shared, *instructions(code), tensor_core, [])

    for product in int32_products(asm["ttir"]):
        report.wrong.append(f"32-bit product reaches an address: {product}")
    for dot in plain_tf32(asm["ttir"]):
        report.wrong.append(f"plain TF32: {dot}")
    if name in SHARED:
        report.wrong += nvidia_faults(name, dtype, asm, report)
    return report


def nvidia_faults(name: str, dtype: str, asm: dict, report: Report) -> list[str]:
    wrong = []
    if report.shared > SHARED[name]:
        wrong.append(f"{report.shared} bytes of shared memory, the chip has {SHARED[name]}")
    # fp32 is for correctness: it may spill, and no tensor core makes its products
    if dtype == "fp32":
        return wrong
    if report.spills:
        wrong.append(f"{report.spills} spills")
    for line in asm["ttgir"].splitlines():
        if re.search(r"tt\.dot .*-> tensor<[^>]*#blocked", line):
            wrong.append(f"off the tensor cores: {line.strip()}")
    if "tt.dot " in asm["ttir"] and not report.tensor_core:
        wrong.append("a product without this chip's tensor-core instruction")
    return wrong


@dataclass
class Line:
    """A kernel of the report."""

    text: str
    failed: bool
    # for --out
    row: dict


def report_of(job: tuple) -> list[Line]:
    """The lines of one case on one architecture."""
    name, kernel_file, case, dtype, shape = job
    torch.set_num_threads(1)
    sizes = " ".join(f"{k}={v}" for k, v in shape.items())
    where = f"{name:7s} {dtype} {kernel_file:16s} {sizes:22s}"
    row = {"arch": name, "dtype": dtype, "file": kernel_file, "shape": shape}
    try:
        compiled = compile_case(name, case, dtype, shape)
    except Exception as error:
        # the compiler's own, of many kinds: a line of the report, not its end
        failure = str(error).splitlines()[0]
        return [Line(f"{where} FAILED to compile: {failure}", True, row | {"wrong": [failure]})]

    lines = []
    for kernel_name, kernel in compiled:
        found = inspect_kernel(name, dtype, kernel)
        warps = kernel.metadata.num_warps
        text = (
            f"{where} {kernel_name:15s} {warps:2d} warps "
            f"{found.registers:4d} registers {found.spills:4d} spills "
            f"{found.shared:7d} B shared instructions {found.instructions:4d} "
            f"({', '.join(map(str, found.loops))}) {found.tensor_core:4d} tensor-core"
        )
        for fault in found.wrong:
            text += f"\n    FAILED {fault}"
        about = {"kernel": kernel_name, "constants": constants(kernel), "warps": warps}
        lines.append(Line(text, bool(found.wrong), row | about | vars(found)))
    return lines


def constants(kernel) -> dict[str, int]:
    """The sizes that a kernel was compiled for: its tl.constexpr arguments that are numbers."""
    found = {}
    for path, value in kernel.src.constants.items():
        if type(value) is int:
            found[kernel.src.fn.arg_names[path[0]]] = value
    return found


def jobs(archs: list, kernels: list, dtypes: list, shapes: int | None) -> list[tuple]:
    """Every case to compile; `shapes` cuts each kernel's shape classes to its first ones."""
    found = []
    for arch in archs:
        for kernel, case in CASES.items():
            if kernel not in kernels:
                continue
            for dtype in dtypes:
                for shape in case.COMPILED[:shapes]:
                    found.append((arch, kernel, case.launch, dtype, shape))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="kernels.compile", usage=argparse.SUPPRESS)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--shapes", type=int, metavar="N", help="only the first N shape classes of each kernel"
    )
    parser.add_argument("--out", help="a JSON file with a row for each kernel")
    args = parser.parse_args()
    all_lines = []
    todo = jobs(args.arch, args.kernel, args.dtype, args.shapes)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for lines in pool.map(report_of, todo):
            for line in lines:
                print(line.text, flush=True)
            all_lines += lines
    failed = sum(line.failed for line in all_lines)
    print(f"{len(all_lines)} kernels compiled, {failed} failed")
    if args.out:
        command = "python -m kernels.compile " + " ".join(sys.argv[1:])
        rows = [line.row for line in all_lines]
        about = {"command": command, "triton": triton.__version__}
        Path(args.out).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
