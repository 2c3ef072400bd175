"""What must survive: kills, full disks, broken files, other numbers of ranks, too little memory.

And numbers that are not finite.
"""

import contextlib
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from conftest import ROOT, call, metrics, refused
from faults import check_starts, history, job, weights
from kernel_checks import kernels_on
from test_tokenizer import prepared, tied_base

import model as model_module
import train as train_module
from data import Prepared
from model import Config, Model
from support.budget import activation_width, out_of_memory
from support.checkpoint import Checkpoints, HashedFile, steps
from support.checkpoint import fault as fault_of
from support.hf import RandomWeights, load_model, load_weights
from support.ranks import is_of_another_rank
from train import clip_gradients, main

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SHORT = (
    *("--model", "toy", "--steps", 12, "--batch_tokens", 512, "--micro_tokens", 256),
    *("--save_every", 2, "--keep", 3),
)


def data_of(toy):
    return "--data", toy / "train.safetensors"


def words(toy, *more):
    """The flags of a short run."""
    return *data_of(toy), *SHORT, *more


def train(*flags):
    """train.py's main in this process."""
    main([str(flag) for flag in flags])


# ---- kills, restarts, other numbers of ranks


@pytest.fixture(scope="module")
def whole(toy):
    """(weights, data) of the run that nothing disturbs."""
    job(toy / "whole", [], words(toy))
    return weights(toy / "whole"), history(toy / "whole")


def outcome(out):
    check_starts(out)
    return weights(out), history(out)


def fault(kind, after=1, rank=0):
    return {"kind": kind, "after": after, "rank": rank}


def lines_of_errors(printed):
    """What the ranks said to the user: a line that begins with the script's name."""
    return re.findall(r"^faults.py: .*", printed, re.M)


def test_five_faults_cost_nothing(toy, tmp_path, whole):
    plan = [
        fault("after_backward", 3, 1),
        fault("torn_shard", 1, 1),
        fault("full_disk", 4, 0),
        fault("flipped_byte"),
        fault("after_rename", 2),
    ]
    # Now and then one attempt of the five prints no line (at d331a37, too). We think that then
    # torchrun's SIGTERM reaches the rank that is left before it has noticed that its peer is gone.
    # So one job in which a line is missing is allowed, if the next has all five.
    for run in ("run", "again"):
        printed = job(tmp_path / run, plan, words(toy))
        assert outcome(tmp_path / run) == whole
        assert "lost another rank" in printed
        assert "No space left on device" in printed
        assert "missing or changed; taking the one before" in printed
        assert 'train.py", line' not in printed, "a traceback"
        count = len(lines_of_errors(printed))
        # one line for each attempt that failed, never more
        assert count <= 5, printed
        if count == 5:
            break
    assert count == 5, printed
    assert "rank 0 lost another rank" in printed


def test_two_agents_recover_together(toy, tmp_path, whole):
    """Their restart counts may differ, and the store is the old one."""
    job(tmp_path / "run", [fault("forward", 3, 1)], words(toy), ranks=1, mode="two agents")
    assert outcome(tmp_path / "run") == whole


@pytest.mark.long
@pytest.mark.parametrize("mode", ["standalone", "static", "c10d", "two agents"])
def test_twenty_recoveries_in_each_launch_mode(toy, tmp_path, whole, mode):
    """Five jobs of four kills each; none takes a minute."""
    ranks = 1 if mode == "two agents" else 2
    for number in range(5):
        rng = random.Random(number)
        plan = []
        for _ in range(4):
            kind = rng.choice(faults.KILLS[:4])
            plan.append(fault(kind, rng.randrange(1, 4), rng.randrange(2)))
        out = tmp_path / str(number)
        job(out, plan, words(toy), ranks=ranks, mode=mode)
        assert outcome(out) == whole
        waits = check_starts(out)
        assert len(waits) >= 4, waits
        assert max(waits) < 60, waits


@pytest.mark.long
def test_a_hundred_random_faults(tmp_path):
    command = [sys.executable, ROOT / "tests" / "faults.py", "10", "10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same bits, same data") == 10, done.stdout + done.stderr


@pytest.mark.long
def test_a_rank_that_hangs_takes_the_job_down_in_bounded_time(toy, tmp_path, whole):
    """Stopped, not killed: the others wait --timeout seconds, torchrun 30 more for the stopped one.

    Then all start again.
    """
    job(tmp_path / "run", [fault("hang", 3, 1)], words(toy, "--timeout", 15))
    assert outcome(tmp_path / "run") == whole
    assert max(check_starts(tmp_path / "run")) < 90


def test_a_background_save_that_is_killed_costs_nothing(toy, tmp_path, whole):
    plan = [fault("torn_shard", 3, 1), fault("before_rename", 3)]
    job(tmp_path / "run", plan, words(toy, "--async_save"))
    assert outcome(tmp_path / "run") == whole


def test_a_background_save_holds_the_state_of_its_step(tmp_path):
    """Training goes on while it is written; and its error is raised by the next wait."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())

    def take_step():
        model(torch.ones(64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    take_step()
    checkpoints = Checkpoints(tmp_path, {"a": 1}, 2, background=True)
    write = checkpoints._write
    before = model.weight.detach().clone()
    go = threading.Event()

    def write_later(*args):
        go.wait(60)
        write(*args)

    checkpoints._write = write_later
    checkpoints.save(1, model, optimizer)
    take_step()
    assert checkpoints.newest() == (None, 0)
    go.set()
    checkpoints.wait()
    checkpoints.load(checkpoints.newest()[0], model, optimizer)
    assert torch.equal(model.weight, before)

    def fail(*_):
        raise OSError("no space")

    checkpoints._write = fail
    checkpoints.save(2, model, optimizer)
    with pytest.raises(OSError, match="no space"):
        checkpoints.wait()


def wait_for_step(out, step, process):
    """Until the run's log has this step; it must not end before."""
    log = out / "metrics.jsonl"
    for _ in range(600):
        if log.is_file() and f'"step": {step},' in log.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


@pytest.mark.parametrize("to", ["torchrun", pytest.param("one rank", marks=pytest.mark.long)])
def test_sigterm_saves_and_leaves(toy, tmp_path, to):
    """All ranks stop after the same step, whichever got the signal."""
    out = tmp_path / "run"
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    script = "train.py", "--out", out, *words(toy, "--steps", 900)
    command = [sys.executable, *torchrun, *map(str, script)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(out, 3, process)
    if to == "torchrun":
        process.terminate()
    else:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGTERM)
    printed = process.communicate(timeout=40)[0]
    assert printed.count("stopped by a signal after step") == 1, printed
    assert "a checkpoint remains" in printed, printed
    last = steps(out / "checkpoints")[0]
    assert last == len(metrics(out))
    assert fault_of(out / "checkpoints" / f"step-{last}") is None


def test_foreign_lines_and_fields_are_said_in_a_line(base, tmp_path, toy):
    """A metrics.jsonl that holds other JSON; a config.json whose sizes are no numbers above 0."""
    for text in ("", "3\n", "{}\n", '{"loss": 1}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert "no step in it yet" in refused(main, "plot", tmp_path)
    config = json.loads((base / "config.json").read_text())
    for bad in ("64", 64.5, 0, None, [64]):
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": bad}))
        said = "no hidden_size" if bad is None else "hidden_size = "
        assert said in refused(main, "--dry_run", "--model", tmp_path, "--steps", 3)


def test_what_a_user_did_wrong_is_said_once(toy, tmp_path):
    """Three ranks find it; one speaks. So it is where one rank fails and the others wait for it."""
    printed = job(tmp_path / "run", [], words(toy, "--lr", -1), ranks=3, ok=False)
    assert lines_of_errors(printed) == [
        "faults.py: --lr -1.0 is not from 1e-30 to below 1e30: AdamW computes in fp32"
    ]
    assert 'train.py", line' not in printed

    plan = [fault("full_disk", 1, 1)]
    printed = job(tmp_path / "full", plan, words(toy), restarts=0, ok=False)
    (line,) = lines_of_errors(printed)
    assert "step-2 could not be written" in line
    assert "No space left on device" in line
    assert "__1_0.distcp" in line
    assert "free space or choose another folder" in line
    assert 'train.py", line' not in printed


def test_a_changed_base_does_not_resume(toy, base, tmp_path):
    model = tmp_path / "base"
    shutil.copytree(base, model)
    sizes = "--steps", 2, "--batch_tokens", 512
    flags = *data_of(toy), "--model", model, "--out", tmp_path / "run", *sizes
    train(*flags)
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (model / "model.safetensors").write_bytes(raw)
    assert "is of a run with model_sha256" in refused(main, *flags)


def test_changed_data_does_not_resume(toy, tmp_path):
    """The same name, other content."""
    data = tmp_path / "train.safetensors"
    shutil.copy(toy / "train.safetensors", data)
    flags = "--data", data, "--out", tmp_path / "run", *SHORT
    train(*flags)

    # a bit in the middle of the tokens
    raw = bytearray(data.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    begin = json.loads(raw[8 : 8 + header])["tokens"]["data_offsets"][0]
    offset = Prepared(data).tokens.nbytes // 2
    raw[8 + header + begin + offset] ^= 1
    data.write_bytes(raw)
    assert "tokens: not what was prepared, by its digest" in refused(main, *flags)


def test_data_that_change_under_a_run_stop_it_and_the_checkpoint_stays(toy, tmp_path, monkeypatch):
    data = tmp_path / "train.safetensors"
    shutil.copy(toy / "train.safetensors", data)
    batches = itertools.count(1)
    read = Prepared.batch

    def touched(self, conversations):
        # a step is one micro-batch: before the sixth, which a thread makes a few steps ahead
        if next(batches) == 6:
            os.utime(data, (1, 1))
        return read(self, conversations)

    monkeypatch.setattr(Prepared, "batch", touched)
    sizes = "--steps", 8, "--batch_tokens", 512, "--micro_tokens", 512, "--save_every", 5
    flags = "--data", data, "--out", tmp_path / "run", "--model", "toy", *sizes
    assert "train.safetensors: changed while it is read" in refused(main, *flags)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert names == ["step-5"]


# ---- the same bits on any number of ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory, toy):
    """A tiny Hugging Face base of 32,001 rows, which 2 and 4 do not divide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=32001,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def elastic(toy, base, *more):
    sizes = "--steps", 9, "--batch_tokens", 1024, "--micro_tokens", 128, "--save_every", 2
    return *data_of(toy), "--model", base, *sizes, "--lr", 1e-3, "--exact", *more


def chain(toy, base, tmp_path, *more):
    """2 ranks, killed; 1, killed; 4, killed; 3 to the end.

    (weights, data) of that run, and of one rank that nothing disturbed.
    """
    run, one = tmp_path / "chain", tmp_path / "one"
    flags = elastic(toy, base, *more)
    for ranks, after in ((2, 3), (1, 2), (4, 3)):
        plan = [fault("after_backward", after, ranks - 1)]
        job(run, plan, flags, ranks=ranks, restarts=0, ok=False)
    job(run, [], flags, ranks=3)
    job(one, [], flags, ranks=1)
    assert [line["step"] for line in metrics(run)] == list(range(1, 10))
    return outcome(run), outcome(one)


def test_a_chain_of_kills_on_2_1_4_and_3_ranks_ends_with_the_same_bits(toy, base, tmp_path):
    ours, one = chain(toy, base, tmp_path)
    assert ours == one
    from safetensors import safe_open

    with safe_open(tmp_path / "chain" / "hf" / "model-00001-of-00001.safetensors", "pt") as file:
        assert file.get_slice("lm_head.weight").get_shape() == [32001, 16]


@pytest.mark.long
def test_the_chain_in_bf16(toy, base, tmp_path):
    ours, one = chain(toy, base, tmp_path, "--dtype", "bfloat16")
    assert ours == one


@pytest.mark.long
def test_the_chain_with_a_tied_head_and_a_byte_level_tokenizer(toy, byte_level_file, tmp_path):
    base = tied_base(tmp_path / "base", byte_level_file)
    prepared(tmp_path, toy, base / "tokenizer.json")
    ours, one = chain(tmp_path, base, tmp_path)
    assert ours == one


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_on_1_2_3_4_and_8_ranks(toy, tmp_path, dtype):
    sizes = "--steps", 20, "--batch_tokens", 2048, "--micro_tokens", 256
    flags = *data_of(toy), "--model", "toy", *sizes, "--exact", "--dtype", dtype
    found = set()
    for ranks in (1, 2, 3, 4, 8):
        job(tmp_path / str(ranks), [], flags, ranks=ranks)
        found.add(weights(tmp_path / str(ranks)))
    assert len(found) == 1


@pytest.mark.long
def test_without_exact_the_bits_differ_and_the_losses_do_not(toy, tmp_path, whole):
    """What --exact is for. 3 micro-batches a step on 1, 2 and 4 ranks are in test_train.py."""
    one, three = tmp_path / "one", tmp_path / "three"
    flags = words(toy, "--micro_tokens", 128)
    call("train.py", "--out", one, *flags)
    job(three, [], flags, ranks=3)
    assert weights(one) != weights(three)

    losses = [line["loss"] for line in metrics(one)]
    losses_of_three = [line["loss"] for line in metrics(three)]
    assert losses_of_three == pytest.approx(losses, rel=1e-5)


# ---- numbers


def with_nan(losses):
    """The losses of a micro-batch, the sum made NaN."""
    loss_sum, *rest = losses
    return loss_sum * float("nan"), *rest


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of the third step is NaN."""
    real = train_module.forward
    count = 0

    def forward(*args):
        nonlocal count
        losses = real(*args)
        # validation does not count
        if not torch.is_grad_enabled():
            return losses
        count += 1
        return with_nan(losses) if count == 3 else losses

    monkeypatch.setattr(train_module, "forward", forward)


SIX_STEPS = "--model", "toy", "--steps", 6, "--batch_tokens", 512


def all_lines(run):
    """Of a run's metrics.jsonl, validation and steps that were not taken too."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_stops_the_run_and_names_its_conversations(
    toy, tmp_path, poisoned
):
    err = refused(main, *data_of(toy), "--out", tmp_path / "run", *SIX_STEPS)
    assert "step 3: loss nan" in err
    assert "--nonfinite skip leaves such steps out" in err
    line = all_lines(tmp_path / "run")[-1]
    assert line["step"] == 3
    assert str(line["conversations"][:8])[1:-1] in err
    assert Prepared(toy / "train.safetensors").lengths[line["conversations"]].sum() > 400


def test_or_is_skipped_and_counted(toy, tmp_path, poisoned, capsys):
    run = tmp_path / "run"
    train(*data_of(toy), "--out", run, *SIX_STEPS, "--nonfinite", "skip")
    assert "step 3 skipped, 1 so far" in "".join(capsys.readouterr())
    taken = metrics(run)
    assert [line["step"] for line in taken] == [1, 2, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) for line in taken)
    assert [line["skipped"] for line in all_lines(run) if "skipped" in line] == [1]


def test_ten_in_a_row_are_no_accident(toy, tmp_path, monkeypatch):
    real = train_module.forward
    monkeypatch.setattr(train_module, "forward", lambda *args: with_nan(real(*args)))
    sizes = "--model", "toy", "--steps", 30, "--batch_tokens", 512
    flags = *data_of(toy), "--out", tmp_path / "run", *sizes, "--nonfinite", "skip"
    err = refused(main, *flags)
    assert "step 10: loss nan" in err
    assert "after 10 such steps in a row" in err


class NoTally:
    """A tally that finds the loss NaN."""

    def add(self, *_):
        pass

    def reduce(self):
        self.loss_sum = float("nan")


class NoBatch:
    def to(self, _device):
        return self


def test_a_skipped_step_leaves_weights_and_moments_alone(monkeypatch):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()

    def state():
        moments = optimizer.state[model.weight]
        kept = model.weight, moments["exp_avg"], moments["step"]
        return [value.detach().clone() for value in kept]

    def forward(*_):
        loss = model(torch.ones(2)).sum() * float("nan")
        return loss, None, None, None

    before = state()
    monkeypatch.setattr(train_module, "forward", forward)
    with pytest.raises(FloatingPointError):
        train_module.train_step(model, optimizer, [NoBatch()], "cpu", 1.0, 1.0, NoTally())
    for old, new in zip(before, state()):
        assert torch.equal(old, new)


def test_clipping_is_by_the_norm_over_all_gradients():
    gradients = [torch.randn(7, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    whole = torch.cat([g.flatten() for g in gradients]).double()
    copies = [g.clone() for g in gradients]
    norm = clip_gradients(copies, 0.5)
    assert norm == pytest.approx(whole.norm().item(), rel=1e-12)
    clipped = torch.cat([g.flatten() for g in copies]).double()
    assert clipped.norm().item() == pytest.approx(0.5, rel=1e-6)
    assert torch.allclose(clipped * norm / 0.5, whole, rtol=1e-5)

    # within the bound: as they were
    copies = [g.clone() for g in gradients]
    clip_gradients(copies, 1e3)
    for copy, gradient in zip(copies, gradients):
        assert torch.equal(copy, gradient)


# ---- checkpoints: every crash point, a thousand corruptions


def tiny():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    return model, torch.optim.AdamW(model.parameters())


def numbers_of(model, optimizer):
    """All weights and first moments, flat."""
    parameters = list(model.parameters())
    moments = [optimizer.state[p]["exp_avg"] for p in parameters]
    return torch.cat([x.detach().flatten() for x in parameters + moments])


def stepped(model, optimizer):
    """The numbers after a step."""
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return numbers_of(model, optimizer)


CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def dies_at(root, number, save):
    """Run save() in a child that dies at its number-th file-system event under root.

    Returns the child's exit code.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # a child that hangs is found
    signal.alarm(60)
    count = 0
    fsync = os.fsync
    write = HashedFile.write

    def tick():
        nonlocal count
        count += 1
        if count == number:
            os._exit(9)

    def event(name, args):
        is_open = name == "open" and str(root) in str(args[0])
        if name in CHANGES or is_open:
            tick()

    def ticking_fsync(handle):
        tick()
        fsync(handle)
        tick()

    def ticking_write(self, data):
        written = write(self, data)
        # a tensor's numbers
        if len(data) >= 64:
            self.flush()
            tick()
        return written

    os.fsync = ticking_fsync
    HashedFile.write = ticking_write
    sys.addaudithook(event)
    try:
        save()
    finally:
        os._exit(0)


def test_a_save_reaches_the_disk_in_order(tmp_path, monkeypatch):
    """What a power cut needs.

    Every shard, then the manifest and its folder, then the name, then the folder that holds it.
    """
    events = []
    fsync = os.fsync
    rename = Path.rename

    def noting_fsync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def noting_rename(path, new):
        events.append(f"{path.name} -> {Path(new).name}")
        return rename(path, new)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    model, optimizer = tiny()
    stepped(model, optimizer)
    Checkpoints(tmp_path / "root", {}, 1).save(2, model, optimizer)
    assert events == [
        "__0_0.distcp",
        ".metadata.tmp",
        ".metadata.tmp -> .metadata",
        "MANIFEST.json",
        "step-2.partial",
        "step-2.partial -> step-2",
        "root",
    ]


def test_every_event_of_a_save_as_a_crash_point(tmp_path):
    """After each, the old checkpoint or the new one loads, whole."""
    model, optimizer = tiny()
    old = stepped(model, optimizer)
    Checkpoints(tmp_path / "first", {"a": 1}, 1).save(1, model, optimizer)
    new = stepped(model, optimizer)
    root = tmp_path / "root"
    found = []
    for number in range(1, 500):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "first", root)
        checkpoints = Checkpoints(root, {"a": 1}, 1)
        code = dies_at(root, number, lambda: checkpoints.save(2, model, optimizer))  # noqa: B023
        path, step = checkpoints.newest()
        again = tiny()
        stepped(*again)
        checkpoints.load(path, *again)
        assert torch.equal(numbers_of(*again), {1: old, 2: new}[step]), f"event {number}: {step}"
        found.append(step)
        if code == 0:
            break
    assert len(found) > 30
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] == 2
    assert found.count(2) > 3


def corrupted(rng, raw, other):
    """(what was done, other bytes than raw)."""
    kind = rng.choice(("bytes", "page", "cut", "other step"))
    new = bytearray(raw)
    if kind == "bytes":
        for _ in range(rng.choice((1, 1, 8))):
            new[rng.randrange(len(new))] ^= rng.randrange(1, 256)
    elif kind == "page":
        start = rng.randrange(0, len(new), 4096)
        new[start : start + 4096] = bytes(len(new[start : start + 4096]))
    elif kind == "cut":
        new = new[: rng.randrange(len(new))]
    else:
        new = bytearray(other)
    return kind, bytes(new)


def listed_files(root, hf):
    """[(file that a manifest vouches for, the same file of the checkpoint before, or None)]."""
    newest, before = root / "step-60", root / "step-50"
    names = ["MANIFEST.json", *json.loads((newest / "MANIFEST.json").read_text())["files"]]
    of_checkpoint = [(newest / name, before / name) for name in names]
    of_export = [(hf / name, None) for name in json.loads((hf / "manifest.json").read_text())]
    return of_checkpoint + of_export


def corrupt(toy_run, tmp_path, count):
    """Corruptions of the newest of two checkpoints and of an export, one at a time.

    All must be found. Returns how many were made.
    """
    rng = random.Random(0)
    root, hf = tmp_path / "checkpoints", tmp_path / "hf"
    shutil.copytree(toy_run / "checkpoints", root)
    shutil.copytree(toy_run / "hf", hf)
    identity = json.loads((root / "step-60" / "MANIFEST.json").read_text())["identity"]
    checkpoints = Checkpoints(root, identity, 2)
    listed = listed_files(root, hf)
    assert len(listed) > 8

    made = 0
    while made < count:
        path, twin = rng.choice(listed)
        raw = path.read_bytes()
        kind, bad = corrupted(rng, raw, twin.read_bytes() if twin else raw[::-1])
        if bad == raw:
            continue
        path.write_bytes(bad)
        if twin:
            assert checkpoints.newest() == (root / "step-50", 50), (path, kind)
            (root / "step-60.broken").rename(root / "step-60")
        else:
            with pytest.raises(ValueError, match="not as manifest.json has it"):
                load_model(hf)
        path.write_bytes(raw)
        made += 1
    assert checkpoints.newest() == (root / "step-60", 60)
    load_model(hf)
    return made


def test_corruptions_are_found(toy_run, tmp_path):
    assert corrupt(toy_run, tmp_path, 40) == 40


@pytest.mark.long
def test_a_thousand_corruptions_are_found(toy_run, tmp_path):
    assert corrupt(toy_run, tmp_path, 1000) == 1000


def test_a_manifest_of_another_checkpoint_is_no_manifest(toy_run, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(toy_run / "checkpoints", root)
    of_another = (root / "step-50" / "MANIFEST.json").read_text()
    for text in (of_another, "[]", '{"files": 3, "step": 60, "identity": {}}', ""):
        (root / "step-60" / "MANIFEST.json").write_text(text)
        assert "MANIFEST.json" in fault_of(root / "step-60")


# ---- memory


# Watches how much memory of its own the process has at most.
WATCH = """
import os, sys, threading, time
sys.path.insert(0, ROOT)
import numpy as np
import torch
import torch.distributed as dist
torch.set_num_threads(1)

def anon():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak = 0

def watch():
    global peak
    while True:
        peak = max(peak, anon())
        time.sleep(0.002)
"""
PROBE = """
import dataclasses
from model import Config
from recipe import TrainConfig
from support.hf import SafetensorsWeights, load_weights, read_config
from support.ranks import local_rows, start_group, together
from train import build

run = TrainConfig(dtype="float32", recompute="none", lr=1.0)
cpu = torch.device("cpu")
with together(str) as store:
    start_group(store, False, 60)
    # imports what FSDP imports late
    build(run, Config(8, 8, 1, 1, 1, 8), cpu)
    config = dataclasses.replace(read_config(BASE), vocab_size=32001)
    before = peak = anon()
    threading.Thread(target=watch, daemon=True).start()
    model, _, _ = build(run, config, cpu)
    load_weights(model, SafetensorsWeights(BASE, config), local_rows)
    highest = max(peak, anon())

    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    whole = sum(p.numel() for p in model.parameters())
    share = 4 * whole / dist.get_world_size()
    largest = 4 * max(*layers, config.vocab_size * config.hidden_size)
    # in one piece, or the ranks' words would mix
    line = f"PROBE {dist.get_rank()} {highest - before} {share} {largest}"
    print(f"\\n{line}\\n", end="", flush=True)
"""


def script(*parts, **names):
    """Python code in which these names have these values."""
    known = [f"{name} = {value!r}\n" for name, value in names.items()]
    return "".join([*known, *parts])


def sharded_load(tmp_path, ranks, **size):
    """Load a base on so many ranks; none may hold more than it needs. Returns the files' bytes.

    What it needs: its share of the fp32 parameters, the largest layer, and 15%.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path / "base"
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=256, **size)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base, max_shard_size="100MB")
    files = list(base.glob("*.safetensors"))
    assert len(files) >= 3

    probe = tmp_path / "probe.py"
    probe.write_text(script(WATCH, PROBE, ROOT=str(ROOT), BASE=str(base)))
    torchrun = "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"
    out, _ = call(*torchrun, probe)
    rows = [line.split()[1:] for line in out.splitlines() if line.startswith("PROBE")]
    assert len(rows) == ranks
    for row in rows:
        _, above, share, largest = map(float, row)
        sizes = above / 2**20, share / 2**20, largest / 2**20
        assert share * 0.9 < above <= (share + largest) * 1.15, sizes
    return sum(path.stat().st_size for path in files)


def test_no_rank_holds_the_whole_checkpoint(tmp_path):
    size = {"hidden_size": 576, "intermediate_size": 1536}
    sharded_load(tmp_path, 2, **size, num_hidden_layers=12, num_attention_heads=9)


@pytest.mark.long
def test_no_rank_holds_a_whole_gigabyte(tmp_path):
    size = {"hidden_size": 1024, "intermediate_size": 2752}
    assert sharded_load(tmp_path, 4, **size, num_hidden_layers=18, num_attention_heads=8) > 1e9


def test_dry_run_for_13b_adds_up():
    machine = "--ranks", 8, "--gb", 80
    sizes = "--model", "llama-2-13b", "--batch_tokens", 262144, "--steps", 2003
    out, _ = call("train.py", "--dry_run", *sizes, *machine)
    assert "13,015,874,560 parameters" in out

    parts, total = [], None
    for line in out.splitlines()[2:]:
        title, *cells = line.rsplit(maxsplit=3)
        if title.startswith("  "):
            parts.append([float(cell) for cell in cells])
        elif title == "sum":
            total = [float(cell) for cell in cells]
    assert len(parts) == 7
    assert [sum(column) for column in zip(*parts)] == pytest.approx(total, abs=1e-6)
    fp32_weights, two_moments = parts[0][0], parts[2][0]
    assert fp32_weights == pytest.approx(13_015_874_560 * 4 / 8 / 2**30, abs=0.005)
    assert two_moments == pytest.approx(2 * fp32_weights, abs=0.01)
    assert re.search(r"within 92% of 80 GB +no +no +yes", out)

    # The embedding and the norms take no part in a matmul.
    tokens = 2003 * 262144
    flops = 6 * tokens * (13_015_874_560 - 32001 * 5120 - 81 * 5120) + 6 * 40 * 5120 * 1500 * tokens
    assert f"{tokens:,} tokens" in out
    assert f"{flops:.3g} FLOPs" in out
    assert f"{flops / (8 * 312e12 * 0.45) / 3600:,.1f} hours" in out


def test_dry_run_with_data_counts_its_steps_and_loads_nothing(toy, toy_run, tmp_path):
    flags = *data_of(toy), "--model", "toy", "--steps", 60, "--dtype", "float32"
    out, _ = call("train.py", "--dry_run", *flags, "--tflops", 0.05, "--gb", 4)
    tokens = sum(line["tokens"] for line in metrics(toy_run))
    assert f"60 steps, {tokens:,} tokens" in out
    assert "351,072 parameters" in out
    assert "--dry_run wants --model" in refused(main, "--dry_run", "--model", "toy")


def test_dry_run_asks_the_optimizer_what_it_keeps(monkeypatch, capsys):
    def gib(title):
        """Of the part with this title, in each column alike; 0 where the table leaves it out."""
        train("--dry_run", "--model", "llama-2-7b", "--steps", 3)
        for line in capsys.readouterr().out.splitlines():
            if line.startswith(f"  {title}"):
                return float(line.split()[-1])
        return 0.0

    def plain_sgd(parameters, _config):
        return torch.optim.SGD(parameters, lr=1.0)

    def sgd_with_momentum(parameters, _config):
        return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)

    of_weights = gib("weights, fp32, sharded")
    assert of_weights > 20
    assert gib("AdamW's two moments, sharded") == pytest.approx(2 * of_weights, abs=0.011)
    monkeypatch.setattr(train_module, "make_optimizer", sgd_with_momentum)
    assert gib("SGD's state, sharded") == of_weights
    assert gib("AdamW's") == 0
    monkeypatch.setattr(train_module, "make_optimizer", plain_sgd)
    assert gib("SGD's") == 0


@contextlib.contextmanager
def kernels_interpreted():
    with contextlib.ExitStack() as stack:
        for name in ("rms_norm", "swiglu", "rotary_attention"):
            stack.enter_context(kernels_on(importlib.import_module(f"kernels.{name}")))
        yield


def two_conversations(toy):
    return Prepared(toy / "train.safetensors").batch(np.arange(2))


def inputs_of(batch):
    """What the model's forward pass is called with."""
    return (
        batch.tokens_T,
        batch.positions_T,
        batch.cu_seqlens,
        batch.labels_T,
        batch.weights_T,
        batch.rows_R,
    )


def saved_bytes(model, batch):
    """Bytes of the activations that the forward pass leaves for the backward pass.

    Each storage once; weights and inputs do not count.
    """
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *inputs_of(batch))}
    seen = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with kernels_interpreted(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # the losses hold the graph, and with it the storages, until they are counted
        losses = model(*inputs_of(batch))
    total = sum(seen.values())
    del losses
    return total


def lone(layers, recompute):
    """A small model with so many layers."""
    config = Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=97,
        max_position_embeddings=64,
    )
    model = Model(config)
    load_weights(model, RandomWeights(config, 0))
    for block in model.model.layers:
        block.recompute = recompute
    return model


def test_what_the_kernels_keep_is_what_dry_run_counts(toy):
    """With the Triton kernels, interpreted here.

    A block more keeps activation_width numbers a token more, and the log-sum-exps.
    """
    batch = two_conversations(toy)
    T = len(batch.tokens_T)
    of_a_block = saved_bytes(lone(2, "none"), batch) - saved_bytes(lone(1, "none"), batch)
    config = lone(1, "none").config
    expected = activation_width(config, "none")
    assert of_a_block / 4 / T == pytest.approx(expected, abs=config.num_attention_heads + 3)


def test_what_cheap_recomputation_keeps_is_what_dry_run_counts(toy, monkeypatch):
    """The block's input, and what its policy says must be kept.

    That is: outputs of mm, and o and rotated k of the attention.
    """
    batch = two_conversations(toy)
    kept = 0
    keep = model_module.keep

    def noting(width, context, op, *args, **kwargs):
        nonlocal kept
        policy = keep(width, context, op, *args, **kwargs)
        if policy == model_module.CheckpointPolicy.MUST_SAVE and not context.is_recompute:
            if op == torch.ops.aten.mm.default:
                kept += args[0].shape[0] * args[1].shape[1]
            else:
                kept += args[0].numel() + args[1].numel()
        return policy

    monkeypatch.setattr(model_module, "keep", noting)
    model = lone(1, "cheap")
    with kernels_interpreted():
        model(*inputs_of(batch))
    T = len(batch.tokens_T)
    assert kept + T * model.config.hidden_size == T * activation_width(model.config, "cheap")


def operations(model, batch):
    """(gradient, operations of the forward pass, those of the backward pass), with the kernels."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.names.append(str(op))
            return op(*args, **(kwargs or {}))

    with kernels_interpreted():
        with Names() as forward:
            loss = model(*inputs_of(batch)).loss_sum
        with Names() as backward:
            loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return gradient, forward.names, backward.names


def count(names, what):
    return sum(what in name for name in names)


def test_cheap_recomputation_does_no_matmul_twice(toy):
    """In the backward pass: matmuls, and forward passes of attention and of SwiGLU."""
    batch = two_conversations(toy)
    attention, swiglu = "crlft.rotary_attention.default", "crlft.swiglu.default"
    gradient, forward, of_none = operations(lone(2, "none"), batch)
    matmuls = count(of_none, "aten.mm")
    assert count(forward, "aten.mm") >= 14
    assert count(of_none, attention) == 0
    assert count(of_none, swiglu) == 0

    cheap, _, of_cheap = operations(lone(2, "cheap"), batch)
    assert torch.equal(cheap, gradient)
    assert count(of_cheap, "aten.mm") == matmuls
    assert count(of_cheap, attention) == 0
    assert count(of_cheap, swiglu) == 2

    rebuilt, _, of_all = operations(lone(2, "all"), batch)
    assert torch.equal(rebuilt, gradient)
    assert count(of_all, "aten.mm") >= matmuls + 2 * 6
    assert count(of_all, attention) == 2


QUICK = [("float32", "all"), ("bfloat16", "cheap")]
LONG = [("float32", "none"), ("float32", "cheap"), ("bfloat16", "none"), ("bfloat16", "all")]


@pytest.mark.parametrize(
    "dtype, recompute", QUICK + [pytest.param(*pair, marks=pytest.mark.long) for pair in LONG]
)
def test_memory_of_a_step_is_what_dry_run_says(dtype, recompute):
    """On a CPU, bf16 under FSDP: the peak of a step above the level after the imports (RssAnon)."""
    measured, said = memory_of_a_step(dtype, recompute)
    assert 0.9 < measured / said < 1.2, (measured / 2**20, said / 2**20)


def memory_of_a_step(dtype, recompute, offload=False):
    """(measured, said): bytes. Two micro-batches with --offload, else one."""
    names = {"ROOT": str(ROOT), "DTYPE": dtype, "RECOMPUTE": recompute, "OFFLOAD": offload}
    out, _ = call("-c", script(WATCH, STEP_MEMORY, **names))
    return map(float, out.split())


STEP_MEMORY = """
from model import Config
from packing import pack
from recipe import TrainConfig
from support.budget import memory_parts, optimizer_state
from support.hf import RandomWeights, load_weights
from support.ranks import local_rows, start_group
from train import Tally, build, copied_once, make_optimizer, needs_fsdp, train_step

config = Config(384, 1024, 8, 6, 6, 32001, 1024)
run = TrainConfig(
    dtype=DTYPE, recompute=RECOMPUTE, offload=OFFLOAD, lr=1e-4, micro_tokens=1024, batch_tokens=2048
)
cpu = torch.device("cpu")
start_group(None, needs_fsdp(run), 60)
# imports what FSDP imports late
build(run, Config(8, 8, 1, 1, 1, 8), cpu)

before = peak = anon()
threading.Thread(target=watch, daemon=True).start()
model, optimizer, _ = build(run, config, cpu)
load_weights(model, RandomWeights(config, 0), local_rows)
rng = np.random.default_rng(0)
conversations = []
for _ in range(4):
    tokens = rng.integers(0, 32000, 256).astype(np.int32)
    conversations.append((tokens, np.ones(256, np.float32)))
batch = pack(conversations)
for _ in range(2):
    batches = [batch]
    if OFFLOAD:
        batches = copied_once(model, iter([batch, batch]), [[0, 1]])
    train_step(model, optimizer, batches, cpu, 1020.0, 1.0, Tally(1, cpu))
measured = peak - before

state = optimizer_state(make_optimizer([torch.nn.Parameter(torch.zeros(4, 4))], run))
parts = memory_parts(run, config, 1, state)
said = sum(size_of[RECOMPUTE] for size_of in parts.values())
if OFFLOAD:
    # on the host: weights and two moments; gradients are there only when the sums are gone
    said += 12 * sum(p.numel() for p in model.parameters())
print(measured, said)
"""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error 'out of memory'"),
    ],
)
def test_every_want_of_memory_is_one(error):
    assert "lower --micro_tokens" in out_of_memory(error)
    assert out_of_memory(RuntimeError("CUDA error: an illegal memory access")) is None


def test_of_nccl_s_errors_only_a_lost_peer_is_another_rank_s():
    error = torch.distributed.DistBackendError
    for text in (
        "NCCL error: remote process exited or there was a network error",
        "NCCL communicator was aborted on rank 3",
        "NCCL error: Socket recv failed: Connection closed by remote peer",
    ):
        assert is_of_another_rank(error(text))
    for text in (
        "NCCL error: invalid usage, Duplicate GPU detected : rank 1 and rank 0",
        "NCCL error: unhandled cuda error",
    ):
        assert not is_of_another_rank(error(text))
    # a store whose time is over, and gloo
    assert is_of_another_rank(torch.distributed.DistStoreError("wait timeout after 600 s"))
    assert is_of_another_rank(RuntimeError("[/x/gloo/pair.cc:1] Connection closed by peer"))


def test_out_of_memory_names_the_knobs(toy, tmp_path):
    flags = f"--data {toy}/train.safetensors --model small --batch_tokens 60000 --steps 2"
    train_command = f"{sys.executable} train.py {flags} --out {tmp_path}/run"
    command = ["bash", "-c", f"ulimit -d 1500000; exec {train_command}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(
        r"rank 0 is out of memory \(tried to allocate \d+ bytes\): "
        r"lower --micro_tokens, set --recompute",
        done.stderr,
    )


def test_a_compiled_run_is_the_same_run(toy, tmp_path):
    """A whole run, by inductor.

    test_triton.py compiles a block with each kind of recomputation in one graph.
    """
    if not shutil.which("g++"):
        pytest.skip("no g++: torch.compile cannot build CPU code")
    compiled, eager = tmp_path / "compiled", tmp_path / "eager"
    flags = *data_of(toy), "--model", "toy", "--steps", 3, "--recompute", "all"
    call("train.py", "--out", compiled, *flags, "--compile")
    train(*flags, "--out", eager)
    assert len(metrics(compiled)) == 3
    for key in ("loss", "grad_norm"):
        expected = [line[key] for line in metrics(eager)]
        assert [line[key] for line in metrics(compiled)] == pytest.approx(expected, rel=1e-4)


# ---- a whole step beside transformers


STEP = """
import os, sys
os.chdir(FOLDER)
sys.argv = ["paper.step", "--conversations", "12", "--rounds", "1"]
from paper.step import main
from support.cli import run
run(main)
"""


@pytest.mark.long
def test_a_step_beats_transformers(tmp_path):
    """The first 12 conversations of the workload.

    The floors leave room here; results/step_cpu.json meets its own on all 64.
    """
    out, _ = call("-c", script(STEP, FOLDER=str(tmp_path)))
    found = re.findall(r"(?:packed|padded) ([\d.]+)", out.split("ours over", 1)[1])
    ratios = [float(ratio) for ratio in found]
    assert len(ratios) == 4, out
    packed, padded, packed_60, padded_60 = ratios
    assert packed > 1.1, out
    assert packed_60 > 1.3, out
    assert min(padded, padded_60) > 2.5, out
    rows = json.loads((tmp_path / "results" / "step_cpu.json").read_text())["rows"]
    peak = {row["contestant"]: row["peak_bytes"] for row in rows}
    assert peak["ours"] < 0.6 * peak["transformers, packed"]


def test_the_committed_step_meets_its_floors():
    """results/step_cpu.json, medians: speed and memory beside transformers.

    1.3 times transformers packed and 3.9 times padded with all tokens supervised, 1.6 and 4.7 times
    with 60%; 0.6 of its memory.
    """
    rows = json.loads((ROOT / "results" / "step_cpu.json").read_text())["rows"]

    def median(who, share, key):
        chosen = [r[key] for r in rows if r["contestant"] == who and r["supervised"] == share]
        return np.median(chosen)

    for share, packed, padded in ((1.0, 1.3, 3.9), (0.6, 1.6, 4.7)):
        ours = median("ours", share, "tokens_per_s")
        assert ours > packed * median("transformers, packed", share, "tokens_per_s")
        assert ours > padded * median("transformers, padded", share, "tokens_per_s")
        peak = median("transformers, packed", share, "peak_bytes")
        assert median("ours", share, "peak_bytes") < 0.6 * peak


def test_a_step_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """Ours decides the exit status. --check writes nothing."""
    import paper.step

    def run_alone(name, supervised, argv, seconds):
        assert 0 < seconds <= 3600
        if name == "ours" or "padded" in name:
            return None, "CUDA error"
        line = {"contestant": name, "supervised": supervised, "tokens_per_s": 1, "peak_bytes": 1}
        return line, None

    monkeypatch.setattr(paper.step, "run_alone", run_alone)
    said = refused(paper.step.main, "--rounds", 1, "--out", tmp_path)
    assert "ours failed: ours: CUDA error; ours: CUDA error" in said
    results = json.loads((tmp_path / "step_cpu.json").read_text())
    assert [row["contestant"] for row in results["rows"]] == 2 * ["transformers, packed"]
    assert results["not_run"]["transformers, padded"] == "CUDA error"

    refused(paper.step.main, "--check", "--out", tmp_path / "none")
    assert "transformers, packed ran" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_the_gpu_s_step_says_that_it_needs_one():
    import paper.step

    assert "needs a GPU" in refused(paper.step.main, "--model", "7b")
    assert "is not one of cpu, 7b, 13b" in refused(paper.step.main, "--model", "8b")
    assert "--rounds 0 is not above 0" in refused(paper.step.main, "--rounds", 0)
    assert "is not one of none, cheap, all" in refused(paper.step.main, "--recompute", "al")
