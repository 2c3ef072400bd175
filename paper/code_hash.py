"""A hash of the code that a result was made with, so that no result outlives its code.

    code_hash(Path("paper/runs.py"))    of this file and of every project file that it reaches

A file is reached when an import statement names it, in the first file or in one that was reached.
Of each file the syntax tree counts, without docstrings. So a comment, a docstring or the formatter
changes nothing, and any other change makes another hash, even where it could not change a result:
making a run once too often costs minutes, a table of two codes costs its meaning.
"""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def code_hash(start: Path, root: Path = ROOT) -> str:
    """The sha256, in hex, of the code of `start` and of all files below `root` that it reaches."""
    digest = hashlib.sha256()
    for path in sorted(files_reached(start, root)):
        name = path.relative_to(root).as_posix()
        tree = without_docstrings(syntax_tree(path))
        # ast.dump writes no positions. The zero bytes keep names and trees apart.
        digest.update(f"{name}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()


def files_reached(start: Path, root: Path) -> set[Path]:
    """`start` and the project's files that it imports, directly or through others."""
    reached = set()
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        for module in modules_imported(syntax_tree(path)):
            waiting += files_of(module, root)
    return reached


def modules_imported(tree: ast.Module) -> Iterator[str]:
    """The names that may be modules in all import statements, also those within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import; this project has none"
            yield node.module
            # `from kernels import swiglu` names a module, `from kernels import arch` a function.
            # Both are tried: a function has no file.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(module: str, root: Path) -> list[Path]:
    """What Python runs to import a.b: a/__init__.py and a/b.py. Nothing of others' packages."""
    files = []
    place = root
    for part in module.split("."):
        place = place / part
        files += [place.with_suffix(".py"), place / "__init__.py"]
    return [file for file in files if file.is_file()]


def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The same tree, changed in place."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree
