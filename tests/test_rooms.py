"""Which file may import which."""

import ast

import pytest
from conftest import ROOT

OUTSIDE_STDLIB = {
    "model",
    "data",
    "train",
    "sample",
    "evaluate",
    "checkpoint",
    "kernels",
    "paper",
    "torch",
    "triton",
    "numpy",
    "sentencepiece",
    "safetensors",
    "tqdm",
    "transformers",
    "matplotlib",
}
MAY = {  # our modules and packages that a file may import
    "kernels/": {"torch", "triton", "kernels", "matplotlib"},
    "model.py": {"torch", "safetensors", "kernels"},
    "data.py": {"numpy", "torch", "sentencepiece", "safetensors", "tqdm", "matplotlib"},
    "checkpoint.py": {"torch"},
    "train.py": {
        "model",
        "data",
        "checkpoint",
        "torch",
        "numpy",
        "safetensors",
        "tqdm",
        "matplotlib",
    },
    "sample.py": {"model", "data", "torch", "numpy", "tqdm"},
    "evaluate.py": {"data", "sample", "numpy", "matplotlib"},
    # a peer of step.py
    "paper/": {
        "model",
        "data",
        "train",
        "checkpoint",
        "sample",
        "kernels",
        "paper",
        "torch",
        "numpy",
        "sentencepiece",
        "matplotlib",
        "transformers",
    },
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("room", MAY)
def test_rooms(room):
    files = list((ROOT / room).glob("*.py")) if room.endswith("/") else [ROOT / room]
    assert files
    for path in files:
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in OUTSIDE_STDLIB or top in MAY[room], f"{path.name} imports {name}"
            if room in ("model.py", "data.py", "sample.py", "kernels/"):
                assert not name.startswith("torch.distributed"), f"{path.name} imports {name}"
    assert not list(ROOT.glob("utils.py"))


def test_no_kernel_imports_another():
    """Only bench.py and compile.py know all four; the others take their few helpers from the package itself."""
    for path in ROOT.glob("kernels/*.py"):
        if path.name not in ("bench.py", "compile.py"):
            assert not [
                name
                for name in imports(path)
                if name.startswith("kernels.") or name == "matplotlib"
            ], path
            assert all(
                {a.name for a in node.names}.isdisjoint(
                    ("rms_norm", "swiglu", "rotary_attention", "cross_entropy")
                )
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom)
            ), path


def test_no_stray_names():
    """Nothing of a machine or a tool in the tree."""
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("paper/*.py"),
        *ROOT.glob("results/**/*.json"),
        ROOT / "README.md",
        ROOT / "paper" / "README.md",
    ]:
        text = path.read_text()
        assert "/work/" not in text and text.isascii(), path
