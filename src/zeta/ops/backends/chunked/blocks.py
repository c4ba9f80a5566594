"""How the scores are cut: blocks of rows, the range of keys each may see, and units of heads done
at once.

A block spans all keys that its rows may see, so that its softmax is complete and nothing is
rescaled; what masks surely hide is never computed, and what they surely show is never masked.

Ranges are of indices; a unit's scores are ``(batches, heads, rows, columns)``.
"""

import dataclasses
from collections.abc import Iterator

from zeta.ops.backends.chunked.products import prefers_single_heads
from zeta.ops.call import AttentionCall

ROWS = (256, 512)
"""Fewest and most rows of a block; in between, as many as make a block of `CPU_ELEMENTS`."""
BOUNDED_ROWS = 256
"""Rows where a mask bounds the keys: a lower staircase along the diagonal wastes less."""
CPU_ELEMENTS = 2**20
"""Scores of a unit on the CPU: a few MiB a buffer, large enough to hide the cost of a call."""
GPU_ELEMENTS = 2**24
SINGLE_ELEMENTS = 2**17
"""Scores of a head from which single heads go faster than batches of them."""
SEGMENT = 64
"""Columns that are looked at together when the ones to mask are sought."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """Heads that are computed together: a rectangle of sequences and heads."""

    batches: slice
    heads: slice
    groups: slice
    """Key heads."""


@dataclasses.dataclass(slots=True)
class Block:
    """Rows, and all columns that they may see.

    Attributes:
        rows, columns: Ranges of indices.
        partial: Ranges of columns in which some pairs may be hidden; elsewhere all are seen.
    """

    rows: slice
    columns: slice
    partial: list[slice]

    @property
    def num_rows(self) -> int:
        return int(self.rows.stop - self.rows.start)


def blocks(call: AttentionCall, num_rows: int | None = None) -> list[Block]:
    """The blocks of a call, last to first; rows that surely see no key have none.

    Under a causal mask the last see the most keys, and their memory then serves all the others.

    Args:
        call: The call.
        num_rows: Rows of a block; by default what goes fast.
    """
    if num_rows is None:
        most = BOUNDED_ROWS if _bounds_keys(call) else ROWS[1]
        num_rows = max(ROWS[0], min(most, CPU_ELEMENTS // call.source))
    found = []
    for first in reversed(range(0, call.target, num_rows)):
        rows = slice(first, min(first + num_rows, call.target))
        columns = _columns(call, rows)
        if columns.start < columns.stop:
            found.append(Block(rows, columns, list(_partial(call, rows, columns))))
    return found


def units(call: AttentionCall, block: Block) -> Iterator[Unit]:
    """All heads of a block, as many at a time as go fast."""
    group = call.heads // call.key_heads
    elements = block.num_rows * (block.columns.stop - block.columns.start)
    device = call.query.device
    if elements >= SINGLE_ELEMENTS and prefers_single_heads(device, call.wide_dtype):
        for batch in range(call.batch):
            for head in range(call.heads):
                key_head = head // group
                yield Unit(
                    slice(batch, batch + 1), slice(head, head + 1), slice(key_head, key_head + 1)
                )
        return
    budget = (CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS) // elements
    num_batches = max(1, budget // call.heads)
    num_groups = call.key_heads if budget >= call.heads else max(1, budget // group)
    for batch in range(0, call.batch, num_batches):
        batches = slice(batch, min(batch + num_batches, call.batch))
        for key_head in range(0, call.key_heads, num_groups):
            groups = slice(key_head, min(key_head + num_groups, call.key_heads))
            yield Unit(batches, slice(groups.start * group, groups.stop * group), groups)


def _bounds_keys(call: AttentionCall) -> bool:
    return call.mask is not None and call.mask.key_bounds(0, 0) != (None, None)


def _positions_of(call: AttentionCall, rows: slice) -> tuple[int, int]:
    shift = call.source - call.target
    return rows.start + shift, rows.stop - 1 + shift


def _columns(call: AttentionCall, rows: slice) -> slice:
    """The keys outside which these rows see nothing."""
    if call.mask is None or call.has_positions:
        return slice(0, call.source)
    first, last = call.mask.key_bounds(*_positions_of(call, rows))
    start = 0 if first is None else max(first, 0)
    stop = call.source if last is None else min(last + 1, call.source)
    return slice(start, max(stop, 0))


def _partial(call: AttentionCall, rows: slice, columns: slice) -> Iterator[slice]:
    """Runs of columns that the mask does not surely show to all rows."""
    if call.has_positions:
        yield columns
        return
    if call.mask is None:
        return
    queries = _positions_of(call, rows)
    if call.mask.covers(*queries, columns.start, columns.stop - 1):
        return
    run_start = None
    for start in range(columns.start, columns.stop, SEGMENT):
        stop = min(start + SEGMENT, columns.stop)
        if call.mask.covers(*queries, start, stop - 1):
            if run_start is not None:
                yield slice(run_start, start)
            run_start = None
        elif run_start is None:
            run_start = start
    if run_start is not None:
        yield slice(run_start, columns.stop)
