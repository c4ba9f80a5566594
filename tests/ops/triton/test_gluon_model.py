"""The model of a Hopper: right kernels run, and wrong ones are found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.ops.triton.gluon_model.launching import Model
from tests.ops.triton.gluon_model.memory import RaceError
from tests.ops.triton.gluon_model.schedule import StuckError
from tests.ops.triton.gluon_model.values import Block, Pointer, binary

ROWS, TILES, SEEDS = 64, 5, 6


@gluon.jit
def fetch(source, tile, full, empty, TILES: gl.constexpr, WRONG: gl.constexpr):
    for index in range(TILES):
        if WRONG != "overwrites what is read":
            mbarrier.wait(empty, (index & 1) ^ 1)
        missing: gl.constexpr = 64 if WRONG == "expects too little" else 0
        mbarrier.expect(full, 64 * 64 * 2 - missing)
        tma.async_copy_global_to_shared(source, [index * 64, 0], full, tile)


@gluon.jit
def square(out, tile, doubled, full, empty, TILES: gl.constexpr, WRONG: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    local_M = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    local_N = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    zero = gl.zeros([64, 64], gl.float32, layout=layout)
    for index in range(TILES):
        if WRONG != "reads too early":
            mbarrier.wait(full, index & 1)
        found = tile.load(layout)
        doubled.store(found + found)
        if WRONG != "shows nothing to engines":
            fence_async_shared()
        if WRONG == "frees too early":
            mbarrier.arrive(empty, count=1)
        product = warpgroup_mma(doubled, tile, zero, use_acc=False, is_async=True)
        result = warpgroup_mma_wait(1 if WRONG == "uses what is not done" else 0, [product])
        if WRONG != "frees too early" and WRONG != "frees nothing":
            mbarrier.arrive(empty, count=1)
        gl.store(out + (index * 64 + local_M)[:, None] * 64 + local_N[None, :], result)


@gluon.jit
def squares_kernel(source, out, TILES: gl.constexpr, WRONG: gl.constexpr):
    """Of each tile of rows, twice its square."""
    tile = gl.allocate_shared_memory(gl.float16, [64, 64], source.layout)
    doubled = gl.allocate_shared_memory(gl.float16, [64, 64], source.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize(
        [
            (square, (out, tile, doubled, full, empty, TILES, WRONG)),
            (fetch, (source, tile, full, empty, TILES, WRONG)),
        ],
        [1],
        [24],
    )


def _run(wrong: str, seed: int) -> tuple[Tensor, Tensor]:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    source = torch.randn(TILES * ROWS, ROWS, dtype=torch.float16)
    out = torch.full((TILES * ROWS, ROWS), float("nan"))
    descriptor = TensorDescriptor.from_tensor(source, [ROWS, ROWS], layout)
    Model().launch(
        squares_kernel, (1,), descriptor, out, seed=seed, TILES=TILES, WRONG=wrong, num_warps=4
    )
    tiles = source.view(TILES, ROWS, ROWS)
    return out, ((tiles + tiles).float() @ tiles.float()).view_as(out)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_right_kernel_runs(seed: int) -> None:
    found, expected = _run("", seed)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ("overwrites what is read", RaceError, "writes what|more arrive"),
        ("expects too little", StuckError, "every task waits"),
        ("reads too early", RaceError, "reads what|may still read|more arrive"),
        ("shows nothing to engines", RaceError, "no fence has shown"),
        ("frees too early", RaceError, "may still read"),
        ("frees nothing", StuckError, "every task waits: .* for a barrier"),
    ],
)
def test_a_wrong_kernel_is_found_out(
    wrong: str, error: type[Exception], words: str, seed: int
) -> None:
    with pytest.raises(error, match=words):
        _run(wrong, seed)


def test_a_product_cannot_be_used_before_it_is_done() -> None:
    errors = []
    for seed in range(SEEDS):
        try:
            _run("uses what is not done", seed)
        except AssertionError as error:
            errors.append(str(error))
    assert "a product is used before it was waited for" in errors


@gluon.jit
def take_turns_kernel(out, counts, WRONG: gl.constexpr):
    """Writes the numbers of programs in the order of their turns."""
    turn = gl.program_id(0)
    if WRONG != "counts on the grid's order":
        turn = gl.atomic_add(counts, 1, sem="relaxed", scope="gpu")
    if WRONG != "waits for none":
        seen = gl.load(counts + 1, volatile=True)
        while seen < turn:
            seen = gl.load(counts + 1, volatile=True)
    told = 0 if WRONG == "tells none" else 1
    place = gl.atomic_add(counts + 1, told, sem="release", scope="gpu")
    gl.store(out + place, turn)


def _turns(wrong: str, seed: int) -> list[int]:
    out, counts = torch.full((8,), -1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    Model().launch(take_turns_kernel, (8,), out, counts, seed=seed, WRONG=wrong, num_warps=4)
    return out.tolist()


def _all_turns(wrong: str) -> list[list[int]]:
    return [_turns(wrong, seed) for seed in range(SEEDS)]


def test_programs_that_take_turns_run() -> None:
    assert _all_turns("") == [list(range(8))] * SEEDS


def test_programs_begin_in_any_order_and_a_seed_decides_it() -> None:
    orders = _all_turns("waits for none")
    assert any(order != list(range(8)) for order in orders)
    assert _all_turns("waits for none") == orders


@pytest.mark.parametrize("wrong", ["tells none", "counts on the grid's order"])
def test_programs_that_wait_for_ever_are_found_out(wrong: str) -> None:
    with pytest.raises(StuckError, match="a change of global memory"):
        _all_turns(wrong)


def _block(*numbers: float, dtype: torch.dtype) -> Block:
    return Block(torch.tensor(numbers, dtype=dtype))


@pytest.mark.parametrize(
    ("result", "numbers", "dtype"),
    [
        (lambda x: x // 2, [-1, 1], torch.int32),
        (lambda x: x % 2, [-1, 1], torch.int32),
        (lambda x: x + 0.5, [-2.5, 3.5], torch.float32),
        (lambda x: x + 2**40, [2**40 - 3, 2**40 + 3], torch.int64),
        (lambda x: x * (2**31 - 1), [-(2**31) + 3, 2**31 - 3], torch.int32),
        (lambda x: x + Block(torch.tensor(1)), [-2, 4], torch.int64),
        (lambda x: x.to(torch.float16) * 2.0, [-6, 6], torch.float16),
        (lambda x: x.to(torch.float16) + x.to(torch.float32), [-6, 6], torch.float32),
        (lambda x: (x < 0) & (x > -4), [True, False], torch.bool),
        (lambda x: 1 - x, [4, -2], torch.int32),
    ],
)
def test_numbers_are_of_tritons_types(result: Any, numbers: list[Any], dtype: torch.dtype) -> None:
    found = result(_block(-3, 3, dtype=torch.int32))
    assert found.numbers.tolist() == numbers
    assert found.dtype == dtype


@pytest.mark.parametrize("place", [-1, 6])
def test_places_beyond_a_tensor_are_found_out(place: int) -> None:
    from tests.ops.triton.gluon_model.language import load

    pointer = Pointer(torch.arange(6.0).view(2, 3), Block(torch.tensor(0)))
    assert load(pointer + 5).numbers.item() == 5
    assert load(pointer + place, mask=binary(lambda x, y: x != y, 0, 0), other=7.0)
    with pytest.raises(AssertionError, match=f"place {place} of 6"):
        load(pointer + place)
