"""`StoredTensor`: keys or values that lie in a cache in a form of its own, until they are read.

A cache that keeps its tokens in pages, or in codes, gives back tensors like any other. They are
made when they are first read; a backend that reads the stored form itself never makes them.

Shapes: B batch, G key heads, L tokens so far, D features, P pages, S page size.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from zeta.standin import PLAIN, StandIn
from zeta.transforms import is_watched


class Pages(NamedTuple):
    """Keys and values in pages.

    Attributes:
        key: ``(P, G, S, D)``.
        value: ``(P, G, S, Dv)``.
        table: ``(B, most pages)`` int32, the pages of each sequence; behind its last, any.
        lengths: ``(B,)`` int64, tokens of each sequence. Those that it has not are 0 in the
            tensors. None: no sequence is shorter.
        positions: ``(B, L)`` int64, as the cache gives them back: -1 where a sequence has no token;
            None where `lengths` is.
    """

    key: Tensor
    value: Tensor
    table: Tensor
    lengths: Tensor | None
    positions: Tensor | None


class Codes(NamedTuple):
    """Keys and values in 8 bits.

    Feature ``d`` of a token is ``step * (code[d] + middle)``. The middle is an integer, the same
    for all features of a head of a token, and follows the codes in digits of base 256, the lowest
    first: ``sum(digit[i] * 256 ** i)``. So a product with the features is one with codes and
    digits, times the step. There are 4 digits, or 8 with float64.

    Attributes:
        key: ``(B, G, L, D + digits)`` int8.
        value: ``(B, G, L, Dv + digits)`` int8.
        key_steps: ``(B, G, L)`` float32 or float64.
        value_steps: ``(B, G, L)``, alike.
    """

    key: Tensor
    value: Tensor
    key_steps: Tensor
    value_steps: Tensor


Store: TypeAlias = Pages | Codes


class StoredTensor(StandIn):
    """Keys ``(B, G, L, D)`` or values of a `Store`.

    A tensor like any other. Some of the tokens, ``tensor[:, :, 3:9]``, are left where they are too;
    what other operations return are plain tensors. It may be read until what the cache holds of
    these tokens is written over, as after `DecodingCache.crop`; once it was read, for ever.

    Attributes:
        store: Where they lie.
        is_value: Whether they are the values.
        first: Which token of the store is the first.
    """

    store: Store
    is_value: bool
    first: int
    _read: Callable[[], Tensor]
    _check: Callable[[], None]
    _made: Tensor | None
    _lock: threading.Lock

    @classmethod
    def of(
        cls,
        store: Store,
        sizes: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        *,
        is_value: bool,
        first: int = 0,
        read: Callable[[], Tensor],
        check: Callable[[], None],
    ) -> "StoredTensor":
        """Stand for the tensor that ``read`` makes.

        Args:
            store: Where it lies.
            sizes: Its own.
            strides: Its own.
            dtype: Its own.
            is_value: Whether it has the values.
            first: Which token of the store is its first.
            read: Makes it.
            check: Raises RuntimeError if the stored tokens were written over.
        """
        device = store.key.device
        self: StoredTensor = cls.announce(sizes, strides, dtype, device)
        self.store, self.is_value, self.first = store, is_value, first
        self._read, self._check = read, check
        self._made, self._lock = None, threading.Lock()
        return self

    @property
    def materialized(self) -> bool:
        """Whether the numbers are there already."""
        return self._made is not None

    def check(self) -> None:
        """Raise RuntimeError if the stored tokens were written over."""
        self._check()

    def plain(self) -> Tensor:
        """The numbers, as a plain tensor: always the same one."""
        return self._value()

    def narrowed(self, start: int, end: int) -> "StoredTensor":
        """The tokens ``start .. end - 1`` of these."""
        *outer, _, width = self.shape
        return StoredTensor.of(
            self.store,
            (*outer, end - start, width),
            self.stride(),
            self.dtype,
            is_value=self.is_value,
            first=self.first + start,
            read=lambda: self.plain()[:, :, start:end],
            check=self._check,
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its own default, a function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _VIEWS and not args[0].materialized:
            tokens = _tokens_of_view(*args, **(kwargs or {}))
            if tokens is not None:
                return args[0].narrowed(*tokens)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _value(self) -> Tensor:
        if self._made is None:
            with self._lock:
                if self._made is None:
                    made = self._new()
                    if torch._C._are_functorch_transforms_active():
                        # It belongs to the transform, and would outlive it.
                        return made
                    self._made = made
        return self._made

    def _new(self) -> Tensor:
        # A tensor made in inference mode could never again take part in a gradient.
        with torch.inference_mode(False), torch.no_grad():
            made = self._read()
            if made.stride() != self.stride():
                made = made.new_empty_strided(self.shape, self.stride()).copy_(made)
        # Afterwards: what was written over while it was read is noticed too.
        self._check()
        return made


_VIEWS = {
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
}


def _tokens_of_view(
    tensor: StoredTensor,
    dim: int | None = None,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> tuple[int, int] | None:
    """From which token to which a view extends; None if it is not of all that is theirs."""
    if dim is None:
        return 0, tensor.shape[2]
    first, last, _ = slice(start, end).indices(tensor.shape[2])
    return (first, last) if dim == 2 and step == 1 and last > first else None


def plain(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that may be a stored one."""
    return tensor.plain() if isinstance(tensor, StoredTensor) else tensor


def can_defer(tensor: Tensor) -> bool:
    """Whether tokens such as these may be left in their store: on the CPU and on CUDA, where there
    are backends that read them, and where nothing traces or transforms what is computed."""
    return (
        (tensor.is_cpu or tensor.is_cuda)
        and type(tensor) in PLAIN
        and not torch.compiler.is_compiling()
        and not is_watched()
    )
