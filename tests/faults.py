"""Faults in real torchrun jobs: ranks killed at chosen moments, full disks, broken checkpoints.

    python tests/faults.py [JOBS] [FAULTS]     10 jobs of 10 random faults each on 2 ranks, in torchrun's launch modes in turn

torchrun starts this file in place of train.py: `victim` plants the faults of this attempt and calls train.main. Every rank writes
down which data its steps used, so that `history` can tell whether the disturbed run saw what the undisturbed one saw.
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
    import train
    from support.checkpoint import Checkpoints, FileSystemWriter, HashedFile
    from support.cli import run

    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    plan = json.loads(os.environ["FAULTS"])
    fault = plan[attempt] if attempt < len(plan) else {"kind": None}
    broken = fault["kind"] in BROKEN
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    count, start = 0, 0

    def due(kind):
        return fault["kind"] == kind and count >= fault["after"] and rank == fault["rank"]

    def at(kind):
        if due(kind):
            os.kill(os.getpid(), signal.SIGSTOP if kind == "hang" else signal.SIGKILL)

    def around(owner, name, before=None, after=None):
        real = getattr(owner, name)

        def planted(*args, **kwargs):
            if before:
                before(*args)
            result = real(*args, **kwargs)
            if after:
                after(*args)
            return result

        setattr(owner, name, planted)

    around(train, "forward", before=lambda *_: (at("forward"), at("hang")))
    around(train.Tally, "add", before=lambda *_: at("after_backward"))

    def tear(writer, *_):
        if due("torn_shard"):
            for shard in Path(writer.path).glob(f"__{rank}_*"):
                os.truncate(shard, shard.stat().st_size // 3)
        at("torn_shard")

    around(FileSystemWriter, "write_data", before=lambda *_: at("save_begins"), after=tear)

    def full(kind):
        if due(kind):
            raise OSError(errno.ENOSPC, "No space left on device")

    around(HashedFile, "write", before=lambda *_: full("full_disk"))
    around(
        Path,
        "write_text",
        before=lambda path, *_: full("full_at_manifest") if path.name == "MANIFEST.json" else None,
    )
    saving = lambda path, *_: ".partial" in str(path) and path.name.startswith("step-")
    around(
        Path,
        "rename",
        before=lambda path, *_: at("before_rename") if saving(path) else None,
        after=lambda path, *_: at("after_rename") if saving(path) else None,
    )

    if broken:
        broken = rank == 0 and break_newest(
            out / "checkpoints", fault["kind"], random.Random(attempt)
        )
        fault["kind"] = "after_step"  # the attempt that found it dies too, for the next fault

    journal = open(out.parent / f"{out.name}.rank{rank}.jsonl", "a", buffering=1)
    newest, real_step = Checkpoints.newest, train.train_step

    def found(self):
        nonlocal start
        path, start = newest(self)
        journal.write(json.dumps({"start": start, "broken": broken, "time": time.time()}) + "\n")
        return path, start

    def step(model, optimizer, batches, *args):
        nonlocal count
        seen = []

        def noted():
            for batch in batches:
                if batch.weights_T.any():  # not an idle rank's
                    seen.append(
                        hashlib.sha256(
                            batch.tokens_T.numpy().tobytes() + batch.weights_T.numpy().tobytes()
                        ).hexdigest()
                    )
                yield batch

        norm = real_step(model, optimizer, noted(), *args)
        count += 1
        journal.write(
            json.dumps(
                {"step": start + count, "job": os.environ["JOB"], "seen": seen, "time": time.time()}
            )
            + "\n"
        )
        at("after_step")
        return norm

    def saved(_self, number, _state):
        journal.write(json.dumps({"saved": number}) + "\n")

    Checkpoints.newest, train.train_step = found, step
    around(Checkpoints, "_write", after=saved)
    run(train.main)


def break_newest(root, kind, rng):
    from support.checkpoint import fault, steps

    whole = [step for step in steps(root) if fault(root / f"step-{step}") is None]
    if len(whole) < 2:  # nothing to fall back on: leave it
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
    here = f"127.0.0.1:{port()}"
    if mode == "two agents":
        return [
            [
                f"--nproc_per_node={ranks}",
                "--nnodes=2",
                "--rdzv_backend=c10d",
                f"--rdzv_endpoint={here}",
                "--rdzv_id=faults",
                "--local_addr=127.0.0.1",
            ]
        ] * 2
    flags = {
        "standalone": ["--standalone"],
        "static": ["--nnodes=1", "--master_addr=127.0.0.1", f"--master_port={here.split(':')[1]}"],
        "c10d": ["--nnodes=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={here}"],
    }[mode]
    return [[f"--nproc_per_node={ranks}", *flags]]


def job(out, plan, words, ranks=2, mode="standalone", timeout=900, restarts=None, ok=True, **env):
    """Run train.py's words under torchrun with a fault in each attempt; returns what it printed.

    As many restarts as faults, or `restarts`. It must end with exit code 0, or with another one where ok is False.
    """
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "FAULTS": json.dumps(plan),
        "JOB": str(time.time()),
        "PYTHONPATH": str(ROOT),
        **env,
    }
    env.pop("TRITON_INTERPRET", None)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--max_restarts={len(plan) if restarts is None else restarts}",
        "--monitor_interval=0.1",
    ]
    log = Path(f"{out}.log")
    with open(log, "a") as file:
        started = [
            subprocess.Popen(
                [*torchrun, *flags, str(Path(__file__)), "--out", str(out), *map(str, words)],
                cwd=ROOT,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for flags in agents(mode, ranks)
        ]
        try:
            codes = [process.wait(timeout) for process in started]
        finally:
            for process in [process for process in started if process.poll() is None]:
                process.terminate()  # it takes its ranks with it, which kill would leave behind
                process.wait(60)
    assert all((code == 0) == ok for code in codes), (
        f"{mode}, {plan}: {codes}\n{log.read_text()[-6000:]}"
    )
    return log.read_text()


def journals(out):
    return [
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        for path in sorted(Path(out).parent.glob(f"{Path(out).name}.rank*.jsonl"))
    ]


def history(out):
    """A hash chain over the data that the steps used, in the steps' order; of a step taken again, the last time counts."""
    taken = {}  # step: {rank: (job, hashes)}
    for rank, lines in enumerate(journals(out)):
        for line in lines:
            if "step" in line:
                taken.setdefault(line["step"], {})[rank] = line["job"], line["seen"]
    assert sorted(taken) == list(range(1, len(taken) + 1)), f"steps {sorted(taken)}"
    chain = hashlib.sha256()
    for step, ranks in sorted(taken.items()):
        # a rank that this job has no more may have taken the step in an earlier one
        last = max(job for job, _ in ranks.values())
        for one in sorted(one for job, hashes in ranks.values() if job == last for one in hashes):
            chain.update(f"{step} {one}".encode())
    return chain.hexdigest()


def check_starts(out):
    """Every attempt begins at the last checkpoint that was saved, or a later one whose save was cut after its rename; a broken
    one costs what it held. Returns the seconds from one attempt's last sign to the next one's first."""
    lines, last, waits, clock = journals(out)[0], 0, [], None
    for line in lines:
        if "start" in line:
            assert line["start"] >= last or line["broken"], (
                f"an attempt begins at {line['start']}, but {last} had been saved"
            )
            if clock:
                waits.append(line["time"] - clock)
        last = line.get("start", line.get("saved", last))
        clock = line.get("time", clock)
    return waits


def weights(out):
    return hashlib.sha256(
        (Path(out) / "hf" / "model-00001-of-00001.safetensors").read_bytes()
    ).hexdigest()


def random_plan(rng, count, ranks):
    plan = []
    for _ in range(count):
        kind = rng.choice(KILLS * 2 + FULL + BROKEN)
        first = kind in ("before_rename", "after_rename", "full_at_manifest")
        plan.append(
            {
                "kind": kind,
                "after": rng.randrange(1, 5),
                "rank": 0 if first else rng.randrange(ranks),
            }
        )
    return plan


def main(jobs=10, faults=10):
    work = Path(tempfile.mkdtemp())
    subprocess.run(
        [sys.executable, "-m", "paper.toy", "--out", work],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    words = [
        "--data",
        work / "train.safetensors",
        "--model",
        "toy",
        "--steps",
        60,
        "--batch_tokens",
        512,
        "--micro_tokens",
        256,
        "--save_every",
        2,
        "--keep",
        3,
    ]
    job(work / "whole", [], words)
    print(
        f"undisturbed: weights {weights(work / 'whole')[:12]}, data {history(work / 'whole')[:12]}",
        flush=True,
    )
    for number in range(jobs):
        rng = random.Random(number)
        plan, out, began = random_plan(rng, faults, 2), work / f"job{number}", time.time()
        job(out, plan, words, mode=("standalone", "static", "c10d")[number % 3])
        same, waits = (
            weights(out) == weights(work / "whole") and history(out) == history(work / "whole"),
            check_starts(out),
        )
        print(
            f"job {number}: {' '.join(fault['kind'] for fault in plan)}: {'same bits, same data' if same else 'DIFFERENT'}, "
            f"{len(waits)} restarts, the longest {max(waits):.0f} s, {time.time() - began:.0f} s in all",
            flush=True,
        )
        assert same and len(waits) == len(plan) and max(waits) < 60, (
            "a fault that did not happen, or a restart that took a minute"
        )
    shutil.rmtree(work)


if __name__ == "__main__":
    victim() if "RANK" in os.environ else main(*map(int, sys.argv[1:]))
