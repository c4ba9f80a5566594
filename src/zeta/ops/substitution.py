"""Masks and biases with other tensors in the place of theirs."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor

from zeta.values import Value

ValueT = TypeVar("ValueT", bound=Value)


def with_tensors(value: ValueT, tensors: Iterator[Tensor]) -> ValueT:
    """A copy that holds the next ``tensors``, in the order of `Value.tensors`."""
    found: ValueT = _replaced(value, tensors)
    return found


def _replaced(item: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(item, Tensor):
        return next(tensors)
    if isinstance(item, tuple):
        return tuple(_replaced(part, tensors) for part in item)
    if not isinstance(item, Value):
        return item
    made = copy.copy(item)
    for field in dataclasses.fields(item):
        held = getattr(item, field.name)
        replaced = _replaced(held, tensors)
        if replaced is not held:
            object.__setattr__(made, field.name, replaced)
    return made
