"""Ranks that meet, leave and fail together."""

import os
import re
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

# ---- who am I


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def rank_and_world() -> tuple[int, int]:
    """(this rank, how many there are)."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def local_rows(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(this rank's rows of the parameter, index of the first)."""
    if not hasattr(parameter, "to_local"):
        return parameter, 0
    # FSDP2 cuts dimension 0 as torch.chunk does: all parts but the last are equally long.
    me, world = rank_and_world()
    rows_of_a_rank = -(-parameter.shape[0] // world)
    return parameter.to_local(), me * rows_of_a_rank


def on_first_rank(function: Callable[[], object]) -> object:
    """What function() returns on rank 0, on every rank. Its ValueError is raised on every rank."""
    result, problem = None, None
    if rank() == 0:
        try:
            result = function()
        except ValueError as error:
            problem = error
    if dist.is_initialized():
        sent = [result, problem]
        dist.broadcast_object_list(sent, device=torch.device("cpu"))
        result, problem = sent
    if problem:
        raise problem
    return result


# ---- meeting


def meet(wait: timedelta = timedelta(minutes=30)) -> dist.Store:
    """A part of torchrun's store that only the ranks of this attempt share.

    A restart finds the same store, where the addresses of dead ranks still stand; and agents on
    several nodes do not count restarts alike, so their count cannot name the part. Instead rank 0
    draws a new name. It tells it to whoever greets it with a number drawn at random: an answer to
    a greeting that a dead rank left is read by nobody.
    """
    store, me, world = next(dist.rendezvous("env://", timeout=wait))
    drawn = uuid.uuid4().hex
    if me == 0:
        return receive(store, drawn, world, wait)
    store.set(f"hello {me}", drawn)
    name = store.get(f"answer to {drawn}").decode()
    shared = dist.PrefixStore(name, store)
    shared.set(f"here {me}", "")
    return shared


def receive(store: dist.Store, name: str, world: int, wait: timedelta) -> dist.Store:
    """Rank 0's side of `meet`: tell the name to each greeting until all others have come."""
    shared = dist.PrefixStore(name, store)
    until = time.monotonic() + wait.total_seconds()
    missing = set(range(1, world))
    while True:
        missing = {other for other in missing if not shared.check([f"here {other}"])}
        if not missing:
            return shared
        for other in missing:
            # The greeting may be a dead rank's. The one that lives replaces it, and is answered in
            # a later round.
            if store.check([f"hello {other}"]):
                greeting = store.get(f"hello {other}").decode()
                store.set(f"answer to {greeting}", name)
        if time.monotonic() > until:
            raise ValueError(
                f"ranks {sorted(missing)} did not start within {wait}; look at their nodes"
            )
        time.sleep(0.02)


def start_group(store: dist.Store | None, alone: bool, timeout: int) -> None:
    """The process group of all ranks that share the store.

    Without a store there is one process. It gets a group of one if `alone`, for what needs FSDP,
    and else none. timeout: seconds that a rank waits for the others.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if store is not None:
        me, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        limit = timedelta(seconds=timeout)
        dist.init_process_group(backend, store=store, rank=me, world_size=world, timeout=limit)
    elif alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


# ---- failing


@contextmanager
def together(explain: Callable[[BaseException], str | None]) -> Iterator[dist.Store | None]:
    """Yields the ranks' store, None for a process alone. When a rank fails, all leave.

    explain(error) -> the line for the user, or None for a traceback.

    When a peer dies, every other rank fails too, with an error that only says so. So only the
    first rank to fail prints; the others wait two seconds and leave. They leave by os._exit,
    because taking down a process group with a rank missing hangs.
    """
    store = None
    try:
        if "RANK" in os.environ:
            store = meet()
        yield store
    except (Exception, CheckpointException) as error:
        if "RANK" not in os.environ:
            raise
        if is_first_to_fail(store):
            print(account(cause(error), explain), file=sys.stderr, flush=True)
        else:
            # torchrun stops all ranks once one has left: the first gets to the end of its sentence
            time.sleep(2)
        sys.stdout.flush()
        os._exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def cause(error: BaseException) -> BaseException:
    """What one rank raised, where torch.distributed.checkpoint has collected it from all."""
    if isinstance(error, CheckpointException):
        raised, _ = next(iter(error.failures.values()))
        return raised
    return error


def is_first_to_fail(store: dist.Store | None) -> bool:
    """True on one rank. Where the store cannot tell, on one rank of each host."""
    # None: the ranks have not met. RuntimeError: the store is gone with the host that held it.
    if store is not None:
        try:
            return store.add("failures", 1) == 1
        except RuntimeError:
            pass
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def account(error: BaseException, explain: Callable[[BaseException], str | None]) -> str:
    """What to print of an error, in its handler: a line where there is one, or the traceback."""
    line = explain(error)
    # A DistError is also what a store raises when its time is over.
    if not line and ("gloo" in str(error) or isinstance(error, dist.DistError)):
        # without gloo's file name in brackets, and its first sentence only
        reason = re.sub(r"\[/\S+\] ", "", str(error)).split(". ")[0]
        line = (
            f"rank {os.environ['RANK']} lost another rank, which died, hangs or is out of reach "
            f"({reason}); torchrun names it. The same command resumes from the last checkpoint"
        )
    if line:
        return f"{Path(sys.argv[0]).name}: {line}"
    return traceback.format_exc()


class Signals:
    """Within `with`: Ctrl-C and SIGTERM (preemption) ask the loop to save and leave.

    A second signal does not wait for that, nor does one before the loop (in_loop is False).
    """

    def __enter__(self):
        self.received = None
        self.in_loop = False
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, _frame):
        # nothing is there to be saved
        if not self.in_loop:
            raise KeyboardInterrupt
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
