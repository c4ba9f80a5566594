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

LOW_32 = 0xFFFFFFFF
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
COLUMN_SALT = 0x9E3779B9


def threshold(dropout_p: float) -> int:
    """The smallest signed 32-bit hash that is kept."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def keep_mask(call: AttentionCall, tile: Tile) -> Tensor:
    """Which weights of a tile are kept: bool, ``(B, H, rows, columns)``."""
    row, column = row_and_column_hashes(call, tile)
    return _product(row, column) >= threshold(call.dropout_p)


def row_and_column_hashes(call: AttentionCall, tile: Tile) -> tuple[Tensor, Tensor]:
    """Odd int32 hashes ``(B, H, rows, 1)`` and ``(1 or B, 1, 1, columns)`` of a tile."""
    assert call.seed is not None
    device = call.query.device
    batch = torch.arange(call.batch, device=device)[tile.batches]
    head = torch.arange(call.heads, device=device)[tile.heads]
    base = _mix(_mix(call.seed) + (call.seed >> 32))
    sequence = _mix(_mix(base + batch[:, None, None, None]) + head[:, None, None])
    row = _mix(sequence + tile.query_position)
    column = _mix(_mix(base + COLUMN_SALT) + tile.key_position)
    return _signed(row | 1), _signed(column | 1)


def _mix(x: Tensor) -> Tensor:
    """Of the low 32 bits of int64 values, in which no product is too large."""
    x = x & LOW_32
    for shift, multiplier in zip((16, 15), MULTIPLIERS, strict=True):
        x = ((x ^ (x >> shift)) * multiplier) & LOW_32
    return x ^ (x >> 16)


def _signed(x: Tensor) -> Tensor:
    """The low 32 bits of int64 values, as int32."""
    low = x & LOW_32
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The low 32 bits of a product of int32 values."""
    if torch.compiler.is_compiling():
        # Inductor writes it in C++, where one that is too large may become anything.
        return _signed(x.long() * y)
    return x * y
