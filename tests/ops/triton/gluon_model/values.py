"""Blocks of numbers and pointers, with Triton's arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Binary = Callable[[Any, Any], Any]


def _method(operation: Binary, *, swapped: bool = False) -> Binary:
    def method(self: Block, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return binary(operation, other, self) if swapped else binary(operation, self, other)

    return method


class Block:
    """A block of numbers, or one number: what a kernel holds in registers."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.numbers.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.numbers.dtype

    def to(self, dtype: torch.dtype) -> Block:
        return Block(self.numbers.to(dtype))

    def __getitem__(self, index: Any) -> Block:
        return Block(self.numbers[index])

    def __bool__(self) -> bool:
        return bool(self.numbers.item())

    def __index__(self) -> int:
        return operator.index(self.numbers.item())

    def __neg__(self) -> Block:
        return Block(-self.numbers)

    __add__, __radd__ = _method(operator.add), _method(operator.add, swapped=True)
    __sub__, __rsub__ = _method(operator.sub), _method(operator.sub, swapped=True)
    __mul__, __rmul__ = _method(operator.mul), _method(operator.mul, swapped=True)
    __truediv__ = _method(operator.truediv)
    __rtruediv__ = _method(operator.truediv, swapped=True)
    __and__, __rand__ = _method(operator.and_), _method(operator.and_, swapped=True)
    __or__, __ror__ = _method(operator.or_), _method(operator.or_, swapped=True)
    __xor__, __rxor__ = _method(operator.xor), _method(operator.xor, swapped=True)
    __lt__, __le__ = _method(operator.lt), _method(operator.le)
    __gt__, __ge__ = _method(operator.gt), _method(operator.ge)
    # Integers are divided as in C: towards zero.
    __floordiv__ = _method(lambda x, y: torch.div(x, y, rounding_mode="trunc"))
    __rfloordiv__ = _method(lambda x, y: torch.div(x, y, rounding_mode="trunc"), swapped=True)
    __mod__, __rmod__ = _method(torch.fmod), _method(torch.fmod, swapped=True)
    # Kernels compare numbers, and never ask whether two blocks are one object.
    __eq__ = _method(operator.eq)  # type: ignore[assignment]
    __ne__ = _method(operator.ne)  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class Pointer:
    """Places in a tensor: reading or writing beyond its ends is an error."""

    def __init__(self, tensor: Tensor, places: Block) -> None:
        self.tensor, self.places = tensor, places

    @property
    def dtype(self) -> Pointer:
        return self

    @property
    def element_ty(self) -> torch.dtype:
        return self.tensor.dtype

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.tensor, binary(operator.add, self.places, steps))

    def __radd__(self, steps: Any) -> Pointer:
        return self + steps

    def __sub__(self, steps: Any) -> Pointer:
        return Pointer(self.tensor, binary(operator.sub, self.places, steps))

    def elements(self) -> Tensor:
        """All that the tensor spans in memory, in one dimension."""
        steps = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        size = 1 + sum((size - 1) * stride for size, stride in steps)
        return self.tensor.detach().as_strided((size,), (1,))


def binary(operation: Binary, left: Any, right: Any) -> Block:
    """Applies an operation in the type that Triton chooses."""
    first, second = to_numbers(left), to_numbers(right)
    if first.dtype != second.dtype:
        dtype = _common(left, right, first.dtype, second.dtype)
        first, second = first.to(dtype), second.to(dtype)
    return Block(operation(first, second))


def to_numbers(value: Any) -> Tensor:
    if isinstance(value, Block):
        return value.numbers
    assert isinstance(value, bool | int | float), f"no number: {value!r}"
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.int32 if abs(value) < 2**31 else torch.int64)
    return torch.tensor(value)


def _common(left: Any, right: Any, first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """A plain number takes the type of floats that it meets."""
    if not isinstance(right, Block) and first.is_floating_point:
        return first
    if not isinstance(left, Block) and second.is_floating_point:
        return second
    # Of dimensions, so that none counts less for being a single number.
    return torch.promote_types(first, second)
