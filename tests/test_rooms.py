"""Which file may import which, and what nobody reaches through the files it imports."""

import ast
import sys

import pytest
from conftest import ROOT

SUPPORT_WITHOUT_RANKS = {
    "support.cli",
    "support.fields",
    "support.files",
    "support.hf",
    "support.kept",
    "support.rows",
    "support.threads",
}

# A room, and what it may import beyond the standard library: rooms of ours, and packages. `support`
# stands for all of its rooms, `support.cli` for one. What a room must not know is what is not here.
MAY = {
    # a tokenizer's file, but no template and no class
    "tokenizer.py": {"sentencepiece", "tokenizers", "support.fields"},
    # conversation files, but no batch, no device, no model
    "conversations.py": {"numpy", "tokenizer", "support.fields", "support.rows"},
    # pure in lengths, seed and epoch: no conversation, no rank, no model
    "packing.py": {"numpy", "torch"},
    # numbers: no file, no model, no rank
    "recipe.py": {"numpy", "packing"},
    # its arguments: no tokenizer, no template, no rank, no optimizer, no file
    "model.py": {"torch", "kernels"},
    # how others are spoken to: no model
    "prompts.py": {"conversations", "tokenizer"},
    # the prepared file: no process group, no model
    "data.py": {
        *("conversations", "packing", "recipe", "tokenizer"),
        *("support.arrays", "support.cli", "support.fields", "support.makers", "support.threads"),
        *("numpy", "tqdm", "matplotlib"),
    },
    # directories, ranks, devices, the clock: not those who call it
    "support/": {
        *("model", "recipe", "packing", "conversations", "tokenizer", "kernels", "support"),
        *("torch", "numpy", "safetensors", "tqdm", "matplotlib", "pyarrow"),
    },
    # the run: no Triton, no template
    "train.py": {"data", "packing", "recipe", "model", "support", "torch"},
    # the terminal and one device: no training, no rank
    "sample.py": {
        *("model", "conversations", "packing", "prompts", "tokenizer", *SUPPORT_WITHOUT_RANKS),
        *("torch", "numpy", "tqdm"),
    },
    # results: no training, no rank
    "evaluate.py": {"evaluation", "support.cli", "support.threads"},
    "evaluation/": {
        *("evaluation", "sample", "data", "conversations", "prompts", *SUPPORT_WITHOUT_RANKS),
        *("numpy", "matplotlib"),
    },
    # its arguments: no model, no rank, no settings
    "kernels/": {"torch", "triton", "kernels", "matplotlib"},
    "kernels/cases/": {"torch", "kernels"},
    # a page that runs alone
    "paper/atomic.py": {"torch"},
    # everything, and nobody imports it; transformers and Liger are peers of step.py, gguf reads
    # the base of real.py
    "paper/": {
        *("conversations", "tokenizer", "prompts", "packing", "recipe", "data", "model", "train"),
        *("sample", "support", "kernels", "paper"),
        *("torch", "numpy", "sentencepiece", "safetensors", "matplotlib", "tqdm", "gguf"),
        *("transformers", "liger_kernel"),
        *("tqdm", "gguf"),
    },
}
LESSONS = {path.stem for path in ROOT.glob("kernels/cases/*.py")} - {"__init__"}
FOLDERS = "", "support/", "evaluation/", "kernels/", "kernels/cases/", "paper/"


def files_of(room):
    return sorted((ROOT / room).glob("*.py")) if room.endswith("/") else [ROOT / room]


def file_of(name):
    """The file of a module of ours, or None."""
    path = ROOT / name.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def imports(path):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            submodules = [name for name in submodules if file_of(name)]
            yield from submodules or [node.module]


def reached(path):
    """{module: the file that imports it} of a file, and of all files of ours that it imports."""
    found, waiting = {}, [path]
    while waiting:
        path = waiting.pop()
        for name in imports(path):
            if name not in found:
                found[name] = path.name
                waiting += [file for file in [file_of(name)] if file]
    return found


@pytest.mark.parametrize("room", MAY)
def test_rooms(room):
    assert files_of(room)
    for path in files_of(room):
        for name in imports(path):
            parts = name.split(".")
            prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            assert parts[0] in sys.stdlib_module_names or prefixes & MAY[room], (
                f"{path.name} imports {name}"
            )


def test_every_file_is_in_a_room():
    paths = {path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    assert paths == {path for room in MAY for path in files_of(room)}
    assert not [path for path in paths if path.name == "utils.py"]


@pytest.mark.parametrize("room", ["data.py", "sample.py", "evaluate.py", "model.py"])
def test_no_rank_and_no_pickle_through_any_import(room):
    """A prepared file or a directory may be a stranger's: what opens one runs nothing it says."""
    for name, where in reached(ROOT / room).items():
        assert not name.startswith(("torch.distributed", "pickle")), f"{where} imports {name}"


@pytest.mark.parametrize("room", ["sample.py", "evaluate.py"])
def test_nobody_they_reach_loads_a_pickle(room):
    """torch.load can be one; weights come from safetensors."""
    files = {ROOT / room} | {file_of(name) for name in reached(ROOT / room)}
    assert len(files) > 5
    for path in files - {None}:
        for node in ast.walk(ast.parse(path.read_text())):
            is_load = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"
            assert not is_load, f"{path.name}:{node.lineno} calls torch.load"


def test_nothing_imports_in_a_circle():
    for room in MAY:
        for path in files_of(room):
            assert path not in {file_of(name) for name in reached(path)}, path


def test_no_kernel_imports_another():
    """A lesson takes its few helpers from the package itself; its cases know it alone; bench.py,
    tune.py and compile.py find all."""
    others = {f"kernels.{lesson}" for lesson in LESSONS}
    assert all((ROOT / "kernels" / f"{lesson}.py").is_file() for lesson in LESSONS)
    for lesson in sorted(LESSONS):
        names = set(imports(ROOT / "kernels" / f"{lesson}.py"))
        assert not [name for name in names if name.startswith("kernels.")], lesson
        names = set(imports(ROOT / "kernels" / "cases" / f"{lesson}.py"))
        assert names & others == {f"kernels.{lesson}"}, lesson


def test_no_stray_names():
    """Nothing of a machine or a tool in the tree."""
    sources = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "paper" / "README.md"]
    for path in [*sources, *pages, *ROOT.glob("results/**/*.json")]:
        text = path.read_text()
        assert "/work/" not in text and text.isascii(), path
