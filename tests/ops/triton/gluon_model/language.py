"""What kernels call of `triton.language` and Gluon, with the meaning that it has on a Hopper.

Layouts are taken and not looked at: the compiler checks them. So are synchronisations inside a
group of warps, which is one worker here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor

from tests.ops.triton.gluon_model.device import Product, Transfer, here, program_id
from tests.ops.triton.gluon_model.memory import Barrier, Shared
from tests.ops.triton.gluon_model.values import Block, Pointer, binary, to_numbers


class Barriers:
    """Several mbarriers."""

    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, place: Any) -> Barrier:
        return self.all[int(place)]


class BarrierLayout:
    """Marks memory for barriers."""


class SharedLayout:
    """Any layout of tiles."""

    def __init__(self, *_: object) -> None: ...

    @classmethod
    def get_default_for(cls, shape: Sequence[int], dtype: torch.dtype) -> SharedLayout:
        return cls()


class Descriptor:
    """A tensor as the copy engine sees it: tiles of one shape, zero beyond its ends."""

    def __init__(self, made: Any) -> None:
        self.base, self.block_shape, self.layout = made.base, tuple(made.block_shape), made.layout
        self.shape, self.strides = tuple(made.shape), tuple(made.strides)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.base.dtype
        return dtype

    def parts(self, coordinates: Sequence[Any], tile: Tensor) -> tuple[Tensor, Tensor]:
        """What of the tensor a tile covers, and what of the tile lies in the tensor."""
        whole = self.base.detach().as_strided(self.shape, self.strides)
        for dim, coordinate in enumerate(coordinates):
            first = int(coordinate)
            start, stop = max(first, 0), min(first + self.block_shape[dim], self.shape[dim])
            length = max(stop - start, 0)
            whole = whole.narrow(dim, start if length else 0, length)
            tile = tile.narrow(dim, start - first if length else 0, length)
        return whole, tile


# Numbers.


def _one(function: Callable[[Tensor], Tensor]) -> Callable[[Block], Block]:
    return lambda value: Block(function(value.numbers))


def _float_or_integer(of_floats: Any, of_integers: Any) -> Callable[[Any, Any], Block]:
    def function(left: Any, right: Any) -> Block:
        def apply(x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = (of_floats if x.dtype.is_floating_point else of_integers)(x, y)
            return result

        return binary(apply, left, right)

    return function


def where(condition: Any, left: Any, right: Any) -> Block:
    chosen = to_numbers(condition)
    return binary(lambda x, y: torch.where(chosen, x, y), left, right)


def cast(value: Any, dtype: torch.dtype) -> Block:
    return Block(to_numbers(value).to(dtype))


def cdiv(value: Any, divisor: Any) -> Any:
    return (value + divisor - 1) // divisor


def arange(start: int, stop: int, layout: object = None) -> Block:
    return Block(torch.arange(start, stop, dtype=torch.int32))


def full(shape: Sequence[int], value: Any, dtype: torch.dtype, layout: object = None) -> Block:
    return Block(to_numbers(value).to(dtype).expand(shape))


def zeros(shape: Sequence[int], dtype: torch.dtype, layout: object = None) -> Block:
    return full(shape, 0, dtype)


def zeros_like(value: Block) -> Block:
    return full(value.shape, 0, value.dtype)


def convert_layout(value: Block, layout: object) -> Block:
    return value


# Global memory.


def _places(pointer: Pointer, mask: Any, *others: Any) -> tuple[Tensor, ...]:
    """Places, which of them count, and what else is given, in one shape; checked."""
    chosen = torch.tensor(True) if mask is None else to_numbers(mask)
    given = [pointer.places.numbers, chosen, *(to_numbers(other) for other in others)]
    places, chosen, *rest = torch.broadcast_tensors(*given)
    size = pointer.elements().numel()
    outside = chosen & ((places < 0) | (places >= size))
    assert not outside.any(), f"place {int(places[outside][0])} of {size}"
    return places.long(), chosen, *rest


def load(pointer: Pointer, mask: Any = None, other: Any = None, *, volatile: bool = False) -> Block:
    if volatile:
        _look(pointer)
    elements = pointer.elements()
    missing = float("nan") if elements.dtype.is_floating_point else -(2**30)
    places, chosen, rest = _places(pointer, mask, missing if other is None else other)
    found = elements[torch.where(chosen, places, 0)]
    return Block(torch.where(chosen, found, rest.to(elements.dtype)))


def _look(pointer: Pointer) -> None:
    """Lets others run; who looks at a place again waits until something was written."""
    worker, place = here(), int(pointer.places)
    device = worker.device
    seen = worker.looked.get(place)
    worker.pause("a change of global memory", lambda: device.state != seen)
    worker.looked[place] = device.state


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    places, chosen, numbers = _places(pointer, mask, value)
    pointer.elements()[places[chosen]] = numbers[chosen].to(pointer.element_ty)
    here().device.state += 1


def _atomic(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Block]:
    def function(pointer: Pointer, value: Any, *, sem: str, scope: str) -> Block:
        worker = here()
        worker.pause("its turn")
        place = int(_places(pointer, None)[0])
        elements = pointer.elements()
        before = elements[place].clone()
        elements[place] = change(before, to_numbers(value))
        worker.device.state += 1
        return Block(before)

    return function


# Shared memory and barriers.


class Tile(Shared):
    """Shared memory, as a kernel reads and writes it."""

    def load(self, layout: object) -> Block:
        here().pause("its turn")
        return Block(self.read(here().agent))

    def store(self, value: Block) -> None:
        here().pause("its turn")
        assert value.dtype == self.dtype, f"{value.dtype} stored as {self.dtype}"
        self.write(here().agent, value.numbers)


def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Any:
    if isinstance(layout, BarrierLayout):
        return Barrier() if len(shape) == 1 else Barriers(shape[0])
    return Tile.allocate(here().program.agents, dtype, shape)


def init(barrier: Barrier, count: int) -> None:
    barrier.initialise(count)


def expect(barrier: Barrier, number: int) -> None:
    barrier.arrive(here().agent, expected=number)


def arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
    here().pause("its turn")
    if pred:
        barrier.arrive(here().agent, count)


def wait(barrier: Barrier, phase: Any) -> None:
    parity = int(phase)
    here().pause("a barrier", lambda: barrier.has_ended(parity))
    here().agent.learn(barrier.clock)


def fence_async_shared() -> None:
    here().agent.fence()


def thread_barrier() -> None:
    here().pause("its turn")


# The copy engine.


def _known() -> Tensor:
    """What is known where an engine begins."""
    here().agent.tick()
    return here().agent.clock.clone()


def async_copy_global_to_shared(
    descriptor: Descriptor, coordinates: Sequence[Any], barrier: Barrier, result: Shared
) -> None:
    engine, known = here().program.copy(), _known()
    assert result.shape == descriptor.block_shape, f"{result.shape}: {descriptor.block_shape}"

    def copy() -> None:
        tile = torch.zeros(result.shape, dtype=descriptor.dtype)
        source, target = descriptor.parts(coordinates, tile)
        target.copy_(source)
        engine.stand_at(known)
        result.write(engine, tile)
        barrier.receive(tile.numel() * tile.element_size(), engine.clock)

    here().device.schedule.pending.append(copy)
    here().pause("its turn")


def add_to_global(descriptor: Descriptor, coordinates: Sequence[Any], source: Shared) -> None:
    """The kernels' own name for the engine's sum."""
    worker, known, transfer = here(), _known(), Transfer()
    pending = worker.device.schedule.pending

    def read() -> None:
        worker.engine.stand_at(known)
        tile = source.read(worker.engine)
        transfer.clock, transfer.is_read = worker.engine.clock.clone(), True
        pending.append(lambda: add(tile))

    def add(tile: Tensor) -> None:
        target, added = descriptor.parts(coordinates, tile)
        target += added
        worker.device.state += 1
        transfer.has_arrived = True

    worker.transfers.append(transfer)
    pending.append(read)
    worker.pause("its turn")


def store_wait(pendings: int) -> None:
    worker = here()
    waited = worker.transfers[: len(worker.transfers) - pendings]
    worker.pause("its copies to be read", lambda: all(each.is_read for each in waited))
    for transfer in waited:
        worker.agent.learn(transfer.clock)


def inline_asm_elementwise(
    code: str, constraints: str, given: list[Any], dtype: object, pure: bool, pack: int
) -> Any:
    """Of one operand, the only one known: waiting for copies to arrive."""
    wait = r"cp\.async\.bulk\.wait_group (\d+); bar\.warp\.sync 0xffffffff; mov\.b32 \$0, \$1;"
    known = re.fullmatch(wait, code)
    assert known is not None, f"unknown code: {code}"
    worker = here()
    waited = worker.transfers[: max(len(worker.transfers) - int(known[1]), 0)]
    worker.pause("its copies to arrive", lambda: all(each.has_arrived for each in waited))
    for transfer in waited:
        worker.agent.learn(transfer.clock)
    return given[0]


# Products.


def warpgroup_mma(
    a: Block | Shared, b: Shared, acc: Block | Product, *, use_acc: Any = True, is_async: bool
) -> Product:
    worker = here()
    assert is_async
    assert a.shape[0] == 64, f"a group of warps multiplies 64 rows; got {a.shape}"
    adds = bool(use_acc)

    def multiply() -> Tensor:
        left, right = (
            operand.numbers if isinstance(operand, Block) else operand.read(worker.engine)
            for operand in (a, b)
        )
        assert left.dtype == right.dtype, f"{left.dtype} times {right.dtype}"
        product = left.float() @ right.float()
        return product + acc.numbers if adds else product

    product = Product(multiply)
    product.clock = _known()
    worker.products.append(product)
    worker.device.schedule.pending.append(worker.multiply)
    worker.pause("its turn")
    return product


def warpgroup_mma_wait(num_outstanding: int, deps: Sequence[Product]) -> Any:
    worker = here()
    while len(worker.products) > num_outstanding:
        worker.multiply()
    for product in deps:
        assert product.done, "a product is used before it was waited for"
        worker.agent.learn(product.clock)
    results = tuple(Block(product.numbers) for product in deps)
    return results[0] if len(results) == 1 else results


def specialise(
    parts: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: object, registers: object
) -> None:
    here().program.specialise(parts)


def _reduced(function: Callable[..., Tensor]) -> Callable[[Block, int], Block]:
    return lambda value, axis: Block(function(value.numbers, axis))


BOTH = SimpleNamespace(
    abs=_one(torch.abs),
    arange=arange,
    cast=cast,
    cdiv=cdiv,
    exp=_one(torch.exp),
    exp2=_one(torch.exp2),
    bfloat16=torch.bfloat16,
    float16=torch.float16,
    float32=torch.float32,
    int32=torch.int32,
    int64=torch.int64,
    load=load,
    log=_one(torch.log),
    log2=_one(torch.log2),
    # Of a NaN and a number, the number.
    max=_reduced(lambda x, axis: torch.where(x.isnan(), -torch.inf, x).amax(axis)),
    maximum=_float_or_integer(torch.fmax, torch.maximum),
    minimum=_float_or_integer(torch.fmin, torch.minimum),
    program_id=program_id,
    store=store,
    sum=_reduced(torch.sum),
    where=where,
)
"""Of `triton.language` and of Gluon's own."""
TRITON = BOTH
GLUON = SimpleNamespace(
    **vars(BOTH),
    DotOperandLayout=gl.DotOperandLayout,
    NVMMADistributedLayout=gl.NVMMADistributedLayout,
    NVMMASharedLayout=SharedLayout,
    SliceLayout=gl.SliceLayout,
    allocate_shared_memory=allocate_shared_memory,
    atomic_add=_atomic(torch.add),
    atomic_xchg=_atomic(lambda before, value: value),
    convert_layout=convert_layout,
    full=full,
    inline_asm_elementwise=inline_asm_elementwise,
    static_range=range,
    thread_barrier=thread_barrier,
    warp_specialize=specialise,
    zeros=zeros,
    zeros_like=zeros_like,
)
MBARRIER = SimpleNamespace(
    MBarrierLayout=BarrierLayout, arrive=arrive, expect=expect, init=init, wait=wait
)
TMA = SimpleNamespace(
    async_copy_global_to_shared=async_copy_global_to_shared, store_wait=store_wait
)
