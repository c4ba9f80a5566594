"""Tile shapes, warps and pipeline stages of every kernel: fixed, never searched for at run time.

Chosen by the widths of keys and values padded to a power of two, the dtype's size, whether the
mask is causal, and the compute capability. `python -m benchmarks.tune_gpu` searches for better
ones.
"""

import dataclasses
import functools
from typing import Literal

import torch

Pass = Literal["forward", "keys", "queries", "band", "dense", "weights", "split"]


SPLIT_ROWS = 128
"""Up to so many rows, of queries that share a key head, are for "split"."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """A tile of scores has `rows` queries (in "split" at most so many) and `columns` keys."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


Table = dict[Pass, dict[int, tuple[Tiles, Tiles]]]
"""By the padded width up to which they serve: without a causal mask, with one."""


def capability_of(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; torch asks for all of its properties each time, which takes longer."""
    if device.index is None or torch.compiler.is_compiling():
        return torch.cuda.get_device_capability(device)
    return _known_capability(device.index)


@functools.cache
def _known_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _both(*numbers: int) -> tuple[Tiles, Tiles]:
    return Tiles(*numbers), Tiles(*numbers)


INTERPRETED = Tiles(rows=32, columns=32, num_warps=4, num_stages=1)
"""In the interpreter a tile costs the same whatever its size."""

HOPPER: Table = {
    "forward": {
        64: _both(64, 64, 4, 3),
        128: _both(128, 64, 8, 3),
        256: _both(128, 32, 8, 2),
    },
    "keys": {
        64: _both(64, 64, 4, 3),
        128: _both(32, 64, 4, 2),
        256: _both(32, 32, 8, 1),
    },
    "queries": {
        64: (Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3)),
        128: _both(128, 64, 8, 3),
        256: _both(64, 32, 8, 1),
    },
    "band": {64: _both(64, 64, 4, 2), 128: _both(64, 64, 4, 2), 256: _both(32, 32, 4, 1)},
    "dense": {64: _both(64, 64, 4, 2), 128: _both(64, 64, 4, 2), 256: _both(32, 32, 4, 1)},
    "weights": {64: _both(64, 64, 4, 2), 128: _both(64, 64, 4, 2), 256: _both(64, 64, 4, 1)},
    "split": {64: _both(128, 128, 4, 3), 128: _both(128, 64, 4, 4), 256: _both(32, 32, 4, 3)},
}
"""float16 and bfloat16 on compute capability 9.0, with 227 KiB of shared memory."""

BLACKWELL: Table = HOPPER | {"queries": HOPPER["queries"] | {128: _both(128, 64, 8, 2)}}
"""The same on 10.0 and 10.3, where three stages of that kernel take 240 KiB with an offset bias.
Found by compiling, not measured.
"""

HOPPER_DENSE: Table = {
    "forward": {128: _both(128, 32, 8, 2)},
    "keys": {64: _both(32, 64, 4, 3)},
    "dense": {128: _both(64, 32, 4, 2)},
}
"""The same with a dense bias, whose tiles take registers: these spill none, those above many.
Found by compiling, not measured.
"""

AMPERE: Table = {
    "forward": {64: _both(128, 64, 4, 2), 128: _both(64, 64, 4, 2), 256: _both(64, 32, 4, 1)},
    "keys": {64: _both(32, 64, 4, 2), 128: _both(32, 64, 4, 1), 256: _both(16, 32, 4, 1)},
    "queries": {64: _both(64, 32, 4, 2), 128: _both(64, 32, 4, 1), 256: _both(32, 32, 4, 1)},
    "band": {64: _both(64, 32, 4, 1), 128: _both(32, 32, 4, 1), 256: _both(32, 32, 4, 1)},
    "dense": {64: _both(64, 32, 4, 1), 128: _both(32, 32, 4, 1), 256: _both(32, 32, 4, 1)},
    "weights": {64: _both(64, 64, 4, 1), 128: _both(64, 64, 4, 1), 256: _both(32, 32, 4, 1)},
    "split": {64: _both(128, 64, 4, 2), 128: _both(128, 32, 4, 2), 256: _both(32, 32, 4, 1)},
}
"""float16 and bfloat16 elsewhere, within the 99 KiB of shared memory of the smaller devices."""

AMPERE_DENSE: Table = {"forward": {64: _both(64, 64, 4, 2), 128: _both(64, 32, 4, 2)}}
"""As `HOPPER_DENSE`; at 128, under a causal mask with dropout, 50 bytes are left of 1,600."""

WIDE: Table = {
    "forward": {64: _both(64, 32, 4, 1), 128: _both(32, 32, 8, 1), 256: _both(16, 16, 8, 1)},
    "keys": {64: _both(32, 32, 8, 1), 128: _both(16, 32, 8, 1), 256: _both(16, 16, 8, 1)},
    "queries": {64: _both(64, 32, 8, 1), 128: _both(32, 16, 8, 1), 256: _both(16, 16, 8, 1)},
    "band": {64: _both(32, 32, 8, 1), 128: _both(16, 16, 4, 1), 256: _both(16, 32, 8, 1)},
    "dense": {64: _both(32, 32, 8, 1), 128: _both(16, 16, 4, 1), 256: _both(16, 32, 8, 1)},
    "weights": {64: _both(32, 32, 4, 1), 128: _both(16, 32, 4, 1), 256: _both(16, 32, 8, 1)},
    "split": {64: _both(64, 32, 4, 1), 128: _both(32, 32, 4, 1), 256: _both(16, 16, 4, 1)},
}
"""float32: each product is made of three of half the width, with more registers."""


def tiles(
    kind: Pass,
    width: int,
    itemsize: int,
    causal: bool,
    capability: tuple[int, int] | None,
    *,
    has_dense: bool = False,
) -> Tiles:
    """The tiles of one kernel.

    Args:
        kind: Which kernel.
        width: The larger padded width, of keys or of values.
        itemsize: Bytes of an element.
        causal: Whether the mask is causal.
        capability: Of the device; None in the interpreter.
        has_dense: Whether there is a dense bias.
    """
    if capability is None:
        return INTERPRETED
    table: Table = WIDE
    with_dense: Table = {}
    if itemsize == 2 and capability[0] in (9, 10):
        table, with_dense = HOPPER if capability[0] == 9 else BLACKWELL, HOPPER_DENSE
    elif itemsize == 2:
        table, with_dense = AMPERE, AMPERE_DENSE
    limit = min(limit for limit in table[kind] if width <= limit)
    found = with_dense.get(kind, {}).get(limit) if has_dense else None
    return (found or table[kind][limit])[causal]
