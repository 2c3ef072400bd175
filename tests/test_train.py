"""The laws of C-RLFT's loss, the schedule, and real training runs: alone, under torchrun, stopped, killed and resumed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, call, metrics, refused

from data import PrepareConfig, Prepared, prepare
from model import SIZES, Model
from packing import pack, plan
from recipe import TrainConfig, finetune_lr, lr_at
from support.budget import train_flops
from support.checkpoint import Checkpoints
from support.hf import RandomWeights, load_weights
from train import main

# the demo's first 20 losses; `make demo`, then see test_the_demos_first_20_losses
GOLDEN = ROOT / "tests" / "demo_losses.json"

# ---- the laws


@pytest.fixture(scope="module")
def model(toy):
    config = dataclasses.replace(SIZES["toy"], vocab_size=97)
    model = Model(config)
    load_weights(model, RandomWeights(config, 0))
    return model


def gradient(model, conversations, divide=True):
    """The step's gradient, flat, of [(tokens, weights)]."""
    batch = pack(conversations)
    loss_sum, weight_sum = model(
        batch.tokens_T, batch.positions_T, batch.cu_seqlens, batch.labels_T, batch.weights_T
    )
    model.zero_grad()
    (loss_sum / weight_sum if divide else loss_sum).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def close(a, b):
    # what fp32 leaves of an equality; gradients that differ are asserted to do so
    return (a - b).norm() / b.norm() < 1e-5


@pytest.fixture
def conversations(toy):
    """6 experts' and 6 others', with weights 1 and 0.1."""
    file = Prepared(toy / "train.safetensors")
    rows = [*np.flatnonzero(file.class_ids == 0)[:6], *np.flatnonzero(file.class_ids == 1)[:6]]
    return [file.conversation(i) for i in rows]


def scaled(conversations, k):
    return [(tokens, weights * np.float32(k)) for tokens, weights in conversations]


def test_a_common_factor_of_all_weights_is_free(model, conversations):
    assert close(gradient(model, scaled(conversations, 8)), gradient(model, conversations))


def test_weight_0_for_a_class_is_training_without_it(model, conversations):
    without = conversations[:6] + scaled(conversations[6:], 0)
    assert close(gradient(model, without), gradient(model, conversations[:6]))
    assert not close(gradient(model, conversations), gradient(model, conversations[:6]))


def test_weight_2_is_two_copies(model, conversations):
    doubled = scaled(conversations[:1], 2) + conversations[1:]
    assert close(gradient(model, doubled), gradient(model, conversations[:1] + conversations))
    assert not close(gradient(model, doubled), gradient(model, conversations))


def test_one_class_of_weight_1_without_template_is_plain_sft(model, toy, tmp_path):
    how = PrepareConfig(
        (str(toy / "train.jsonl"),),
        str(toy / "tokenizer.model"),
        str(tmp_path / "x.safetensors"),
        "*=SFT:1",
        template="none",
    )
    prepare(how)
    file = Prepared(how.out)
    rows = [file.conversation(i) for i in range(8)]
    ours = gradient(model, rows)
    total, count = 0, 0
    # the mean of cross-entropies over the answers' tokens, each conversation alone
    for tokens, weights in rows:
        x = torch.from_numpy(tokens.astype(np.int64))
        logits = model.lm_head(
            model(x, torch.arange(len(x)), torch.tensor([0, len(x)], dtype=torch.int32))
        )
        answer = torch.from_numpy(weights[1:] > 0)
        total = total + torch.nn.functional.cross_entropy(
            logits[:-1][answer], x[1:][answer], reduction="sum"
        )
        count += int(answer.sum())
        assert file.tokenizer.decode(tokens.tolist()).startswith("User:")
    model.zero_grad()
    (total / count).backward()
    assert close(ours, torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_the_order_in_a_step_and_its_cut_into_micro_batches_are_free(model, conversations):
    whole = gradient(model, conversations)
    assert close(gradient(model, conversations[::-1]), whole)
    weight_sum = sum(w.sum() for _, w in conversations)
    parts = gradient(model, conversations[:3], divide=False) + gradient(
        model, conversations[3:], divide=False
    )
    assert close(parts / weight_sum, whole)


# ---- the recipe


def test_the_papers_learning_rate():
    """Sec. 4.1: 6.7e-5 from 200k supervised tokens a step; 34B and 70B were pre-trained at half the LR."""
    assert finetune_lr(200_000)[0] == pytest.approx(6.7e-5, rel=2e-3)
    assert finetune_lr(200_000, 1.5e-4)[0] == pytest.approx(3.35e-5, rel=2e-3)


def test_warm_up_then_cosine_to_a_tenth():
    config = TrainConfig(lr=1.0)
    at = [lr_at(step, 1000, config) for step in range(1, 1001)]
    assert at[0] == 1 / 50 and at[49] == 1.0 and at[-1] == pytest.approx(0.1)
    assert at[50 + 474] == pytest.approx(0.55, abs=1e-3) and all(
        a > b for a, b in zip(at[49:], at[50:])
    )
    assert lr_at(1, 1, config) == 1.0


# ---- runs


@pytest.fixture
def train(capsys):
    """A run in this process, which spares the start of one: (data, out, flags) -> what it printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(data, out, *words):
        capsys.readouterr()
        main(["--data", str(data), "--out", str(out), *map(str, words)])
        return "".join(capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def torchrun(ranks, data, out, *words):
    call(
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        "--standalone",
        "train.py",
        "--data",
        data,
        "--out",
        out,
        *words,
    )


def weights_of(run):
    return (run / "hf" / "model-00001-of-00001.safetensors").read_bytes()


def start(data, out, *words):
    """A training process in the background."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "train.py", "--data", data, "--out", out, *map(str, words)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(run, step, process):
    """Until the run's log has this step."""
    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        if (run / "metrics.jsonl").is_file() and f'"step": {step},' in (
            run / "metrics.jsonl"
        ).read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} after a minute")


def test_the_demos_first_20_losses_and_ctrl_c_leaves_a_checkpoint(toy):
    """fp32, one thread, seed 0. A change of these numbers is a change of the method, and is said in its commit."""
    run = toy / "golden"
    process = start(toy / "train.safetensors", run, "--model", "toy", "--steps", 1500)
    wait_for(run, 20, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "a checkpoint remains" in out and "Traceback" not in err, (
        out + err
    )
    losses = [line["loss"] for line in metrics(run)]
    assert losses[:20] == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)
    assert (run / "checkpoints" / "latest").read_text() == f"step-{len(losses)}"
    assert not list((run / "checkpoints").glob("*.partial"))


def test_a_killed_run_resumes_to_the_same_bits_and_a_finished_one_says_so(toy, toy_run, train):
    run, words = (
        toy / "killed",
        ("--model", "toy", "--steps", 60, "--val_every", 30, "--save_every", 25),
    )
    process = start(toy / "train.safetensors", run, *words)
    wait_for(run, 29, process)
    process.kill()
    process.communicate()
    assert len(metrics(run)) >= 29
    out = train(toy / "train.safetensors", run, *words)
    assert "resuming from" in out and "step-25" in out
    assert weights_of(run) == weights_of(toy_run)
    assert [line["step"] for line in metrics(run)] == list(range(1, 61))
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(toy_run)]
    out = train(toy / "train.safetensors", run, *words)
    assert "this run is finished, 60 steps" in out
    err = refused(main, "--data", toy / "train.safetensors", "--out", run, *words, "--lr", 0.1)
    assert "lr 0.002, this one has 0.1" in err
    assert weights_of(run) == weights_of(toy_run)


def test_a_broken_checkpoint_is_passed_over(toy, toy_run, tmp_path, train):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", toy_run, run], check=True)
    subprocess.run(["rm", "-r", run / "hf"], check=True)
    shard = next((run / "checkpoints" / "step-60").glob("*.distcp"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    out = train(
        toy / "train.safetensors",
        run,
        "--model",
        "toy",
        "--steps",
        60,
        "--val_every",
        30,
        "--save_every",
        25,
    )
    assert "missing or changed; taking the one before" in out and "step-50" in out
    assert weights_of(run) == weights_of(toy_run)


def test_a_torn_log_and_leftovers_of_a_killed_save_do_not_stop_a_run(toy, tmp_path, train):
    run, words = tmp_path / "run", ("--model", "toy", "--steps", 6, "--save_every", 4)
    train(toy / "train.safetensors", run, *words)
    subprocess.run(["rm", "-r", run / "hf", run / "checkpoints" / "step-6"], check=True)
    (run / "checkpoints" / "step-5.partial").mkdir()
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"step": 7, "lo')
    assert "step-4" in train(toy / "train.safetensors", run, *words)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-4", "step-6"]
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_keep_counts_whole_checkpoints_only(tmp_path):
    """A broken step-6 is put aside until the next is written, the run goes on from step-4, and what it saves stays. Without any whole one it stops."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = lambda keep, a=1: Checkpoints(tmp_path, {"a": a}, keep)
    save = lambda step, keep: checkpoints(keep).save(step, model, optimizer)
    names = lambda: sorted(p.name for p in tmp_path.glob("step-*"))
    assert checkpoints(1).newest() == (None, 0)
    save(4, 2)
    save(6, 2)
    (tmp_path / "step-6" / ".metadata").write_bytes(b"")
    assert checkpoints(2).newest() == (tmp_path / "step-4", 4) and names() == [
        "step-4",
        "step-6.broken",
    ]
    save(6, 2)
    assert names() == ["step-4", "step-6"] and (tmp_path / "latest").read_text() == "step-6"
    save(7, 2)
    assert names() == ["step-6", "step-7"] and checkpoints(1).newest() == (tmp_path / "step-7", 7)
    with pytest.raises(ValueError, match="a 1, this one has 2"):
        checkpoints(1, a=2).newest()
    for step in ("step-6", "step-7"):
        (tmp_path / step / "MANIFEST.json").unlink()
    for _ in range(2):  # a restart does not begin at step 0 either
        with pytest.raises(ValueError, match="no checkpoint there is whole; move the folder away"):
            checkpoints(1).newest()


def test_what_cannot_be_read_is_not_called_broken(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    checkpoints = Checkpoints(tmp_path, {"a": 1}, 2)
    checkpoints.save(1, model, torch.optim.AdamW(model.parameters()))
    monkeypatch.setattr(
        "support.checkpoint.sha256",
        lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error", str(path))),
    )
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.newest()
    assert (tmp_path / "step-1").is_dir()


def test_sigterm_saves_and_other_data_does_not_resume(toy, tmp_path):
    run, words = tmp_path / "run", ("--model", "toy", "--steps", 500)
    process = start(toy / "train.safetensors", run, *words)
    wait_for(run, 5, process)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "a checkpoint remains" in out
    before = sorted(run.rglob("*"))
    other = tmp_path / "other.safetensors"
    prepare(
        PrepareConfig(
            (str(toy / "train.jsonl"),),
            str(toy / "tokenizer.model"),
            str(other),
            "Model: GPT-4=GPT4:1.0,*=GPT3:0.2",
            max_len=128,
        )
    )
    assert "of a run with data_sha256" in refused(main, "--data", other, "--out", run, *words)
    assert "of a run with" in refused(
        main,
        "--data",
        toy / "train.safetensors",
        "--out",
        run,
        "--model",
        "small",
        *words[2:],
        "--batch_tokens",
        1536,
        "--lr",
        0.002,
    )
    assert sorted(run.rglob("*")) == before


def test_the_log_says_what_was_computed(toy, tmp_path, train):
    """Loss, accuracy, gradient norm and validation of a first step, computed again here from the initial weights."""
    run = tmp_path / "run"
    train(
        toy / "train.safetensors",
        run,
        "--model",
        "toy",
        "--steps",
        1,
        "--warmup",
        0,
        "--lr",
        1e-12,
        "--weight_decay",
        0,
        "--val_every",
        1,
        "--val_fraction",
        0.05,
    )
    file = Prepared(toy / "train.safetensors")
    train_on, held_out = file.split(0.05)
    config = dataclasses.replace(SIZES["toy"], vocab_size=97)
    model = Model(config)
    load_weights(model, RandomWeights(config, 0))

    def look(rows):
        batch = file.batch(rows)
        loss, weight_sum, nll, correct = model(
            batch.tokens_T,
            batch.positions_T,
            batch.cu_seqlens,
            batch.labels_T,
            batch.weights_T,
            per_row=True,
        )
        mean = lambda x, c: x[batch.rows_R][batch.class_R == c].mean().item()
        return (
            loss / weight_sum,
            {name: mean(nll, c) for c, name in enumerate(("GPT4", "GPT3"))},
            {name: mean(correct, c) for c, name in enumerate(("GPT4", "GPT3"))},
        )

    first = plan(
        file.lengths[train_on],
        file.class_ids[train_on],
        file.weight_sums[train_on],
        0,
        0,
        1536,
        1536,
        train_flops_cost(config),
    )[0]
    loss, nll, accuracy = look(train_on[first[0]])
    loss.backward()
    (line,) = metrics(run)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5) and line[
        "loss_by_class"
    ] == pytest.approx(nll, rel=1e-5)
    assert line["accuracy_by_class"] == pytest.approx(accuracy)
    assert line["grad_norm"] == pytest.approx(
        torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm().item(), rel=1e-5
    )
    assert (
        line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"])
        and line["tokens"] == file.lengths[train_on[first[0]]].sum()
    )
    val = [
        json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines() if "val_loss" in x
    ][0]
    val_loss, val_nll, _ = look(held_out)
    assert val["val_loss"] == pytest.approx(val_loss.item(), rel=1e-5) and val[
        "val_loss_by_class"
    ] == pytest.approx(val_nll, rel=1e-5)


def train_flops_cost(config):
    linear, head, quadratic = train_flops(config)
    return linear + head, quadratic


def test_what_a_run_leaves(toy_run):
    assert {p.name for p in toy_run.iterdir()} == {
        "run.json",
        "metrics.jsonl",
        "loss.png",
        "checkpoints",
        "hf",
    }
    assert sorted(p.name for p in (toy_run / "checkpoints").iterdir()) == [
        "latest",
        "step-50",
        "step-60",
    ]
    assert {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "crlft.json",
        "manifest.json",
    } < {p.name for p in (toy_run / "hf").iterdir()}
    line = metrics(toy_run)[-1]
    assert set(line) == {
        "step",
        "loss",
        "loss_by_class",
        "accuracy_by_class",
        "lr",
        "grad_norm",
        "tokens",
        "supervised_tokens",
        "weight_sum",
        "tokens_per_s",
        "seconds",
    }
    assert set(line["loss_by_class"]) == set(line["accuracy_by_class"]) == {"GPT4", "GPT3"}
    val = [
        json.loads(x)
        for x in (toy_run / "metrics.jsonl").read_text().splitlines()
        if "val_loss" in x
    ]
    assert [x["step"] for x in val] == [30, 60] and set(val[0]) == {
        "step",
        "val_loss",
        "val_loss_by_class",
    }
    assert metrics(toy_run)[0]["loss"] == pytest.approx(np.log(97), abs=0.05) and line["loss"] < 2.2
    (toy_run / "loss.png").unlink()
    main(["plot", str(toy_run)])
    assert (toy_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_loss_is_the_classes_weighted_mean(toy_run):
    """1.0 n4 loss4 + 0.1 n3 loss3, over 1.0 n4 + 0.1 n3: n from the two sums that the log has."""
    for line in metrics(toy_run):
        n4 = (line["weight_sum"] - 0.1 * line["supervised_tokens"]) / 0.9
        n3 = line["supervised_tokens"] - n4
        mean = (
            n4 * line["loss_by_class"]["GPT4"] + 0.1 * n3 * line["loss_by_class"]["GPT3"]
        ) / line["weight_sum"]
        assert line["loss"] == pytest.approx(mean, rel=1e-5)


def test_torchrun_with_uneven_micro_batches_is_the_same_run(toy, train):
    """3 micro-batches a step on 1 process, 2 and 4 ranks, of which one idles in the last round; bf16 stays near; then a resume on 1."""
    words = (
        "--model",
        "toy",
        "--steps",
        20,
        "--batch_tokens",
        768,
        "--micro_tokens",
        256,
        "--save_every",
        10,
        "--recompute",
        "all",
    )
    data, one, two, four, half = (
        toy / "train.safetensors",
        toy / "one",
        toy / "two",
        toy / "four",
        toy / "half",
    )
    train(data, one, *words)
    torchrun(2, data, two, *words)
    torchrun(4, data, four, *words)
    train(data, half, *words, "--dtype", "bfloat16")
    for size in (384, 768):  # the same steps in 2 micro-batches, and in one
        train(data, toy / str(size), *words, "--micro_tokens", size)
    losses = lambda run: [line["loss"] for line in metrics(run)]
    for run in (two, four, toy / "384", toy / "768"):
        assert losses(run) == pytest.approx(losses(one), rel=1e-5)
        norms = lambda run: [line["grad_norm"] for line in metrics(run)]
        # clipped
        assert (
            norms(run) == pytest.approx(norms(one), rel=1e-5)
            and min(norms(one)) > 0.1
            and max(norms(one)) > 1
        )
        # test_data.py shows that the conversations are the same
        for key in ("tokens", "supervised_tokens", "weight_sum", "lr"):
            assert [line[key] for line in metrics(run)] == [line[key] for line in metrics(one)]
    assert losses(half) == pytest.approx(losses(one), rel=2e-2) and losses(half) != losses(one)
    assert metrics(half)[-1]["weight_sum"] == metrics(one)[-1]["weight_sum"]
    subprocess.run(["rm", "-r", two / "hf", two / "checkpoints" / "step-20"], check=True)
    out = train(data, two, *words)  # another number of ranks
    assert "step-10" in out and losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_real_conversations_give_the_same_losses_on_two_ranks(assets, tmp_path, train):
    """The real tokenizer's 32,001 rows, which 2 does not divide; 20 short steps."""
    file = tmp_path / "x.safetensors"
    prepare(
        PrepareConfig(
            (str(assets / "conversations" / "mixed_quality.jsonl"),),
            str(assets / "llama2" / "tokenizer.model"),
            str(file),
            "Model: GPT-4=GPT4:1.0,*=GPT3:0.1",
            max_len=160,
        )
    )
    words = (
        "--model",
        "small",
        "--steps",
        20,
        "--batch_tokens",
        320,
        "--micro_tokens",
        160,
        "--val_fraction",
        0.001,
    )
    train(file, tmp_path / "one", *words)
    torchrun(2, file, tmp_path / "two", *words)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=1e-4)
    assert one[0]["loss"] == pytest.approx(np.log(32001), abs=0.1) and one[-1]["loss"] < 9.5


def test_a_hugging_face_base_gets_the_token_and_the_papers_recipe(toy, tmp_path, train):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(LlamaConfig(vocab_size=96, **size)).save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    words = "--model", tmp_path / "base", "--steps", 2, "--batch_tokens", 1024
    out = train(toy / "train.safetensors", run, *words)
    assert "* sqrt(" in out and "supervised tokens a step / 4e6)" in out
    supervised = np.mean([x["supervised_tokens"] for x in metrics(run)])
    assert json.loads((run / "run.json").read_text())["lr"] == pytest.approx(
        3e-4 * (supervised / 4e6) ** 0.5, rel=0.1
    )
    assert json.loads((run / "hf" / "config.json").read_text())["vocab_size"] == 97
    LlamaForCausalLM(LlamaConfig(vocab_size=104, **size)).save_pretrained(tmp_path / "padded")
    train(
        toy / "train.safetensors",
        tmp_path / "run2",
        "--model",
        tmp_path / "padded",
        "--steps",
        1,
        "--batch_tokens",
        1024,
    )
    assert json.loads((tmp_path / "run2" / "hf" / "config.json").read_text())["vocab_size"] == 104


def test_without_triton_the_references_train(toy, tmp_path):
    """A machine without triton, as macOS: the import fails, the toy trains."""
    (tmp_path / "triton.py").write_text("raise ImportError('hidden')")
    words = (
        "--data",
        toy / "train.safetensors",
        "--out",
        tmp_path / "run",
        "--model",
        "toy",
        "--steps",
        3,
    )
    call("train.py", *words, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert len(metrics(tmp_path / "run")) == 3


def test_a_loss_that_is_not_finite_stops_with_the_step(toy, tmp_path):
    err = refused(
        main,
        "--data",
        toy / "train.safetensors",
        "--out",
        tmp_path / "run",
        "--model",
        "toy",
        "--steps",
        30,
        "--lr",
        "1e18",
    )
    assert "train.py: step " in err and "are not both finite" in err and "lower --lr" in err


@pytest.mark.long
def test_the_demo(tmp_path):
    """The whole demo as the Makefile has it: the expert's prompt at least 0.75, the other at most 0.60."""
    subprocess.run(
        ["make", "-f", ROOT / "Makefile", "demo", f"PYTHON={sys.executable}", "VENV="],
        cwd=ROOT,
        check=True,
    )
    report = json.loads((ROOT / "out" / "demo" / "report.json").read_text())
    assert (
        report["expert_prompt"] >= 0.75
        and report["other_prompt"] <= 0.60
        and report["steps"] == 1500
    )
