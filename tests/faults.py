"""Faults in real torchrun jobs: ranks killed at chosen moments, full disks, broken checkpoints.

    python tests/faults.py [JOBS] [FAULTS]

10 jobs of 10 random faults each on 2 ranks, in torchrun's launch modes in turn.

torchrun starts this file in place of train.py: `victim` plants the faults of this attempt and calls
train.main. Every rank writes a journal of the data that its steps used, so that `history` can tell
whether the disturbed run saw what the undisturbed one saw.
"""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

KILLS = (
    "forward",
    "after_backward",
    "after_step",
    "save_begins",
    "torn_shard",
    "before_rename",
    "after_rename",
)
FULL = ("full_disk", "full_at_manifest")
# of the newest checkpoint, before the attempt looks for it
BROKEN = ("flipped_byte", "truncated_shard", "shard_of_another_step")


# ---- inside the job


def victim():
    """train.py, with this attempt's fault planted in it."""
    import train
    from support.cli import run

    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    plan = json.loads(os.environ["FAULTS"])
    fault = plan[attempt] if attempt < len(plan) else {"kind": None}
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    rank = int(os.environ["RANK"])
    broken = fault["kind"] in BROKEN
    if broken:
        if rank == 0:
            broken = break_newest(out / "checkpoints", fault["kind"], random.Random(attempt))
        else:
            broken = False
        # the attempt that found it dies too, for the next fault
        fault["kind"] = "after_step"

    attempt_of_rank = Attempt(fault, rank, out, broken)
    attempt_of_rank.plant_kills()
    attempt_of_rank.plant_full_disks()
    attempt_of_rank.keep_journal()
    run(train.main)


class Attempt:
    """One rank's part of an attempt: its fault, the steps it has taken, its journal."""

    def __init__(self, fault, rank, out, broken):
        self.fault = fault
        self.rank = rank
        self.broken = broken
        self.start = 0
        self.count = 0
        self.journal = open(out.parent / f"{out.name}.rank{rank}.jsonl", "a", buffering=1)

    def note(self, **entry):
        self.journal.write(json.dumps(entry) + "\n")

    def due(self, kind):
        if self.fault["kind"] != kind or self.rank != self.fault["rank"]:
            return False
        return self.count >= self.fault["after"]

    def at(self, kind):
        """Where the fault of this kind happens, if it is due."""
        if self.due(kind):
            os.kill(os.getpid(), signal.SIGSTOP if kind == "hang" else signal.SIGKILL)

    def full(self, kind):
        if self.due(kind):
            raise OSError(errno.ENOSPC, "No space left on device")

    def plant_kills(self):
        import train
        from support.checkpoint import FileSystemWriter

        def before_forward(*_):
            self.at("forward")
            self.at("hang")

        def tear(writer, *_):
            if self.due("torn_shard"):
                for shard in Path(writer.path).glob(f"__{self.rank}_*"):
                    os.truncate(shard, shard.stat().st_size // 3)
            self.at("torn_shard")

        def before_rename(path, *_):
            if is_partial(path):
                self.at("before_rename")

        def after_rename(path, *_):
            if is_partial(path):
                self.at("after_rename")

        around(train, "forward", before=before_forward)
        around(train.Tally, "add", before=lambda *_: self.at("after_backward"))
        around(FileSystemWriter, "write_data", before=lambda *_: self.at("save_begins"), after=tear)
        around(Path, "rename", before=before_rename, after=after_rename)

    def plant_full_disks(self):
        from support.checkpoint import HashedFile

        def before_text(path, *_):
            if path.name == "MANIFEST.json":
                self.full("full_at_manifest")

        around(HashedFile, "write", before=lambda *_: self.full("full_disk"))
        around(Path, "write_text", before=before_text)

    def keep_journal(self):
        """Where the attempt begins, what data each step used, which steps were saved."""
        import train
        from support.checkpoint import Checkpoints

        newest = Checkpoints.newest
        real_step = train.train_step

        def found(checkpoints):
            path, self.start = newest(checkpoints)
            self.note(start=self.start, broken=self.broken, time=time.time())
            return path, self.start

        def step(model, optimizer, batches, *args):
            seen = []
            norm = real_step(model, optimizer, noted(batches, seen), *args)
            self.count += 1
            number = self.start + self.count
            self.note(step=number, job=os.environ["JOB"], seen=seen, time=time.time())
            self.at("after_step")
            return norm

        def saved(_checkpoints, number, _state):
            self.note(saved=number)

        Checkpoints.newest = found
        train.train_step = step
        around(Checkpoints, "_write", after=saved)


def around(owner, name, before=None, after=None):
    """Let the method or function call before(*its arguments) and after(*its arguments)."""
    real = getattr(owner, name)

    def planted(*args, **kwargs):
        if before:
            before(*args)
        result = real(*args, **kwargs)
        if after:
            after(*args)
        return result

    setattr(owner, name, planted)


def is_partial(path):
    """Whether this is the folder of a checkpoint that is being written."""
    return ".partial" in str(path) and path.name.startswith("step-")


def noted(batches, seen):
    """The same batches; the hash of each goes to `seen`, but for those of an idle rank."""
    for batch in batches:
        if batch.weights_T.any():
            raw = batch.tokens_T.numpy().tobytes() + batch.weights_T.numpy().tobytes()
            seen.append(hashlib.sha256(raw).hexdigest())
        yield batch


def break_newest(root, kind, rng):
    """Whether the newest checkpoint was broken; it is left alone where it is the only one."""
    from support.checkpoint import fault, steps

    whole = [step for step in steps(root) if fault(root / f"step-{step}") is None]
    if len(whole) < 2:
        return False
    shards = sorted((root / f"step-{whole[0]}").glob("*.distcp"))
    shard = rng.choice(shards)
    raw = bytearray(shard.read_bytes())
    if kind == "flipped_byte":
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == "truncated_shard":
        raw = raw[: rng.randrange(len(raw))]
    else:
        raw = (root / f"step-{whole[1]}" / shard.name).read_bytes()
    shard.write_bytes(raw)
    return True


# ---- around it


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def agents(mode, ranks):
    """The flags of each torchrun that forms the job in this launch mode."""
    number = port()
    ranks_here = f"--nproc_per_node={ranks}"
    if mode == "standalone":
        return [[ranks_here, "--standalone"]]
    if mode == "static":
        master = ["--master_addr=127.0.0.1", f"--master_port={number}"]
        return [[ranks_here, "--nnodes=1", *master]]
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{number}"]
    if mode == "c10d":
        return [[ranks_here, "--nnodes=1", *meeting]]
    assert mode == "two agents"
    agent = [ranks_here, "--nnodes=2", *meeting, "--rdzv_id=faults", "--local_addr=127.0.0.1"]
    return [agent, agent]


def agent(out, flags, words, file, plan=(), restarts=0, **env):
    """Start a torchrun with these flags, whose ranks run `victim`; it prints into the file."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "FAULTS": json.dumps(plan),
        "JOB": "0",
        "PYTHONPATH": str(ROOT),
        **env,
    }
    env.pop("TRITON_INTERPRET", None)
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += [f"--max_restarts={restarts}", "--monitor_interval=0.1", *flags]
    command = [*torchrun, __file__, "--out", str(out), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)


def job(out, plan, words, ranks=2, mode="standalone", timeout=900, restarts=None, ok=True):
    """Run train.py's words under torchrun with a fault in each attempt; returns what it printed.

    As many restarts as faults, or `restarts`. It must end with exit code 0, or with another one
    where ok is False.
    """
    if restarts is None:
        restarts = len(plan)
    log = Path(f"{out}.log")
    number = str(time.time())
    with open(log, "a") as file:
        started = []
        for flags in agents(mode, ranks):
            started.append(agent(out, flags, words, file, plan, restarts, JOB=number))
        try:
            codes = [process.wait(timeout) for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    # it takes its ranks with it, which kill would leave behind
                    process.terminate()
                    process.wait(60)
    printed = log.read_text()
    for code in codes:
        assert (code == 0) == ok, f"{mode}, {plan}: {codes}\n{printed[-6000:]}"
    return printed


def journals(out):
    """The journal of each rank; a line that a kill has torn is left out."""
    out = Path(out)
    found = []
    for path in sorted(out.parent.glob(f"{out.name}.rank*.jsonl")):
        lines = path.read_text().splitlines()
        found.append([json.loads(line) for line in lines if line.endswith("}")])
    return found


def history(out):
    """A hash chain over the data that the steps used, in the steps' order.

    Of a step that was taken again, the last time counts.
    """
    # {step: {rank: (job, hashes)}}
    taken = {}
    for rank, lines in enumerate(journals(out)):
        for line in lines:
            if "step" in line:
                taken.setdefault(line["step"], {})[rank] = line["job"], line["seen"]
    assert sorted(taken) == list(range(1, len(taken) + 1)), f"steps {sorted(taken)}"

    chain = hashlib.sha256()
    for step, ranks in sorted(taken.items()):
        # a rank that this job has no more may have taken the step in an earlier one
        last = max(job for job, _ in ranks.values())
        used = []
        for job, hashes in ranks.values():
            if job == last:
                used += hashes
        for one in sorted(used):
            chain.update(f"{step} {one}".encode())
    return chain.hexdigest()


def check_starts(out):
    """Every attempt begins at the last checkpoint that was saved.

    Or at a later one, whose save was cut after its rename; or at an earlier one, where the last was
    broken. Returns the seconds from one attempt's last sign to the next one's first.
    """
    last = 0
    waits = []
    clock = None
    for line in journals(out)[0]:
        if "start" in line:
            start = line["start"]
            is_right = start >= last or line["broken"]
            assert is_right, f"an attempt begins at {start}, but {last} had been saved"
            if clock:
                waits.append(line["time"] - clock)
        last = line.get("start", line.get("saved", last))
        clock = line.get("time", clock)
    return waits


def weights(out):
    raw = (Path(out) / "hf" / "model-00001-of-00001.safetensors").read_bytes()
    return hashlib.sha256(raw).hexdigest()


# ---- a hundred at random


def random_plan(rng, count, ranks):
    plan = []
    for _ in range(count):
        kind = rng.choice(KILLS * 2 + FULL + BROKEN)
        after = rng.randrange(1, 5)
        # these happen on rank 0 only
        if kind in ("before_rename", "after_rename", "full_at_manifest"):
            rank = 0
        else:
            rank = rng.randrange(ranks)
        plan.append({"kind": kind, "after": after, "rank": rank})
    return plan


def main(jobs=10, faults=10):
    work = Path(tempfile.mkdtemp())
    toy = [sys.executable, "-m", "paper.toy", "--out", work]
    subprocess.run(toy, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    settings = "--steps 60 --batch_tokens 512 --micro_tokens 256 --save_every 2 --keep 3".split()
    words = ["--data", work / "train.safetensors", "--model", "toy", *settings]

    job(work / "whole", [], words)
    whole = weights(work / "whole"), history(work / "whole")
    print(f"undisturbed: weights {whole[0][:12]}, data {whole[1][:12]}", flush=True)

    for number in range(jobs):
        plan = random_plan(random.Random(number), faults, 2)
        out = work / f"job{number}"
        began = time.time()
        job(out, plan, words, mode=("standalone", "static", "c10d")[number % 3])
        same = (weights(out), history(out)) == whole
        waits = check_starts(out)

        kinds = " ".join(fault["kind"] for fault in plan)
        verdict = "same bits, same data" if same else "DIFFERENT"
        print(
            f"job {number}: {kinds}: {verdict}, {len(waits)} restarts, the longest "
            f"{max(waits):.0f} s, {time.time() - began:.0f} s in all",
            flush=True,
        )
        assert same
        assert len(waits) == len(plan), "a fault that did not happen"
        assert max(waits) < 60, "a restart that took a minute"
    shutil.rmtree(work)


if __name__ == "__main__":
    if "RANK" in os.environ:
        victim()
    else:
        main(*map(int, sys.argv[1:]))
