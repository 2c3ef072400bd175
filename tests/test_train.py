"""The laws of C-RLFT's loss, the schedule, and real runs: alone, torchrun, stopped, resumed."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, call, metrics, refused

import recipe
from data import PrepareConfig, Prepared, prepare
from model import SIZES, Model
from packing import pack, plan
from recipe import TrainConfig, finetune_lr, lr_at
from support.budget import train_flops
from support.checkpoint import Checkpoints
from support.hf import RandomWeights, load_weights
from train import Tally, forward, main

# the demo's first 20 losses; `make demo`, then see test_the_demos_first_20_losses
GOLDEN = ROOT / "tests" / "demo_losses.json"
TOY = dataclasses.replace(SIZES["toy"], vocab_size=97)

# ---- the laws


def toy_model():
    model = Model(TOY)
    load_weights(model, RandomWeights(TOY, 0))
    return model


@pytest.fixture(scope="module")
def model():
    return toy_model()


def gradient_of(model):
    """Of all parameters, flat."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradient(model, conversations, divide=True):
    """The step's gradient, flat, of [(tokens, weights)]."""
    losses = forward(model, pack(conversations))
    loss = losses.loss_sum
    if divide:
        loss = loss / losses.weight_sum
    model.zero_grad()
    loss.backward()
    return gradient_of(model)


def close(a, b):
    # what fp32 leaves of an equality; gradients that differ are asserted to do so
    return (a - b).norm() / b.norm() < 1e-5


@pytest.fixture
def conversations(toy):
    """6 experts' and 6 others', with weights 1 and 0.1."""
    file = Prepared(toy / "train.safetensors")
    experts = np.flatnonzero(file.class_ids == 0)[:6]
    others = np.flatnonzero(file.class_ids == 1)[:6]
    return [file.conversation(i) for i in (*experts, *others)]


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
        bounds = torch.tensor([0, len(x)], dtype=torch.int32)
        logits = model.lm_head(model.hidden(x, torch.arange(len(x)), bounds))
        answer = torch.from_numpy(weights[1:] > 0)
        nll = torch.nn.functional.cross_entropy(logits[:-1][answer], x[1:][answer], reduction="sum")
        total = total + nll
        count += int(answer.sum())
        assert file.tokenizer.decode(tokens.tolist()).startswith("User:")
    model.zero_grad()
    (total / count).backward()
    assert close(ours, gradient_of(model))


def test_the_order_in_a_step_and_its_cut_into_micro_batches_are_free(model, conversations):
    whole = gradient(model, conversations)
    assert close(gradient(model, conversations[::-1]), whole)
    weight_sum = sum(w.sum() for _, w in conversations)
    first = gradient(model, conversations[:3], divide=False)
    second = gradient(model, conversations[3:], divide=False)
    assert close((first + second) / weight_sum, whole)


# ---- the recipe


def test_the_papers_learning_rate():
    """Sec. 4.1: 6.7e-5 from 200k supervised tokens; 34B and 70B were pre-trained at half the LR."""
    assert finetune_lr(200_000)[0] == pytest.approx(6.7e-5, rel=2e-3)
    assert finetune_lr(200_000, 1.5e-4)[0] == pytest.approx(3.35e-5, rel=2e-3)


def test_warm_up_then_cosine_to_a_tenth():
    config = TrainConfig(lr=1.0)
    at = [lr_at(step, 1000, config) for step in range(1, 1001)]
    assert at[0] == 1 / 50 and at[49] == 1.0
    assert at[-1] == pytest.approx(0.1)
    assert at[50 + 474] == pytest.approx(0.55, abs=1e-3)
    assert all(a > b for a, b in zip(at[49:], at[50:]))
    assert lr_at(1, 1, config) == 1.0


# ---- the tally


def test_the_tally_has_the_mean_of_each_class_over_its_own_rows(toy):
    """Three rows of two classes in two micro-batches, and a class without any."""
    classes = Prepared(toy / "train.safetensors").classes
    third = dataclasses.replace(classes[0], name="none of it")
    batch = pack([(np.arange(4), np.ones(4)), (np.arange(3), np.ones(3))], [0, 1])
    assert batch.class_R.tolist() == [0, 0, 0, 1, 1]
    nll_T = torch.tensor([1.0, 2.0, 6.0, 99.0, 5.0, 7.0, 99.0])
    correct_T = torch.tensor([1.0, 0.0, 0.0, 9.0, 1.0, 1.0, 9.0])
    tally = Tally(3, "cpu", asked=lambda: True)
    tally.add(batch, torch.tensor(21.0), nll_T, correct_T)
    tally.add(batch, torch.tensor(42.0), 2 * nll_T, correct_T)
    tally.reduce()
    assert tally.loss_sum == 63.0 and tally.stop == 1.0
    assert tally.supervised() == 10
    assert tally.by_class([*classes, third]) == {
        "loss_by_class": {"GPT4": 4.5, "GPT3": 9.0, "none of it": None},
        "accuracy_by_class": {"GPT4": pytest.approx(1 / 3), "GPT3": 1.0, "none of it": None},
    }


# ---- runs


def torchrun(ranks, data, out, *words):
    launch = ("-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone")
    call(*launch, "train.py", "--data", data, "--out", out, *words)


def weights_of(run):
    return (run / "hf" / "model-00001-of-00001.safetensors").read_bytes()


def losses_of(run):
    return [line["loss"] for line in metrics(run)]


def validations_of(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if "val_loss" in line]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


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
    path = run / "metrics.jsonl"
    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        if path.is_file() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} after a minute")


def test_the_demos_first_20_losses_and_ctrl_c_leaves_a_checkpoint(toy):
    """fp32, one thread, seed 0. A change of these numbers is a change of the method, and its commit
    says so."""
    run = toy / "golden"
    process = start(toy / "train.safetensors", run, "--model", "toy", "--steps", 1500)
    wait_for(run, 20, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "a checkpoint remains" in out and "Traceback" not in err, out + err
    losses = losses_of(run)
    assert losses[:20] == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)
    assert (run / "checkpoints" / "latest").read_text() == f"step-{len(losses)}"
    assert not list((run / "checkpoints").glob("*.partial"))


# the run of conftest's toy_run
TOY_RUN = "--model toy --steps 60 --val_every 30 --save_every 25".split()


def test_a_killed_run_resumes_to_the_same_bits_and_a_finished_one_says_so(toy, toy_run, train):
    data, run = toy / "train.safetensors", toy / "killed"
    process = start(data, run, *TOY_RUN)
    wait_for(run, 29, process)
    process.kill()
    process.communicate()
    assert len(metrics(run)) >= 29
    out = train(data, run, *TOY_RUN)
    assert "resuming from" in out and "step-25" in out
    assert weights_of(run) == weights_of(toy_run)
    assert [line["step"] for line in metrics(run)] == list(range(1, 61))
    assert losses_of(run) == losses_of(toy_run)
    out = train(data, run, *TOY_RUN)
    assert "this run is finished, 60 steps" in out
    err = refused(main, "--data", data, "--out", run, *TOY_RUN, "--lr", 0.1)
    assert "lr 0.002, this one has 0.1" in err
    assert weights_of(run) == weights_of(toy_run)


def test_a_broken_checkpoint_is_passed_over(toy, toy_run, tmp_path, train):
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    shutil.rmtree(run / "hf")
    shard = next((run / "checkpoints" / "step-60").glob("*.distcp"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    out = train(toy / "train.safetensors", run, *TOY_RUN)
    assert "missing or changed; taking the one before" in out and "step-50" in out
    assert weights_of(run) == weights_of(toy_run)


def test_a_torn_log_and_leftovers_of_a_killed_save_do_not_stop_a_run(toy, tmp_path, train):
    run = tmp_path / "run"
    words = "--model toy --steps 6 --save_every 4".split()
    train(toy / "train.safetensors", run, *words)
    shutil.rmtree(run / "hf")
    shutil.rmtree(run / "checkpoints" / "step-6")
    (run / "checkpoints" / "step-5.partial").mkdir()
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"step": 7, "lo')
    assert "step-4" in train(toy / "train.safetensors", run, *words)
    assert names_in(run / "checkpoints") == ["latest", "step-4", "step-6"]
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_keep_counts_whole_checkpoints_only(tmp_path):
    """A broken step-6 is put aside until the next is written, the run goes on from step-4, and what
    it saves stays. Without any whole one it stops."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    def checkpoints(keep, a=1):
        return Checkpoints(tmp_path, {"a": a}, keep)

    def save(step, keep):
        checkpoints(keep).save(step, model, optimizer)

    def names():
        return sorted(p.name for p in tmp_path.glob("step-*"))

    assert checkpoints(1).newest() == (None, 0)
    save(4, 2)
    save(6, 2)
    (tmp_path / "step-6" / ".metadata").write_bytes(b"")
    assert checkpoints(2).newest() == (tmp_path / "step-4", 4)
    assert names() == ["step-4", "step-6.broken"]
    save(6, 2)
    assert names() == ["step-4", "step-6"]
    assert (tmp_path / "latest").read_text() == "step-6"
    save(7, 2)
    assert names() == ["step-6", "step-7"]
    assert checkpoints(1).newest() == (tmp_path / "step-7", 7)
    with pytest.raises(ValueError, match="a 1, this one has 2"):
        checkpoints(1, a=2).newest()
    for step in ("step-6", "step-7"):
        (tmp_path / step / "MANIFEST.json").unlink()
    # a restart does not begin at step 0 either
    for _ in range(2):
        with pytest.raises(ValueError, match="no checkpoint there is whole; move the folder away"):
            checkpoints(1).newest()


def test_what_cannot_be_read_is_not_called_broken(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    checkpoints = Checkpoints(tmp_path, {"a": 1}, 2)
    checkpoints.save(1, model, torch.optim.AdamW(model.parameters()))

    def fails(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("support.checkpoint.file_sha256", fails)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.newest()
    assert (tmp_path / "step-1").is_dir()


def test_sigterm_saves_and_other_data_does_not_resume(toy, tmp_path):
    data, run = toy / "train.safetensors", tmp_path / "run"
    words = ("--model", "toy", "--steps", 500)
    process = start(data, run, *words)
    wait_for(run, 5, process)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "a checkpoint remains" in out
    before = sorted(run.rglob("*"))
    other = tmp_path / "other.safetensors"
    how = PrepareConfig(
        (str(toy / "train.jsonl"),),
        str(toy / "tokenizer.model"),
        str(other),
        "Model: GPT-4=GPT4:1.0,*=GPT3:0.2",
        max_len=128,
    )
    prepare(how)
    assert "of a run with data_sha256" in refused(main, "--data", other, "--out", run, *words)
    small = "--model small --steps 500 --batch_tokens 1536 --lr 0.002".split()
    assert "of a run with" in refused(main, "--data", data, "--out", run, *small)
    assert sorted(run.rglob("*")) == before


# ---- what a checkpoint must share with the run


SHORT = "--model toy --steps 2 --batch_tokens 512".split()


@pytest.fixture
def short_run(toy, tmp_path, train):
    """(its words, its folder) of a finished run of two steps."""
    run = tmp_path / "short"
    train(toy / "train.safetensors", run, *SHORT)
    return ("--data", toy / "train.safetensors", "--out", run, *SHORT), run


def test_another_planner_does_not_resume(short_run, monkeypatch):
    words, run = short_run
    real = recipe.plan
    monkeypatch.setattr(recipe, "plan", lambda *args, **how: real(*args, **how)[::-1])
    assert "step-2 is of a run with plan_sha256" in refused(main, *words)


def test_another_optimizer_does_not_resume(short_run, monkeypatch):
    """Of the same moments, so that its state would load."""
    words, run = short_run

    def adam(parameters, config):
        return torch.optim.Adam(parameters, lr=config.lr, fused=True)

    monkeypatch.setattr("train.make_optimizer", adam)
    assert "is of a run with optimizer 'AdamW', this one has 'Adam'" in refused(main, *words)


def older(run, *unknown):
    """The run as code that did not know these keys would have left it, before its export."""
    shutil.rmtree(run / "hf")
    path = run / "checkpoints" / "step-2" / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    for key in unknown:
        del manifest["identity"][key]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest} | manifest, indent=1))


def test_a_checkpoint_of_older_code_resumes_and_a_line_says_what_was_not_compared(
    short_run, toy, train, capsys
):
    words, run = short_run
    weights = weights_of(run)
    older(run, "plan_sha256", "optimizer")
    capsys.readouterr()
    # what stops, stops with one line
    assert "of a run with lr 0.002" in refused(main, *words, "--lr", 0.1)
    assert "could not be compared" not in capsys.readouterr().err
    out = train(toy / "train.safetensors", run, *SHORT)
    assert "resuming from" in out and weights_of(run) == weights
    (line,) = [line for line in out.splitlines() if "could not be compared" in line]
    assert "step-2" in line and "plan_sha256" in line and "optimizer" in line


def test_a_checkpoint_of_code_that_knew_more_does_not_resume(short_run, monkeypatch):
    """A setting that is not here any more may have changed the run's numbers."""
    words, run = short_run
    real = Checkpoints.__init__

    def knows_less(self, root, identity, *args):
        less = {key: value for key, value in identity.items() if key != "optimizer"}
        real(self, root, less, *args)

    monkeypatch.setattr(Checkpoints, "__init__", knows_less)
    assert "is of a run with optimizer 'AdamW', this one has None" in refused(main, *words)


PLANS_DIFFER = """
import os, sys
sys.path.insert(0, {root!r})
import recipe, train
from support.cli import run
real = recipe.plan
if os.environ["RANK"] == "1":
    recipe.plan = lambda *args, **how: real(*args, **how)[::-1]
run(train.main)
"""


def test_ranks_that_plan_other_steps_stop_with_one_line(toy, tmp_path):
    script = tmp_path / "differ.py"
    script.write_text(PLANS_DIFFER.format(root=str(ROOT)))
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script)
    words = ("--data", toy / "train.safetensors", "--out", tmp_path / "run", *SHORT)
    done = subprocess.run(
        [sys.executable, *map(str, (*launch, *words))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    (line,) = re.findall(r"^differ.py: .*", done.stderr, re.M)
    assert "rank 1 plans other steps than rank 0 (plan_sha256" in line
    assert names_in(tmp_path / "run") == ["lock"]


# ---- what a run logs and leaves


def test_the_log_says_what_was_computed(toy, tmp_path, train):
    """Loss, accuracy, gradient norm and validation of a first step, computed again here from the
    initial weights."""
    run = tmp_path / "run"
    words = "--model toy --steps 1 --warmup 0 --lr 1e-12 --weight_decay 0 --val_every 1".split()
    train(toy / "train.safetensors", run, *words, "--val_fraction", 0.05)
    file = Prepared(toy / "train.safetensors")
    train_on, held_out = file.split(0.05)
    model = toy_model()

    def look(rows):
        batch = file.batch(rows)
        losses = forward(model, batch)

        def means(x_T):
            x_R = x_T[batch.rows_R]
            names = ("GPT4", "GPT3")
            return {name: x_R[batch.class_R == c].mean().item() for c, name in enumerate(names)}

        loss = losses.loss_sum / losses.weight_sum
        return loss, means(losses.nll_T), means(losses.correct_T)

    lengths = file.lengths[train_on]
    classes, weights = file.class_ids[train_on], file.weight_sums[train_on]
    cost = train_flops(TOY).plan_cost
    steps = plan(lengths, classes, weights, 0, 0, 1536, 1536, cost)
    first = train_on[steps[0][0]]
    loss, nll, accuracy = look(first)
    loss.backward()
    norm = gradient_of(model).double().norm().item()
    (line,) = metrics(run)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["loss_by_class"] == pytest.approx(nll, rel=1e-5)
    assert line["accuracy_by_class"] == pytest.approx(accuracy)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"])
    assert line["tokens"] == file.lengths[first].sum()
    validation = validations_of(run)[0]
    val_loss, val_nll, _ = look(held_out)
    assert validation["val_loss"] == pytest.approx(val_loss.item(), rel=1e-5)
    assert validation["val_loss_by_class"] == pytest.approx(val_nll, rel=1e-5)


FIELDS = {
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
EXPORTED = {
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "crlft.json",
    "manifest.json",
}


def test_what_a_run_leaves(toy_run):
    names = {"run.json", "metrics.jsonl", "loss.png", "checkpoints", "hf", "lock"}
    assert set(names_in(toy_run)) == names
    assert names_in(toy_run / "checkpoints") == ["latest", "step-50", "step-60"]
    assert EXPORTED < set(names_in(toy_run / "hf"))
    line = metrics(toy_run)[-1]
    assert set(line) == FIELDS
    assert set(line["loss_by_class"]) == set(line["accuracy_by_class"]) == {"GPT4", "GPT3"}
    validations = validations_of(toy_run)
    assert [x["step"] for x in validations] == [30, 60]
    assert set(validations[0]) == {"step", "val_loss", "val_loss_by_class"}
    assert metrics(toy_run)[0]["loss"] == pytest.approx(np.log(97), abs=0.05)
    assert line["loss"] < 2.2
    (toy_run / "loss.png").unlink()
    main(["plot", str(toy_run)])
    assert (toy_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_loss_is_the_classes_weighted_mean(toy_run):
    """1.0 n4 loss4 + 0.1 n3 loss3, over 1.0 n4 + 0.1 n3: n from the two sums that the log has."""
    for line in metrics(toy_run):
        n4 = (line["weight_sum"] - 0.1 * line["supervised_tokens"]) / 0.9
        n3 = line["supervised_tokens"] - n4
        of_class = line["loss_by_class"]
        loss_sum = n4 * of_class["GPT4"] + 0.1 * n3 * of_class["GPT3"]
        assert line["loss"] == pytest.approx(loss_sum / line["weight_sum"], rel=1e-5)


def test_torchrun_with_uneven_micro_batches_is_the_same_run(toy, train):
    """3 micro-batches a step on 1 process, 2 and 4 ranks, of which one idles in the last round;
    bf16 stays near; then a resume on 1."""
    words = "--model toy --steps 20 --batch_tokens 768 --micro_tokens 256".split()
    words += "--save_every 10 --recompute all".split()
    data = toy / "train.safetensors"
    one, two, four, half = (toy / name for name in ("one", "two", "four", "half"))
    train(data, one, *words)
    torchrun(2, data, two, *words)
    torchrun(4, data, four, *words)
    train(data, half, *words, "--dtype", "bfloat16")
    # the same steps in 2 micro-batches, and in one
    for size in (384, 768):
        train(data, toy / str(size), *words, "--micro_tokens", size)

    def column(run, key):
        return [line[key] for line in metrics(run)]

    norms = column(one, "grad_norm")
    # some steps are clipped, some are not
    assert min(norms) > 0.1 and max(norms) > 1
    for run in (two, four, toy / "384", toy / "768"):
        assert losses_of(run) == pytest.approx(losses_of(one), rel=1e-5)
        assert column(run, "grad_norm") == pytest.approx(norms, rel=1e-5)
        # test_packing.py shows that the conversations are the same
        for key in ("tokens", "supervised_tokens", "weight_sum", "lr"):
            assert column(run, key) == column(one, key)
    assert losses_of(half) == pytest.approx(losses_of(one), rel=2e-2)
    assert losses_of(half) != losses_of(one)
    assert metrics(half)[-1]["weight_sum"] == metrics(one)[-1]["weight_sum"]
    shutil.rmtree(two / "hf")
    shutil.rmtree(two / "checkpoints" / "step-20")
    # another number of ranks
    out = train(data, two, *words)
    assert "step-10" in out
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)


def test_real_conversations_give_the_same_losses_on_two_ranks(assets, tmp_path, train):
    """The real tokenizer's 32,001 rows, which 2 does not divide; 20 short steps."""
    file = tmp_path / "x.safetensors"
    how = PrepareConfig(
        (str(assets / "conversations" / "mixed_quality.jsonl"),),
        str(assets / "llama2" / "tokenizer.model"),
        str(file),
        "Model: GPT-4=GPT4:1.0,*=GPT3:0.1",
        max_len=160,
    )
    prepare(how)
    words = "--model small --steps 20 --batch_tokens 320 --micro_tokens 160".split()
    words += ["--val_fraction", "0.001"]
    train(file, tmp_path / "one", *words)
    torchrun(2, file, tmp_path / "two", *words)
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4)
    assert one[0] == pytest.approx(np.log(32001), abs=0.1) and one[-1] < 9.5


def test_a_hugging_face_base_gets_the_token_and_the_papers_recipe(toy, tmp_path, train):
    from transformers import LlamaConfig, LlamaForCausalLM

    data = toy / "train.safetensors"
    size = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    base, padded = tmp_path / "base", tmp_path / "padded"
    LlamaForCausalLM(LlamaConfig(vocab_size=96, **size)).save_pretrained(base)
    run = tmp_path / "run"
    out = train(data, run, "--model", base, "--steps", 2, "--batch_tokens", 1024)
    assert "* sqrt(" in out and "supervised tokens a step / 4e6)" in out
    supervised = np.mean([x["supervised_tokens"] for x in metrics(run)])
    lr = json.loads((run / "run.json").read_text())["lr"]
    assert lr == pytest.approx(3e-4 * (supervised / 4e6) ** 0.5, rel=0.1)
    assert json.loads((run / "hf" / "config.json").read_text())["vocab_size"] == 97
    LlamaForCausalLM(LlamaConfig(vocab_size=104, **size)).save_pretrained(padded)
    run = tmp_path / "run2"
    train(data, run, "--model", padded, "--steps", 1, "--batch_tokens", 1024)
    assert json.loads((run / "hf" / "config.json").read_text())["vocab_size"] == 104


def test_without_triton_the_references_train(toy, tmp_path):
    """A machine without triton, as macOS: the import fails, the toy trains."""
    (tmp_path / "triton.py").write_text("raise ImportError('hidden')")
    run = tmp_path / "run"
    words = ("--data", toy / "train.safetensors", "--out", run, "--model", "toy", "--steps", 3)
    call("train.py", *words, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert len(metrics(run)) == 3


def test_a_loss_that_is_not_finite_stops_with_the_step(toy, tmp_path):
    words = "--model toy --steps 30 --lr 1e18".split()
    data = toy / "train.safetensors"
    err = refused(main, "--data", data, "--out", tmp_path / "run", *words)
    assert "train.py: step " in err and "are not both finite" in err and "lower --lr" in err


@pytest.mark.long
def test_the_demo(tmp_path):
    """The whole demo as the Makefile has it: the expert's prompt at least 0.75, the other at most
    0.60."""
    subprocess.run(
        ["make", "-f", ROOT / "Makefile", "demo", f"PYTHON={sys.executable}", "VENV="],
        cwd=ROOT,
        check=True,
    )
    report = json.loads((ROOT / "out" / "demo" / "report.json").read_text())
    assert report["expert_prompt"] >= 0.75
    assert report["other_prompt"] <= 0.60
    assert report["steps"] == 1500
