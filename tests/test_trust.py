"""What stands on a disk is not trusted: pickles run nothing, numbers are finite, logs stop no run.

And a disk that is full is named.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import pickle
import resource
import struct
import sys
import termios

import pytest
import torch
from conftest import metrics, refused
from test_survival import all_lines, data_of, lone, stepped, tiny, train

import train as train_module
from support.checkpoint import Checkpoints, digest, steps
from support.checkpoint import fault as fault_of
from support.cli import one_line
from support.export import write_weights
from support.files import write_json, written_whole
from support.kept import KeptAnswers
from support.metrics import Log
from train import main

# ---- what a checkpoint says is not run


class Call:
    """Its pickle makes a folder when it is read: a call that a stranger has planted."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def saved(root, *models):
    """A checkpoint of a model and its optimizer, as step 1."""
    stepped(*models)
    Checkpoints(root, {}, 2).save(1, *models)
    return root / "step-1"


def vouch(checkpoint):
    """Write a manifest that calls the files whole that now stand there."""
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        raw = (checkpoint / name).read_bytes()
        entry |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    content = {"sha256": digest(manifest)} | manifest
    (checkpoint / "MANIFEST.json").write_text(json.dumps(content, indent=1))


def refused_to_load(root, *models):
    """What the loading of the newest checkpoint says, which must be found whole."""
    checkpoints = Checkpoints(root, {}, 2)
    path, step = checkpoints.newest()
    assert step == 1
    with pytest.raises(ValueError) as error:
        checkpoints.load(path, *models)
    assert "\n" not in str(error.value)
    assert "nothing in it was run" in str(error.value)
    return str(error.value)


def test_a_call_in_the_metadata_is_not_made(tmp_path):
    """Nor is any other thing there taken that DCP does not write."""
    witness = tmp_path / "witness"
    path = saved(tmp_path / "root", *tiny())
    whole = (path / ".metadata").read_bytes()
    metadata = pickle.loads(whole)
    metadata.planner_data = Call(witness)
    with_call = pickle.dumps(metadata)
    for raw, said in (
        (with_call, f"{path}/.metadata is not as torch.distributed.checkpoint writes it (it names"),
        (with_call, "posix.mkdir"),
        (pickle.dumps(Call(witness)), "posix.mkdir"),
        (pickle.dumps({"a": 1}), "it holds a dict"),
        (whole[:100], "truncated"),
        (b"", "Ran out of input"),
    ):
        (path / ".metadata").write_bytes(raw)
        vouch(path)
        assert said in refused_to_load(tmp_path / "root", *tiny())
    assert not witness.exists()

    # a shard's place outside of the folder
    metadata = pickle.loads(whole)
    for shard in metadata.storage_data.values():
        shard.relative_path = "../step-0/" + shard.relative_path
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    vouch(path)
    assert "outside its folder" in refused_to_load(tmp_path / "root", *tiny())


def test_a_call_in_the_optimizer_s_settings_is_not_made(tmp_path):
    """DCP keeps them as pickles, and would load them by a torch.load that runs what they say."""
    witness = tmp_path / "witness"
    model, optimizer = tiny()
    stepped(model, optimizer)
    optimizer.param_groups[0]["foreach"] = Call(witness)
    Checkpoints(tmp_path / "root", {}, 2).save(1, model, optimizer)
    again = tiny()
    stepped(*again)
    said = refused_to_load(tmp_path / "root", *again)
    assert "the checkpoint's optimizer.param_groups" in said
    assert "posix.mkdir" in said
    assert not witness.exists()


def test_a_manifest_that_vouches_for_too_little_is_a_fault(tmp_path):
    """One that names a file outside, or no file; and one that cannot be read."""
    path = saved(tmp_path / "root", *tiny())
    manifest = json.loads((path / "MANIFEST.json").read_text())
    del manifest["sha256"]
    entry = {"bytes": 1, "sha256": ""}
    for files, said in (({}, "does not list .metadata"), ({"../x": entry}, "outside its folder")):
        content = manifest | {"files": files}
        text = json.dumps({"sha256": digest(content)} | content, indent=1)
        (path / "MANIFEST.json").write_text(text)
        assert said in fault_of(path)
    for content in (
        {k: v for k, v in manifest.items() if k != "identity"},
        manifest | {"identity": []},
    ):
        text = json.dumps({"sha256": digest(content)} | content, indent=1)
        (path / "MANIFEST.json").write_text(text)
        assert "MANIFEST.json" in fault_of(path)
    for raw in (b"[" * 10**5, b"1" * 10**4, b'{"files": 3}', b"\xff"):
        (path / "MANIFEST.json").write_bytes(raw)
        assert "MANIFEST.json changed" in fault_of(path)
    # nobody writes into the pipe: who opened it would wait for ever
    (path / "MANIFEST.json").unlink()
    os.mkfifo(path / "MANIFEST.json")
    assert fault_of(path) == "MANIFEST.json missing"


# ---- numbers


def test_a_checkpoint_holds_finite_numbers_only(tmp_path):
    """Whatever the loss was: a NaN or an infinity in a weight or a moment, of any rank."""
    model, optimizer = tiny()
    stepped(model, optimizer)
    checkpoints = Checkpoints(tmp_path, {}, 2, background=True)
    checkpoints.save(3, model, optimizer)
    moment = optimizer.state[model[1].bias]["exp_avg_sq"]
    for tensor, name in (
        (model[0].weight, "model.0.weight"),
        (moment, "optimizer.state.1.bias.exp_avg_sq"),
    ):
        numbers = tensor.detach().flatten()
        kept = numbers[-1].item()
        for value in (math.nan, math.inf, -math.inf):
            numbers[-1] = value
            with pytest.raises(ValueError) as error:
                checkpoints.save(4, model, optimizer)
            assert f"step 4: {name} is not finite" in str(error.value)
            assert f"the newest whole one is {tmp_path}/step-3" in str(error.value)
            assert "Lower --lr, under a new --out" in str(error.value)
        numbers[-1] = kept
    assert steps(tmp_path) == [3]
    checkpoints.save(4, model, optimizer)
    checkpoints.wait()
    assert steps(tmp_path) == [4, 3]

    # what another rank finds counts as one's own
    checkpoints.gather = lambda value: [value, "model.far.weight"]
    with pytest.raises(ValueError, match="model.far.weight is not finite"):
        checkpoints.save(5, model, optimizer)


SIX_STEPS = "--model", "toy", "--steps", 6, "--batch_tokens", 512


def test_a_weight_that_is_not_finite_stops_the_run(toy, tmp_path, monkeypatch):
    """With --nonfinite skip too: it is no accident of one step. Nothing is published."""
    optimizers = []
    make = train_module.make_optimizer
    real = train_module.log_line

    def make_optimizer(*args):
        optimizers.append(make(*args))
        return optimizers[-1]

    def log_line(step, *rest):
        if step == 4:
            embedding = optimizers[0].param_groups[0]["params"][0]
            embedding.detach()[0, 0] = math.inf
        return real(step, *rest)

    monkeypatch.setattr(train_module, "make_optimizer", make_optimizer)
    monkeypatch.setattr(train_module, "log_line", log_line)
    out = tmp_path / "run"
    flags = "--out", out, *SIX_STEPS, "--save_every", 2, "--nonfinite", "skip"
    err = refused(main, *data_of(toy), *flags)
    assert "step 4: model.model.embed_tokens.weight is not finite" in err
    assert f"the newest whole one is {out}/checkpoints/step-2" in err
    assert steps(out / "checkpoints") == [2]
    assert not (out / "hf").exists()
    assert len(metrics(out)) == 4


def test_an_export_holds_finite_numbers_only(tmp_path):
    """Also where only the export's dtype makes them infinite."""
    model = lone(1, "none")
    named = dict(model.named_parameters())
    named["model.norm.weight"].detach()[0] = 3.4e38
    write_weights(tmp_path, model.config, named.items(), torch.float32)
    with pytest.raises(ValueError, match=r"model.norm.weight is not finite in torch.bfloat16"):
        write_weights(tmp_path, model.config, named.items(), torch.bfloat16)


def test_settings_that_fp32_cannot_hold_are_refused(toy, tmp_path):
    flags = *data_of(toy), "--out", tmp_path / "run", *SIX_STEPS
    for name in ("lr", "eps", "clip"):
        for value in ("1e-46", "1e39", "nan", "inf", "0"):
            assert f"--{name} " in refused(main, *flags, f"--{name}", value)
    for name in ("epochs", "batch_tokens", "micro_tokens"):
        for value in (0, -1, 10**9, 10**30):
            assert f"--{name} " in refused(main, *flags, f"--{name}", value)
    many = "--batch_tokens", 256 * 4096 + 1, "--micro_tokens", 256
    assert "more than 4,096 micro-batches of --micro_tokens 256" in refused(main, *flags, *many)
    assert not (tmp_path / "run").exists()


# ---- logs

# One line each, of which a log may hold any.
FOREIGN = (
    b"\xff\xfe\x00 \x80",
    b"[" * 100_000,
    b"1" * 10_000,
    b"null",
    b'{"loss": 1.0}',
    b'{"step": "3", "loss": 1.0}',
    b'{"step": true, "loss": 1.0}',
    b'{"step": NaN, "loss": 1.0}',
    b'{"step": -1, "loss": 1.0}',
    b'{"step": 2.0, "loss": 1.0}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b'{"step": 1, "loss": 1.0, "loss_by_cl',
)
# A step's line whose values are none.
STRANGE = (
    b'{"step": 1, "loss_by_class": {"$x_{": 1e999, "GPT4": "high", "A": null, "B": [2]}}',
    b'{"step": 2, "loss_by_class": {"C": 1.0, "GPT4": 1' + b"0" * 400 + b"}}",
    b'{"step": 2, "val_loss": "low", "val_loss_by_class": 7}',
    b'{"step": 3, "skipped": [], "\\ud800": "\\ud800"}',
)


def test_a_log_stops_no_run(tmp_path, capsys):
    """Whatever bytes stand in metrics.jsonl: they are read past, by a run and by plot."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*FOREIGN, *STRANGE]))
    log = Log(tmp_path, start=2, steps=9)
    log.write({"step": 3, "val_loss": 1.0, "val_loss_by_class": {"GPT4": 1.0}})
    log.file.close()
    assert [line["step"] for line in all_lines(tmp_path)] == [1, 2, 2, 3]
    assert log.validated == {2}

    path.write_bytes(b"\n".join([*FOREIGN, *STRANGE]))
    capsys.readouterr()
    train("plot", tmp_path)
    assert capsys.readouterr().out == f"drew {tmp_path}/loss.png\n"
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    path.write_bytes(b"\n".join(FOREIGN))
    assert "no step in it yet" in refused(main, "plot", tmp_path)


def test_a_terminal_of_0_columns_gets_lines(tmp_path, monkeypatch, capsys):
    """Some programs run others in a terminal that they have given no size."""
    inside, outside = os.openpty()
    assert os.get_terminal_size(outside).columns == 0
    with open(outside, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        log = Log(tmp_path, start=0, steps=9)
        assert log.bar.disable
        line = {"loss": 1.0, "loss_by_class": {}, "lr": 1.0, "tokens_per_s": 1.0}
        log.write({"step": 1, **line, "supervised_tokens": 1, "tokens": 2})
        assert "step 1/9 loss 1.0000" in capsys.readouterr().out

        fcntl.ioctl(outside, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        assert not Log(tmp_path, start=0, steps=9).bar.disable
    os.close(inside)


def test_a_full_disk_names_the_file(tmp_path):
    log = Log(tmp_path, start=0, steps=9)
    log.file.close()
    log.file = open("/dev/full", "a", buffering=1)
    with pytest.raises(OSError) as error:
        log.write({"step": 1, "nonfinite": "x"})
    assert one_line(error.value) == (
        f"{tmp_path}/metrics.jsonl: No space left on device; free space or choose another folder"
    )
    # what is still to be written goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), log.file.fileno())
    log.file.close()


def test_small_files_that_do_not_fit_are_named_too(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError) as error:
        write_json(tmp_path / "config.json", {})
    assert one_line(error.value).startswith(f"{tmp_path}/config.json: No space left on device")
    with pytest.raises(OSError) as error, written_whole(tmp_path / "answers.jsonl") as partial:
        partial.write_bytes(b"")
    assert one_line(error.value).startswith(f"{tmp_path}/answers.jsonl: No space left on device")
    assert not list(tmp_path.iterdir())


def test_answers_that_do_not_fit_name_their_file(tmp_path):
    """A limit on the size of files stands for the disk."""
    with pytest.raises(OSError) as error, KeptAnswers(tmp_path / "out", {}, 9) as kept:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        try:
            kept.part("").add([0], [([1], "stop")], ["a" * 9000])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_line(error.value).startswith(f"{tmp_path}/out.partial: File too large; free space")


def test_the_remedy_is_that_of_the_error():
    def said(number):
        return one_line(OSError(number, os.strerror(number), "x"))

    assert (
        said(errno.EACCES) == "x: Permission denied; change its permissions, or give another path"
    )
    assert said(errno.EISDIR) == "x: Is a directory; give another path"
    assert said(errno.ENOSPC).endswith("; free space or choose another folder")


def test_an_export_that_does_not_fit_names_the_file(tmp_path):
    """A limit on the size of files stands for the disk."""
    model = lone(1, "none")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ValueError) as error:
            write_weights(tmp_path, model.config, model.named_parameters(), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = one_line(error.value)
    assert f"{tmp_path}/model-00001-of-00001.safetensors could not be written" in said
    assert "free space or choose another folder" in said
