"""Dropout by a counter-based hash: any kernel, block size and recomputation draws the same.

A weight's fate is a function of (seed, batch, head, query position, key position) alone. A strong
hash of (seed, batch, head, query position) and one of (seed, key position) are made once a row and
once a column, both odd; each weight then costs one multiplication. All arithmetic is on 32-bit
two's complement integers that wrap around::

    mix(x):  x ^= x >>> 16;  x *= 0x7feb352d;  x ^= x >>> 15;  x *= 0x846ca68b;  x ^= x >>> 16
    s   = mix(mix(low(seed)) + high(seed))
    row = mix(mix(mix(s + batch) + head) + query) | 1;  column = mix(mix(s + 0x9e3779b9) + key) | 1
    kept if row * column >= round(p * 2**32) - 2**31

``>>>`` shifts in zeros. Multiplying by an odd number permutes the 32-bit numbers, so a row drops as
its columns' hashes are spread: evenly. Two rows drop independently unless the ratio of their hashes
is close to one of small numbers, which is rare.
"""

import torch
from torch import Tensor

from zeta.ops.call import AttentionCall
from zeta.values import Tile

MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B - 2**32
COLUMN_SALT = 0x9E3779B9 - 2**32


def threshold(dropout_p: float) -> int:
    """The smallest signed 32-bit hash that is kept."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def keep_mask(call: AttentionCall, tile: Tile) -> Tensor:
    """Which weights of a tile are kept: bool, ``(B, H, rows, columns)``."""
    row, column = row_and_column_hashes(call, tile)
    return row * column >= threshold(call.dropout_p)


def row_and_column_hashes(call: AttentionCall, tile: Tile) -> tuple[Tensor, Tensor]:
    """Odd int32 hashes ``(B, H, rows, 1)`` and ``(1 or B, 1, 1, columns)`` of a tile."""
    if call.seed is None:
        raise ValueError("dropout needs a seed")
    device = call.query.device
    batch = torch.arange(call.batch, dtype=torch.int32, device=device)[tile.batches]
    head = torch.arange(call.heads, dtype=torch.int32, device=device)[tile.heads]
    base = _mix(_mix(_low_32(call.seed)) + _low_32(call.seed >> 32))
    sequence = _mix(_mix(base + batch[:, None, None, None]) + head[:, None, None])
    row = _mix(sequence + _low_32(tile.query_position))
    column = _mix(_mix(base + COLUMN_SALT) + _low_32(tile.key_position))
    return row | 1, column | 1


def _low_32(x: Tensor) -> Tensor:
    """The low 32 bits of int64 values, as int32."""
    low = x & 0xFFFFFFFF
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * MULTIPLIER_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * MULTIPLIER_2
    return x ^ ((x >> 16) & 0xFFFF)
