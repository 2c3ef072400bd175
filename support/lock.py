"""One run per folder: two runs in one --out would write over each other's log and checkpoints.

The lock is the kernel's (flock on `OUT/lock`), which frees it with the process that holds it. So
nothing here judges by a process's number or by a file's age whether a run still lives, and the
file is never deleted: who deletes it may delete the one that another has just locked. What stands
in it is for the message only.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support.cli import printable
from support.files import try_lock
from support.ranks import on_first_rank

# Seconds to wait for a run that holds the lock. A killed one has left within a few, once the
# kernel has taken its memory back; torchrun's restart may come before that. Of another host the
# file server learns later: NFS frees a dead client's locks after a lease of 90 s.
HERE = 15
ELSEWHERE = 120
# from one try to the next
PAUSE = 0.5


class Holder(NamedTuple):
    """Who holds the lock, as far as the file tells."""

    host: str
    process: str
    since: str
    command: str


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Within `with`: no other run writes to the folder. Called by all ranks; rank 0 locks.

    ValueError, on all ranks: another run holds the lock, and did not leave in time.
    """
    lock = Lock(out)
    try:
        # Rank 0 tells the others after each try, so that none waits long for the next word.
        while not on_first_rank(lock.take):
            time.sleep(PAUSE)
        yield
    finally:
        lock.release()


class Lock:
    """The lock of a run's folder, on rank 0."""

    def __init__(self, out: Path):
        self.out = out
        self.file = None
        self.began = None

    def take(self) -> bool:
        """Try once; True where the run may go on. ValueError: it has waited long enough."""
        if self.file is None:
            self.out.mkdir(parents=True, exist_ok=True)
            # "a": made where there is none, and not emptied. NFS locks what is open for writing.
            self.file = open(self.out / "lock", "a+b", buffering=0)
            # A forked child shares the lock: one that lived on would hold it for a dead run.
            os.register_at_fork(after_in_child=self.file.close)
        if not try_lock(self.file, self.out):
            return self.is_held()
        self.sign()
        return True

    def is_held(self) -> bool:
        """False: try again. The first time a line says so. ValueError: the time is over."""
        holder = self.holder()
        is_here = holder is None or holder.host == socket.gethostname()
        most = HERE if is_here else ELSEWHERE
        words = f"{self.out} is written by another run"
        if holder:
            words = (
                f"{self.out} is written by process {holder.process} on {holder.host} since "
                f"{holder.since}: {holder.command}"
            )

        if self.began is None:
            self.began = time.monotonic()
            text = printable(f"{words}; waiting up to {most} s for it to end")
            print(text, file=sys.stderr, flush=True)
        if time.monotonic() - self.began > most:
            raise ValueError(f"{words}; wait for it, stop it, or give another --out")
        return False

    def sign(self) -> None:
        """Write into the file who holds it."""
        me = {
            "host": socket.gethostname(),
            "process": str(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": " ".join(sys.argv),
        }
        self.file.truncate(0)
        self.file.write(json.dumps(me).encode())

    def holder(self) -> Holder | None:
        """None: it has not signed yet, or the file holds something else."""
        self.file.seek(0)
        try:
            content = json.loads(self.file.read(2**16))
            return Holder(*(str(content[name]) for name in Holder._fields))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def release(self) -> None:
        """Closing the file frees the lock."""
        if self.file is not None:
            self.file.close()
