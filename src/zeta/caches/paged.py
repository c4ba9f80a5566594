"""`PagedCache`: sequences of any lengths, in pages that they may share.

Shapes: B batch, G key heads, N new tokens, M tokens that are stored, L longest sequence, D head
dimension.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor

from zeta.caches import checks
from zeta.caches.forks import Forks
from zeta.caches.form import Form, following, placed, sent
from zeta.caches.interface import Cached
from zeta.caches.pool import PagePool
from zeta.caches.rows import Rows
from zeta.caches.sequences import Sequences
from zeta.caches.states import STATE_NAMES, Tokens, dict_of, tokens_of
from zeta.stored import can_defer, plain
from zeta.transforms import uncompiled
from zeta.values import check_integer, kind

_NAMES = STATE_NAMES | {"lengths"}


class PagedCache:
    """Keys and values in pages of a shared pool, copied only where sequences begin to differ.

    Repeating a sequence (`select`, `reorder`), forking and `duplicate` share its pages; the first
    to write to a shared page gets one of its own. So beams, and requests with the same prompt, keep
    their common part once. Every page is given back when the last cache that uses it is reset,
    drops the sequence, or is garbage.

    Sequences may differ in length: padding at the end of what is given to `update`, bool and ``(B,
    N)``, is not stored, and the next token follows the last real one. Each sequence is then what it
    would be alone. Padding elsewhere keeps its place and is hidden.

    The kernels of the CPU and of a GPU read a step of decoding from the pages. Otherwise they are
    gathered into one tensor when it is looked at, into memory that is free again after it.

    Args:
        pool: Where the pages are.

    Raises:
        TypeError: It is no `PagePool`.
    """

    def __init__(self, pool: PagePool) -> None:
        if not isinstance(pool, PagePool):
            raise TypeError(f"pool must be a PagePool; got {kind(pool)}")
        self.pool = pool
        self._rows: Rows | None = None
        self._before: Rows | None = None
        self._forks: Forks[Rows | None] = Forks()
        self._table: Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A copy of the same pool's, or of the copy that came with it, has uses of its own.
        self._forks = Forks(self._forks.states)
        for rows in (self._rows, *self._forks.states):
            self.pool.claim(() if rows is None else rows.pages)

    def __del__(self) -> None:
        if hasattr(self, "_table"):
            self.reset()

    @property
    @uncompiled
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence; empty before the first `update`."""
        return () if self._rows is None else self._rows.lengths

    @uncompiled
    def next_positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """See `Cache`. ``(B, num_tokens)`` if sequences differ in length."""
        if len(set(self.lengths)) <= 1:
            return following(self.length, num_tokens, device)
        return sent(self.lengths, device)[:, None] + torch.arange(num_tokens, device=device)

    @uncompiled
    def origin(self, first: Tensor | None) -> Tensor | None:
        """See `Cache`."""
        return self._rows.origin if self._rows is not None and self.length else first

    def update(
        self,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        origin: Tensor | None = None,
    ) -> Cached:
        """See `Cache`.

        Raises:
            ValueError: The tokens do not fit the pool, or those that are there.
            CacheFullError: The pool has too few free pages. Free some, and call again.
        """
        if torch.compiler.is_compiling():
            return _update_and_gather(self, key, value, key_padding_mask, origin)
        form = Form.of(key, value)
        checks.check_no_gradient("PagedCache", key, value)
        rows = self._rows
        self.pool.form(form.batch if rows is None else len(rows.lengths)).check(form)
        if rows is None:
            rows = Rows(((),) * form.batch, (0,) * form.batch, None)
        added = key.shape[2]
        padding, counts = rows.extended_padding(key_padding_mask, added)
        tables = self._make_room(rows, counts)
        if tables != rows.tables:
            self._table = None
        query_positions = self.next_positions(added, form.device)
        lengths = tuple(map(sum, zip(rows.lengths, counts, strict=True)))
        self._before = self._rows
        self._write(tables, rows.lengths, counts, key, value)
        origin = None if origin is None else origin.expand(form.batch)
        self._rows = Rows(tables, lengths, padding, origin)
        sequences = self._sequences()
        are_alike = len(set(lengths)) == 1 and set(counts) == {added}
        lengths_B = None if are_alike else sequences.lengths()
        positions = None if lengths_B is None else sequences.positions(lengths_B)
        keys: Tensor
        values: Tensor
        if can_defer(key):
            keys, values = sequences.deferred(lengths_B, positions)
        else:
            keys, values = (sequences.gathered(values=values) for values in (False, True))
        if are_alike:
            return Cached(keys, values, None, padding)
        if not self.length:
            padding = None  # One empty slot stands for the keys that there are not.
        return Cached(keys, values, positions, padding, query_positions)

    def take_back(self) -> None:
        """See `Cache`. A page that was copied to be written to stays a copy."""
        before, made = self._before, self._rows
        if made is None:
            return
        if before is None:
            self._replace(None)
            return
        size = self.pool.page_size
        pairs = zip(made.tables, before.lengths, strict=True)
        self._shorten(before._replace(tables=tuple(t[: -(-n // size)] for t, n in pairs)))

    def _make_room(self, rows: Rows, counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The tables with pages for more tokens, and a page that is written to used once."""
        size = self.pool.page_size
        copied: list[int | None] = []
        copies: Counter[int] = Counter()
        missing: list[int] = []
        for table, length, count in zip(rows.tables, rows.lengths, counts, strict=True):
            missing.append(-(-(length + count) // size) - len(table))
            # Of the sequences that share a page, the last to get here keeps it.
            partial = bool(count and length % size)
            alone = partial and self.pool.uses(table[-1]) == 1 + copies[table[-1]]
            copied.append(table[-1] if partial and not alone else None)
            if partial and not alone:
                copies[table[-1]] += 1
        sources = [page for page in copied if page is not None]
        new = self.pool.take(sum(missing) + len(sources))
        if sources:
            self.pool.copy(sources, new[: len(sources)])
            self.pool.give_back(sources)
        targets, fresh = iter(new[: len(sources)]), iter(new[len(sources) :])
        tables = []
        for table, page, count in zip(rows.tables, copied, missing, strict=True):
            begun = table if page is None else (*table[:-1], next(targets))
            tables.append((*begun, *islice(fresh, count)) if count else begun)
        return tuple(tables)

    def _write(
        self,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        counts: Sequence[int],
        key: Tensor,
        value: Tensor,
    ) -> None:
        """Store the first ``counts[b]`` of the new tokens of sequence ``b`` behind the others."""
        size, added = self.pool.page_size, key.shape[2]
        at: list[int] = []
        tokens: list[int] = []
        for b, (table, length, count) in enumerate(zip(tables, lengths, counts, strict=True)):
            at += [table[n // size] * size + n % size for n in range(length, length + count)]
            tokens += range(b * added, b * added + count)
        at_M = sent(at, key.device)
        key_MGD, value_MGD = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
        if len(tokens) < len(key_MGD):
            token_M = sent(tokens, key.device)
            key_MGD, value_MGD = key_MGD[token_M], value_MGD[token_M]
        if at:
            self.pool.write(at_M, key_MGD, value_MGD)

    def _sequences(self) -> Sequences:
        assert self._rows is not None
        if self._table is None:
            device = self.pool.form(1).device
            width = max(1, *map(len, self._rows.tables))
            rows = [table + (0,) * (width - len(table)) for table in self._rows.tables]
            self._table = sent(rows, device, torch.int32)
        return Sequences(self.pool, self._rows, self._table, self.pool.now)

    def reorder(self, index: Tensor) -> None:
        """See `DecodingCache`. Sequences share their pages."""
        if self._rows is not None:
            batch = len(self._rows.lengths)
            self._take(checks.reorder_index(index, batch, torch.device("cpu")))

    def select(self, rows: Tensor) -> None:
        """See `DecodingCache`. Sequences share their pages."""
        if self._rows is not None:
            batch = len(self._rows.lengths)
            self._take(checks.select_index(rows, batch, torch.device("cpu")))

    def _take(self, index: Tensor) -> None:
        assert self._rows is not None
        self._replace(self._rows.take(index.tolist()))

    def _replace(self, rows: Rows | None) -> None:
        """Go over to other sequences, made of pages that are in use."""
        before = self._rows
        if rows is not None:
            self.pool.share(rows.pages)
        self._rows, self._table = rows, None
        if before is not None:
            self.pool.give_back(before.pages)

    def _shorten(self, rows: Rows) -> None:
        """Go over to these sequences less some of their last tokens."""
        assert self._rows is not None
        before, size = self._rows.lengths, self.pool.page_size
        triples = zip(rows.tables, rows.lengths, before, strict=True)
        self.pool.give_up([table[-1] for table, n, old in triples if n < old and n % size])
        self._replace(rows)

    def crop(self, length: int) -> None:
        """See `DecodingCache`. Sequences that are shorter stay as they are."""
        length = checks.check_crop(length, self.length)
        if self._rows is not None:
            self._shorten(self._rows.crop([length] * len(self.lengths), self.pool.page_size))

    def drop(self, count: int) -> None:
        """Forget the last ``count`` tokens of each sequence, however long it is.

        Raises:
            TypeError: ``count`` is no integer.
            ValueError: It is negative, or a sequence has fewer.
        """
        count = check_integer("count", count)
        shortest = min(self.lengths, default=0)
        if not 0 <= count <= shortest:
            raise ValueError(
                f"count must be in [0, {shortest}], the tokens of the shortest sequence; "
                f"got {count}"
            )
        if self._rows is not None:
            kept = [length - count for length in self.lengths]
            self._shorten(self._rows.crop(kept, self.pool.page_size))

    def fork(self) -> None:
        """See `DecodingCache`. All pages are shared with the fork until they are written to."""
        if self._rows is not None:
            self.pool.share(self._rows.pages)
        self._forks.open(self._rows)

    def commit(self) -> None:
        """See `DecodingCache`."""
        self._drop(self._forks.close("commit"))

    def rollback(self) -> None:
        """See `DecodingCache`."""
        kept = self._forks.close("rollback")
        self._drop(self._rows)
        self._rows, self._table = kept, None

    def reset(self) -> None:
        """See `DecodingCache`. All pages are given back."""
        for rows in (self._rows, *self._forks.states):
            self._drop(rows)
        self._rows = self._table = None
        self._forks.clear()

    def _drop(self, rows: Rows | None) -> None:
        if rows is not None:
            self.pool.give_back(rows.pages)

    def duplicate(self) -> "PagedCache":
        """Another cache with the same sequences, which shares their pages; without open forks."""
        new = PagedCache(self.pool)
        new._replace(self._rows)
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use; one that sequences share counts once."""
        if self._rows is None:
            return 0
        padding = self._rows.padding
        held = len(set(self._rows.pages)) * self.pool.page_nbytes
        return held + (0 if padding is None else padding.nbytes)

    def state_dict(self) -> dict[str, Any]:
        """See `DecodingCache`."""
        tokens = None
        if self._rows is not None and self.length:
            form = self.pool.form(len(self.lengths))
            sequences = self._sequences()
            key, value = (sequences.gathered(values=values) for values in (False, True))
            tokens = Tokens(form, key, value, self._rows.padding, self._rows.origin)
        return dict_of("PagedCache", tokens) | {"lengths": list(self.lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `DecodingCache`. It takes new pages before it gives the old ones back.

        Raises:
            CacheFullError: The pool has too few free pages.
        """
        checks.check_state(state, "PagedCache", _NAMES)
        tokens, lengths = tokens_of(state), _lengths_of(state)
        rows = None
        if tokens is not None:
            form = self.pool.form(len(lengths))
            form.check(tokens.form._replace(device=form.device))
            if max(lengths) != tokens.key.shape[2]:
                raise ValueError(
                    f"state must have keys as long as its longest sequence, {max(lengths)}; "
                    f"got {tokens.key.shape[2]}"
                )
            none = Rows(((),) * form.batch, (0,) * form.batch, None)
            tables = self._make_room(none, lengths)
            key, value = tokens.key.to(form.device), tokens.value.to(form.device)
            self._write(tables, none.lengths, lengths, key, value)
            padding, origin = (
                None if tensor is None else tensor.to(form.device, copy=True)
                for tensor in (tokens.padding, tokens.origin)
            )
            rows = Rows(tables, lengths, padding, origin)
        elif lengths:
            rows = Rows(((),) * len(lengths), lengths, None)
        self.reset()
        self._rows = rows

    def to(self, device: torch.device | str) -> Self:
        """See `DecodingCache`.

        Raises:
            ValueError: It is not the device of the pool, whose pages cannot be moved one by one.
        """
        here, target = self.pool.form(1).device, placed(device)
        if target != here:
            raise ValueError(f"device must be that of the pool, {here}; got {target}")
        return self


def _lengths_of(state: dict[str, Any]) -> tuple[int, ...]:
    """The tokens of each sequence of a state dict.

    Raises:
        ValueError: They are something else.
    """
    lengths = state["lengths"]
    if not isinstance(lengths, Sequence):
        raise ValueError(f"state['lengths'] must be a list; got {lengths!r}")
    return tuple(checks.state_count("lengths", length) for length in lengths)


@uncompiled
def _update_and_gather(
    cache: PagedCache,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    origin: Tensor | None,
) -> Cached:
    """`PagedCache.update`, for code that reads plain tensors alone."""
    cached = cache.update(key, value, key_padding_mask, origin=origin)
    return cached._replace(key=plain(cached.key), value=plain(cached.value))
