"""One run per folder: the lock, who waits for it and how long."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, metrics

from support import lock as lock_module
from support.lock import Lock, only_run

HOST = socket.gethostname()


@pytest.fixture
def impatient(monkeypatch):
    """Who waits gives up within a second, whoever holds the lock."""
    monkeypatch.setattr(lock_module, "HERE", 0.5)
    monkeypatch.setattr(lock_module, "ELSEWHERE", 0.5)
    monkeypatch.setattr(lock_module, "PAUSE", 0.05)


@contextlib.contextmanager
def holding(out, then=lambda: time.sleep(60)):
    """For `with`: a child that holds the lock, and its number."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        # a child that hangs is found
        signal.alarm(60)
        try:
            with only_run(out):
                os.write(tell, b".")
                then()
        finally:
            os._exit(0)
    os.read(ready, 1)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_second_run_is_told_who_writes_there(tmp_path, impatient, capfd):
    with holding(tmp_path) as child:
        with pytest.raises(ValueError) as error, only_run(tmp_path):
            pass
        assert f"{tmp_path} is written by process {child} on {HOST} since 2" in str(error.value)
        assert f": {sys.argv[0]}" in str(error.value)
        assert "wait for it, stop it, or give another --out" in str(error.value)
        assert "waiting up to 0.5 s" in capfd.readouterr().err

        # killed, and at once the next: the kernel frees the lock
        os.kill(child, signal.SIGKILL)
        with only_run(tmp_path):
            assert json.loads((tmp_path / "lock").read_text())["process"] == str(os.getpid())


def test_a_run_waits_for_one_that_is_leaving(tmp_path):
    with holding(tmp_path, then=lambda: time.sleep(0.3)), only_run(tmp_path):
        pass
    assert (tmp_path / "lock").is_file()


def test_how_long_it_waits_depends_on_the_host(tmp_path, impatient, monkeypatch):
    """The host is what the file says; a file that says nothing counts as this one's."""
    monkeypatch.setattr(lock_module, "ELSEWHERE", 1000)
    lock = Lock(tmp_path)
    with holding(tmp_path):
        text = (tmp_path / "lock").read_text()
        (tmp_path / "lock").write_text(text.replace(HOST, "another"))
        assert lock.take() is False
        lock.began -= 999
        assert lock.take() is False
        lock.began -= 2
        with pytest.raises(ValueError, match="on another since"):
            lock.take()
        for text in ("", "\0\xff", "[" * 10**5, "[]", "{}", "3"):
            (tmp_path / "lock").write_text(text)
            with pytest.raises(ValueError, match="is written by another run; wait"):
                lock.take()


def test_a_child_of_a_dead_run_holds_nothing(tmp_path, impatient):
    """A child that the run has forked shares its open files, and may outlive it."""
    told, tell = os.pipe()

    def fork_and_wait():
        grandchild = os.fork()
        if grandchild:
            os.write(tell, str(grandchild).encode())
        time.sleep(60)

    with holding(tmp_path, fork_and_wait) as child:
        grandchild = int(os.read(told, 20))
        os.kill(child, signal.SIGKILL)
        try:
            with only_run(tmp_path):
                os.kill(grandchild, 0)
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_one_after_the_other_in_one_process(tmp_path, impatient):
    """Also after one that has failed."""
    with pytest.raises(RuntimeError), only_run(tmp_path / "new"):
        raise RuntimeError
    with only_run(tmp_path / "new"), pytest.raises(ValueError), only_run(tmp_path / "new"):
        pass
    with only_run(tmp_path / "new"):
        pass


def test_where_the_file_system_cannot_lock_the_run_goes_on(tmp_path, monkeypatch, capfd):
    def flock(_file, _how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_run(tmp_path):
        pass
    (line,) = capfd.readouterr().err.splitlines()
    assert "this file system cannot lock (No locks available)" in line


@pytest.mark.long
def test_two_real_runs_three_seconds_apart(toy, tmp_path):
    """The second is refused, and the first does not notice.

    Then the first is killed, and at once a third goes on from its last checkpoint.
    """
    out = tmp_path / "run"
    sizes = "--model toy --batch_tokens 512 --micro_tokens 256 --save_every 5".split()
    command = [sys.executable, "train.py", "--data", toy / "train.safetensors", "--out", out]

    def start(steps):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        flags = [*sizes, "--steps", steps]
        return subprocess.Popen(
            [*map(str, command), *map(str, flags)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(count):
        until = time.monotonic() + 200
        while not (out / "metrics.jsonl").is_file() or len(metrics(out)) < count:
            assert first.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)

    first = start(1500)
    wait_for(1)
    second = start(1500)
    err = second.communicate(timeout=200)[1]
    waiting, refusal = err.splitlines()
    assert second.returncode == 1
    assert "waiting up to 15 s" in waiting
    assert f"is written by process {first.pid} on {HOST}" in refusal
    assert "train.py --data" in refusal

    wait_for(12)
    first.kill()
    third = start(1500)
    err = third.communicate(timeout=400)[1]
    first.communicate()
    assert third.returncode == 0, err
    assert [line["step"] for line in metrics(out)] == list(range(1, 1501))
