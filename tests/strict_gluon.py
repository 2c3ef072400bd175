"""A strict executor of Gluon kernels for Hopper on a CPU: it runs the very source of a kernel file.

The parts of a warp-specialised program (here: actors) run in one thread each, one at a time, in an
order that a seed draws. What the hardware does by itself happens at random times: a TMA copy lands
when the scheduler says so, a wgmma reads shared memory as late as its wait allows. So wrong numbers
show themselves; but a race must be seen in every order, not only in the one where it hurts.
Therefore every access to shared memory is an event, a bit, and each actor carries the set of all
events that are known to be over before its next step:

    TMA copy      over for those who wait for its mbarrier
    wgmma         over for its own actor after warpgroup_mma_wait, for others by way of an mbarrier
    store         over for wgmma and TMA (they read and write by another road) after
                  fence_async_shared and then a barrier of the actor's threads
    mbarrier      hands the knowledge of all who arrived to all who wait

An access is refused, Race, if an event it conflicts with is not known to be over. Deadlock: every
actor waits and no copy is in flight. OutOfBounds: a load or store of global memory outside its
tensor. Misaligned: a TMA copy from where the chip cannot read. Shared memory starts as NaN. Layouts
are not modelled: they move values between threads, never change them, and a wrong one does not
compile.
"""

import itertools
import math
import random
import sys
import threading
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch


class Race(RuntimeError):
    """Two accesses to shared memory without an order, or a use of what is not there yet."""


class Deadlock(RuntimeError):
    """Every actor waits for another."""


class OutOfBounds(IndexError):
    """An address outside its tensor."""


class Misaligned(ValueError):
    """A TMA copy that does not begin on a 16-byte boundary."""


class Stopped(BaseException):
    """Ends the other actors when one has failed."""


# ---- the scheduler


class Actor:
    """One part of a program: a thread of Python that runs only when it is its turn."""

    def __init__(self, run):
        self.run = run
        # bits of the events that are over for this actor
        self.known = 0
        # wgmmas in flight, oldest first
        self.products = []
        # stores that wait for a fence, and those that wait for the barrier after it
        self.stored = 0
        self.fenced = 0
        self.may_go_on = None
        self.done = False
        self.turn = threading.Semaphore(0)
        self.thread = None


class Program:
    """One program of the grid: its actors, copies in flight and events."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        # how it runs: anything goes; copies land late; actors run in bursts
        self.mood = seed % 3
        self.main = Actor(None)
        self.current = self.main
        self.actors = []
        self.copies = []
        self.events = 0
        self.error = None
        self.back = threading.Semaphore(0)

    def event(self):
        """A new bit."""
        self.events += 1
        return 1 << self.events

    def step(self, may_go_on=None):
        """The current actor lets others run, and goes on when may_go_on() is true."""
        actor = self.current
        if actor is self.main:
            assert may_go_on is None or may_go_on(), "it waits before the program has parts"
            return
        actor.may_go_on = may_go_on
        self.back.release()
        actor.turn.acquire()
        if self.error:
            raise Stopped

    def run(self, parts):
        """Run (function, arguments) of each part to its end."""
        self.actors = [Actor(lambda f=f, args=args: f(*args)) for f, args in parts]
        for actor in self.actors:
            actor.known = self.main.known
            actor.thread = threading.Thread(target=self._live, args=(actor,), daemon=True)
            actor.thread.start()
        last = None
        while self.error is None and not all(actor.done for actor in self.actors):
            last = self._one_step(last)
        for actor in self.actors:
            actor.turn.release()
        for actor in self.actors:
            actor.thread.join()
        self.current = self.main
        if self.error is None and self.copies:
            self.error = Race("the program ends with a copy in flight")
        if self.error is not None:
            raise self.error

    def _live(self, actor):
        actor.turn.acquire()
        try:
            if self.error is None:
                actor.run()
                if actor.products:
                    raise Race("an actor ends with a wgmma in flight")
        except Stopped:
            pass
        except BaseException as error:  # of the kernel, to be raised in the main thread
            self.error = self.error or error
        actor.done = True
        self.back.release()

    def _one_step(self, last):
        ready = [
            actor
            for actor in self.actors
            if not actor.done and (actor.may_go_on is None or actor.may_go_on())
        ]
        if not ready and not self.copies:
            self.error = Deadlock("every part waits, and no copy is in flight")
            return None
        choices = ready + self.copies
        if self.mood == 1 and ready:
            choices = ready
        choice = self.random.choice(choices)
        if self.mood == 2 and last in ready and self.random.random() < 0.9:
            choice = last
        if choice in self.copies:
            self.copies.remove(choice)
            try:
                choice()
            except RuntimeError as error:
                self.error = error
            return last
        self.current = choice
        choice.turn.release()
        self.back.acquire()
        return choice


program = None
programs_seed = 0


# ---- shared memory and mbarriers


class Tile:
    """What is known of one piece of shared memory: the events that wrote it, and that read it
    since."""

    def __init__(self):
        self.written = 0
        self.read = 0


class Shared:
    """A view of shared memory. Its first axis, if several, counts tiles."""

    def __init__(self, data, tiles):
        self.data = data
        self.tiles = tiles
        self.dtype = data.dtype
        self.shape = data.shape

    def index(self, i):
        i = int(i)
        if not 0 <= i < len(self.data):
            raise OutOfBounds(f"tile {i} of {len(self.data)}")
        tiles = self.tiles[i] if isinstance(self.tiles, list) else self.tiles
        return Shared(self.data[i], tiles)

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, int(start), int(length)), self.tiles)

    def permute(self, order):
        return Shared(self.data.permute(*order), self.tiles)

    def _reinterpret(self, dtype, shape, layout):
        """As rows of half the width: all left halves, then all right ones, as TMA lays them."""
        rows, width = self.data.shape
        assert dtype == self.dtype and list(shape) == [2 * rows, width // 2]
        left, right = self.data.chunk(2, 1)
        return Halves([*left, *right], self)

    def store(self, value):
        actor = program.current
        _no_pending(value)
        _over(self.tiles.written | self.tiles.read, "a store over a tile in use")
        event = program.event()
        self.tiles.written |= event
        actor.stored |= event
        self.data.copy_(value)
        program.step()

    def load(self, layout):
        _over(self.tiles.written & ~program.current.stored, "a load of a tile not yet there")
        # the compiler puts a barrier between the loads and a later arrive: test_hopper.py sees it
        event = program.event()
        self.tiles.read |= event
        program.current.known |= event
        value = block(self.data.clone())
        program.step()
        return value


class Halves:
    """The rows of a tile in two halves, for stores of a half row at a time."""

    def __init__(self, rows, tile):
        self.rows = rows
        self.tile = tile

    def index(self, i):
        i = int(i)
        if not 0 <= i < len(self.rows):
            raise OutOfBounds(f"half row {i} of {len(self.rows)}")
        return Shared(self.rows[i], self.tile.tiles)


def _over(events, what):
    if events & ~(program.current.known | program.current.stored | program.current.fenced):
        raise Race(what)


def fence_async_shared():
    actor = program.current
    actor.fenced |= actor.stored
    actor.stored = 0
    program.step()


def partition_barrier():
    actor = program.current
    actor.known |= actor.fenced
    actor.fenced = 0
    program.step()


class Barrier:
    """An mbarrier: it flips when all arrivals and all announced bytes are in."""

    def __init__(self):
        self.count = None
        self.missing = None
        self.bytes = 0
        self.flips = 0
        # what those who wait will know; what it is becoming
        self.known = 0
        self.coming = 0

    def change(self, arrivals, count_bytes, known):
        assert self.count is not None, "an mbarrier that nobody initialised"
        self.missing -= arrivals
        self.bytes += count_bytes
        self.coming |= known
        if self.missing < 0:
            raise Race("more arrivals at an mbarrier than it counts")
        if self.missing == 0 and self.bytes == 0:
            self.flips += 1
            self.missing = self.count
            self.known |= self.coming


class Barriers:
    def __init__(self, count):
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i):
        i = int(i)
        if not 0 <= i < len(self.barriers):
            raise OutOfBounds(f"mbarrier {i} of {len(self.barriers)}")
        return self.barriers[i]


class MBarrierLayout:
    pass


def init(barrier, count):
    assert barrier.count is None, "an mbarrier is initialised twice"
    barrier.count = int(count)
    barrier.missing = int(count)


def expect(barrier, size):
    barrier.change(1, int(size), program.current.known)
    program.step()


def arrive(barrier, *, count=1):
    barrier.change(int(count), 0, program.current.known)
    program.step()


def wait(barrier, phase):
    program.step(lambda: barrier.flips % 2 != int(phase))
    program.current.known |= barrier.known


# ---- TMA


class TensorDescriptor:
    """A view of global memory by tiles; what lies outside the tensor arrives as zeros."""

    def __init__(self, tensor, shape):
        assert tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
        assert all(stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:-1])
        assert all(n <= 256 for n in shape)
        self.tensor = tensor
        self.block = shape
        self.dtype = tensor.dtype
        self.layout = None
        self.block_type = SimpleNamespace(nbytes=math.prod(shape) * tensor.itemsize)

    @staticmethod
    def from_tensor(tensor, block_shape, layout):
        return TensorDescriptor(tensor, block_shape)


def async_copy_global_to_shared(descriptor, coordinates, barrier, destination):
    tile = destination.tiles
    _over(tile.written | tile.read, "a copy into a tile in use")
    assert list(destination.shape) == list(descriptor.block)
    event = program.event()
    tile.written = event
    tile.read = 0
    known = program.current.known | event
    coordinates = [int(c) for c in coordinates]
    # an illegal instruction on the GPU
    if coordinates[-1] * descriptor.tensor.itemsize % 16:
        raise Misaligned(f"a copy from column {coordinates[-1]}")
    # until it lands a reader finds neither the old values nor the new ones
    destination.data.fill_(math.nan)

    def land():
        pieces = []
        for at, size, end in zip(coordinates, descriptor.block, descriptor.tensor.shape):
            assert at >= 0
            pieces.append(slice(min(at, end), min(at + size, end)))
        source = descriptor.tensor[tuple(pieces)]
        destination.data.zero_()
        destination.data[tuple(slice(0, n) for n in source.shape)] = source
        barrier.change(0, -descriptor.block_type.nbytes, known)

    program.copies.append(land)
    program.step()


# ---- wgmma


class Product:
    """A wgmma in flight, in place of its accumulator: not to be touched."""

    def __init__(self, run, event):
        self.run = run
        self.event = event
        self.value = None

    def __getattr__(self, name):
        raise Race("an accumulator is used while its wgmma is in flight")

    def _touched(self, _other):
        raise Race("an accumulator is used while its wgmma is in flight")

    __add__ = __sub__ = __mul__ = __truediv__ = __rmul__ = __rsub__ = _touched


def _no_pending(*values):
    for value in values:
        if isinstance(value, Product):
            raise Race("an accumulator is used while its wgmma is in flight")


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    actor = program.current
    _no_pending(a, acc)
    event = program.event()
    for x in (a, b):
        if isinstance(x, Shared):
            if not x.tiles.written:
                raise Race("wgmma reads a tile that nobody wrote")
            if x.tiles.written & ~actor.known:
                raise Race("wgmma reads a tile that is not yet there")
            x.tiles.read |= event
    start = acc.clone() if use_acc else torch.zeros_like(acc)

    def run():
        left = a.data if isinstance(a, Shared) else a
        return block(start + left.float() @ b.data.float())

    product = Product(run, event)
    actor.products.append(product)
    program.step()
    return product if is_async else warpgroup_mma_wait(0, (product,))


def warpgroup_mma_wait(num_outstanding, deps):
    program.step()
    actor = program.current
    while len(actor.products) > num_outstanding:
        product = actor.products.pop(0)
        product.value = product.run()
        actor.known |= product.event
    values = []
    for value in deps:
        finished = isinstance(value, Product) and value.value is not None
        values.append(value.value if finished else value)
    return values[0] if len(values) == 1 else tuple(values)


# ---- values and global memory


class Block(torch.Tensor):
    """A tensor in registers."""

    @property
    def type(self):
        return SimpleNamespace(layout=None, scalar=self.dtype)


def block(x):
    return x.as_subclass(Block)


class Pointer:
    def __init__(self, tensor, offset=0):
        self.tensor = tensor
        self.offset = offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, more):
        return Pointer(self.tensor, self.offset + more)


def _address(pointer, mask, what):
    """(flat tensor, offsets, mask), the offsets within the tensor where the mask is true."""
    flat = pointer.tensor.view(-1)
    offset = torch.as_tensor(pointer.offset)
    mask = torch.as_tensor(True if mask is None else mask)
    offset, mask = torch.broadcast_tensors(offset, mask)
    outside = (offset < 0) | (offset >= len(flat))
    if (outside & mask).any():
        raise OutOfBounds(f"{what} outside the tensor")
    return flat, offset.long(), mask


def load(pointer, mask=None, other=0):
    flat, offset, mask = _address(pointer, mask, "a load")
    values = torch.full(offset.shape, other, dtype=flat.dtype)
    values[mask] = flat[offset[mask]]
    return block(values)


def store(pointer, value, mask=None):
    _no_pending(value)
    flat, offset, mask = _address(pointer, mask, "a store")
    value, offset, mask = torch.broadcast_tensors(torch.as_tensor(value), offset, mask)
    flat[offset[mask]] = value[mask].to(flat.dtype)


class Layout:
    """Any layout: values do not depend on it."""

    def __init__(self, *_args):
        pass

    @staticmethod
    def get_default_for(shape, dtype):
        return Layout()


def allocate_shared_memory(dtype, shape, layout):
    if isinstance(layout, MBarrierLayout):
        return Barriers(shape[0])
    data = torch.full(shape, math.nan).to(dtype)
    return Shared(data, [Tile() for _ in range(shape[0])])


def where(mask, a, b):
    _no_pending(a, b)
    a = torch.as_tensor(a)
    b = torch.as_tensor(b, dtype=a.dtype)
    return block(torch.where(mask, a, b))


def warp_specialize(parts, warps, registers):
    assert len(warps) == len(registers) == len(parts) - 1
    program.run(parts)


# ---- the modules that a kernel file imports, and the launcher


class Kernel:
    """A function under gluon.jit: called by another it is itself, with a grid it is launched."""

    def __init__(self, function, grid=None):
        self.function = function
        self.grid = grid

    def __getitem__(self, grid):
        return Kernel(self.function, grid)

    def __call__(self, *args, num_warps=None):
        global program
        if self.grid is None:
            return self.function(*args)
        pointers = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
        for at in itertools.product(*(range(n) for n in self.grid)):
            program = Program(
                programs_seed + sum(7919 * (axis + 1) * i for axis, i in enumerate(at))
            )
            program.at = at
            program.grid = self.grid
            self.function(*pointers)
        return None


def jit(function=None, **_options):
    return jit if function is None else Kernel(function)


def _language():
    names = {
        "constexpr": lambda value: value,
        "static_range": range,
        "program_id": lambda axis: block(torch.tensor(program.at[axis], dtype=torch.int32)),
        "num_programs": lambda axis: program.grid[axis],
        "arange": lambda a, b, layout: block(torch.arange(a, b, dtype=torch.int32)),
        "zeros": lambda shape, dtype, layout: block(torch.zeros(shape, dtype=dtype)),
        "full": lambda shape, value, dtype, layout: block(torch.full(shape, value, dtype=dtype)),
        "load": load,
        "store": store,
        "where": where,
        "maximum": torch.maximum,
        "max": lambda x, axis: x.amax(axis),
        "sum": lambda x, axis: x.sum(axis),
        "exp2": torch.exp2,
        "log2": torch.log2,
        "reshape": lambda x, shape: x.reshape(shape),
        "permute": lambda x, order: x.permute(order),
        "split": lambda x: (x[..., 0], x[..., 1]),
        "join": lambda a, b: block(torch.stack([a, b], -1)),
        "convert_layout": lambda x, layout: x,
        "allocate_shared_memory": allocate_shared_memory,
        "warp_specialize": warp_specialize,
        "barrier": partition_barrier,
    }
    dtypes = "int32", "int64", "float32", "bfloat16", "float16"
    names |= {dtype: getattr(torch, dtype) for dtype in dtypes}
    layouts = (
        "NVMMASharedLayout",
        "NVMMADistributedLayout",
        "SwizzledSharedLayout",
        "BlockedLayout",
        "SliceLayout",
        "DotOperandLayout",
    )
    names |= dict.fromkeys(layouts, Layout)
    return names


def _module(name, **names):
    module = ModuleType(name)
    vars(module).update(names)
    return module


@contextmanager
def _gluon():
    """Triton's Gluon replaced by this file's, for as long as a kernel file is being read."""
    root = "triton.experimental.gluon"
    mbarrier = SimpleNamespace(
        MBarrierLayout=MBarrierLayout, init=init, expect=expect, arrive=arrive, wait=wait
    )
    tma = SimpleNamespace(async_copy_global_to_shared=async_copy_global_to_shared)
    language = _module(f"{root}.language", **_language())
    modules = [
        _module("triton.experimental", gluon=None),
        _module(root, jit=jit, language=language),
        language,
        _module(f"{root}.language.nvidia"),
        _module(
            f"{root}.language.nvidia.hopper",
            fence_async_shared=fence_async_shared,
            mbarrier=mbarrier,
            tma=tma,
            warpgroup_mma=warpgroup_mma,
            warpgroup_mma_wait=warpgroup_mma_wait,
        ),
        _module(f"{root}.nvidia"),
        _module(f"{root}.nvidia.hopper", TensorDescriptor=TensorDescriptor),
    ]
    modules[0].gluon = modules[1]
    before = {module.__name__: sys.modules.get(module.__name__) for module in modules}
    sys.modules.update({module.__name__: module for module in modules})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def read(source, path="hopper_attention.py"):
    """The kernel file with this source, as a module whose kernels run here on CPU tensors."""
    module = ModuleType("strict_hopper")
    with _gluon():
        exec(compile(source, path, "exec"), vars(module))
    return module
