"""Files: hashes, JSON, and what reaches the disk whole."""

import errno
import fcntl
import hashlib
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, not escaped: pieces of a tokenizer and conditions are not all ASCII."""
    write_bytes(path, json.dumps(content, indent=1, ensure_ascii=False).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file. The error of a full disk names it."""
    with naming(path):
        path.write_bytes(content)


@contextmanager
def written_whole(path: str | Path):
    """For `with`: the path of a file to write instead, which takes this path's name at the end.

    Readers find the old file or the new one, never half of one. When the block fails, the old
    file stays, and what was written is deleted.
    """
    path = Path(path)
    # In the same folder, or the rename would be a copy. With the process's number, so that two
    # programs that write the same file do not write into each other's.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # the mode that the umask gives: safetensors makes files that only their owner may read
        partial.touch()
        mode = partial.stat().st_mode
        with naming(path):
            yield partial
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming(path: str | Path, always: bool = False):
    """For `with`: an OSError that names no file gets this name. A write to a full disk has none.

    always: also one that names another file, which the user has not asked for.
    """
    try:
        yield
    except OSError as error:
        if error.errno and (always or error.filename is None):
            error.filename = str(path)
        raise


# flock's errors where another process holds the lock, and where the file system has no locks
HELD = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def try_lock(file, place: str | Path) -> bool:
    """Lock an open file until it is closed, or its process ends; False: another process holds it.

    Where the file system cannot lock, a line says so, and the file counts as locked. place: what
    the lock is for, for that line.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"{place}: this file system cannot lock ({error.strerror}); nothing keeps a "
            "second run from writing here",
            file=sys.stderr,
        )
    return True


def is_at(file, path: Path) -> bool:
    """Whether the path still leads to this open file: another process may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def fsync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder: a power cut cannot undo it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
