"""What makes a run survive: checkpoints that are whole or absent.

A checkpoint is written by torch.distributed.checkpoint into step-N.partial, every rank its shards; listed with the sizes and
sha256 of what was written in its MANIFEST.json, flushed to the disk, and made visible by one rename to step-N. Whatever dies in
between, a reader finds the old checkpoints or the new one, never half of it. (The file `latest` is for people: a resumed run goes
by names and manifests.)

It holds model, optimizer, step and, in `identity`, what the run is made of. The plan's position is the step, because the plan is
a pure function of data and settings, and nothing after the initial weights draws a random number: there is no other state.
"""

import hashlib
import io
import json
import os
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils._pytree import tree_map

from support.files import fsync, sha256
from support.ranks import cause, rank

# a single process is no accident
warnings.filterwarnings("ignore", "torch.distributed is disabled")


class HashedFile(io.BufferedWriter):
    def __init__(self, path, mode):
        super().__init__(io.FileIO(path, mode))
        self.bytes, self.hash = 0, hashlib.sha256()

    def write(self, data):
        self.bytes += memoryview(data).nbytes
        self.hash.update(data)
        return super().write(data)


class HashedFiles(FileSystem):
    """Knows sizes and sha256 of the files it wrote without reading them back: what the disk then holds is checked against them."""

    def __init__(self):
        self.files = {}

    @contextmanager
    def create_stream(self, path, mode):
        with HashedFile(path, mode) as stream:
            yield stream
        fsync(path)
        self.files[path.name] = {"bytes": stream.bytes, "sha256": stream.hash.hexdigest()}

    def rename(self, path, new_path):
        super().rename(path, new_path)
        self.files[new_path.name] = self.files.pop(path.name)


def state_of(model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def steps(root):
    """The steps that have a checkpoint by name, newest first."""
    names = os.listdir(root) if Path(root).is_dir() else []
    return sorted(
        (int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name))), reverse=True
    )


def digest(manifest):
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def fault(path, share=slice(None)):
    """Why this checkpoint can't be trusted, as far as this share of its files goes, or None.

    OSError: a file could not be read, which says nothing about the checkpoint.
    """
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        if manifest.pop("sha256") != digest(manifest):
            return "MANIFEST.json changed"
        files = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
        if path.name != f"step-{manifest['step']}":
            return "MANIFEST.json is of another checkpoint"
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"MANIFEST.json missing or changed ({error})"
    for name in sorted(files)[share]:
        file = path / name
        if (
            not file.is_file()
            or file.stat().st_size != files[name][0]
            or sha256(file) != files[name][1]
        ):
            return f"{name} missing or changed"
    return None


class Checkpoints:
    """The checkpoints of one run, in the folder root; the last `keep` stay.

    identity: a JSON dict of what a run must share with this one to resume from it. background: training goes on while a copy
    of the state in host memory is written; what goes wrong there is raised by the next save or wait.
    """

    def __init__(self, root, identity, keep, background=False, timeout=1800):
        self.root, self.identity, self.keep = Path(root), identity, keep
        # Its own group: what a background save has to tell the other ranks must not meet the step's
        # collectives.
        self.group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            if dist.is_initialized()
            else None
        )
        self.thread, self.pending = ThreadPoolExecutor(1) if background else None, None

    def gather(self, value):
        """Every rank's value, in order."""
        if self.group is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, self.group)
        return values

    def agree(self, function=None):
        """Call function, on the ranks that have one; an OSError there is raised on all."""
        problem = None
        try:
            if function:
                function()
        except OSError as error:
            problem = str(error)
        if problem := next(filter(None, self.gather(problem)), None):
            raise OSError(problem)

    def save(self, step, model, optimizer):
        """Write checkpoint step-N, every rank its shards. OSError: the old ones are untouched."""
        self.wait()
        state = state_of(model, optimizer)
        if self.thread is None:
            return self._write(step, state)
        state = tree_map(
            lambda x: x.to("cpu", copy=True) if isinstance(x, torch.Tensor) else x, state
        )
        self.pending = self.thread.submit(self._write, step, state)

    def wait(self):
        """Until the last save has its name, or has raised its OSError."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def _write(self, step, state):
        root, final, partial = (
            self.root,
            self.root / f"step-{step}",
            self.root / f"step-{step}.partial",
        )
        first = rank() == 0

        def begin():
            for left in root.glob("*.partial"):  # of a save that was killed
                shutil.rmtree(left)
            partial.mkdir(parents=True)

        def find():
            if not partial.is_dir():
                raise OSError(
                    f"rank {rank()} does not see the folder that rank 0 made: --out must lie on a file system that all ranks share"
                )

        def publish():
            manifest = partial / "MANIFEST.json"
            content = {"step": step, "identity": self.identity, "files": files}
            manifest.write_text(json.dumps({"sha256": digest(content)} | content, indent=1))
            for path in (manifest, partial):
                fsync(path)
            partial.rename(final)
            fsync(root)
            (root / ".latest").write_text(final.name)
            (root / ".latest").replace(root / "latest")
            for old in [root / f"step-{s}" for s in steps(root)[self.keep :]] + list(
                root.glob("*.broken")
            ):
                shutil.rmtree(old)

        try:
            self.agree(begin if first else None)
            self.agree(find)
            # HashedFiles flushes to the disk. A state in host memory needs no copying ahead, which
            # would be done on GPU 0 by any thread.
            writer = FileSystemWriter(
                partial, sync_files=False, per_thread_copy_ahead=0 if self.thread else 10_000_000
            )
            writer.fs = HashedFiles()
            dcp.save(
                state, storage_writer=writer, process_group=self.group, no_dist=self.group is None
            )
            files = {
                name: entry
                for written in self.gather(writer.fs.files)
                for name, entry in written.items()
            }
            self.agree(publish if first else None)
        except (OSError, RuntimeError, CheckpointException) as error:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            reason = cause(error)
            if "gloo" in str(reason):  # another rank is gone
                raise RuntimeError(str(reason)) from error
            raise OSError(
                f"{final} could not be written ({reason}); the checkpoints before it are whole"
            ) from error

    def newest(self):
        """(path, step) of the newest whole checkpoint, or (None, 0) where there is none at all.

        The ranks share the work of hashing. A broken one is said, renamed to step-N.broken and passed over. ValueError: all are
        broken, or the first entry of `identity` in which the run that wrote it differs.
        """
        there, broken = self.gather((steps(self.root), list(self.root.glob("*.broken"))))[0]
        for step in there:
            path = self.root / f"step-{step}"
            problems = self.gather(
                fault(path, slice(rank(), None, dist.get_world_size() if self.group else 1))
            )
            if problem := next(filter(None, problems), None):
                if rank() == 0:
                    print(f"{path}: {problem}; taking the one before", file=sys.stderr)
                    shutil.rmtree(f"{path}.broken", ignore_errors=True)
                    path.rename(f"{path}.broken")
                continue
            theirs = json.loads((path / "MANIFEST.json").read_text())["identity"]
            for key in self.identity | theirs:
                if theirs.get(key) != self.identity.get(key):
                    raise ValueError(
                        f"{path} is of a run with {key} {theirs.get(key)!r}, this one has {self.identity.get(key)!r}; "
                        "use its value, or another --out"
                    )
            return path, step
        if there or broken:
            raise ValueError(
                f"{self.root}: no checkpoint there is whole; move the folder away to begin again"
            )
        return None, 0

    def load(self, path, model, optimizer):
        """Fill model and optimizer, sharded as they are now, from a checkpoint that any number of ranks wrote."""
        state = state_of(model, optimizer)
        dcp.load(state, checkpoint_id=path, process_group=self.group, no_dist=self.group is None)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
