"""`PagePool`: the memory that the `PagedCache` of many sequences share.

Shapes: P pages, S page size, G key heads, D head dimension, M tokens.
"""

import copy
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from zeta.caches.form import Form, sent
from zeta.caches.interface import CacheFullError
from zeta.caches.slots import own
from zeta.stored import Pages
from zeta.values import check_size


class PagePool:
    """Pages of keys and values, each counted by how many sequences use it.

    One pool serves any number of caches, of all layers with the same heads, and any number of
    threads with a cache each. A copy, pickled or not, has its own pages: what is copied together
    goes on sharing them, and pages of caches that were not copied are free in it.

    Args:
        num_pages: Pages.
        page_size: Tokens of a page.
        num_kv_heads: Key heads.
        head_dim: Features of a key's head.
        value_dim: Features of a value's head; ``head_dim`` by default.
        dtype: Of keys and values.
        device: Of keys and values.

    Raises:
        TypeError: A size is no integer, or ``dtype`` not floating point.
        ValueError: One is below 1.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        num_pages = check_size("num_pages", num_pages)
        page_size = check_size("page_size", page_size)
        num_kv_heads = check_size("num_kv_heads", num_kv_heads)
        head_dim = check_size("head_dim", head_dim)
        value_dim = check_size("value_dim", value_dim)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype; got {dtype!r}")
        self.num_pages = num_pages
        self.page_size = page_size
        # A token's heads lie side by side, so that pages become a sequence in one copy.
        shape = num_pages, page_size, num_kv_heads
        # Nothing could be written to a tensor of inference mode outside of it.
        with torch.inference_mode(False):
            self._key_PSGD = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
            self._value_PSGD = torch.zeros(*shape, value_dim, dtype=dtype, device=device)
        self._form = Form(1, num_kv_heads, head_dim, value_dim, dtype, self._key_PSGD.device)
        self._uses = [0] * num_pages
        self._now = 0
        self._given_up = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        # A cache that becomes garbage while pages are counted gives its own back in that thread.
        self._lock = threading.RLock()

    def __copy__(self) -> "PagePool":
        return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        if self._key_PSGD.is_inference():
            # Made as a copy, in that mode.
            self._key_PSGD, self._value_PSGD = own(self._key_PSGD), own(self._value_PSGD)
        # The caches that are copied with it count theirs.
        self._uses = [0] * self.num_pages
        self._free = list(range(self.num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return (self._key_PSGD.nbytes + self._value_PSGD.nbytes) // self.num_pages

    def form(self, batch: int) -> Form:
        """What the tokens of ``batch`` sequences must look like."""
        return self._form._replace(batch=batch)

    def uses(self, page: int) -> int:
        """How many sequences use a page."""
        return self._uses[page]

    def take(self, count: int) -> list[int]:
        """Pages for one sequence each, to be given back.

        Raises:
            CacheFullError: There are fewer; none is taken.
        """
        with self._lock:
            if count > len(self._free):
                raise CacheFullError(
                    f"{count} more pages are needed, but the pool has {len(self._free)} of its "
                    f"{self.num_pages} left; free some and call again"
                )
            pages = [self._free.pop() for _ in range(count)]
            for page in pages:
                self._uses[page] = 1
        self.give_up(pages)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Count one more use of pages that are in use."""
        with self._lock:
            for page in pages:
                self._uses[page] += 1

    def claim(self, pages: Iterable[int]) -> None:
        """Count one more use of pages, whether they are in use or free."""
        with self._lock:
            self.share(pages)
            self._free = [page for page in self._free if not self._uses[page]]

    def give_back(self, pages: Iterable[int]) -> None:
        """Count one use less; a page without any is free."""
        with self._lock:
            for page in pages:
                self._uses[page] -= 1
                if self._uses[page] == 0:
                    self._free.append(page)

    @property
    def now(self) -> int:
        """The moment, for `keeps`."""
        return self._now

    def give_up(self, pages: Sequence[int]) -> None:
        """From now on what these pages hold may be written over."""
        if pages:
            with self._lock:
                self._now += 1
                for page in pages:
                    self._given_up[page] = self._now

    def keeps(self, pages: Iterable[int], since: int) -> bool:
        """Whether these pages still have all that they had at a moment."""
        return self._now == since or all(self._given_up[page] <= since for page in pages)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the contents of pages."""
        device = self._form.device
        source, target = sent(sources, device), sent(targets, device)
        for pages in (self._key_PSGD, self._value_PSGD):
            pages.index_copy_(0, target, pages.index_select(0, source))

    def write(self, at_M: Tensor, key_MGD: Tensor, value_MGD: Tensor) -> None:
        """Put tokens into the slots ``page * page_size + offset``."""
        self._key_PSGD.flatten(0, 1).index_copy_(0, at_M, key_MGD)
        self._value_PSGD.flatten(0, 1).index_copy_(0, at_M, value_MGD)

    def read(self, table: Tensor, *, values: bool) -> Tensor:
        """Keys or values ``(B, num * S, G, D)`` of the pages ``(B, num)``."""
        batch, num_pages = table.shape
        pages = self._value_PSGD if values else self._key_PSGD
        tokens = pages.index_select(0, table.flatten())
        return tokens.view(batch, num_pages * self.page_size, *pages.shape[2:])

    def store(self, table: Tensor, lengths: Tensor | None, positions: Tensor | None) -> Pages:
        """Sequences as a backend reads them where they lie; see `Pages`."""
        key_PGSD, value_PGSD = self._key_PSGD.transpose(1, 2), self._value_PSGD.transpose(1, 2)
        return Pages(key_PGSD, value_PGSD, table, lengths, positions)
