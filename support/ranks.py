"""Ranks that meet, leave and fail together; and the signals that ask them to."""

import math
import os
import re
import signal
import sys
import threading
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
from tqdm import tqdm

from support.cli import ENDED_BY_CTRL_C

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


def is_finite(numbers: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """No NaN and no infinity among them; nor, rounded to dtype, where that is given."""
    if numbers.numel() == 0:
        return True
    # No copy, which isfinite() makes. A NaN makes both NaN.
    low, high = numbers.detach().aminmax()
    if dtype is not None:
        low, high = low.to(dtype), high.to(dtype)
    return math.isfinite(low.item()) and math.isfinite(high.item())


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


def from_all_ranks(value: object) -> list:
    """What each rank has called this with, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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
            # torchrun's own mark; another launcher's child may outlive its parent on purpose
            if "TORCHELASTIC_RUN_ID" in os.environ:
                leave_without_agent()
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
    if not line and is_of_another_rank(error):
        # without gloo's file name in brackets, and its first sentence only
        reason = re.sub(r"\[/\S+\] ", "", str(error)).split(". ")[0]
        line = (
            f"rank {os.environ['RANK']} lost another rank, which died, hangs or is out of reach "
            f"({reason}); torchrun names it. The same command resumes from the last checkpoint"
        )
    if line:
        return f"{Path(sys.argv[0]).name}: {line}"
    return traceback.format_exc()


# what NCCL says where a peer is gone; its other errors are this rank's own
LOST_PEER = "remote process", "connection", "timed out", "timeout", "abort", "socket"


def is_of_another_rank(error: BaseException) -> bool:
    """Whether the error says that another rank is gone."""
    text = str(error).lower()
    if "nccl" in text:
        return any(words in text for words in LOST_PEER)
    # A DistError is also what a store raises when its time is over.
    return "gloo" in text or isinstance(error, dist.DistError)


def leave_without_agent() -> None:
    """Let this process end within seconds after torchrun's agent, which started it, has died.

    A rank notices nothing of that by itself: its collectives work on, and it would train beside the
    ranks that the agent's successor starts.
    """
    agent = os.getppid()

    def watch():
        while os.getppid() == agent:
            time.sleep(1)
        if int(os.environ["LOCAL_RANK"]) == 0:
            print(
                f"{Path(sys.argv[0]).name}: rank {os.environ['RANK']} leaves: the torchrun that "
                "started it is gone. The same command resumes from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- signals

# Seconds after the first Ctrl-C from which another one means it. Under torchrun a rank gets one
# Ctrl-C twice: from the terminal, and at once again from its agent.
MEANT = 1.0


class Signals:
    """Within `with`: Ctrl-C and SIGTERM (preemption) ask the loop to save and leave.

    asked: whether this rank has been asked. in_loop: set by the loop; outside of it nothing is
    there to be saved, and a signal ends the process. A second Ctrl-C quits without saving; SIGTERM
    never does, since Slurm and torchrun may both send it.

    Python calls a handler only between two lines of Python, and a step has few of them: the main
    thread waits for the device or for other ranks. The kernel's side of the handler writes the
    signal's number into a pipe at once (set_wakeup_fd), and a thread reads it there.
    """

    def __enter__(self):
        self.asked = False
        self.in_loop = False
        # when Ctrl-C came first, and whether the line has been said
        self.first = None
        self.said = False

        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.handle)
        self.heard, self.tell = os.pipe()
        os.set_blocking(self.tell, False)
        self.tell_before = signal.set_wakeup_fd(self.tell)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        signal.set_wakeup_fd(self.tell_before)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        # the thread reads to the end of the pipe
        os.close(self.tell)
        self.thread.join()
        os.close(self.heard)

    def handle(self, _number, _frame):
        """In the main thread, as soon as it is in Python again."""
        if not self.in_loop:
            raise KeyboardInterrupt
        self.asked = True

    def listen(self):
        """In the thread: each signal, as soon as it has come."""
        while numbers := os.read(self.heard, 64):
            for number in numbers:
                if self.in_loop and number in self.handlers:
                    self.hear(number, time.monotonic())

    def hear(self, number: int, now: float) -> None:
        self.asked = True
        is_ctrl_c = number == signal.SIGINT
        if not self.said:
            self.said = True
            again = "; Ctrl-C again quits without saving" if is_ctrl_c else ""
            self.say(f"{signal.Signals(number).name}: finishing the step and saving{again}")
        if is_ctrl_c and self.first is None:
            self.first = now
        elif is_ctrl_c and now - self.first >= MEANT:
            # the main thread may be in a collective that never ends
            self.say("stopped by a second Ctrl-C without saving; an earlier checkpoint remains")
            os._exit(ENDED_BY_CTRL_C)

    def say(self, text: str) -> None:
        """One line of each node."""
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            tqdm.write(text, file=sys.stderr)

    def asked_on_any_rank(self) -> bool:
        """The same on all ranks, so that all stop after the same step."""
        asked = torch.tensor(float(self.asked))
        if dist.is_initialized():
            dist.all_reduce(asked)
        return asked.item() > 0
