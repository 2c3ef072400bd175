"""What makes a run survive: checkpoints that are whole or absent, and the search for the newest whole one.

A checkpoint is written by torch.distributed.checkpoint into step-N.partial, listed with sizes and sha256 in its MANIFEST.json,
flushed to the disk and made visible by one rename to step-N; then the file `latest` names it. Whatever dies in between, a
reader finds the old checkpoints or the new one, never half of it.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is no accident


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


def fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def save(root, step, model, optimizer, identity, keep):
    """Write checkpoint step-N, every rank its shards; keep the last `keep`. OSError: the old ones are untouched.

    identity: a JSON dict of what a run must share with this one to resume from it.
    """
    final, partial = Path(root) / f"step-{step}", Path(root) / f"step-{step}.partial"
    if rank() == 0:
        for left in Path(root).glob("*.partial"):  # of a save that was killed
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    barrier()
    try:
        dcp.save(state_of(model, optimizer), checkpoint_id=partial, no_dist=not dist.is_initialized())
        if rank() == 0:
            files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(partial.iterdir())}
            manifest = partial / "MANIFEST.json"
            manifest.write_text(json.dumps({"step": step, "identity": identity, "files": files}, indent=1))
            for path in (manifest, partial):
                fsync(path)
            shutil.rmtree(final, ignore_errors=True)  # only ever a corrupt one: a valid step-N would have been resumed from
            partial.rename(final)
            fsync(root)
            (Path(root) / ".latest").write_text(final.name)
            (Path(root) / ".latest").replace(Path(root) / "latest")
            kept = [s for s in steps(root) if s <= step][:keep]  # a later one is broken, or this run would have resumed from it
            for old in set(steps(root)) - set(kept):
                shutil.rmtree(Path(root) / f"step-{old}")
    except (OSError, RuntimeError, CheckpointException) as error:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise OSError(f"{final} could not be written ({reason}); the checkpoints before it are whole") from error
    barrier()


def steps(root):
    """The steps that have a checkpoint by name, newest first."""
    names = os.listdir(root) if Path(root).is_dir() else []
    return sorted((int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name))), reverse=True)


def fault(path):
    """Why this checkpoint can't be trusted, or None."""
    try:
        files = json.loads((path / "MANIFEST.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"MANIFEST.json unreadable: {error}"
    for name, entry in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            return f"{name} missing or changed"
    return None


def newest(root, identity):
    """(path, step) of the newest whole checkpoint, or (None, 0). Broken ones are said and passed over.

    ValueError names the first entry of `identity` in which the run that wrote it differs.
    """
    for step in steps(root):
        path = Path(root) / f"step-{step}"
        if problem := fault(path):
            print(f"{path}: {problem}; taking the one before", file=sys.stderr)
            continue
        theirs = json.loads((path / "MANIFEST.json").read_text())["identity"]
        for key in identity | theirs:
            if theirs.get(key) != identity.get(key):
                raise ValueError(f"{path} is of a run with {key} {theirs.get(key)!r}, this one has {identity.get(key)!r}; "
                                 "use its value, or another --out")
        return path, step
    return None, 0


def load(path, model, optimizer):
    """Fill model and optimizer, sharded as they are now, from a checkpoint that any number of ranks wrote."""
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
