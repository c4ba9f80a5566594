"""The arguments kernels take, grouped: an absent part is None, and its code is not compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

# Fields hold tensors and numbers on the host, and pointers and scalars inside a kernel: hence
# `Any`.


class Sizes(NamedTuple):
    """Counts of one call: `group` query heads share a key head."""

    batch: Any
    heads: Any
    group: Any
    queries: Any
    keys: Any


class Rows(NamedTuple):
    """A (B, H, rows, D) tensor whose last dimension is dense: its strides in elements."""

    pointer: Any
    batch: Any
    head: Any
    row: Any


class PageTable(NamedTuple):
    """Where keys and values lie that are kept in pages of `size` tokens: (B, pages) page numbers,
    the rows `row` apart. The first key is token `first` of its sequence.

    The batch stride of `Rows` in pages is that from page to page.
    """

    pointer: Any
    row: Any
    first: Any
    # Last of a whole argument: see `Score`.
    size: Any


class Parts(NamedTuple):
    """What splits of the keys give to their queries: weighted values (splits, B, H, T, Dv), sums
    and peaks of exponentials (splits, B, H, T).
    """

    sums: Any
    totals: Any
    peaks: Any


class Turned(NamedTuple):
    """What is rotated, (B, heads, length, D); where the result goes; cosines and sines, with a
    stride of 0 where all share them.
    """

    source: Any
    target: Any
    cos: Any
    sin: Any
    table_batch: Any
    table_row: Any
    heads: Any
    length: Any


class Plane(NamedTuple):
    """A tensor seen as (B, H, T, S): a stride is 0 where it is broadcast."""

    pointer: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Turns(NamedTuple):
    """Whose turn it is among programs that add to the same sums: how many have begun, then of each
    how far it has come. All are 0 at first.
    """

    counts: Any


class Labels(NamedTuple):
    """A number per query (B, T) and per key (B, S): document ids, or positions. Batch stride 0
    where shared.
    """

    rows: Any
    row_batch: Any
    columns: Any
    column_batch: Any


class Places(NamedTuple):
    """Where queries and keys stand, as a `Score` says it: None if one after another."""

    positions: Any


class Softcap(NamedTuple):
    """`outer * tanh(inner * score)`, before or after what is added."""

    inner: Any
    outer: Any
    first: Any


class Spread(NamedTuple):
    """An offset bias, written out for the tiles that its band cuts, in the unit of the scores or of
    the products that begin with it: (H, count, a tile), by the offset of a tile's first element,
    `first` and `step` more each. The first and the last tile are those that lie beyond the reach.
    """

    pointer: Any
    count: Any
    first: Any
    step: Any


class Offsets(NamedTuple):
    """A vector (H, 2 * reach + 1) over key-query offsets, dense; its ends hold beyond it too."""

    pointer: Any
    reach: Any


class Dropout(NamedTuple):
    """Hash halves per query (B, H, T) and key (B or 1, S): kept where their mix reaches
    `threshold`.
    """

    rows: Any
    columns: Any
    column_batch: Any
    threshold: Any
    keep: Any


class Score(NamedTuple):
    """How a product of a query and a key becomes a score, and what exponential makes it a weight.

    Scores, and all that is added to them, are in a unit: with `exact`, that of the natural
    exponential, and 1; otherwise that of exp2, which is faster, and log2(e). `scale` includes the
    unit, `slope` does not; `scale` is positive where `folds`. Offset and dense biases are in
    that of the natural exponential. `begins` says that the products of tiles that are not clean
    begin with an offset bias, by `begin_products`.
    """

    unit: Any
    scale: Any
    slope: Any
    folds: Any
    causal: Any
    window: Any
    prefix: Any
    padding: Any
    documents: Any
    keep: Any
    positions: Any
    softcap: Any
    offsets: Any
    spread: Any
    slopes: Any
    dense: Any
    dropout: Any
    begins: Any
    # Last, because Triton 3.6 loses a constant in a nested tuple unless one of the outer follows.
    exact: Any
