"""What the tests share: calling a command, what it refuses, the toy's data and a run on it."""

import json
import os
import signal
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
    """`pytest -m gpu` runs the kernels on the GPU.

    All other tests see no GPU, and kernels are interpreted: losses and bits are compared in fp32 on
    the CPU, also on a machine that has a GPU.
    """
    config.on_gpu = config.option.markexpr == "gpu"
    if config.on_gpu:
        # deterministic matmuls, set before CUDA starts
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"
        # before any kernel is imported
        import strict  # noqa: F401


def pytest_collection_modifyitems(config, items):
    can_run = config.on_gpu and torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not can_run:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and pytest -m gpu"))


def call(*words, ok=True, **env):
    """(stdout, stderr) of python with these words, called as a user would, on one thread.

    ok=False: it must fail, in one line.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=env)
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode != 0, "it did not fail: " + done.stdout
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stdout, done.stderr


def refused(main, *words):
    """The one line in which an entry point refuses these words.

    Its main is called in this process, as its script calls it.
    """
    before = sys.argv
    sys.argv = [main.__module__ + ".py", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as stop:
            run(main)
    finally:
        sys.argv = before
    # a text: Python prints it to stderr and exits with 1
    message = stop.value.code
    assert isinstance(message, str), message
    assert message.startswith(main.__module__), message
    assert "\n" not in message, message
    return message


def metrics(folder):
    """The optimizer steps' lines of a run's metrics.jsonl."""
    text = (Path(folder) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
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
    """The folder that the demo's command makes, without a run.

    train.jsonl, heldout.jsonl, tokenizer.model, train.safetensors.
    """
    out = tmp_path_factory.mktemp("toy")
    call("-m", "paper.toy", "--out", out)
    return out


@pytest.fixture(scope="session")
def toy_run(toy):
    """A short training run on the toy, with its export in hf/."""
    out = toy / "run"
    settings = "--steps 60 --val_every 30 --save_every 25".split()
    data = "--data", toy / "train.safetensors"
    call("train.py", *data, "--model", "toy", "--out", out, *settings)
    return out


@pytest.fixture
def train(capsys):
    """A run in this process, without starting one: (data, out, flags) -> what it printed."""
    # here: what a test does not need it need not import
    from train import main

    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.getsignal(number)

    def run(data, out, *words):
        capsys.readouterr()
        main(["--data", str(data), "--out", str(out), *map(str, words)])
        return "".join(capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
