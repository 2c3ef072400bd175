"""One card: --offload gives the bits of a run without it, and copies a step's gradients once;
--pretrain_lr."""

import json
import shutil

import pytest
import torch
from conftest import metrics, refused
from test_survival import memory_of_a_step
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

import train as train_module
from recipe import TrainConfig
from train import main, offload_policy

# 3 micro-batches a step, of which the first 2 are not copied
SHORT = "--model toy --steps 4 --batch_tokens 768 --micro_tokens 256 --save_every 2".split()
SHORT += "--val_every 2".split()


def weights_of(run):
    return (run / "hf" / "model-00001-of-00001.safetensors").read_bytes()


def lines_of(run):
    """What metrics.jsonl says of each step and validation, times apart."""
    lines = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name in ("seconds", "tokens_per_s"):
            line.pop(name, None)
        lines.append(line)
    return lines


@pytest.fixture(scope="module")
def data(toy):
    return toy / "train.safetensors"


# ---- the same run


def interrupted(run, to):
    """A copy of a finished run, as if it had been stopped after its second step."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "hf")
    shutil.rmtree(to / "checkpoints" / "step-4")
    return to


def test_the_same_bits_as_without_it_and_each_goes_on_as_the_other(data, tmp_path, train):
    """In fp32, where a run without --offload has no FSDP. bf16: with the tied base, below."""
    plain, offload = tmp_path / "plain", tmp_path / "offload"
    train(data, plain, *SHORT)
    train(data, offload, *SHORT, "--offload")
    assert weights_of(offload) == weights_of(plain)
    assert len(lines_of(plain)) == 6
    assert lines_of(offload) == lines_of(plain)

    left = interrupted(offload, tmp_path / "left")
    assert "resuming from" in train(data, left, *SHORT)
    assert weights_of(left) == weights_of(plain)
    joined = interrupted(plain, tmp_path / "joined")
    assert "resuming from" in train(data, joined, *SHORT, "--offload")
    assert weights_of(joined) == weights_of(plain)


def test_gradients_are_copied_once_a_step(data, tmp_path, train, monkeypatch):
    """FSDP calls a hook for each of its parts when it hands a part's gradients on."""
    copied, policies = [], []
    shard, fully_shard = train_module.shard, train_module.fully_shard

    def shard_and_count(model, *how):
        shard(model, *how)
        for part in (*model.model.layers, model):
            part.set_all_reduce_hook(copied.append)

    def note_policy(part, offload_policy, **how):
        policies.append(offload_policy)
        return fully_shard(part, offload_policy=offload_policy, **how)

    monkeypatch.setattr(train_module, "shard", shard_and_count)
    monkeypatch.setattr(train_module, "fully_shard", note_policy)
    train(data, tmp_path / "offload", *SHORT, "--offload")
    # the toy has 3 blocks; all other parameters are a part, too
    parts, steps = 4, 4
    assert len(copied) == parts * steps
    assert policies == [CPUOffloadPolicy(pin_memory=False)] * parts


def test_memory_is_pinned_for_a_gpu_only():
    config = TrainConfig(offload=True)
    for device in ("cuda", "cpu"):
        policy = offload_policy(config, torch.device(device))
        assert policy == CPUOffloadPolicy(pin_memory=device == "cuda")
        assert offload_policy(TrainConfig(), torch.device(device)) == OffloadPolicy()


# ---- a base: its learning rate, a tied head


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tied")
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_tied_base_and_its_own_learning_rate(data, tmp_path, train, tied_base):
    words = "--model", tied_base, *SHORT[2:], "--dtype", "bfloat16"
    plain, offload = tmp_path / "plain", tmp_path / "offload"
    of_llama = train(data, plain, *words)
    assert " = 0.0003 * sqrt(" in of_llama

    of_mistral = train(data, tmp_path / "mistral", *words, "--pretrain_lr", 5e-5)
    assert " = 5e-05 * sqrt(" in of_mistral
    highest = max(line["lr"] for line in metrics(plain))
    assert max(line["lr"] for line in metrics(tmp_path / "mistral")) == pytest.approx(highest / 6)

    train(data, offload, *words, "--offload")
    assert weights_of(offload) == weights_of(plain)
    assert weights_of(offload) != weights_of(tmp_path / "mistral")


def test_pretrain_lr_is_refused_where_nothing_is_computed_from_it(data, tmp_path, tied_base):
    run = "--data", data, "--out", tmp_path / "run"
    both = refused(main, *run, "--model", tied_base, "--lr", 1e-4, "--pretrain_lr", 5e-5)
    assert "--lr 0.0001 is the learning rate itself" in both and "give one of them" in both
    preset = refused(main, *run, "--model", "toy", "--pretrain_lr", 5e-5)
    assert "--pretrain_lr 5e-05 is for a base; toy is trained from random weights" in preset
    assert "--pretrain_lr 0.0 is not from 1e-30" in refused(
        main, *run, "--model", tied_base, "--pretrain_lr", 0
    )
    assert not (tmp_path / "run").exists()


# ---- what it does not go with


def test_what_offload_is_refused_with(data, tmp_path, monkeypatch):
    run = "--data", data, "--out", tmp_path / "run", *SHORT, "--offload"
    assert "--offload does not go with --exact" in refused(main, *run, "--exact")
    assert "--offload does not go with --async_save" in refused(main, *run, "--async_save")
    dry = "--dry_run", "--model", "llama-2-7b", "--steps", 3, "--offload", "--ranks", 2
    assert "--offload is for one rank, not 2" in refused(main, *dry)
    monkeypatch.setattr(train_module, "rank_and_world", lambda: (0, 2))
    assert "--offload is for one rank, not 2" in refused(main, *run)
    assert not (tmp_path / "run").exists()


# ---- what it needs


def test_dry_run_has_the_hosts_column_too(capsys):
    """Llama-2-7B by hand: a block's 4 square matrices are 2^26 bytes in fp32 and are not rounded,
    its 3 others become 2^28 each; embedding and head 2^29; the 65 norms 2^14."""
    words = "--dry_run --model llama-2-7b --batch_tokens 262144 --steps 2003 --offload".split()
    main(words)
    out = capsys.readouterr().out
    assert "that is 125 GB, or 108 if PyTorch did not round pinned tensors" in out

    def gib(title):
        (line,) = [line for line in out.splitlines() if line.startswith(title)]
        return float(line.split()[-1])

    pinned = 32 * (4 * 2**26 + 3 * 2**28) + 2 * 2**29 + 65 * 2**14
    parameters = 6_738_423_808
    assert gib("  weights, fp32, pinned") == pytest.approx(pinned / 2**30, abs=0.005)
    assert gib("  gradients, fp32, pinned") == pytest.approx(pinned / 2**30, abs=0.005)
    assert gib("  AdamW's two moments") == pytest.approx(8 * parameters / 2**30, abs=0.005)
    assert round((2 * pinned + 8 * parameters) / 1e9) == 125
    assert round(16 * parameters / 1e9) == 108

    # The GPU has no shards. It has a step's gradients until the last micro-batch.
    assert "sharded" not in out
    so_far = gib("  gradients of the step so far, fp32")
    assert so_far == pytest.approx(4 * parameters / 2**30, abs=0.005)
    assert gib("  one matrix on its way, fp32") == pytest.approx(
        4 * 4096 * 11008 / 2**30, abs=0.005
    )
    main([*words, "--batch_tokens", "16384"])
    assert "gradients of the step so far" not in capsys.readouterr().out


@pytest.mark.long
def test_memory_of_a_step_is_what_dry_run_says():
    """Of host and GPU together, on a CPU, where nothing is rounded."""
    measured, said = memory_of_a_step("bfloat16", "all", offload=True)
    assert 0.9 < measured / said < 1.2, (measured / 2**20, said / 2**20)
