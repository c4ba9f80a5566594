"""`Sequences`: what a `PagedCache` gives back, read from its pages when somebody looks.

Shapes: B batch, G key heads, L longest sequence, S page size, D head dimension.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from zeta.caches.form import sent
from zeta.caches.pool import PagePool
from zeta.caches.rows import Rows
from zeta.stored import Pages, StoredTensor


class Sequences(NamedTuple):
    """The sequences of a cache at one moment.

    Attributes:
        pool: Where their pages are.
        rows: Which they are.
        table: Their pages, ``(B, most pages)`` int32 on the device of the pool.
        since: The moment, by the clock of the pool.
    """

    pool: PagePool
    rows: Rows
    table: Tensor
    since: int

    @property
    def length(self) -> int:
        """``L``; 1 where all are empty."""
        return max(1, *self.rows.lengths)

    def lengths(self) -> Tensor:
        """``(B,)``: tokens of each sequence, on the device."""
        return sent(self.rows.lengths, self.table.device)

    def positions(self, lengths_B: Tensor) -> Tensor:
        """``(B, L)``: the position of each token, -1 behind the end of a sequence."""
        slot_L = torch.arange(self.length, device=self.table.device)
        return torch.where(slot_L < lengths_B[:, None], slot_L, -1)

    def gathered(self, *, values: bool) -> Tensor:
        """Keys ``(B, G, L, D)`` or values; 0 behind the end of a sequence."""
        tokens = self.pool.read(self.table, values=values)[:, : self.length]
        if min(self.rows.lengths) < self.length:
            # What others left there could be NaN.
            is_empty_BL = self.positions(self.lengths()) < 0
            tokens.masked_fill_(is_empty_BL[:, :, None, None], 0)
        return tokens.transpose(1, 2)

    def deferred(
        self, lengths_B: Tensor | None, positions: Tensor | None
    ) -> tuple[StoredTensor, StoredTensor]:
        """Keys and values that are gathered when they are first read.

        Args:
            lengths_B: `lengths`; None where no sequence is shorter.
            positions: What the cache gives back with them.
        """
        store = self.pool.store(self.table, lengths_B, positions)
        key, value = (self._stand_in(store, values=values) for values in (False, True))
        return key, value

    def _stand_in(self, store: Pages, *, values: bool) -> StoredTensor:
        form = self.pool.form(len(self.rows.lengths))
        size = form.value_dim if values else form.head_dim
        row = form.heads * size
        return StoredTensor.of(
            store,
            (form.batch, form.heads, self.length, size),
            (self.table.shape[1] * self.pool.page_size * row, size, row, 1),
            form.dtype,
            is_value=values,
            read=partial(self.gathered, values=values),
            check=self.check,
        )

    def check(self) -> None:
        """Raise RuntimeError if tokens were written over since."""
        if self.pool.now != self.since and not self.pool.keeps(self.rows.pages, self.since):
            raise RuntimeError(
                "these keys and values were not looked at before, and cannot be now: their pages "
                "have been given up and may be another's"
            )
