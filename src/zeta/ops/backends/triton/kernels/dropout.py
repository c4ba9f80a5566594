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
def hash_rows_kernel(seed, out, score, sizes, BLOCK: tl.constexpr):
    """The row half for a block of queries of one head: out (B, H, T), int32."""
    batch_head = tl.program_id(0)
    batch = (batch_head // sizes.heads).to(tl.int64)
    head = batch_head % sizes.heads
    local = tl.arange(0, BLOCK)
    row0 = tl.program_id(1) * BLOCK
    x = mix(seed_hash(seed) + batch.to(tl.uint32))
    x = mix(x + head.to(tl.uint32))
    x = mix(x + query_positions(score, sizes, batch, row0, local).to(tl.uint32))
    target = out + batch_head.to(tl.int64) * sizes.queries + row0 + local
    tl.store(target, (x | 1).to(tl.int32, bitcast=True), mask=row0 + local < sizes.queries)


@triton.jit
def hash_columns_kernel(seed, out, score, sizes, BLOCK: tl.constexpr):
    """The column half for a block of keys: out (B or 1, S), int32."""
    batch = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, BLOCK)
    column0 = tl.program_id(1) * BLOCK
    x = mix(seed_hash(seed) + 0x9E3779B9)
    x = mix(x + key_positions(score, sizes, batch, column0, local).to(tl.uint32))
    target = out + batch * sizes.keys + column0 + local
    tl.store(target, (x | 1).to(tl.int32, bitcast=True), mask=column0 + local < sizes.keys)
