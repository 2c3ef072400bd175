"""What the tests share: calling a command, what it refuses, the toy's data and a run on it."""

import contextlib
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


@contextlib.contextmanager
def stopped_after(batches, monkeypatch):
    """Ctrl-C in the batch of answers after so many."""
    from sample import Speaker

    real = Speaker.answer
    made = []

    def answer(self, *args):
        if len(made) == batches:
            raise KeyboardInterrupt
        made.append(1)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Speaker, "answer", answer)
        yield


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


# Llama-3's special tokens, by their places behind its 128,000 merges.
LLAMA3_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def llama3_file(assets, tmp_path_factory):
    """Llama-3's tokenizer.json, made of its ranks by transformers."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    specials = [LLAMA3_SPECIALS.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)]
    ranks = assets / "tokenizers" / "llama-3.tokenizer.tiktoken"
    converter = TikTokenConverter(
        str(ranks), pattern=LLAMA3_PATTERN, additional_special_tokens=specials
    )
    path = tmp_path_factory.mktemp("llama-3") / "tokenizer.json"
    converter.converted().save(str(path))
    return path


# SmolLM2's names of special tokens, and Llama-3's that a template needs.
SMALL_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"]


@pytest.fixture(scope="session")
def byte_level_file(tmp_path_factory):
    """A small byte-level tokenizer.json of SmolLM2's form, whose special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SMALL_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["GPT4 User: copy reverse a b c", "GPT3 Assistant: the question is what"] * 50
    library.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    library.save(str(path))
    return path


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
