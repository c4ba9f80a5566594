"""What caches refuse, with the argument, what was expected and what came."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zeta.transforms import is_forward_mode
from zeta.values import check_integer, check_tensor

KIND = "kind"
"""The key of a state dict that names the class of the cache."""


def check_no_gradient(kind: str, *tensors: Tensor) -> None:
    """Raise ValueError if a derivative would be lost in tensors that are written to in place."""
    if is_forward_mode():
        raise ValueError(
            f"a {kind} keeps no forward-mode derivative (torch.func.jvp): take a DynamicCache"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            f"a {kind} keeps no gradient: use it under torch.no_grad() or torch.inference_mode(), "
            "or take a DynamicCache; got keys or values that require one"
        )


def reorder_index(index: Tensor, batch: int, device: torch.device) -> Tensor:
    """The argument of `DecodingCache.reorder`, checked, on the device of the cache.

    Raises:
        TypeError: It is no tensor.
        ValueError: It is not ``(batch,)`` integers in ``[0, batch)``.
    """
    check_tensor("index", index)
    if index.shape != (batch,):
        raise ValueError(
            f"index must have shape ({batch},), one a sequence; got {tuple(index.shape)}"
        )
    return _row_numbers("index", index, batch, device)


def select_index(rows: Tensor, batch: int, device: torch.device) -> Tensor:
    """The argument of `DecodingCache.select`, checked, as int64 on the device of the cache.

    Raises:
        TypeError: It is no tensor.
        ValueError: It is empty, of another shape or out of range.
    """
    check_tensor("rows", rows)
    if rows.dtype == torch.bool:
        if rows.shape != (batch,):
            raise ValueError(f"bool rows must have shape ({batch},); got {tuple(rows.shape)}")
        rows = rows.nonzero()[:, 0]
        if len(rows):
            return rows.to(device)
    if rows.dim() != 1 or len(rows) == 0:
        raise ValueError(f"rows must name at least one sequence; got shape {tuple(rows.shape)}")
    return _row_numbers("rows", rows, batch, device)


def _row_numbers(name: str, rows: Tensor, batch: int, device: torch.device) -> Tensor:
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise ValueError(f"{name} must be integers; got {rows.dtype}")
    # Traced code cannot wait for the values; the compiler's own bounds check stands in.
    if not torch.compiler.is_compiling():
        least, most = (int(bound) for bound in rows.aminmax())
        if least < 0 or most >= batch:
            raise ValueError(f"{name} must lie in [0, {batch}); got values from {least} to {most}")
    return rows.to(device, torch.int64)


def check_crop(length: int, present: int) -> int:
    """``length`` as one of Python's numbers, if so many of the ``present`` tokens can be kept.

    Raises:
        TypeError: ``length`` is no integer.
        ValueError: They cannot.
    """
    length = check_integer("length", length)
    if not 0 <= length <= present:
        raise ValueError(f"length must be in [0, {present}], the tokens in the cache; got {length}")
    return length


def check_state(state: dict[str, Any], kind: str, names: set[str]) -> None:
    """Raise unless ``state`` is the state dict of this kind of cache.

    Raises:
        TypeError: It is no dict.
        ValueError: It is that of another kind.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be that of a {kind}; got {type(state).__name__}")
    found = state.get(KIND)
    if found != kind:
        raise ValueError(f"state must be that of a {kind}; got that of {found or 'something else'}")
    if set(state) != names | {KIND}:
        raise ValueError(f"state must have the keys {sorted(names | {KIND})}; got {sorted(state)}")


def state_tensor(name: str, tensor: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of a state dict, checked.

    Args:
        name: Its key, for the message.
        tensor: What the state dict has there.
        shape: -1 stands for any size.
        dtype: What it must have.

    Raises:
        ValueError: It is something else.
    """
    if (
        isinstance(tensor, Tensor)
        and tensor.dtype == dtype
        and tensor.dim() == len(shape)
        and all(want in (-1, size) for want, size in zip(shape, tensor.shape, strict=True))
    ):
        return tensor
    found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
    raise ValueError(f"state[{name!r}] must be {dtype} {shape} (-1: any size); got {found}")


def state_count(name: str, count: object) -> int:
    """A number of tokens of a state dict, checked.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
        return count
    raise ValueError(f"state[{name!r}] must have numbers of tokens; got {count!r}")
