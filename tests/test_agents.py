"""Nodes that die and come back: two of torchrun's agents on one machine, each a node.

The first holds the store in which the agents meet. All of these take a minute or two.
"""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import call, metrics
from faults import agent, port, weights

pytestmark = pytest.mark.long

# as docs/training.md has it
SETTING = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SIZES = "--steps 60 --batch_tokens 512 --micro_tokens 256 --save_every 10 --exact".split()
PATIENCE = 300


@pytest.fixture(scope="module")
def flags(toy):
    return "--data", toy / "train.safetensors", "--model", "toy", *SIZES


@pytest.fixture(scope="module")
def alone(toy, flags):
    """The same run on one process, which nothing disturbs."""
    out = toy / "alone"
    call("train.py", "--out", out, *flags)
    return out


class Nodes:
    """Two lines of torchrun for one run; they are started and ended one by one."""

    def __init__(self, out, flags, endpoint, *more):
        self.out = out
        self.flags = flags
        meeting = "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--rdzv_id=nodes", *more
        self.line = ["--nproc_per_node=1", "--nnodes=2", "--local_addr=127.0.0.1", *meeting]
        self.log = open(f"{out}.log", "a")
        self.started = []

    def start(self):
        node = agent(self.out, self.line, self.flags, self.log, restarts=3, **SETTING)
        self.started.append(node)
        return node

    def ranks_of(self, node):
        return [int(pid) for pid in children(node.pid).read_text().split()]

    def step(self):
        """The last step that stands in the log."""
        try:
            return metrics(self.out)[-1]["step"]
        except (OSError, IndexError, ValueError):
            return 0

    def wait_for_step(self, step):
        until = time.monotonic() + PATIENCE
        while self.step() < step:
            assert time.monotonic() < until, self.printed()
            time.sleep(0.05)

    def printed(self):
        return Path(self.log.name).read_text()

    def end(self):
        for node in self.started:
            if node.poll() is None:
                ranks = self.ranks_of(node)
                node.kill()
                node.wait()
                for rank in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGKILL)


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children")


def seconds_until_gone(pids):
    began = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < began + 60
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture
def nodes(tmp_path, flags):
    """endpoint and flags -> two nodes that have taken 15 steps."""
    made = []

    def start(endpoint, *more):
        pair = Nodes(tmp_path / "run", flags, endpoint, *more)
        made.append(pair)
        host = pair.start()
        # long enough that it is the one which holds the store
        time.sleep(8)
        other = pair.start()
        pair.wait_for_step(15)
        return pair, host, other

    yield start
    for pair in made:
        pair.end()


def finished(pair, *still, alone):
    """All agents that are left end well, and the run is the one that nothing disturbed."""
    for node in still:
        assert node.wait(PATIENCE) == 0, pair.printed()
    losses = [line["loss"] for line in metrics(pair.out)]
    assert losses == [line["loss"] for line in metrics(alone)]
    assert weights(pair.out) == weights(alone)


@pytest.mark.parametrize("how", ["killed with its ranks", "killed alone", "terminated"])
def test_a_node_that_is_started_again_goes_on(nodes, alone, how):
    """Its line is started again, alone; the other node's goes on by itself."""
    pair, host, other = nodes(f"127.0.0.1:{port()}")
    ranks = pair.ranks_of(other)
    assert len(ranks) == 1
    if how == "terminated":
        other.terminate()
    else:
        other.kill()
    if how == "killed with its ranks":
        os.kill(ranks[0], signal.SIGKILL)
    other.wait(60)
    if how == "killed alone":
        # a rank whose agent has died leaves by itself
        assert seconds_until_gone(ranks) < 5
        assert re.search(r"rank \d leaves: the torchrun that started it is gone", pair.printed())
    if how == "terminated":
        assert "SIGTERM: finishing the step and saving" in pair.printed()
        assert "stopped by a signal after step" in pair.printed()
    assert pair.step() < 60

    again = pair.start()
    finished(pair, host, again, alone=alone)


def test_the_node_that_holds_the_store(nodes, alone):
    """With it the others go: each says so in a line, and all lines are started again."""
    pair, host, other = nodes(f"127.0.0.1:{port()}")
    ranks = pair.ranks_of(host)
    began = time.monotonic()
    host.kill()
    os.kill(ranks[0], signal.SIGKILL)
    assert other.wait(90) == 1
    assert time.monotonic() - began < 90
    (line,) = re.findall(r"^faults.py: .*", pair.printed(), re.M)
    assert "lost another rank" in line
    assert "The same command resumes from the last checkpoint" in line
    finished(pair, pair.start(), pair.start(), alone=alone)


def test_a_store_in_a_file_needs_no_host(nodes, alone, tmp_path):
    """On a file system that all nodes share and that locks: then any node may go."""
    pair, host, other = nodes(tmp_path / "meet", "--rdzv_conf=store_type=file")
    ranks = pair.ranks_of(host)
    host.kill()
    os.kill(ranks[0], signal.SIGKILL)
    host.wait()
    finished(pair, other, pair.start(), alone=alone)
