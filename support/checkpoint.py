"""What makes a run survive: checkpoints that are whole or absent.

A checkpoint is written by torch.distributed.checkpoint into step-N.partial, every rank its shards.
MANIFEST.json lists the size and sha256 of each file as it was written. All is flushed to the disk,
and then one rename to step-N makes it visible. Whatever dies in between, a reader finds the old
checkpoints or the new one, never half of it. (The file `latest` is for people: a resumed run goes
by names and manifests.)

It holds model, optimizer, step and, in `identity`, what the run is made of. There is no other
state: the plan's position is the step, because the plan is a pure function of data and settings,
and nothing after the initial weights draws a random number.
"""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.utils._pytree import tree_map

from support.files import file_sha256, fsync, naming, written_whole
from support.ranks import cause, is_finite, local_rows, rank

# A run of one process has no process group on purpose.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

# Bytes that the writer copies ahead while it writes; its own default.
COPY_AHEAD = 10_000_000


# ---- files that are hashed as they are written


class HashedFile(io.BufferedWriter):
    """A file that counts and hashes what is written to it."""

    def __init__(self, path: Path, mode: str):
        super().__init__(io.FileIO(path, mode))
        self.bytes = 0
        self.hash = hashlib.sha256()

    def write(self, data):
        self.bytes += memoryview(data).nbytes
        self.hash.update(data)
        return super().write(data)


class HashedFiles(FileSystem):
    """Knows size and sha256 of every file it wrote, without reading it back.

    So what the disk holds later is compared with what was meant, not with what it held before.
    """

    def __init__(self):
        # {name: {"bytes": .., "sha256": ..}}
        self.files = {}

    @contextmanager
    def create_stream(self, path: Path, mode: str):
        with naming(path):
            with HashedFile(path, mode) as stream:
                yield stream
            fsync(path)
        self.files[path.name] = {"bytes": stream.bytes, "sha256": stream.hash.hexdigest()}

    def rename(self, path: Path, new_path: Path):
        super().rename(path, new_path)
        self.files[new_path.name] = self.files.pop(path.name)


# ---- reading what a file says, and running nothing

# the file that says what stands where in the others
METADATA = ".metadata"

# All that a `.metadata` of torch.distributed.checkpoint names, in torch 2.11 and 2.13, where a
# checkpoint holds fp32 tensors and plain values.
DCP_METADATA = "torch.distributed.checkpoint.metadata"
METADATA_NAMES = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    (DCP_METADATA, "BytesStorageMetadata"),
    (DCP_METADATA, "ChunkStorageMetadata"),
    (DCP_METADATA, "Metadata"),
    (DCP_METADATA, "MetadataIndex"),
    (DCP_METADATA, "StorageMeta"),
    (DCP_METADATA, "TensorProperties"),
    (DCP_METADATA, "TensorStorageMetadata"),
    (DCP_METADATA, "_MEM_FORMAT_ENCODING"),
}


class MetadataUnpickler(pickle.Unpickler):
    """Knows METADATA_NAMES and no other. A pickle can name any function of Python, to be called."""

    def find_class(self, module: str, name: str):
        if (module, name) not in METADATA_NAMES:
            raise ValueError(f"it names {module}.{name}")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """What a checkpoint's `.metadata` says. ValueError: it is not as DCP writes it."""
    file = path / METADATA
    raw = file.read_bytes()
    try:
        metadata = MetadataUnpickler(io.BytesIO(raw)).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds a {type(metadata).__name__}")
        for shard in metadata.storage_data.values():
            require_inside(shard.relative_path)
    # a damaged pickle may raise anything
    except Exception as error:
        raise ValueError(
            f"{file} is not as torch.distributed.checkpoint writes it ({error}); nothing in it was "
            f"run. Move {path.name} away: then the checkpoint before it is taken"
        ) from None
    return metadata


class Reader(FileSystemReader):
    """DCP's own reads `.metadata` with a pickle.load, which runs what the file says.

    Here it has been read before: DCP takes an error in read_metadata for a file that is missing.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.metadata = read_metadata(path)

    def read_metadata(self, *args, **kwargs) -> Metadata:
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self.metadata


class Planner(DefaultLoadPlanner):
    """DCP's own loads what is no tensor, AdamW's param_groups, with weights_only=False."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        # a damaged pickle may raise anything
        except Exception as error:
            # torch goes on with advice that does not hold here
            reason = str(error).partition(". ")[0]
            reason = re.search(r"GLOBAL \S+|$", str(error))[0] or reason
            raise ValueError(
                f"the checkpoint's {name} holds more than numbers and text ({reason}); nothing in "
                "it was run. Move that step's folder away: then the checkpoint before it is taken"
            ) from None
        *parents, last = self.mappings[name]
        inner = self.original_state_dict
        for key in parents:
            inner = inner[key]
        inner[last] = loaded


def require_inside(name: str) -> None:
    """ValueError: the name of a file leads out of its folder."""
    if Path(name).name != name:
        raise ValueError(f"it names {name!r}, outside its folder")


# ---- what stands on the disk


def steps(root: str | Path) -> list[int]:
    """The steps that have a checkpoint by name, newest first."""
    if not Path(root).is_dir():
        return []
    found = []
    for name in os.listdir(root):
        match = re.fullmatch(r"step-(\d+)", name)
        if match:
            found.append(int(match[1]))
    return sorted(found, reverse=True)


def digest(manifest: dict) -> str:
    """The sha256 of a manifest without the field that holds it."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def fault(path: Path, share: slice = slice(None)) -> str | None:
    """Why this checkpoint cannot be trusted, as far as this share of its files goes; or None.

    OSError: a file could not be read, which says nothing about the checkpoint.
    """
    # anything else of that name, a pipe for one, may keep a reader waiting for ever
    if not (path / "MANIFEST.json").is_file():
        return "MANIFEST.json missing"
    # Whatever a damaged manifest holds, this is a fault of the checkpoint and no error here.
    try:
        text = (path / "MANIFEST.json").read_text()
        manifest = json.loads(text)
        # the text, too: `1e-05` and `1E-05` are the same number
        is_same = text == json.dumps(manifest, indent=1)
        if manifest.pop("sha256") != digest(manifest) or not is_same:
            return "MANIFEST.json changed"
        expected = {}
        for name, entry in manifest["files"].items():
            require_inside(name)
            expected[name] = entry["bytes"], entry["sha256"]
        if METADATA not in expected:
            return f"MANIFEST.json does not list {METADATA}"
        if path.name != f"step-{manifest['step']}":
            return "MANIFEST.json is of another checkpoint"
        if not isinstance(manifest["identity"], dict):
            return "MANIFEST.json does not say of which run it is"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"MANIFEST.json changed ({error})"

    for name in sorted(expected)[share]:
        if not is_as_written(path / name, *expected[name]):
            return f"{name} missing or changed"
    return None


def is_as_written(file: Path, size: int, sha256: str) -> bool:
    if not file.is_file() or file.stat().st_size != size:
        return False
    return file_sha256(file) == sha256


def state_of(model, optimizer) -> dict:
    """What a checkpoint holds of the two, each rank its shards."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    # A tied head is the embedding under a second name: it is stored once.
    names = {name for name, _ in model.named_parameters()}
    model_state = {name: tensor for name, tensor in model_state.items() if name in names}
    return {"model": model_state, "optimizer": optimizer_state}


def first_not_finite(state: dict, prefix: str = "") -> str | None:
    """The name of a tensor of which this rank's rows hold a NaN or an infinity; None: of none."""
    for name, value in state.items():
        found = None
        if isinstance(value, dict):
            found = first_not_finite(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor) and not is_finite(local_rows(value)[0]):
            found = f"{prefix}{name}"
        if found:
            return found
    return None


def to_host(state: dict) -> dict:
    """A copy in host memory, which training does not change."""

    def copy(value):
        return value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value

    return tree_map(copy, state)


# ---- the checkpoints of a run


class Checkpoints:
    """The checkpoints of one run, in the folder root; the last `keep` stay.

    identity: a JSON dict of what a run must share with this one to resume from it. background:
    training goes on while a copy of the state in host memory is written; what goes wrong there is
    raised by the next save or wait. timeout: seconds that a rank waits for the others.
    """

    def __init__(
        self,
        root: str | Path,
        identity: dict,
        keep: int,
        background: bool = False,
        timeout: int = 1800,
    ):
        self.root = Path(root)
        self.identity = identity
        self.keep = keep
        # Their own process group: what a save in the background has to tell the other ranks must
        # not get between a step's collectives.
        self.group = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.thread = ThreadPoolExecutor(1) if background else None
        self.pending = None

    # -- talking to the other ranks

    def gather(self, value) -> list:
        """Every rank's value, in the ranks' order."""
        if self.group is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, self.group)
        return values

    def first_problem(self, problem: str | None) -> str | None:
        """A problem that some rank has, the same on all ranks; None where none has any."""
        return next(filter(None, self.gather(problem)), None)

    def agree(self, function: Callable, *args, here: bool = True) -> None:
        """Call function(*args) where `here`. An OSError on one rank is raised on all of them."""
        problem = None
        if here:
            try:
                function(*args)
            except OSError as error:
                problem = str(error)
        problem = self.first_problem(problem)
        if problem:
            raise OSError(problem)

    # -- saving

    def save(self, step: int, model, optimizer) -> None:
        """Write checkpoint step-N, every rank its shards. OSError: the old ones are untouched.

        ValueError: a number is not finite, so a run that resumes from here would be lost.
        """
        self.wait()
        state = state_of(model, optimizer)
        self._require_finite(step, state)
        if self.thread is None:
            self._write(step, state)
        else:
            self.pending = self.thread.submit(self._write, step, to_host(state))

    def _require_finite(self, step: int, state: dict) -> None:
        name = self.first_problem(first_not_finite(state))
        if name is None:
            return
        there = steps(self.root)
        newest = "there is none before it"
        if there:
            newest = f"the newest whole one is {self.root}/step-{there[0]}"
        raise ValueError(
            f"step {step}: {name} is not finite, so no checkpoint is written and nothing exported; "
            f"{newest}. Lower --lr, under a new --out"
        )

    def wait(self) -> None:
        """Until the last save has its name, or has raised its OSError."""
        pending = self.pending
        self.pending = None
        if pending is not None:
            pending.result()

    def _write(self, step: int, state: dict) -> None:
        """Partial folder, shards, manifest, name; the ranks go from one to the next together."""
        final = self.root / f"step-{step}"
        partial = self.root / f"step-{step}.partial"
        is_first = rank() == 0
        try:
            self.agree(self._make_folder, partial, here=is_first)
            self.agree(self._require_folder, partial)
            files = self._write_shards(partial, state)
            self.agree(self._publish, partial, final, step, files, here=is_first)
        except (OSError, RuntimeError, CheckpointException) as error:
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)
            reason = cause(error)
            # gloo's errors mean that another rank is gone: nothing is wrong with the disk
            if "gloo" in str(reason):
                raise RuntimeError(str(reason)) from error
            raise OSError(
                f"{final} could not be written ({reason}); the checkpoints before it are whole"
            ) from error

    def _make_folder(self, partial: Path) -> None:
        # what a save that was killed has left
        for left in self.root.glob("step-*.partial"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)

    def _require_folder(self, partial: Path) -> None:
        if not partial.is_dir():
            raise OSError(
                f"rank {rank()} does not see the folder that rank 0 made: --out must lie on a file "
                "system that all ranks share"
            )

    def _write_shards(self, partial: Path, state: dict) -> dict:
        """This rank's shards; returns {name: size and sha256} of the files of all ranks."""
        # HashedFiles flushes to the disk, so the writer need not. Of a state in host memory it
        # must copy nothing ahead: the thread would do that through GPU 0, on every rank.
        copy_ahead = 0 if self.thread else COPY_AHEAD
        writer = FileSystemWriter(partial, sync_files=False, per_thread_copy_ahead=copy_ahead)
        writer.fs = HashedFiles()
        alone = self.group is None
        dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=alone)
        files = {}
        for written in self.gather(writer.fs.files):
            files |= written
        return files

    def _publish(self, partial: Path, final: Path, step: int, files: dict) -> None:
        """Manifest, flush, rename; then the old ones go. The order is what a power cut needs."""
        manifest = partial / "MANIFEST.json"
        content = {"step": step, "identity": self.identity, "files": files}
        manifest.write_text(json.dumps({"sha256": digest(content)} | content, indent=1))
        fsync(manifest)
        fsync(partial)
        partial.rename(final)
        fsync(self.root)
        with written_whole(self.root / "latest") as latest:
            latest.write_text(final.name)

        for old in steps(self.root)[self.keep :]:
            shutil.rmtree(self.root / f"step-{old}")
        for broken in self.root.glob("*.broken"):
            shutil.rmtree(broken)

    # -- resuming

    def newest(self) -> tuple[Path | None, int]:
        """(path, step) of the newest whole checkpoint, or (None, 0) where there is none at all.

        The ranks share the work of hashing. For a broken one a line is printed; it is renamed to
        step-N.broken and passed over. ValueError: all are broken, or the run that wrote it has
        another `identity`; the first entry that is not equal is named.
        """
        # as rank 0 sees the folder, so that all ranks look at the same checkpoints
        there, broken = self.gather((steps(self.root), list(self.root.glob("*.broken"))))[0]
        for step in there:
            path = self.root / f"step-{step}"
            every_nth = dist.get_world_size() if self.group else 1
            problem = self.first_problem(fault(path, slice(rank(), None, every_nth)))
            if problem is None:
                self._require_same_run(path)
                return path, step
            if rank() == 0:
                print(f"{path}: {problem}; taking the one before", file=sys.stderr)
                shutil.rmtree(f"{path}.broken", ignore_errors=True)
                path.rename(f"{path}.broken")
        if there or broken:
            raise ValueError(
                f"{self.root}: no checkpoint there is whole; move the folder away to begin again"
            )
        return None, 0

    def _require_same_run(self, path: Path) -> None:
        """ValueError where the run that wrote the checkpoint differs in its identity."""
        theirs = json.loads((path / "MANIFEST.json").read_text())["identity"]
        # Keys that the code which wrote it did not know yet do not stop the run.
        unknown = [key for key in self.identity if key not in theirs]
        for key in self.identity | theirs:
            if key not in unknown and theirs.get(key) != self.identity.get(key):
                # no flag sets these: other code does
                code = key in ("plan_sha256", "optimizer")
                remedy = "go back to the code that wrote it" if code else "use its value"
                raise ValueError(
                    f"{path} is of a run with {key} {theirs.get(key)!r}, this one has "
                    f"{self.identity.get(key)!r}; {remedy}, or another --out"
                )
        if unknown and rank() == 0:
            print(
                f"{path} does not hold {', '.join(unknown)} of the run that wrote it: "
                "this could not be compared",
                file=sys.stderr,
            )

    def load(self, path: Path, model, optimizer) -> None:
        """Fill model and optimizer from a checkpoint that any number of ranks wrote.

        Each rank reads the shards that it holds now.
        """
        state = state_of(model, optimizer)
        alone = self.group is None
        try:
            dcp.load(
                state,
                storage_reader=Reader(path),
                planner=Planner(),
                process_group=self.group,
                no_dist=alone,
            )
        except CheckpointException as error:
            raise cause(error) from None
        # Not strict about names: a tied head's second name is not in it (`state_of`). dcp.load has
        # already refused a checkpoint that lacks any other.
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=False),
        )
