"""`Rows`: the sequences of a `PagedCache`, each with its pages.

Shapes: B batch, N new tokens, L longest sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zeta.caches.padding import kept_padding
from zeta.values import check_tensor


class Rows(NamedTuple):
    """Whoever holds it has a use of each of its pages.

    Attributes:
        tables: Each sequence's pages.
        lengths: Each sequence's length.
        padding: ``(B, L)``, or None.
        origin: ``(B,)``, or None; see `Cache.origin`.
    """

    tables: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    padding: Tensor | None
    origin: Tensor | None = None

    @property
    def pages(self) -> list[int]:
        """All pages, one that sequences share as often as they do."""
        return [page for table in self.tables for page in table]

    def take(self, order: list[int]) -> "Rows":
        """The sequences ``order``."""
        lengths = tuple(self.lengths[b] for b in order)
        padding = None if self.padding is None else self.padding[order, : max(lengths)]
        origin = None if self.origin is None else self.origin[order]
        return Rows(tuple(self.tables[b] for b in order), lengths, padding, origin)

    def crop(self, most: Sequence[int], page_size: int) -> "Rows":
        """The first ``most[b]`` tokens of sequence ``b``, if it has so many."""
        lengths = tuple(map(min, most, self.lengths))
        pairs = zip(self.tables, lengths, strict=True)
        tables = tuple(table[: -(-kept // page_size)] for table, kept in pairs)
        padding = None if self.padding is None else self.padding[:, : max(lengths)]
        return Rows(tables, lengths, padding, self.origin)

    def extended_padding(
        self, new: Tensor | None, added: int
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """The padding ``(B, L)`` with new tokens, and how many of those each sequence stores."""
        batch, before = len(self.lengths), max(self.lengths)
        counts = (added,) * batch
        if new is not None:
            check_tensor("key_padding_mask", new)
        for_all = new is not None and before > 0 and new.shape == (batch, before + added)
        padding = kept_padding(self.padding, new, batch=batch, length=before + added, added=added)
        if padding is None:
            return None, counts
        if new is not None and new.dtype == torch.bool and not for_all:
            number_N = torch.arange(1, added + 1, device=new.device)
            counts = tuple(torch.where(new, 0, number_N).amax(1).tolist())
        if for_all:
            if len(set(self.lengths)) > 1:
                raise ValueError(
                    f"key_padding_mask must have shape ({batch}, {added}), of the new tokens, "
                    f"where sequences differ in length; got ({batch}, {before + added})"
                )
            return padding, counts
        device = padding.device
        old_B1 = torch.tensor(self.lengths, device=device)[:, None]
        count_B1 = torch.tensor(counts, device=device)[:, None]
        slot_L = torch.arange(max(map(sum, zip(self.lengths, counts, strict=True))), device=device)
        # From a frame in which all new tokens stand behind the longest sequence.
        source_BL = torch.where(slot_L < old_B1, slot_L, before + slot_L - old_B1)
        moved = padding.gather(1, source_BL.clamp(max=before + added - 1))
        padding = torch.where(slot_L < old_B1 + count_B1, moved, torch.zeros_like(moved))
        return (padding if self.padding is not None or bool(padding.any()) else None), counts
