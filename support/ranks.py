"""Ranks that meet, leave and fail together."""

import os
import re
import signal
import sys
import time
import traceback
import uuid
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_rows(parameter):
    """(this rank's rows of the parameter, index of the first): FSDP2 cuts dimension 0 as torch.chunk does."""
    if not hasattr(parameter, "to_local"):
        return parameter, 0
    rank, world = rank_and_world()
    return parameter.to_local(), rank * -(-parameter.shape[0] // world)


def on_first_rank(function):
    """What function() returns on rank 0, on every rank; its ValueError likewise."""
    result = [None, None]
    if rank() == 0:
        try:
            result[0] = function()
        except ValueError as error:
            result[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(result, device=torch.device("cpu"))
    if result[1]:
        raise result[1]
    return result[0]


def meet(wait=timedelta(minutes=30)):
    """A part of torchrun's store that only the ranks of this attempt share.

    A restart finds the same store, where the dead ranks' addresses still stand, and agents on several nodes do not count
    restarts alike. So rank 0 draws a new name and tells it to whoever greets it with a number of its own: an answer to a
    greeting that a dead rank left is read by nobody.
    """
    store, me, world = next(dist.rendezvous("env://", timeout=wait))
    mine = uuid.uuid4().hex
    if me:
        store.set(f"hello {me}", mine)
        fresh = dist.PrefixStore(store.get(f"answer to {mine}").decode(), store)
        fresh.set(f"here {me}", "")
        return fresh
    fresh, missing, until = (
        dist.PrefixStore(mine, store),
        set(range(1, world)),
        time.monotonic() + wait.total_seconds(),
    )
    while missing := {other for other in missing if not fresh.check([f"here {other}"])}:
        for other in missing:
            if store.check([f"hello {other}"]):
                store.set(f"answer to {store.get(f'hello {other}').decode()}", mine)
        if time.monotonic() > until:
            raise ValueError(
                f"ranks {sorted(missing)} did not start within {wait}; look at their nodes"
            )
        time.sleep(0.02)
    return fresh


def cause(error):
    """What one rank raised, of the collection that torch.distributed.checkpoint makes of it."""
    return (
        next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    )


@contextmanager
def together(explain):
    """Yields the ranks' store, None for a process alone. When they fail, the first to fail says why and all leave.

    explain(error) -> the line for the user, or None for a traceback. What the others have to say, once a peer is gone, is
    its echo; and a process group is not taken down in order when half of it is missing, so they leave by _exit.
    """
    store = None
    try:
        store = meet() if "RANK" in os.environ else None
        yield store
    except (Exception, CheckpointException) as error:
        if "RANK" not in os.environ:
            raise
        error = cause(error)
        try:
            first = store.add("failures", 1) == 1
        except (RuntimeError, AttributeError):
            # the store is gone with its host, or the ranks have not met: one speaks on each host
            first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if first:
            # a store's timeout is one too
            lost = "gloo" in str(error) or isinstance(error, dist.DistError)
            reason = re.sub(r"\[/\S+\] ", "", str(error)).split(". ")[0]
            line = (
                explain(error)
                or lost
                and (
                    f"rank {os.environ['RANK']} lost another rank, which died, hangs or is out of reach ({reason}); "
                    "torchrun names it. The same command resumes from the last checkpoint"
                )
            )
            print(
                f"{Path(sys.argv[0]).name}: {line}" if line else traceback.format_exc(),
                file=sys.stderr,
                flush=True,
            )
        else:
            time.sleep(2)  # torchrun stops all once one has left: the first finishes its sentence
        sys.stdout.flush()
        os._exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def start_group(store, alone, timeout):
    """The process group: of all ranks that share the store; or, where a process is alone and needs one, of itself."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if store is not None:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
    elif alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class Signals:
    """Ctrl-C and SIGTERM (preemption) ask the loop to save and leave; a second one, or one outside the loop, does not wait."""

    def __enter__(self):
        self.received, self.in_loop = None, False
        self.before = {
            number: signal.signal(number, self.receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def receive(self, number, _frame):
        if not self.in_loop:  # nothing is there to be saved
            raise KeyboardInterrupt
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
