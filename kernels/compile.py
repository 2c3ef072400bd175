"""Compile every kernel ahead of time, for GPUs that are not there, and read the result.

    python -m kernels.compile                     all kernels, all architectures
    python -m kernels.compile --arch sm_90 --kernel rotary_attention --dtype bf16

Each operator runs once on small CPU tensors with its launches diverted to the compiler, so what is compiled is what training
launches: the same arguments, the same tiles. A line per kernel: registers, spills (loads and stores of local memory in the
machine code), shared memory, tensor-core instructions, and below it what is wrong. On the NVIDIA targets a bf16 or fp16 kernel
fails that spills or multiplies matrices off the tensor cores; any kernel fails there that wants more shared memory than the chip
has, and everywhere one that multiplies fp32 as plain TF32, or whose address depends on a 32-bit product (it would wrap above
2^31 elements). fp32 is for correctness: a spill there is printed. gfx942 (AMD MI300) must compile. Exit status 1 on a failure.
"""

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
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


def compile_case(name, case, dtype, shape):
    """[(kernel's name, triton's compiled kernel)] for every launch of the case."""
    done, run = [], triton.JITFunction.run

    def divert(self, *args, grid, warmup, **kwargs):
        done.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    triton.runtime.driver.set_active(_Driver(name))
    triton.JITFunction.run = divert
    for module in (importlib.import_module(f"kernels.{kernel}") for kernel in CASES):
        module.on_gpu, module.arch = lambda x: True, lambda x: name
    try:
        case(DTYPES[dtype], **shape)
    finally:
        triton.JITFunction.run = run
    return list({kernel.hash: (kernel_name, kernel) for kernel_name, kernel in done}.values())


def disassemble(cubin):
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage, sass = (
            subprocess.run(
                [tools / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    return int(re.search(r"REG:(\d+)", usage)[1]), sass


def int32_products(ttir):
    """32-bit products (and shifts) in Triton's IR that reach an address, by data flow forward from each of them."""
    lines = [line.strip() for line in ttir.splitlines()]
    values = lambda text: re.findall(r"%[\w#]+", text)
    heads = {
        label: re.findall(r"(%\w+):", args)
        for line in lines
        for label, args in re.findall(r"^(\^bb\d+)\((.*)\):", line)
    }
    tainted, before = {}, None
    while before != len(tainted):  # a loop carries a value back to its head
        before, regions = len(tainted), []
        copy = lambda sources, targets: tainted.update(
            {t: tainted[s] for s, t in zip(sources, targets) if s in tainted}
        )
        for line in lines:
            results, _, body = line.partition(" = ") if line.startswith("%") else ("", "", line)
            outer = re.match(r"(%\w+)(?::(\d+))?", results)
            outer = (
                [f"{outer[1]}#{i}" for i in range(int(outer[2]))]
                if outer and outer[2]
                else [outer[1]]
                if outer
                else []
            )
            if line.startswith("}") and not line.startswith(("} else", "})")) and regions:
                regions.pop()
            if re.match(r"scf\.(for|if|while)", body):
                carried = re.findall(r"(%\w+) = (%[\w#]+)", body)
                copy([start for _, start in carried], [inner for inner, _ in carried])
                regions.append((outer, [inner for inner, _ in carried]))
            elif line.startswith("scf.yield") and regions:
                for targets in regions[-1]:
                    copy(values(line), targets)
            elif line.startswith("cf."):
                for label, passed in re.findall(r"(\^bb\d+)\(([^)]*)\)", line):
                    copy(values(passed), heads.get(label, []))
            elif outer and not body.startswith(("tt.load", "arith.cmpi")):
                hit = next((tainted[x] for x in values(body) if x in tainted), None)
                if re.match(r"arith\.(muli|shli)", body) and re.search(
                    r": (?:tensor<[\dx]*x)?i32", body
                ):
                    hit = line
                tainted.update({x: hit for x in outer if hit})
    addresses = (values(line.partition(" = ")[2])[1] for line in lines if " = tt.addptr " in line)
    return sorted({tainted[x] for x in addresses if x in tainted})


def plain_tf32(ttir):
    """Products of fp32 matrices that a GPU would make of TF32, ten bits of mantissa."""
    return [
        line.strip()
        for line in ttir.splitlines()
        if "tt.dot" in line
        and re.search(r"inputPrecision = tf32\b", line)
        and re.search(r"xf32[^-]*->", line)
    ]


def inspect_kernel(name, dtype, kernel):
    """(registers, spills, shared bytes, tensor-core instructions, what is wrong)."""
    asm, shared = kernel.asm, kernel.metadata.shared
    if name == "gfx942":
        field = lambda key: int(re.search(rf"\.{key}: *(\d+)", asm["amdgcn"])[1])
        registers, spills, code = field("vgpr_count"), field("vgpr_spill_count"), asm["amdgcn"]
    else:
        registers, code = disassemble(asm["cubin"])
        spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    tensor = len(re.findall(TENSOR_CORE[name], code))
    wrong = [
        f"32-bit product reaches an address: {product}" for product in int32_products(asm["ttir"])
    ]
    wrong += [f"plain TF32: {dot}" for dot in plain_tf32(asm["ttir"])]
    if name in SHARED:
        wrong += [f"{shared} bytes of shared memory, the chip has {SHARED[name]}"] * (
            shared > SHARED[name]
        )
    if name in SHARED and dtype != "fp32":
        wrong += [f"{spills} spills"] * (spills > 0)
        wrong += [
            f"off the tensor cores: {line.strip()}"
            for line in asm["ttgir"].splitlines()
            if re.search(r"tt\.dot .*-> tensor<[^>]*#blocked", line)
        ]
        wrong += ["a product without this chip's tensor-core instruction"] * (
            "tt.dot " in asm["ttir"] and not tensor
        )
    return registers, spills, shared, tensor, wrong


def report(job):
    """The lines of one case on one architecture: [(text, failed)]."""
    name, kernel_file, case, dtype, shape = job
    torch.set_num_threads(1)
    where = (
        f"{name:7s} {dtype} {kernel_file:16s} {' '.join(f'{k}={v}' for k, v in shape.items()):22s}"
    )
    try:
        compiled = compile_case(name, case, dtype, shape)
    except Exception as error:
        # the compiler's own, of many kinds: a line of the report, not its end
        return [(f"{where} FAILED to compile: {str(error).splitlines()[0]}", True)]
    lines = []
    for kernel_name, kernel in compiled:
        registers, spills, shared, tensor, wrong = inspect_kernel(name, dtype, kernel)
        warps = kernel.metadata.num_warps
        text = f"{where} {kernel_name:15s} {warps:2d} warps {registers:4d} registers {spills:4d} spills {shared:7d} B shared {tensor:4d} tensor-core"
        lines.append((text + "".join(f"\n    FAILED {w}" for w in wrong), bool(wrong)))
    return lines


def jobs(archs, kernels, dtypes, shapes):
    """Every case to compile; `shapes` cuts each kernel's shape classes to its first ones."""
    return [
        (arch, kernel, case.launch, dtype, shape)
        for arch in archs
        for kernel, case in CASES.items()
        if kernel in kernels
        for dtype in dtypes
        for shape in case.COMPILED[:shapes]
    ]


def main():
    parser = argparse.ArgumentParser(prog="kernels.compile", usage=argparse.SUPPRESS)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--kernel",
        nargs="+",
        choices=list(CASES),
        default=list(CASES),
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--shapes", type=int, metavar="N", help="only the first N shape classes of each kernel"
    )
    args = parser.parse_args()
    count, failed = 0, 0
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for lines in pool.map(report, jobs(args.arch, args.kernel, args.dtype, args.shapes)):
            for text, bad in lines:
                print(text, flush=True)
                count, failed = count + 1, failed + bad
    print(f"{count} kernels compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
