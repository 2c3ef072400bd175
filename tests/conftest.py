import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from support.cli import run  # noqa: E402, after the path


def pytest_configure(config):
    """`pytest -m gpu` runs the kernels on the GPU; else they are interpreted, and no GPU is seen: losses and bits are compared
    in fp32 on the CPU, also on a machine that has one."""
    config.on_gpu = config.option.markexpr == "gpu"
    if config.on_gpu:
        # deterministic matmuls, before CUDA starts
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    else:
        os.environ["CUDA_VISIBLE_DEVICES"], os.environ["TRITON_INTERPRET"] = "", "1"
        import strict  # noqa: F401, before the kernels


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not (config.on_gpu and torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and pytest -m gpu"))


def call(*words, ok=True, **env):
    """Run python with these words as a user would, one thread; returns (stdout, stderr). ok=False: it must fail, in one line."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=env,
    )
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode != 0, "it did not fail: " + done.stdout
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stdout, done.stderr


def refused(main, *words):
    """The one line in which an entry point's main, called in this process as its script calls it, refuses these words."""
    argv, sys.argv = sys.argv, [main.__module__ + ".py", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as stop:
            run(main)
    finally:
        sys.argv = argv
    message = stop.value.code  # a string: Python prints it to stderr and exits with 1
    assert (
        isinstance(message, str) and message.startswith(main.__module__) and "\n" not in message
    ), message
    return message


def metrics(folder):
    """The optimizer steps' lines of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="session")
def assets():
    """The folder of real inputs: the Llama-2 tokenizer and real conversations."""
    if "CRLFT_ASSETS" not in os.environ:
        pytest.skip("CRLFT_ASSETS is unset: no real tokenizer and conversations")
    return Path(os.environ["CRLFT_ASSETS"])


@pytest.fixture(scope="session")
def llama_tokenizer(assets):
    from tokenizer import Tokenizer

    return Tokenizer(assets / "llama2" / "tokenizer.model")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The demo's data, made by its command: train.jsonl, heldout.jsonl, tokenizer.model, train.safetensors."""
    out = tmp_path_factory.mktemp("toy")
    call("-m", "paper.toy", "--out", out)
    return out


@pytest.fixture(scope="session")
def toy_run(toy):
    """A short training run on the toy, with its export in hf/."""
    out = toy / "run"
    call(
        "train.py",
        "--data",
        toy / "train.safetensors",
        "--model",
        "toy",
        "--out",
        out,
        "--steps",
        60,
        "--val_every",
        30,
        "--save_every",
        25,
    )
    return out
