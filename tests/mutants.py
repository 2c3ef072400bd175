"""Break the kernels, one token at a time, and see that a check notices: who tests the tests.

    python tests/mutants.py [rms_norm swiglu ...]

prints every mutant: killed by what, or SURVIVED (exit status 1).

A mutant is a kernel file with one change. Inside a @triton.jit function: a comparison or an
operator replaced, a term dropped, a mask removed, a fill value or a function exchanged, a stored
value scaled by 1%. In the functions around the launches also: `and` and `or`, min and max
exchanged, a `not`, a `.t()`, a `.contiguous()` dropped. In the launch tables: more rows read at a
time than are owned. A change that cannot show in any result is named in EQUIVALENT with the reason.
"""

import ast
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
KERNELS = "rms_norm", "swiglu", "rotary_attention", "cross_entropy"

# the functions around the kernels that are mutated too
LAUNCHERS = {
    "rms_norm": ("_shape", "rms_norm_op", "rms_norm_bwd_op"),
    "swiglu": ("swiglu_op", "swiglu_bwd_op"),
    "rotary_attention": (
        "_launch",
        "_plan",
        "_rotate",
        "rotary_attention_op",
        "rotary_attention_bwd_op",
    ),
    "cross_entropy": (
        "softmax_gradient",
        "_padded",
        "_aligned",
        "_add_product",
        "linear_cross_entropy_op",
        "linear_cross_entropy_bwd_op",
    ),
}
TABLES = "LAUNCH", "LAUNCH_FP32"

COMPARE = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
BINARY = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "+",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.BitAnd: "|",
}
# of these the right term is also dropped
DROPPED = (ast.Add, ast.Sub, ast.Mult, ast.BitAnd)
CALLS = {
    "exp": "exp2",
    "exp2": "exp",
    "log": "log2",
    "log2": "log",
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "sum": "max",
    "rsqrt": "sqrt",
}
IDENTITIES = {ast.Is: "is not", ast.IsNot: "is"}
# methods that a launcher calls without arguments
METHODS = "contiguous", "t", "float"

# (function, change, statement as ast.unparse writes it, why nothing shows): by what survives a
# formatter.
COLUMNS = "columns beyond D are not stored"
FACTORS = "what is summed over the columns is w dy h: beyond D the other two factors are 0"
ELEMENTS = "elements beyond n are not stored"
UNSTORED = "rows beyond the conversation are not stored"
TURNED = "masked rows are 0 before they turn, or are not stored"
ZERO_ROWS = "rows beyond the conversation have q = do = 0"
SPARE_HEADS = "heads beyond A are not stored"
LATER_KEY = "a key beyond the conversation comes after every query: p = ds = 0"
LATER_KEYS = "more key tiles, all of them after every query of the block: masked"
LATER_QUERIES = "more tiles, all beyond the conversation: q = do = 0"
WARPS = "warps change no number: kernels.compile sees what they cost"
PROGRAMS = "any number of programs adds up the same rows"
TILES = "other tiles, the same numbers: kernels.compile sees which fit a chip"
MASKED_BLOCK = "where BV divides V, a last block whose columns are all masked: it changes nothing"
_EQUIVALENT = {
    "rms_norm": (
        ("_shape", "min -> max", "num_warps = min(max(BD // 256, 1), MOST_WARPS)", WARPS),
        ("_shape", "max -> min", "num_warps = min(max(BD // 256, 1), MOST_WARPS)", WARPS),
        (
            "_shape",
            "BD // 256 -> BD * 256",
            "num_warps = min(max(BD // 256, 1), MOST_WARPS)",
            WARPS,
        ),
        (
            "rms_norm_bwd_op",
            "D <= 4096 -> D < 4096",
            "programs = PROGRAMS[arch(h)] if D <= 4096 else PROGRAMS[arch(h)] // 2",
            PROGRAMS,
        ),
        (
            "rms_norm_bwd_op",
            "PROGRAMS[arch(h)] // 2 -> PROGRAMS[arch(h)] * 2",
            "programs = PROGRAMS[arch(h)] if D <= 4096 else PROGRAMS[arch(h)] // 2",
            PROGRAMS,
        ),
        (
            "_fwd_kernel",
            "0.0 -> 3.0",
            "b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(tl.float32)",
            COLUMNS,
        ),
        (
            "_bwd_kernel",
            "0.0 -> 3.0",
            "b_dx += tl.load(dh + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)",
            COLUMNS,
        ),
        (
            "_bwd_kernel",
            "0.0 -> 3.0",
            "b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(tl.float32)",
            FACTORS,
        ),
        (
            "_bwd_kernel",
            "0.0 -> 3.0",
            "b_h = tl.load(h + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)",
            FACTORS,
        ),
        (
            "_bwd_kernel",
            "0.0 -> 3.0",
            "b_dy = tl.load(dy + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)",
            FACTORS,
        ),
    ),
    "swiglu": (
        (
            "_fwd_kernel",
            "0.0 -> 3.0",
            "b_g = tl.load(gate + o_n, mask=m_n, other=0.0).to(tl.float32)",
            ELEMENTS,
        ),
        (
            "_fwd_kernel",
            "0.0 -> 3.0",
            "b_u = tl.load(up + o_n, mask=m_n, other=0.0).to(tl.float32)",
            ELEMENTS,
        ),
        (
            "_bwd_kernel",
            "0.0 -> 3.0",
            "b_g = tl.load(gate + o_n, mask=m_n, other=0.0).to(tl.float32)",
            ELEMENTS,
        ),
        (
            "_bwd_kernel",
            "0.0 -> 3.0",
            "b_u = tl.load(up + o_n, mask=m_n, other=0.0).to(tl.float32)",
            ELEMENTS,
        ),
        (
            "_bwd_kernel",
            "0.0 -> 3.0",
            "b_dy = tl.load(dy + o_n, mask=m_n, other=0.0).to(tl.float32)",
            ELEMENTS,
        ),
    ),
    "cross_entropy": (
        ("_softmax_kernel", "WHOLE < V -> WHOLE <= V", "if WHOLE < V:", MASKED_BLOCK),
        (
            "_softmax_kernel",
            "b_z > b_m -> b_z >= b_m",
            "b_l = tl.where(b_z > b_m, b_l * b_less + 1, b_l + b_less)",
            "where both are equal b_less is 1: either way b_l + 1",
        ),
        (
            "_softmax_kernel",
            "0.0 -> 3.0",
            "b_z = tl.load(z + o_v, mask=o_v < S, other=0.0).to(tl.float32)",
            "columns beyond V are -inf in the sum, and 0 or not stored in dz",
        ),
    ),
    "rotary_attention": (
        (
            "_launch",
            "x.dtype == torch.float32 and name != 'interpreter' -> "
            "x.dtype == torch.float32 or name != 'interpreter'",
            "if x.dtype == torch.float32 and name != 'interpreter':",
            TILES,
        ),
        (
            "_launch",
            "x.dtype == torch.float32 -> x.dtype != torch.float32",
            "if x.dtype == torch.float32 and name != 'interpreter':",
            TILES,
        ),
        (
            "_launch",
            "name != 'interpreter' -> name == 'interpreter'",
            "if x.dtype == torch.float32 and name != 'interpreter':",
            TILES,
        ),
        (
            "_launch",
            "x.shape[-1] == 32 -> x.shape[-1] != 32",
            "if x.shape[-1] == 32:",
            TILES,
        ),
        (
            "_rotate",
            "min -> max",
            "BA = min(triton.next_power_of_2(A), 32)",
            "more heads to spare, or fewer programs a row",
        ),
        (
            "_rotate_kernel",
            "0.0 -> 3.0",
            "b_lo = tl.load(x + o_x, mask=m_a, other=0.0).to(tl.float32)",
            SPARE_HEADS,
        ),
        (
            "_rotate_kernel",
            "0.0 -> 3.0",
            "b_hi = tl.load(x + o_x + C, mask=m_a, other=0.0).to(tl.float32)",
            SPARE_HEADS,
        ),
        (
            "_load_tile",
            "0.0 -> 3.0",
            "b_k = tl.load(k + o_kv, mask=m_n, other=0.0)",
            LATER_KEY,
        ),
        (
            "_load_tile",
            "0.0 -> 3.0",
            "b_v = tl.load(v + o_kv, mask=m_n, other=0.0)",
            LATER_KEY,
        ),
        (
            "_fwd_kernel",
            "0.0 -> 3.0",
            "b_lo = tl.load(q + o_q, mask=m_m[:, None], other=0.0).to(tl.float32)",
            UNSTORED,
        ),
        (
            "_fwd_kernel",
            "0.0 -> 3.0",
            "b_hi = tl.load(q + o_q + E // 2, mask=m_m[:, None], other=0.0).to(tl.float32)",
            UNSTORED,
        ),
        (
            "_dq_kernel",
            "0.0 -> 3.0",
            "b_q = tl.load(q + o_te, mask=m_m[:, None], other=0.0)",
            UNSTORED,
        ),
        (
            "_dq_kernel",
            "0.0 -> 3.0",
            "b_do = tl.load(do + o_te, mask=m_m[:, None], other=0.0)",
            UNSTORED,
        ),
        (
            "_dq_kernel",
            "0.0 -> 3.0",
            "b_o = tl.load(o + o_te, mask=m_m[:, None], other=0.0)",
            UNSTORED,
        ),
        (
            "_dkv_kernel",
            "0.0 -> 3.0",
            "b_k = tl.load(k + o_te, mask=m_n[:, None], other=0.0)",
            UNSTORED,
        ),
        (
            "_dkv_kernel",
            "0.0 -> 3.0",
            "b_v = tl.load(v + o_te, mask=m_n[:, None], other=0.0)",
            UNSTORED,
        ),
        (
            "_dkv_kernel",
            "0.0 -> 3.0",
            "b_q = tl.load(q + o_q, mask=m_m[:, None], other=0.0)",
            "beyond the conversation do and delta are 0, and so are p do and ds",
        ),
        (
            "_plan_kernel",
            "0 -> 3",
            "b_start = tl.load(cu_seqlens + o_c, mask=o_c <= N, other=0)",
            "lanes beyond N are masked in both sums that use b_start, and in b_blocks",
        ),
        (
            "_planned",
            "0 -> 3",
            "start = tl.load(cu_seqlens + n, mask=n >= 0, other=0)",
            "a slot left over (n = -1) returns before it uses start",
        ),
        (
            "_planned",
            "n >= 0 -> n > 0",
            "start = tl.load(cu_seqlens + n, mask=n >= 0, other=0)",
            "cu_seqlens[0] is 0, the fill value",
        ),
        (
            "_turn",
            "0.0 -> 3.0",
            "b_cos = tl.load(cos + o_c, mask=m_t[:, None], other=0.0)",
            TURNED,
        ),
        (
            "_turn",
            "0.0 -> 3.0",
            "b_sin = tl.load(sin + o_c, mask=m_t[:, None], other=0.0) * way",
            TURNED,
        ),
        (
            "_fwd_kernel",
            "tl.zeros([BM], dtype=tl.float32) -> tl.zeros([BM], dtype=tl.float32) * 1.01",
            "tl.store(lse + i_h * T + o_t, tl.zeros([BM], dtype=tl.float32), mask=m_m)",
            "0 * 1.01 = 0",
        ),
        (
            "_fwd_kernel",
            "tl.minimum -> tl.maximum",
            "end = tl.minimum(first + BM, length)",
            LATER_KEYS,
        ),
        (
            "_dq_kernel",
            "0.0 -> 3.0",
            "b_lse = tl.load(lse + i_h * T + o_t, mask=m_m, other=0.0)",
            UNSTORED,
        ),
        (
            "_dq_kernel",
            "tl.minimum -> tl.maximum",
            "end = tl.minimum(first + BM, length)",
            LATER_KEYS,
        ),
        (
            "_dkv_kernel",
            "length - first -> length + first",
            "tiles = tl.cdiv(length - first, BM)",
            LATER_QUERIES,
        ),
        (
            "_dkv_kernel",
            "length - first -> length",
            "tiles = tl.cdiv(length - first, BM)",
            LATER_QUERIES,
        ),
        (
            "_dkv_kernel",
            "0.0 -> 3.0",
            "b_lse = tl.load(lse + i_h * T + start + o_m, mask=m_m, other=0.0)",
            ZERO_ROWS,
        ),
        (
            "_dkv_kernel",
            "0.0 -> 3.0",
            "b_delta = tl.load(delta + i_h * T + start + o_m, mask=m_m, other=0.0)",
            ZERO_ROWS,
        ),
    ),
}


def equivalent() -> dict[str, str]:
    """{a mutant's name: why nothing shows}."""
    found = {}
    for kernel, entries in _EQUIVALENT.items():
        for function, change, statement, reason in entries:
            found[f"{kernel} {function}: {change} in `{statement}`"] = reason
    return found


EQUIVALENT = equivalent()


class Mutant(NamedTuple):
    """A kernel file with one change. what: function, change and statement."""

    kernel: str
    number: int | str
    what: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.what}"


# ---- the changes


class Text:
    """A source by the nodes of its syntax tree."""

    def __init__(self, source: str):
        self.source = source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        begin = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        return begin, end

    def of(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self.source[begin:end]

    def replaced(self, node: ast.AST, new: str) -> str:
        begin, end = self.span(node)
        return self.source[:begin] + new + self.source[end:]


def mutations(kernel: str, source: str) -> list[tuple[str, str]]:
    """[(what was changed, the changed source)], a change at a time."""
    text = Text(source)
    found = []
    for top in ast.parse(source).body:
        if is_kernel(top):
            found += mutations_of_function(top, text, changes_of_kernel)
        elif isinstance(top, ast.FunctionDef) and top.name in LAUNCHERS[kernel]:
            found += mutations_of_function(top, text, changes_of_launcher)
        elif isinstance(top, ast.Assign) and ast.unparse(top.targets[0]) in TABLES:
            found += mutations_of_table(top, text)
    return found


def mutations_of_function(function, text, changes) -> list[tuple[str, str]]:
    statement_of = innermost_statements(function)
    found = []
    for statement in function.body:
        for node in ast.walk(statement):
            for target, new in changes(node, text, function.name):
                what = description(function, target, new, statement_of[target])
                found.append((what, text.replaced(target, new)))
    return found


def mutations_of_table(table, text) -> list[tuple[str, str]]:
    """Tiles (rows owned, rows read at a time, warps, stages) that read more than they own."""
    name = ast.unparse(table.targets[0])
    found = []
    for node in ast.walk(table.value):
        if isinstance(node, ast.Tuple) and isinstance(node.elts[0], ast.Constant):
            owned, _, warps, stages = (text.of(element) for element in node.elts)
            new = f"({owned}, 2 * {owned}, {warps}, {stages})"
            found.append((f"{name}: {text.of(node)} -> {new}", text.replaced(node, new)))
    return found


def is_kernel(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef):
        return False
    return any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)


def innermost_statements(function: ast.FunctionDef) -> dict[ast.AST, ast.stmt]:
    """{node: its statement}: ast.walk meets the innermost last."""
    found = {}
    for statement in ast.walk(function):
        if isinstance(statement, ast.stmt):
            found |= dict.fromkeys(ast.walk(statement), statement)
    return found


def description(function, node, new, statement) -> str:
    written = ast.unparse(ast.parse(new, mode="eval"))
    # the first line of a loop or a branch is its head
    head = ast.unparse(statement).splitlines()[0]
    return f"{function.name}: {ast.unparse(node)} -> {written} in `{head}`"


def changes_of_kernel(node, text, function) -> Iterator[tuple[ast.AST, str]]:
    """(node, the text to put there) of every change to this node of a @triton.jit function."""
    yield from changes_of_operator(node, text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        called = ast.unparse(node.func)
        module, _, name = called.rpartition(".")
        if module == "tl" and name in CALLS:
            yield node.func, f"tl.{CALLS[name]}"
        if called in ("tl.load", "tl.store"):
            yield from changes_of_access(node, text)
        # the values of the plan are whole numbers
        if called == "tl.store" and function != "_plan_kernel":
            value, cast, dtype = text.of(node.args[1]).rpartition(".to(")
            if cast:
                yield node.args[1], f"({value} * 1.01).to({dtype}"
            else:
                yield node.args[1], f"({text.of(node.args[1])}) * 1.01"


def changes_of_operator(node, text) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        left = text.of(node.left)
        right = text.of(node.comparators[0])
        yield node, f"(({left}) {COMPARE[type(node.ops[0])]} ({right}))"
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left = text.of(node.left)
        right = text.of(node.right)
        yield node, f"(({left}) {BINARY[type(node.op)]} ({right}))"
        if isinstance(node.op, DROPPED):
            yield node, f"({left})"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if not isinstance(node.operand, ast.Constant):
            yield node, text.of(node.operand)


def changes_of_access(node, text) -> Iterator[tuple[ast.AST, str]]:
    """A load or a store with another fill value, and without its mask."""
    for keyword in node.keywords:
        if keyword.arg == "other":
            # a float for a float: a cast of int32 to bf16 would be refused for its own sake
            yield keyword.value, "3.0" if "." in text.of(keyword.value) else "3"
    if any(keyword.arg == "mask" for keyword in node.keywords):
        arguments = ", ".join(text.of(argument) for argument in node.args)
        yield node, f"{text.of(node.func)}({arguments})"


def changes_of_launcher(node, text, _function) -> Iterator[tuple[ast.AST, str]]:
    yield from changes_of_operator(node, text)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in IDENTITIES:
        left = text.of(node.left)
        right = text.of(node.comparators[0])
        yield node, f"({left} {IDENTITIES[type(node.ops[0])]} {right})"
    if isinstance(node, ast.BoolOp):
        other = " or " if isinstance(node.op, ast.And) else " and "
        yield node, f"({other.join(text.of(value) for value in node.values)})"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, text.of(node.operand)
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called in ("min", "max"):
            yield node.func, "max" if called == "min" else "min"
        is_method = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
        if is_method and not node.args:
            yield node, text.of(node.func.value)


# ---- the checks


def checks_of(kernel: str) -> list[Callable]:
    """The checks that a mutant of this file must fail, functions of its module; the quick and
    sharp ones first."""
    import kernel_checks as checks
    import torch

    f32 = torch.float32
    bf16 = torch.bfloat16
    if kernel == "rms_norm":
        return [
            with_arguments(checks.rms_norm, f32, 7, 48),
            with_arguments(checks.rms_norm, f32, 5, 97, residual=False, strided=True),
            with_arguments(checks.rms_norm, bf16, 5, 40, strided=True),
            with_arguments(checks.rms_norm_as_on, "sm_90"),
        ]
    if kernel == "swiglu":
        return [
            with_arguments(checks.swiglu, f32, 5, 700),
            with_arguments(checks.swiglu, bf16, 1, 9),
            with_arguments(checks.swiglu, f32, 3, 9, strided=True),
        ]
    if kernel == "cross_entropy":
        return cross_entropy_checks(checks, f32, bf16)
    assert kernel == "rotary_attention", f"no checks for {kernel}"
    return rotary_attention_checks(checks, f32, bf16)


def cross_entropy_checks(checks, f32, bf16) -> list[Callable]:
    import torch

    loss = checks.linear_cross_entropy
    weights = torch.tensor([0, 1e-8, 1e4, 1, 0.1, 1])
    return [
        with_arguments(checks.columns_beyond_the_vocabulary),
        with_arguments(checks.padded_matrix),
        with_arguments(checks.add_product_on_a_gpu),
        with_arguments(loss, f32, 12, 16, 97),
        with_arguments(checks.chunk_sizes),
        with_arguments(loss, f32, 4, 16, 4160),
        # two whole blocks of logits and a part of one
        with_arguments(loss, f32, 12, 24, 8193),
        with_arguments(loss, f32, 6, 24, 8193, weights=weights, scale=3e3),
        with_arguments(loss, f32, 6, 24, 64, scale=0.0),
        with_arguments(loss, bf16, 6, 24, 4097),
        with_arguments(loss, f32, 5, 24, 97, weights=torch.zeros(5)),
    ]


def rotary_attention_checks(checks, f32, bf16) -> list[Callable]:
    attention = checks.rotary_attention
    on_gpus = []
    for name in ("sm_80", "sm_90", "sm_100", "gfx942"):
        on_gpus.append(with_arguments(checks.rotary_attention_as_on, name))
    return [
        with_arguments(checks.plan, [32, 33, 0, 64, 1, 31], 40),
        # as LLaMA-2 13B: two programs a row, the second with heads to spare
        with_arguments(checks.rotation, 40),
        with_arguments(attention, f32, [9], 0, 1, 1, 32, strided=True),
        with_arguments(attention, f32, [64], 0, 1, 1, 64),
        with_arguments(attention, bf16, [40], 33, 1, 1, 32),
        with_arguments(attention, f32, [40], 3, 2, 1, 32, scale=8.0),
        with_arguments(attention, f32, [1, 33, 0, 2, 50], 5, 4, 2, 32),
        with_arguments(checks.rotary_attention_with_other_tiles),
        with_arguments(checks.attention_blindness, f32, [5, 40, 17], 2, 1, 32),
        with_arguments(checks.plan, [1, 33, 2] * 43, 3),
        with_arguments(checks.plan, [1, 33] * 64, 70),
        *on_gpus,
        with_arguments(checks.tiles_divide),
    ]


def with_arguments(check: Callable, *arguments, **more) -> Callable:
    return lambda module: check(module, *arguments, **more)


# ---- running them


def load(source: str, name: str) -> tuple[ModuleType, str]:
    """(a kernel file with this source, its path); its operators are registered under this name."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", prefix=name, delete=False) as file:
        file.write(source.replace('"crlft::', f'"{name}::'))
    spec = importlib.util.spec_from_file_location(name, file.name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, file.name


# Of a mutant's checks; the kernels' own take 20. A mutant that loops for ever is found, too.
MOST_SECONDS = 240


def out_of_time(number, frame):
    raise TimeoutError(f"no end in {MOST_SECONDS} s")


def fate(mutant: Mutant) -> str | None:
    """What killed it, or None."""
    import kernel_checks
    import numpy as np
    import torch

    torch.set_num_threads(1)
    name = f"mutant_{mutant.kernel}_{os.getpid()}_{mutant.number}"
    path = None
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(MOST_SECONDS)
    try:
        module, path = load(mutant.source, name)
        with kernel_checks.kernels_on(module), np.errstate(all="ignore"):
            for check in checks_of(mutant.kernel):
                check(module)
    except Exception as error:
        # a mutant may fail in every way there is
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    finally:
        signal.alarm(0)
        if path:
            os.unlink(path)
    return None


def source_of(kernel: str) -> str:
    return (ROOT / "kernels" / f"{kernel}.py").read_text()


def all_mutants(kernels=KERNELS) -> list[Mutant]:
    found = []
    for kernel in kernels:
        for number, (what, source) in enumerate(mutations(kernel, source_of(kernel))):
            found.append(Mutant(kernel, number, what, source))
    return found


def controls(kernels=KERNELS) -> list[Mutant]:
    """The kernels as they are: none of these may be killed, or a kill proves nothing."""
    return [Mutant(kernel, "control", "nothing", source_of(kernel)) for kernel in kernels]


def interpret() -> None:
    """Every process of the script interprets, strictly."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ["TRITON_INTERPRET"] = "1"
    # before the kernels
    import strict  # noqa: F401


def main() -> int:
    kernels = sys.argv[1:] or KERNELS
    mutants = all_mutants(kernels)
    survived = 0
    with ProcessPoolExecutor(os.cpu_count(), initializer=interpret) as pool:
        for control, killer in zip(controls(kernels), pool.map(fate, controls(kernels))):
            if killer:
                sys.exit(f"the checks fail on the kernels themselves: {control.kernel}: {killer}")
        for mutant, killer in zip(mutants, pool.map(fate, mutants)):
            verdict = killer
            if killer is None and mutant.name in EQUIVALENT:
                verdict = f"equivalent: {EQUIVALENT[mutant.name]}"
            elif killer is None:
                verdict = "SURVIVED"
                survived += 1
            print(f"{mutant.name}\n    {verdict}", flush=True)
    print(f"{len(mutants)} mutants, {survived} survived unexplained")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
