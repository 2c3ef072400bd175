"""Break the kernels, one token at a time, and see that a check notices: who tests the tests.

    python tests/mutants.py [rms_norm swiglu ...]      every mutant: killed by what, or SURVIVED (exit status 1)

A mutant is a kernel file with one change inside a @triton.jit function: a comparison or an operator replaced, a term dropped, a
mask removed, a fill value or a function exchanged, a stored value scaled by 1%. A change that cannot show in any result is
named in EQUIVALENT with the reason.
"""

import ast
import importlib.util
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = "rms_norm", "swiglu", "rotary_attention", "cross_entropy"

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

# Function, change, statement (as ast.unparse writes it, whatever a formatter did), why nothing shows.
_EQUIVALENT_IN_ATTENTION = (
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
        "0.0 -> 3",
        "b_cos = tl.load(cos + o_c, mask=m_t[:, None], other=0.0)",
        "masked rows are 0 before they turn, or are not stored",
    ),
    (
        "_turn",
        "0.0 -> 3",
        "b_sin = tl.load(sin + o_c, mask=m_t[:, None], other=0.0) * way",
        "masked rows are 0 before they turn, or are not stored",
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
        "more key tiles, all of them after every query of the block: masked",
    ),
    (
        "_dq_kernel",
        "0.0 -> 3",
        "b_lse = tl.load(lse + i_h * T + o_t, mask=m_m, other=0.0)",
        "rows beyond the conversation are not stored",
    ),
    (
        "_dq_kernel",
        "0.0 -> 3",
        "b_delta = tl.load(delta + i_h * T + o_t, mask=m_m, other=0.0)",
        "rows beyond the conversation are not stored",
    ),
    (
        "_dq_kernel",
        "tl.minimum -> tl.maximum",
        "end = tl.minimum(first + BM, length)",
        "more key tiles, all of them after every query of the block: masked",
    ),
    (
        "_dkv_kernel",
        "length - first -> length + first",
        "tiles = tl.cdiv(length - first, BM)",
        "more tiles, all beyond the conversation: q = do = 0",
    ),
    (
        "_dkv_kernel",
        "length - first -> length",
        "tiles = tl.cdiv(length - first, BM)",
        "more tiles, all beyond the conversation: q = do = 0",
    ),
    (
        "_dkv_kernel",
        "0.0 -> 3",
        "b_lse = tl.load(lse + i_h * T + start + o_m, mask=m_m, other=0.0)",
        "rows beyond the conversation have q = do = 0",
    ),
    (
        "_dkv_kernel",
        "0.0 -> 3",
        "b_delta = tl.load(delta + i_h * T + start + o_m, mask=m_m, other=0.0)",
        "rows beyond the conversation have q = do = 0",
    ),
)
EQUIVALENT = {
    f"rotary_attention {function}: {change} in `{statement}`": reason
    for function, change, statement, reason in _EQUIVALENT_IN_ATTENTION
}


def mutations(source):
    """[(what was changed, the changed source)], a change at a time, inside the @triton.jit functions."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    begin = lambda node: starts[node.lineno - 1] + node.col_offset
    end = lambda node: starts[node.end_lineno - 1] + node.end_col_offset
    text = lambda node: source[begin(node) : end(node)]
    found = []

    def replace(node, new):
        change = f"{ast.unparse(node)} -> {ast.unparse(ast.parse(new, mode='eval'))}"
        # the first line of a loop or a branch is its head
        line = ast.unparse(statement_of[node]).splitlines()[0]
        what = f"{function.name}: {change} in `{line}`"
        found.append((what, source[: begin(node)] + new + source[end(node) :]))

    for function in ast.parse(source).body:
        if not (
            isinstance(function, ast.FunctionDef)
            and any(ast.unparse(d) == "triton.jit" for d in function.decorator_list)
        ):
            continue
        statement_of = {}  # the innermost, which ast.walk meets last
        for statement in ast.walk(function):
            if isinstance(statement, ast.stmt):
                statement_of |= dict.fromkeys(ast.walk(statement), statement)
        for node in (n for statement in function.body for n in ast.walk(statement)):
            if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
                replace(
                    node,
                    f"(({text(node.left)}) {COMPARE[type(node.ops[0])]} ({text(node.comparators[0])}))",
                )
            if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
                replace(node, f"(({text(node.left)}) {BINARY[type(node.op)]} ({text(node.right)}))")
                if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.BitAnd)):
                    replace(node, f"({text(node.left)})")
            if (
                isinstance(node, ast.UnaryOp)
                and isinstance(node.op, ast.USub)
                and not isinstance(node.operand, ast.Constant)
            ):
                replace(node, text(node.operand))
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if ast.unparse(node.func.value) == "tl" and node.func.attr in CALLS:
                replace(node.func, f"tl.{CALLS[node.func.attr]}")
            if ast.unparse(node.func) in ("tl.load", "tl.store"):
                for keyword in node.keywords:
                    if keyword.arg == "other":
                        replace(keyword.value, "3")
                if any(keyword.arg == "mask" for keyword in node.keywords):
                    replace(node, f"{text(node.func)}({', '.join(text(a) for a in node.args)})")
            # whose values are whole numbers
            if ast.unparse(node.func) == "tl.store" and function.name != "_plan_kernel":
                value, cast, dtype = text(node.args[1]).rpartition(".to(")
                replace(
                    node.args[1],
                    f"({value} * 1.01).to({dtype}" if cast else f"({text(node.args[1])}) * 1.01",
                )
    return found


def checks_of(kernel):
    """The checks that a mutant of this kernel file must fail, the quick and sharp ones first."""
    import kernel_checks as checks
    import torch

    f32, bf16 = torch.float32, torch.bfloat16
    if kernel == "rms_norm":
        return [
            lambda m: checks.rms_norm(m, f32, 7, 48),
            lambda m: checks.rms_norm(m, f32, 5, 97, residual=False),
            lambda m: checks.rms_norm(m, bf16, 5, 40),
        ]
    if kernel == "swiglu":
        return [lambda m: checks.swiglu(m, f32, 5, 700), lambda m: checks.swiglu(m, bf16, 1, 9)]
    if kernel == "cross_entropy":
        weights = torch.tensor([0, 1e-8, 1e4, 1, 0.1, 1])
        return [
            lambda m: checks.linear_cross_entropy(m, f32, 12, 16, 97),
            lambda m: checks.linear_cross_entropy(m, f32, 4, 16, 4160),
            lambda m: checks.linear_cross_entropy(m, f32, 6, 24, 8193, weights=weights, scale=3e3),
            lambda m: checks.linear_cross_entropy(m, f32, 6, 24, 64, scale=0.0),
            lambda m: checks.linear_cross_entropy(m, bf16, 6, 24, 4097),
        ]

    def plan(m, lengths, padding):
        T, _, _, cu_seqlens = checks.packing(lengths, padding, 32)
        blocks = [
            (n, row) for n, length in enumerate([*lengths, padding]) for row in range(0, length, 32)
        ]
        blocks.sort(key=lambda block: (-block[1], block[0]))
        found = m._plan(cu_seqlens, T, 32).tolist()
        assert found == [list(block) for block in blocks] + [[-1, 0]] * (
            len(found) - len(blocks)
        ), "plan"

    return [
        lambda m: plan(m, [32, 33, 0, 64, 1, 31], 40),
        lambda m: plan(m, [1, 33, 2] * 43, 3),
        lambda m: plan(m, [1, 33] * 64, 70),
        lambda m: checks.rotary_attention(m, f32, [1, 33, 0, 2, 50], 5, 4, 2, 32),
        lambda m: checks.rotary_attention(m, f32, [64], 0, 1, 1, 64),
        lambda m: checks.attention_blindness(m, f32, [5, 40, 17], 2, 1, 32),
        lambda m: checks.rotary_attention(m, bf16, [40], 33, 1, 1, 32),
    ]


def load(source, name):
    """A kernel file with this source, its operators registered under another name."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", prefix=name, delete=False) as file:
        file.write(source.replace('"crlft::', f'"{name}::'))
    spec = importlib.util.spec_from_file_location(name, file.name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, file.name


def fate(job):
    """(what was changed, what killed it or None)."""
    import kernel_checks as checks
    import numpy as np
    import torch

    torch.set_num_threads(1)
    kernel, number, what, source = job
    module, path = load(source, f"mutant_{kernel}_{os.getpid()}_{number}")
    try:
        with checks.kernels_on(module), np.errstate(all="ignore"):
            for check in checks_of(kernel):
                check(module)
    except Exception as error:  # any: a mutant may fail in every way there is
        return what, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        os.unlink(path)
    return what, None


def all_jobs(kernels=KERNELS):
    """[(kernel, number, what, source)]."""
    return [
        (kernel, i, *m)
        for kernel in kernels
        for i, m in enumerate(mutations((ROOT / "kernels" / f"{kernel}.py").read_text()))
    ]


def controls(kernels=KERNELS):
    """The kernels as they are: none of these may be killed, or a kill proves nothing."""
    return [
        (kernel, "control", "nothing", (ROOT / "kernels" / f"{kernel}.py").read_text())
        for kernel in kernels
    ]


def interpret():
    """Every process of the script interprets, strictly."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ["TRITON_INTERPRET"] = "1"
    import strict  # noqa: F401, before the kernels


def main():
    kernels, survived = sys.argv[1:] or KERNELS, 0
    jobs = all_jobs(kernels)
    with ProcessPoolExecutor(os.cpu_count(), initializer=interpret) as pool:
        if broken := [
            f"{job[0]}: {killer}"
            for job, (_, killer) in zip(controls(kernels), pool.map(fate, controls(kernels)))
            if killer
        ]:
            sys.exit(f"the checks fail on the kernels themselves: {broken}")
        for (kernel, *_), (what, killer) in zip(jobs, pool.map(fate, jobs)):
            reason = EQUIVALENT.get(f"{kernel} {what}")
            survived += killer is None and reason is None
            print(
                f"{kernel} {what}\n    {killer or (reason and 'equivalent: ' + reason) or 'SURVIVED'}",
                flush=True,
            )
    print(f"{len(jobs)} mutants, {survived} survived unexplained")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
