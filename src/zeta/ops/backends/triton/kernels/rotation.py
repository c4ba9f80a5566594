"""Pairs of features turned by the angles of their token, and scaled where the tables say so.

L: tokens of a tile, P: pairs, padded, R: features behind them, padded.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(first, second, cos, sin):
    """Both features of pairs, turned."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rotate_head(
    turned, base_L, out_L, inside_L, cos_LP, sin_LP,
    INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head, which begin at the offsets ``base_L``."""
    source = turned.source.pointer
    target = turned.target.pointer
    dtype = target.dtype.element_ty
    if INTERLEAVED:
        feature_D = tl.arange(0, 2 * BLOCK_P)[None, :]
        wanted = inside_L & (feature_D < 2 * PAIRS)
        x = tl.load(source + base_L + feature_D, mask=wanted, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, (BLOCK_L, BLOCK_P, 2)))
        even, odd = turn(even, odd, cos_LP, sin_LP)
        x = tl.reshape(tl.join(even, odd), (BLOCK_L, 2 * BLOCK_P))
        tl.store(target + out_L + feature_D, x.to(dtype), mask=wanted)
    else:
        pair_P = tl.arange(0, BLOCK_P)[None, :]
        wanted = inside_L & (pair_P < PAIRS)
        low = tl.load(source + base_L + pair_P, mask=wanted, other=0.0).to(tl.float32)
        high = tl.load(source + base_L + PAIRS + pair_P, mask=wanted, other=0.0).to(tl.float32)
        low, high = turn(low, high, cos_LP, sin_LP)
        tl.store(target + out_L + pair_P, low.to(dtype), mask=wanted)
        tl.store(target + out_L + PAIRS + pair_P, high.to(dtype), mask=wanted)
    if REST:
        feature_R = tl.arange(0, BLOCK_R)[None, :]
        wanted = inside_L & (feature_R < REST)
        kept = tl.load(source + base_L + 2 * PAIRS + feature_R, mask=wanted, other=0.0)
        tl.store(target + out_L + 2 * PAIRS + feature_R, kept, mask=wanted)


@triton.jit
def rotate_heads(
    turned, program,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Some tokens of up to HEADS heads, which share what is read of the tables."""
    shares = tl.cdiv(turned.heads, HEADS)
    tiles = tl.cdiv(turned.length, BLOCK_L)
    first_head = program % shares * HEADS
    row_L = program // shares % tiles * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    batch = (program // shares // tiles).to(tl.int64)
    inside_L = row_L < turned.length
    # 64 bits: a tensor may have more elements than 32 can count.
    row_L = row_L.to(tl.int64)
    pair_P = tl.arange(0, BLOCK_P)[None, :]
    place_LP = batch * turned.table_batch + row_L * turned.table_row + pair_P
    wanted = inside_L & (pair_P < PAIRS)
    cos_LP = tl.load(turned.cos + place_LP, mask=wanted, other=0.0)
    sin_LP = tl.load(turned.sin + place_LP, mask=wanted, other=0.0)
    if INVERSE:
        sin_LP = -sin_LP
    for head in tl.range(first_head, tl.minimum(first_head + HEADS, turned.heads)):
        source, target = turned.source, turned.target
        base_L = batch * source.batch + tl.cast(head, tl.int64) * source.head + row_L * source.row
        out_L = batch * target.batch + tl.cast(head, tl.int64) * target.head + row_L * target.row
        rotate_head(
            turned, base_L, out_L, inside_L, cos_LP, sin_LP, INTERLEAVED, PAIRS, REST, BLOCK_L,
            BLOCK_P, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=["query_programs"])
def rotation_kernel(
    query, key, query_programs,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Queries by the first programs, and keys, where there are any, by the others."""
    program = tl.program_id(0)
    if key is None:
        rotate_heads(
            query, program, INTERLEAVED, INVERSE, PAIRS, REST, BLOCK_L, BLOCK_P, BLOCK_R, HEADS
        )
    else:
        if program < query_programs:
            rotate_heads(
                query, program, INTERLEAVED, INVERSE, PAIRS, REST, BLOCK_L, BLOCK_P, BLOCK_R, HEADS
            )
        else:
            rotate_heads(
                key, program - query_programs, INTERLEAVED, INVERSE, PAIRS, REST, BLOCK_L, BLOCK_P,
                BLOCK_R, HEADS,
            )  # fmt: skip
