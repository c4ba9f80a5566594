"""Which tiles a tile meets: hidden ones are never visited, and ones that nothing cuts through
known.

The tiles fall in up to five parts, by six ends: cut, clean, cut, clean, cut. A tile of a clean part
has no hidden score, and one value for an offset bias: that left of its band in one part, that right
of it in the other. One loop goes over both clean parts, and one over the cut ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def floor_to(x, BLOCK: tl.constexpr):
    """The multiple of BLOCK at or below x, also for a negative x."""
    return x - ((x % BLOCK) + BLOCK) % BLOCK


@triton.jit
def ceil_to(x, BLOCK: tl.constexpr):
    return floor_to(x + BLOCK - 1, BLOCK)


@triton.jit
def count_tiles(low, one, two, three, four, high, BLOCK: tl.constexpr, CLEAN: tl.constexpr):
    """How many tiles are clean, or are not."""
    if CLEAN:
        return tl.cdiv(two - one, BLOCK) + tl.cdiv(four - three, BLOCK)
    else:
        cut = tl.cdiv(one - low, BLOCK) + tl.cdiv(three - two, BLOCK)
        return cut + tl.cdiv(high - four, BLOCK)


@triton.jit
def tile_start(index, low, one, two, three, four, BLOCK: tl.constexpr, CLEAN: tl.constexpr):
    """Where the tile of that index begins, among those that are clean, or among the others."""
    if CLEAN:
        first = tl.cdiv(two - one, BLOCK)
        return tl.where(index < first, one + index * BLOCK, three + (index - first) * BLOCK)
    else:
        first = tl.cdiv(one - low, BLOCK)
        second = first + tl.cdiv(three - two, BLOCK)
        late = tl.where(
            index < second, two + (index - first) * BLOCK, four + (index - second) * BLOCK
        )
        return tl.where(index < first, low + index * BLOCK, late)


@triton.jit
def load_length(lengths, sizes, batch):
    """A number of keys, in 32 bits: whoever means all of them may give any that is large enough."""
    return tl.minimum(tl.maximum(tl.load(lengths + batch), 0), sizes.keys).to(tl.int32)


@triton.jit
def column_parts(score, sizes, batch, row0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The six ends of the parts of the loop over key columns, for a tile of query rows."""
    first = row0 + (sizes.keys - sizes.queries)
    last = tl.minimum(row0 + BLOCK_M, sizes.queries) - 1 + (sizes.keys - sizes.queries)
    low = first * 0
    high = low + sizes.keys
    clean_low = low
    clean_high = high
    band_low = high
    band_high = high
    if score.positions is not None:
        clean_high = low
    else:
        if score.padding is not None:
            length = load_length(score.padding, sizes, batch)
            high = tl.minimum(high, length)
            clean_high = tl.minimum(clean_high, length)
        if score.prefix is not None:
            prefix = load_length(score.prefix, sizes, batch)
            high = tl.minimum(high, tl.maximum(last + 1, prefix))
            clean_high = tl.minimum(clean_high, tl.maximum(first + 1, prefix))
        if score.causal:
            high = tl.minimum(high, last + 1)
            clean_high = tl.minimum(clean_high, first + 1)
        if score.window is not None:
            low = tl.maximum(low, floor_to(first - score.window + 1, BLOCK_N))
            clean_low = tl.maximum(low, ceil_to(last - score.window + 1, BLOCK_N))
        if score.offsets is not None:
            band_low = floor_to(first - score.offsets.reach + 1, BLOCK_N)
            band_high = ceil_to(last + score.offsets.reach, BLOCK_N)
    high = tl.maximum(high, low)
    clean_high = floor_to(clean_high, BLOCK_N)
    one = tl.minimum(clean_low, high)
    two = tl.maximum(one, tl.minimum(tl.minimum(clean_high, band_low), high))
    three = tl.minimum(tl.maximum(two, band_high), high)
    four = tl.maximum(three, tl.minimum(clean_high, high))
    return low, one, two, three, four, high


@triton.jit
def row_parts(score, sizes, batch, column0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The six ends of the parts of the loop over query rows, for a tile of key columns.

    Here the first clean part lies right of the band, and the second left of it. Columns without a
    key are not cut out: each column's results are its own.
    """
    shift = sizes.keys - sizes.queries
    first = column0 - shift
    last = tl.minimum(column0 + BLOCK_N, sizes.keys) - 1 - shift
    low = first * 0
    high = low + sizes.queries
    clean_low = low
    clean_high = high
    band_low = high
    band_high = high
    if score.positions is not None:
        clean_high = low
    else:
        if score.prefix is not None:
            prefix = load_length(score.prefix, sizes, batch) - shift
            low = tl.where(first < prefix, low, tl.maximum(low, floor_to(first, BLOCK_M)))
            clean_low = tl.where(last < prefix, low, tl.maximum(low, ceil_to(last, BLOCK_M)))
        if score.causal:
            low = tl.maximum(low, floor_to(first, BLOCK_M))
            clean_low = tl.maximum(clean_low, tl.maximum(low, ceil_to(last, BLOCK_M)))
        if score.window is not None:
            high = tl.minimum(high, last + score.window)
            clean_high = tl.minimum(high, floor_to(first + score.window, BLOCK_M))
        if score.padding is not None:
            high = tl.where(column0 < tl.load(score.padding + batch), high, low)
        if score.offsets is not None:
            band_low = floor_to(first - score.offsets.reach + 1, BLOCK_M)
            band_high = ceil_to(last + score.offsets.reach, BLOCK_M)
    high = tl.maximum(high, low)
    one = tl.minimum(tl.maximum(clean_low, low), high)
    two = tl.maximum(one, tl.minimum(tl.minimum(clean_high, band_low), high))
    three = tl.minimum(tl.maximum(two, band_high), high)
    four = tl.maximum(three, tl.minimum(clean_high, high))
    return low, one, two, three, four, high
