"""The halves of the dropout hash: one number per query row, one per key column.

A weight is dropped by (seed, batch, head, query position, key position) alone, so that every
backend, block size and recomputation draws the same ones. Most of the hash depends on the row or on
the column only, and is done here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zeta.ops.backends.triton.kernels.scores import key_positions, query_positions


@triton.jit
def mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def seed_hash(seed):
    value = tl.load(seed).to(tl.int64)
    low = (value & 0xFFFFFFFF).to(tl.uint32)
    high = ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return mix(mix(low) + high)


@triton.jit
def hash_kernel(seed, rows, columns, places, sizes, BLOCK: tl.constexpr):
    """Both halves, a block a program: rows (B, H, T) of each head, then columns (B or 1, S), int32.

    places: has what `query_positions` and `key_positions` read of a `Score`.
    """
    plane = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    local = tl.arange(0, BLOCK)
    hashed = seed_hash(seed)
    num_heads = sizes.batch * sizes.heads
    if plane < num_heads:
        batch = (plane // sizes.heads).to(tl.int64)
        x = mix(hashed + batch.to(tl.uint32))
        x = mix(x + (plane % sizes.heads).to(tl.uint32))
        x = mix(x + query_positions(places, sizes, batch, start, local).to(tl.uint32))
        target = rows + plane.to(tl.int64) * sizes.queries + start + local
        tl.store(target, (x | 1).to(tl.int32, bitcast=True), mask=start + local < sizes.queries)
    else:
        batch = (plane - num_heads).to(tl.int64)
        x = mix(hashed + 0x9E3779B9)
        x = mix(x + key_positions(places, sizes, batch, start, local).to(tl.uint32))
        target = columns + batch * sizes.keys + start + local
        tl.store(target, (x | 1).to(tl.int32, bitcast=True), mask=start + local < sizes.keys)
