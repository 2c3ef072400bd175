"""Ctrl-C and SIGTERM: what a signal costs, who says so, and what a second one does."""

import hashlib
import json
import os
import signal
import subprocess
import threading
import time

import pytest
from conftest import ROOT, metrics

import train as train_module
from support.checkpoint import steps
from support.cli import ENDED_BY_CTRL_C
from support.ranks import Signals, leave_without_agent
from train import main


def send(number):
    os.kill(os.getpid(), number)


def lines_of(run):
    """A run's metrics, without what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("seconds", "tokens_per_s"):
            line.pop(name, None)
    return lines


class Interruption:
    """Sends SIGTERM when train.py calls a function for the count-th time."""

    def __init__(self, monkeypatch, name, count):
        real = getattr(train_module, name)
        self.calls = 0

        def function(*args):
            self.calls += 1
            if self.calls == count:
                send(signal.SIGTERM)
            return real(*args)

        monkeypatch.setattr(train_module, name, function)


def test_what_a_signal_costs(toy, tmp_path, capsys):
    """The rest of its step, or one step more; never a validation that had not begun.

    And whatever stopped the run, its metrics are in the end those of one that nothing stopped.
    """
    sizes = "--model toy --steps 6 --val_every 2 --batch_tokens 512 --micro_tokens 256".split()
    data = "--data", str(toy / "train.safetensors")

    def run(out):
        main([*data, *sizes, "--out", str(out)])

    def stopped(name, count):
        """(the last step that has a line, the last that has a validation)."""
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as stop:
            Interruption(monkeypatch, name, count)
            run(tmp_path / "run")
        assert stop.value.code == ENDED_BY_CTRL_C
        last = metrics(tmp_path / "run")[-1]["step"]
        assert steps(tmp_path / "run" / "checkpoints")[0] == last
        out, err = capsys.readouterr()
        assert "SIGTERM: finishing the step and saving\n" in err
        assert f"stopped by a signal after step {last}" in out
        validated = [line["step"] for line in lines_of(tmp_path / "run") if "val_loss" in line]
        return last, max(validated, default=0)

    # in the computing of step 1
    assert stopped("forward", 1) == (1, 0)
    # in step 2, behind the sums: the next question is that before the validation
    assert stopped("log_line", 1) == (2, 0)
    # The validation that step 2 owes comes first. In step 3, behind the sums: one step more, and
    # its validation is not begun.
    assert stopped("log_line", 1) == (4, 2)
    # while a validation runs, that of step 4: it ends, and so does the step after it
    assert stopped("validate", 1) == (5, 4)
    # in the last step
    assert stopped("forward", 1) == (6, 4)
    assert not (tmp_path / "run" / "hf").exists()
    run(tmp_path / "run")
    run(tmp_path / "whole")
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    weights = "hf/model-00001-of-00001.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_signal_before_the_first_step_does_not_wait():
    with Signals() as signals:
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
            time.sleep(5)
        signals.in_loop = True
        send(signal.SIGINT)
        time.sleep(0.01)
        assert signals.asked


def test_a_signal_is_answered_at_once(monkeypatch):
    """While the main thread is in no Python code, as it is in a step: here in two seconds of C."""
    said = []
    monkeypatch.setattr(Signals, "say", lambda _, text: said.append((time.monotonic(), text)))
    with Signals() as signals:
        signals.in_loop = True
        threading.Timer(0.05, lambda: send(signal.SIGTERM)).start()
        began = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 10_000_000)
        ended = time.monotonic()
    ((when, text),) = said
    assert text == "SIGTERM: finishing the step and saving"
    assert when - began < 0.8 * (ended - began)


def ends_after(*numbers_and_pauses):
    """The exit code of a process in the loop that gets these signals, after these seconds each."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(60)
    with Signals() as signals:
        signals.in_loop = True
        for pause, number in numbers_and_pauses:
            time.sleep(pause)
            send(number)
        time.sleep(0.3)
    os._exit(7 if signals.asked else 8)


def test_only_a_second_ctrl_c_quits_and_only_after_a_second():
    ctrl_c, term = signal.SIGINT, signal.SIGTERM
    # the terminal's and the agent's, at once
    assert ends_after((0, ctrl_c), (0.05, ctrl_c)) == 7
    assert ends_after((0, ctrl_c), (0.05, ctrl_c), (1.1, ctrl_c)) == ENDED_BY_CTRL_C
    # Slurm's and torchrun's
    assert ends_after((0, ctrl_c), (0, term), (1.1, term)) == 7
    assert ends_after() == 8


def test_a_rank_leaves_when_its_agent_has_died(monkeypatch):
    """A child that starts the watch, and whose parent then ends: a pipe closes when it leaves."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    left, held = os.pipe()
    agent = os.fork()
    if agent == 0:
        if os.fork() == 0:
            leave_without_agent()
            os.write(held, b"watching")
            time.sleep(30)
            os.write(held, b"still here")
            os._exit(0)
        time.sleep(0.3)
        os._exit(0)
    os.close(held)
    began = time.monotonic()
    with open(left, "rb") as pipe:
        assert pipe.read() == b"watching"
    assert time.monotonic() - began < 5
    os.waitpid(agent, 0)


# ---- a Slurm cluster

SAVED = "step 7/9 loss 1.0\nstopped by a signal after step 7; a checkpoint remains\nTraceback ..\n"
# What the script calls. srun's command is torchrun's: it is noted, and a run is played.
PLAYED = {
    "srun": """
        echo "$@" > srun.txt
        echo $$ > run.pid
        trap 'printf "$SAVED" >> openchat-42.log; exit 1' TERM
        $PLAY &
        wait $!
    """,
    "scontrol": """
        if [ "$1" = requeue ]; then echo "$2" > requeue.txt; else printf "node1\\nnode2\\n"; fi
    """,
    "scancel": """
        echo "$@" > scancel.txt
        kill -TERM "$(cat run.pid)"
    """,
}


def slurm(folder, play, signalled=False):
    """The exit code of docs/slurm.sh with a run that does this, and whether it was queued again."""
    folder.mkdir()
    for name, text in PLAYED.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    env = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PLAY": play,
        "SAVED": SAVED,
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
    }
    (folder / "openchat-42.log").touch()
    script = ["bash", ROOT / "docs" / "slurm.sh", "--data", "a b.safetensors", "--model", "toy"]
    job = subprocess.Popen(script, cwd=folder, env=env)
    if signalled:
        while not (folder / "run.pid").is_file():
            time.sleep(0.01)
        time.sleep(0.2)
        job.terminate()
    return job.wait(30), (folder / "requeue.txt").is_file()


def test_the_slurm_script_goes_back_into_the_queue(tmp_path):
    """Where the run has saved and was not at its end; not where it failed or was done."""
    assert slurm(tmp_path / "stopped", "sleep 20", signalled=True) == (1, True)
    assert (tmp_path / "stopped" / "requeue.txt").read_text() == "42\n"
    assert (tmp_path / "stopped" / "scancel.txt").read_text() == "--signal=TERM 42\n"
    assert slurm(tmp_path / "failed", "false") == (1, False)
    assert slurm(tmp_path / "done", "true") == (0, False)


def test_the_slurm_script_starts_what_torchrun_knows(tmp_path):
    from torch.distributed.run import get_args_parser

    slurm(tmp_path / "done", "true")
    words = (tmp_path / "done" / "srun.txt").read_text().split()
    assert words[0] == "torchrun"
    found = get_args_parser().parse_args(words[1:])
    assert found.rdzv_endpoint == "node1:29500"
    assert found.rdzv_id == "42"
    assert found.nnodes == "2"
    assert found.training_script == "train.py"
    assert found.training_script_args == ["--data", "a", "b.safetensors", "--model", "toy"]
