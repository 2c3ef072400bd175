"""Arrays in a file: they grow on the disk, are joined once, and are read back by the piece.

The file is a safetensors file: 8 bytes that say how long the header is, the header, which is JSON,
and the arrays end to end. What the arrays mean is not known here.

safetensors has no checksum. So the metadata have one of each array, its digest: the sha256 of the
sha256s of its pieces of 64 MiB. Several processes can check a file, each some of the pieces.
"""

import errno
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.files import is_at, naming, try_lock

# How safetensors calls the types that are used here.
TYPES = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "|u1", "F32": "<f4"}

PIECE = 2**26
# longer than any header: the classes of a file stand in it
MOST_HEADER = 2**27


# ---- digests


def digest_of(pieces: list[bytes]) -> str:
    """The digest of an array, from the sha256 of each of its pieces."""
    return hashlib.sha256(b"".join(pieces)).hexdigest()


class Digest:
    """The digest of an array that comes bit by bit."""

    def __init__(self):
        self.pieces = []
        self.piece = hashlib.sha256()
        self.room = PIECE

    def update(self, content: memoryview) -> None:
        while len(content):
            part = content[: self.room]
            self.piece.update(part)
            self.room -= len(part)
            content = content[len(part) :]
            if self.room == 0:
                self.pieces.append(self.piece.digest())
                self.piece = hashlib.sha256()
                self.room = PIECE

    def hexdigest(self) -> str:
        is_empty = self.room == PIECE
        return digest_of(self.pieces if is_empty else [*self.pieces, self.piece.digest()])


# ---- writing


class Growing:
    """An array that grows in a file of its own."""

    def __init__(self, path: Path, dtype: str):
        self.file = open(path, "wb")
        self.dtype = np.dtype(dtype)
        self.digest = Digest()
        self.length = 0

    @property
    def bytes(self) -> int:
        return self.length * self.dtype.itemsize


class Spool:
    """For `with`: arrays that are to become the file `out`, and whatever is left of them.

    They grow in the folder `.NAME.partial` beside it. `join` makes them one file, which then takes
    its name; without that nothing remains. The folder of a process that was killed is taken over:
    the kernel frees its lock.
    """

    def __init__(self, out: str | Path):
        self.out = Path(out)
        self.folder = self.out.with_name(f".{self.out.name}.partial")
        self.arrays = {}

    def __enter__(self):
        # folders that are made here go, too, if nothing comes of it
        parents = (self.out.parent, *self.out.parent.parents)
        self.made = [parent for parent in parents if not parent.exists()]
        try:
            with naming(self.out, always=True):
                self.lock = locked_folder(self.folder)
        except BlockingIOError:
            raise ValueError(
                f"{self.out}: another process is writing it; wait for it, or give another --out"
            ) from None
        # left by a process that was killed
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.unlink()
        return self

    def __exit__(self, kind, *_):
        for array in self.arrays.values():
            # what could not be written cannot be flushed
            with suppress(OSError):
                array.file.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.close()
        if kind is not None:
            with suppress(OSError):
                for parent in self.made:
                    parent.rmdir()

    def append(self, name: str, values: np.ndarray) -> None:
        """More values of this array."""
        with naming(self.out, always=True):
            if name not in self.arrays:
                self.arrays[name] = Growing(self.folder / name, values.dtype)
            array = self.arrays[name]
            content = memoryview(np.ascontiguousarray(values, array.dtype)).cast("B")
            array.file.write(content)
        array.digest.update(content)
        array.length += len(values)

    def digests(self) -> dict[str, str]:
        return {name: array.digest.hexdigest() for name, array in self.arrays.items()}

    def join(self, order: tuple[str, ...], metadata: dict[str, str]) -> None:
        """Make the arrays one file, in this order. OSError: the disk is full."""
        assert set(order) == set(self.arrays)
        arrays = {name: self.arrays[name] for name in order}
        header = header_of(arrays, metadata)
        needed = len(header) + sum(array.bytes for array in arrays.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            what = f"{needed / 1e9:,.1f} GB are to be written, {free / 1e9:,.1f} GB are free"
            raise OSError(errno.ENOSPC, what, str(self.out))

        whole = self.folder / self.out.name
        with naming(self.out, always=True):
            with open(whole, "wb") as file:
                file.write(header)
                for array in arrays.values():
                    array.file.close()
                    path = Path(array.file.name)
                    with open(path, "rb") as grown:
                        shutil.copyfileobj(grown, file, 2**20)
                    path.unlink()
            # readers find the old file or the new one, never half of one
            whole.replace(self.out)


def header_of(arrays: dict[str, Growing], metadata: dict[str, str]) -> bytes:
    """The header of a safetensors file, the 8 bytes before it included."""
    names = {value: name for name, value in TYPES.items()}
    header = {"__metadata__": metadata}
    at = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": names[array.dtype.str],
            "shape": [array.length],
            "data_offsets": [at, at + array.bytes],
        }
        at += array.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # the arrays begin at a multiple of 8, so that numpy can use them where they lie
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


LOCK = "lock"


def locked_folder(folder: Path):
    """Make a folder and lock it: the open file whose end frees it. BlockingIOError: it is locked.

    Where the file system cannot lock, a line says so.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / LOCK, "wb")
        except FileNotFoundError:
            # who had it has just removed it
            continue
        if not try_lock(file, folder):
            file.close()
            raise BlockingIOError
        # it may have been removed after it was opened, before it was locked
        if is_at(file, folder / LOCK):
            return file
        file.close()


# ---- reading


@dataclass(frozen=True)
class Stored:
    """Where in a file an array lies."""

    dtype: np.dtype
    length: int
    # the first of its bytes, from the start of the file
    start: int


class Arrays:
    """A file of arrays, open: what is read later is this file, also if its name is given to
    another one. ValueError names the file and what is wrong with it.

        metadata  {key: text}
        stored    {name: Stored}
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        # kept open for os.pread, which several threads may call
        self.file = open(path, "rb", buffering=0)
        self.state = self.state_now()
        self.metadata, self.stored = self.read_header()

    def state_now(self) -> tuple[int, int]:
        """(size, time of the last change)."""
        stat = os.fstat(self.file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def check_unchanged(self) -> None:
        """ValueError: the file is no longer what it was when it was opened."""
        if self.state_now() != self.state:
            raise ValueError(
                f"{self.path}: changed while it is read; put the file back, or give a new --out"
            )

    def bytes_at(self, start: int, count: int) -> bytes:
        content = os.pread(self.file.fileno(), count, start)
        # one call reads 2 GB at most
        while len(content) < count:
            more = os.pread(self.file.fileno(), count - len(content), start + len(content))
            if not more:
                raise ValueError(
                    f"{self.path}: ends at byte {start + len(content):,}, within an array; "
                    "copy or prepare it again"
                )
            content += more
        return content

    def read(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Values [first, stop) of an array, of all by default. They cannot be written to."""
        stored = self.stored[name]
        stop = stored.length if stop is None else stop
        size = stored.dtype.itemsize
        content = self.bytes_at(stored.start + first * size, (stop - first) * size)
        return np.frombuffer(content, stored.dtype)

    def mapped(self, name: str) -> np.ndarray:
        """The whole array, read where it is used. If the file is cut short meanwhile, the process
        dies: training reads, and does not map."""
        stored = self.stored[name]
        memory = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.ndarray(stored.length, stored.dtype, memory, stored.start)

    def pieces(self) -> Iterator[tuple[str, int, int]]:
        """(array, first, stop): values [first, stop) are a piece."""
        for name, stored in self.stored.items():
            step = PIECE // stored.dtype.itemsize
            for first in range(0, stored.length, step):
                yield name, first, min(first + step, stored.length)

    def read_header(self) -> tuple[dict[str, str], dict[str, Stored]]:
        """(metadata, stored)."""
        size, _ = self.state
        length = int.from_bytes(os.pread(self.file.fileno(), 8, 0), "little")
        try:
            if size < 8 or not length <= min(MOST_HEADER, size - 8):
                raise ValueError("no header")
            header = json.loads(self.bytes_at(8, length))
            metadata = header.pop("__metadata__", {})
            stored = {}
            stop = 0
            for name, fields in sorted(header.items(), key=first_byte):
                stored[name], stop = stored_at(fields, 8 + length, after=stop)
            if 8 + length + stop != size:
                raise ValueError(f"{size:,} bytes, and {8 + length + stop:,} by its header")
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("__metadata__ holds no texts")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.path}: not a whole prepared file ({error}); prepare it again"
            ) from None
        return metadata, stored


def first_byte(entry: tuple[str, dict]) -> int:
    """Where an array of the header begins."""
    _, fields = entry
    return fields["data_offsets"][0]


def stored_at(fields: dict, begin: int, after: int) -> tuple[Stored, int]:
    """(an array of the header, where it ends).

    begin: where all arrays begin in the file. after: where the one before it ends, from there.
    """
    dtype = np.dtype(TYPES[fields["dtype"]])
    (length,) = fields["shape"]
    first, stop = fields["data_offsets"]
    if any(type(number) is not int for number in (length, first, stop)) or length < 0:
        raise ValueError("a size that is no whole number")
    if first != after or stop - first != length * dtype.itemsize:
        raise ValueError(f"{length:,} values in bytes {first:,} to {stop:,}")
    return Stored(dtype, length, begin + first), stop
