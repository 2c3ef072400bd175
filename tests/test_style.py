"""How densely the code is written: one idea a line, held by numbers of the syntax tree.

A formatter does not change these numbers. nanoGPT has 0.7% of statements that do several things and
6.2 expressions a statement.
"""

import ast
import io
import subprocess
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

SIMPLE = (
    ast.Assign,
    ast.AugAssign,
    ast.AnnAssign,
    ast.Return,
    ast.Expr,
    ast.Raise,
    ast.Assert,
    ast.Delete,
)
MOST_LINES = 60  # of a function, its docstring apart
MOST_PARAMETERS = 8
METHOD = (
    "conversations.py",
    "tokenizer.py",
    "packing.py",
    "data.py",
    "recipe.py",
    "model.py",
    "train.py",
    "sample.py",
)


def sources() -> list[Path]:
    """All Python files of the repository: what git lists, or every file where there is no git."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        paths = [ROOT / name for name in listed.stdout.split()]
    except (OSError, subprocess.CalledProcessError):
        paths = list(ROOT.rglob("*.py"))
    return [path for path in paths if path.is_file()]


def is_test(path: Path) -> bool:
    return path.is_relative_to(ROOT / "tests")


def is_docstring(node: ast.AST) -> bool:
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text and isinstance(node.value.value, str)


def statements(path: Path) -> list[ast.stmt]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, SIMPLE) and not is_docstring(node)]


def things(statement: ast.stmt) -> int:
    """How many things beyond its own a statement does: comprehensions, lambdas, ternaries,
    walruses, further targets of `a, b = x, y`, texts and lists times a condition."""
    count = 0
    for node in ast.walk(statement):
        if isinstance(node, (ast.comprehension, ast.Lambda, ast.IfExp, ast.NamedExpr)):
            count += 1
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            count += isinstance(node.right, (ast.Compare, ast.BoolOp))
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Tuple):
        for target in statement.targets:
            if isinstance(target, ast.Tuple):
                count += len(target.elts) - 1
    return count


def size(statement: ast.stmt) -> int:
    return sum(isinstance(part, ast.expr) for part in ast.walk(statement))


@pytest.mark.parametrize("tests, most", [(False, 0.01), (True, 0.03)])
def test_a_statement_does_one_thing(tests, most):
    count = 0
    dense = []
    for path in sources():
        if is_test(path) == tests:
            found = statements(path)
            count += len(found)
            dense += [f"{path.name}:{s.lineno}" for s in found if things(s) >= 2]
    assert len(dense) <= most * count, dense


def test_a_statement_is_short():
    """Mean and 95th percentile over all that is no test."""
    sizes = []
    for path in sources():
        if not is_test(path):
            sizes += [size(statement) for statement in statements(path)]
    sizes.sort()
    assert sum(sizes) / len(sizes) <= 8
    assert sizes[int(0.95 * len(sizes))] <= 18


def test_no_nested_ternary_and_no_tuple_for_its_effects():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.IfExp):
                inner = [n for n in ast.walk(node) if isinstance(n, ast.IfExp) and n is not node]
                assert not inner, f"{where} a ternary in a ternary"
            if isinstance(node, ast.Expr):
                assert not isinstance(node.value, ast.Tuple), f"{where} a tuple for its effects"
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
                called = node.value.func
                prints = isinstance(called, ast.Name) and called.id == "print"
                assert not prints, f"{where} return print(..)"


def is_exempt(function: ast.FunctionDef) -> bool:
    """Kernels and operators list tensors: Triton and torch.library know no dataclass."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    marks = ("triton.jit", "gluon.jit", "custom_op", "register_fake")
    return any(mark in decorator for decorator in decorators for mark in marks)


def test_functions_are_short_and_take_few_parameters():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_exempt(node):
                continue
            where = f"{path.name}:{node.lineno} {node.name}"
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if is_docstring(first):
                lines -= first.end_lineno - first.lineno + 1
            assert lines <= MOST_LINES, f"{where} has {lines} lines"
            if not is_test(path):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = [a.arg for a in arguments if a.arg not in ("self", "cls")]
                count = len(names)
                assert count <= MOST_PARAMETERS, f"{where} has {count} parameters"


def comment_lines(text: str) -> int:
    """Comments on lines of their own."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return sum(token.line.lstrip().startswith("#") for token in comments)


def code_lines(text: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    lines = [line.strip() for line in text.splitlines()]
    count = sum(bool(line) and not line.startswith("#") for line in lines)
    for node in ast.walk(ast.parse(text)):
        if is_docstring(node):
            within = text.splitlines()[node.lineno - 1 : node.end_lineno]
            count -= sum(bool(line.strip()) for line in within)
    return count


def test_the_method_explains_itself():
    """Eight comment lines in a hundred lines of code, in the files that a student reads."""
    comments = 0
    code = 0
    for name in METHOD:
        text = (ROOT / name).read_text()
        comments += comment_lines(text)
        code += code_lines(text)
    assert comments >= 0.08 * code, f"{comments} comment lines for {code} lines of code"


def test_no_line_is_wide():
    """Tables of numbers and golden tokens too; the linter does not look into what it skips."""
    for path in sources():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number} has {len(line)} columns"
