"""Every kind of cache under test, each with what it does to the full forward."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from tests.caches.histories import HEAD_DIM, VALUE_DIM, History, Setting
from zeta import masks
from zeta.caches import (
    Cached,
    DecodingCache,
    DictCache,
    DynamicCache,
    PagedCache,
    PagePool,
    QuantizedCache,
    RollingCache,
    StaticCache,
)
from zeta.caches.quantized import dequantize, quantize


class PlainDict:
    """A plain dict, changed as its users change it: by the tensors that they can read in it."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.forks: list[dict[str, Tensor]] = []

    @property
    def length(self) -> int:
        return self.state["prev_key"].shape[2] if self.state else 0

    def next_positions(self, num_tokens: int, device: torch.device) -> Tensor:
        return torch.arange(self.length, self.length + num_tokens, device=device)[None]

    def update(self, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Cached:
        return DictCache(self.state).update(key, value, key_padding_mask)

    def reorder(self, index: Tensor) -> None:
        self.state = {name: part.index_select(0, index) for name, part in self.state.items()}

    select = reorder

    def crop(self, length: int) -> None:
        for name, dim in (("prev_key", 2), ("prev_value", 2), ("prev_key_padding_mask", 1)):
            if name in self.state:
                self.state[name] = self.state[name].narrow(dim, 0, length)

    def fork(self) -> None:
        self.forks.append(dict(self.state))

    def commit(self) -> None:
        if not self.forks:
            raise ValueError("commit() needs an open fork")
        self.forks.pop()

    def rollback(self) -> None:
        if not self.forks:
            raise ValueError("rollback() needs an open fork")
        self.state = self.forks.pop()

    def reset(self) -> None:
        self.state, self.forks = {}, []

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.state.values())

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.forks = dict(state), []

    def to(self, device: torch.device | str) -> Self:
        self.state = {name: part.to(device) for name, part in self.state.items()}
        return self


def new_pool(
    num_pages: int,
    page_size: int,
    *,
    key_heads: int = 2,
    head_dim: int = HEAD_DIM,
    value_dim: int = VALUE_DIM,
) -> PagePool:
    return PagePool(
        num_pages,
        page_size,
        num_kv_heads=key_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=torch.float64,
    )


def through(bits: int) -> Callable[[Tensor], Tensor]:
    """What a quantised cache makes of a tensor."""
    return lambda x: dequantize(*quantize(x, bits), bits, x.shape[-1], x.dtype)


def sinks_and_window(sinks: int, window: int) -> masks.Mask:
    first = masks.Causal() & masks.Padding(torch.tensor([sinks]))
    return masks.SlidingWindow(window) | first


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of cache.

    Attributes:
        make: Makes an empty one, for keys of so many heads.
        history: Options of a `History` with it.
    """

    make: Callable[[int], DecodingCache]
    history: Callable[[Setting], dict[str, Any]] = lambda setting: {}


def _paged(num_pages: int, page_size: int) -> Kind:
    def options(setting: Setting) -> dict[str, Any]:
        return {"drops_trailing_padding": setting.padding != "float"}

    return Kind(lambda heads: PagedCache(new_pool(num_pages, page_size, key_heads=heads)), options)


KINDS = {
    "dict": Kind(lambda heads: PlainDict()),
    "dynamic": Kind(lambda heads: DynamicCache()),
    "static": Kind(lambda heads: StaticCache(24)),
    "rolling": Kind(
        lambda heads: RollingCache(4), lambda setting: {"mask": masks.SlidingWindow(4)}
    ),
    "rolling with sinks": Kind(
        lambda heads: RollingCache(3, 2), lambda setting: {"mask": sinks_and_window(2, 3)}
    ),
    "paged": _paged(200, 3),
    "paged, one token a page": _paged(40, 1),
    "quantized, 8 bits": Kind(
        lambda heads: QuantizedCache(8), lambda setting: {"keep": through(8)}
    ),
    "quantized, 4 bits": Kind(
        lambda heads: QuantizedCache(4), lambda setting: {"keep": through(4)}
    ),
}


def new_history(name: str, setting: Setting) -> History:
    kind = KINDS[name]
    return History(setting, lambda: kind.make(setting.key_heads), **kind.history(setting))
