"""What every kernel agrees on: what is added to a score, which are hidden, which weights are
dropped.

M: query rows of a tile, N: key columns. A tile is [M, N], or [N, M] in the key-major backward pass:
`row` and `column` are index vectors from 0, shaped to broadcast to it, and `row0` and `column0` say
where the tile begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x, score):
    """Of a score in its unit."""
    if score.exact:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def logarithm(x, score):
    if score.exact:
        return tl.log(x)
    else:
        return tl.log2(x)


@triton.jit
def soft_cap(x, score):
    """The capped score, and the derivative of the cap."""
    cap = score.softcap
    x *= cap.inner
    t = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    if score.exact:
        # Near zero that difference has few digits left: there by a series.
        y = x * x
        series = ((0.021869488 - y * 0.008863236) * y - 0.053968254) * y + 0.13333333
        t = tl.where(y < 0.1, x + x * y * (series * y - 0.33333333), t)
    return cap.outer * t, 1.0 - t * t


@triton.jit
def query_positions(score, sizes, batch, row0, row):
    index = row0 + row
    if score.positions is None:
        return index + (sizes.keys - sizes.queries)
    else:
        base = score.positions.rows + batch * score.positions.row_batch
        return tl.load(base + index, mask=index < sizes.queries, other=0)


@triton.jit
def is_column(sizes, index):
    """Whether an index is of a key; a band may begin before the first."""
    return (index >= 0) & (index < sizes.keys)


@triton.jit
def key_positions(score, sizes, batch, column0, column):
    index = column0 + column
    if score.positions is None:
        return index
    else:
        base = score.positions.columns + batch * score.positions.column_batch
        return tl.load(base + index, mask=is_column(sizes, index), other=-1)


@triton.jit
def key_exists(score, sizes, batch, column0, column):
    """Whether a column is a key at all: inside the tensor, in a filled slot, not padding."""
    position = key_positions(score, sizes, batch, column0, column)
    exists = is_column(sizes, column0 + column)
    if score.positions is not None:
        exists = exists & (position >= 0)
    if score.padding is not None:
        exists = exists & (position < tl.load(score.padding + batch))
    return exists


@triton.jit
def visible(score, sizes, batch, row0, column0, row, column):
    """Whether a query may see a key, by their positions. What is no query may see anything."""
    query = query_positions(score, sizes, batch, row0, row)
    key = key_positions(score, sizes, batch, column0, column)
    if score.causal and score.positions is None and row.shape[0] == 1:
        # No query lies after the last key, and no key-major tile begins before the first, so that
        # one comparison does. (Of one alone, the compiler would make two in a row-major tile.)
        seen = key <= query
        if score.padding is not None:
            seen = seen & (key < tl.load(score.padding + batch))
    else:
        seen = key_exists(score, sizes, batch, column0, column)
        if score.causal:
            seen = seen & (key <= query)
        if score.prefix is not None:
            seen = seen & ((key <= query) | (key < tl.load(score.prefix + batch)))
    if score.window is not None:
        seen = seen & (key > query - score.window)
    return seen


@triton.jit
def load_plane(plane, sizes, batch, head, row0, column0, row, column, other):
    """A tile of a (B, H, T, S) tensor."""
    base = plane.pointer + batch * plane.batch + tl.cast(head, tl.int64) * plane.head
    base += tl.cast(row0, tl.int64) * plane.row + tl.cast(column0, tl.int64) * plane.column
    inside = (row0 + row < sizes.queries) & is_column(sizes, column0 + column)
    # 64 bits: rows, or columns of what is transposed, may lie far apart.
    places = base + row.to(tl.int64) * plane.row + column.to(tl.int64) * plane.column
    return tl.load(places, mask=inside, other=other)


@triton.jit
def spread_bias(score, sizes, head, row0, column0, row, column):
    """A tile of an offset bias that was written out for tiles of this shape."""
    spread = score.spread
    start = column0 - row0 - (sizes.keys - sizes.queries)
    # Of a tile's two lengths, the inner one: elements are then a power of two apart, and the
    # compiler finds each at a constant distance from a thread's first.
    if row.shape[0] == 1:
        place = column * row.shape[1] + row
    else:
        place = row * column.shape[1] + column
    size: tl.constexpr = row.shape[0] * row.shape[1] * column.shape[0] * column.shape[1]
    index = tl.minimum(tl.maximum((start - spread.first) // spread.step, 0), spread.count - 1)
    return tl.load(spread.pointer + (head * spread.count + index).to(tl.int64) * size + place)


@triton.jit
def offset_bias(score, sizes, batch, head, row0, column0, row, column):
    """A tile of an offset bias."""
    if score.spread is not None:
        return spread_bias(score, sizes, head, row0, column0, row, column)
    else:
        places = offset_places(score, sizes, batch, head, row0, column0, row, column)
        tile = tl.zeros_like(places).to(tl.float32)
        # There are keys; but under a condition, the compiler keeps this tile out of the loads that
        # it stages in shared memory.
        if sizes.keys > 0:
            tile = tl.load(score.offsets.pointer + places) * score.unit
        return tile


@triton.jit
def offset_places(score, sizes, batch, head, row0, column0, row, column):
    """Where in the vectors of an offset bias the values of a tile lie."""
    reach = score.offsets.reach
    query = query_positions(score, sizes, batch, row0, row)
    key = key_positions(score, sizes, batch, column0, column)
    offset = tl.minimum(tl.maximum(key - query, -reach), reach)
    return head * (2 * reach + 1) + reach + offset


@triton.jit
def begin_products(score, sizes, batch, head, row0, column0, row, column):
    """What the products of a tile are added to, in their own unit, so that it is read before them:
    its offset bias.
    """
    if score.spread is not None:
        return spread_bias(score, sizes, head, row0, column0, row, column)
    else:
        places = offset_places(score, sizes, batch, head, row0, column0, row, column)
        return tl.load(score.offsets.pointer + places) / score.slope


@triton.jit
def far_bias(score, head, RIGHT: tl.constexpr):
    """The value that all offsets beyond the reach share, on one side."""
    side = 0.0
    if score.offsets is not None:
        last = 2 * score.offsets.reach
        place = head * (last + 1)
        if RIGHT:
            place += last
        side = tl.load(score.offsets.pointer + place) * score.unit
    return side


@triton.jit
def score_tile(
    dots, score, sizes, batch, head, row0, column0, row, column, side, CLEAN: tl.constexpr
):
    """Scores of a tile, -inf where hidden, and the derivative of a soft cap (unused without one).

    CLEAN promises that positions hide nothing here, and that an offset bias is `side` everywhere.
    Where the score `begins`, the products of other tiles have begun with it.
    """
    s = dots * score.scale
    slope = s
    if score.softcap is not None:
        if score.softcap.first:
            s, slope = soft_cap(s, score)
    if score.offsets is not None:
        if CLEAN:
            s += side
        elif not score.begins:
            s += offset_bias(score, sizes, batch, head, row0, column0, row, column)
    if score.slopes is not None:
        query = query_positions(score, sizes, batch, row0, row)
        key = key_positions(score, sizes, batch, column0, column)
        s -= tl.load(score.slopes + head) * tl.abs(key - query).to(tl.float32)
    if score.dense is not None:
        dense = load_plane(score.dense, sizes, batch, head, row0, column0, row, column, 0.0)
        s += dense.to(tl.float32) * score.unit
    if score.softcap is not None:
        if not score.softcap.first:
            s, slope = soft_cap(s, score)
    if not CLEAN:
        seen = visible(score, sizes, batch, row0, column0, row, column)
        s = tl.where(seen, s, float("-inf"))
    if score.documents is not None:
        s = tl.where(
            same_document(score, sizes, batch, row0, column0, row, column), s, float("-inf")
        )
    if score.keep is not None:
        keep = load_plane(score.keep, sizes, batch, head, row0, column0, row, column, 0)
        s = tl.where(keep != 0, s, float("-inf"))
    return s, slope


@triton.jit
def same_document(score, sizes, batch, row0, column0, row, column):
    documents = score.documents
    query = tl.load(
        documents.rows + batch * documents.row_batch + row0 + row,
        mask=row0 + row < sizes.queries,
        other=0,
    )
    key = tl.load(
        documents.columns + batch * documents.column_batch + column0 + column,
        mask=is_column(sizes, column0 + column),
        other=0,
    )
    return query == key


@triton.jit
def row_hashes(score, sizes, batch, head, row0, local_M):
    """The row half of the dropout hash; without dropout, nothing that is used."""
    hash_M = local_M
    if score.dropout is not None:
        base = score.dropout.rows + (batch * sizes.heads + head) * sizes.queries + row0
        hash_M = tl.load(base + local_M, mask=row0 + local_M < sizes.queries, other=0)
    return hash_M


@triton.jit
def column_hashes(score, sizes, batch, column0, local_N):
    """The column half of the dropout hash; without dropout, nothing that is used."""
    hash_N = local_N
    if score.dropout is not None:
        base = score.dropout.columns + batch * score.dropout.column_batch + column0
        hash_N = tl.load(base + local_N, mask=is_column(sizes, column0 + local_N), other=0)
    return hash_N


@triton.jit
def kept(score, row_hash, column_hash):
    """Which weights dropout keeps; the halves are shaped to broadcast to the tile."""
    return row_hash * column_hash >= score.dropout.threshold


@triton.jit
def load_rows(rows, batch, head, start, local, limit, columns, WIDTH, FULL: tl.constexpr):
    """A tile of rows [len(local), len(columns)], 0 past `limit` and past WIDTH columns.

    FULL promises that no row is past `limit`.
    """
    base = rows.pointer + batch * rows.batch + tl.cast(head, tl.int64) * rows.head
    base += tl.cast(start, tl.int64) * rows.row
    pointers = base + local[:, None] * rows.row + columns[None, :]
    wide: tl.constexpr = columns.shape[0] != WIDTH
    if FULL:
        if wide:
            return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
        else:
            return tl.load(pointers)
    else:
        inside = (start + local < limit)[:, None]
        if wide:
            inside = inside & (columns[None, :] < WIDTH)
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_keys(rows, score, sizes, batch, head, start, local, columns, WIDTH, FULL: tl.constexpr):
    """A tile of keys or values; 0 where there is no key, so that what lies there never spreads.

    FULL promises that the tile lies inside the tensor: only padding and empty slots are no keys.
    """
    base = rows.pointer + batch * rows.batch + tl.cast(head, tl.int64) * rows.head
    base += tl.cast(start, tl.int64) * rows.row
    pointers = base + local[:, None] * rows.row + columns[None, :]
    wide: tl.constexpr = columns.shape[0] != WIDTH
    if FULL and score.padding is None and score.positions is None:
        if wide:
            return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
        else:
            return tl.load(pointers)
    else:
        inside = key_exists(score, sizes, batch, start, local)[:, None]
        if wide:
            inside = inside & (columns[None, :] < WIDTH)
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def find_pages(pages, score, sizes, batch, start, local):
    """Of each key of a tile whether it exists, its page, and its place there."""
    exists = key_exists(score, sizes, batch, start, local)
    token = pages.first + start + local
    numbers = pages.pointer + batch * pages.row + token // pages.size
    # Read for empty slots too: waiting for their positions, the pipeline would be a stage shorter.
    page = tl.load(numbers, mask=is_column(sizes, start + local), other=0)
    # 64 bits: a pool may have more elements than 32 can count.
    return exists, page.to(tl.int64), token % pages.size


@triton.jit
def load_pages(rows, head, found, columns, WIDTH):
    """A tile of keys or values from their pages, as of `load_keys`; ``found`` by `find_pages`."""
    exists, page, slot = found
    base = page * rows.batch + slot * rows.row + tl.cast(head, tl.int64) * rows.head
    pointers = rows.pointer + base[:, None] + columns[None, :]
    inside = exists[:, None]
    wide: tl.constexpr = columns.shape[0] != WIDTH
    if wide:
        inside = inside & (columns[None, :] < WIDTH)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(rows, batch, head, start, local, limit, columns, WIDTH, value):
    """Writes what `load_rows` reads."""
    base = rows.pointer + batch * rows.batch + tl.cast(head, tl.int64) * rows.head
    base += tl.cast(start, tl.int64) * rows.row
    pointers = base + local[:, None] * rows.row + columns[None, :]
    inside = (start + local < limit)[:, None] & (columns[None, :] < WIDTH)
    tl.store(pointers, value.to(rows.pointer.dtype.element_ty), mask=inside)
