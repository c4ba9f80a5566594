"""What masks and biases share: taken apart and put together, and what they may hold."""

import dataclasses
import gc
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from zeta import biases, masks
from zeta.values import Tile, Value


def _mask_of(number: int) -> masks.Mask:
    """Of a class whose name all of them have."""

    @dataclasses.dataclass(frozen=True, eq=False)
    class Multiples(masks.Mask):
        def visible(self, tile: Tile) -> Tensor:
            return tile.key_position % number == 0

    return Multiples()


def _again(value: Value) -> Any:
    return Value.unflatten(*value.flatten())


def test_classes_of_one_name_are_told_apart() -> None:
    first, second = _mask_of(2), _mask_of(3)
    assert type(_again(first)) is type(first)
    assert type(_again(second)) is type(second)
    assert first.flatten()[0] != second.flatten()[0]


def test_the_string_of_zetas_own_is_what_saved_programs_hold() -> None:
    spec, _ = masks.SlidingWindow(3).flatten()
    assert spec == '{"kind": "masks.SlidingWindow", "fields": {"size": 3}}'


def test_a_class_that_nobody_holds_is_forgotten() -> None:
    key = _mask_of(5).flatten()[0]
    gc.collect()
    with pytest.raises(KeyError, match="Multiples"):
        Value.unflatten(key, [])


@dataclasses.dataclass(frozen=True, eq=False)
class Widened(masks.Mask):
    """Makes something of what it is given, once."""

    UNIT: ClassVar[str] = "tokens"

    size: int
    half: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.size + 1)
        object.__setattr__(self, "half", self.size // 2)

    def visible(self, tile: Tile) -> Tensor:
        return (tile.key_position - tile.query_position).abs() <= self.half


def test_what_was_made_of_fields_is_not_made_of_them_again() -> None:
    mask = Widened(3)
    again = _again(mask)
    assert (again.size, again.half) == (mask.size, mask.half) == (4, 2)
    assert torch.equal(again.dense(1, 1, 5, 5), mask.dense(1, 1, 5, 5))


@dataclasses.dataclass(frozen=True, eq=False)
class Holder(biases.OffsetBias):
    """Whatever it is given."""

    held: Any

    def reach(self, longest: int) -> int:
        return longest

    def at(self, offset: Tensor) -> Tensor:
        slopes_H = torch.arange(1, 3, device=offset.device)
        return -offset.abs().unsqueeze(-1) * slopes_H / 4


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 1e300, -0.0, 5, True])
def test_every_number_comes_back(number: float) -> None:
    found = _again(Holder(number)).held
    assert repr(found) == repr(number)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: [torch.ones(2)], "list"),
        (lambda: (1, {"slopes": torch.ones(2)}), "dict"),
    ],
)
def test_tensors_that_nobody_would_find_are_refused(make: Callable[[], Any], name: str) -> None:
    bias = Holder(make())
    for ask in (bias.tensors, bias.flatten):
        with pytest.raises(TypeError, match=f"a mask or bias cannot hold a {name}: its fields are"):
            ask()


@pytest.mark.parametrize("held", [None, "a name", 3, 0.5, (1, (torch.ones(2), None))])
def test_what_holds_no_tensor_may_be_held(held: Any) -> None:
    assert len(Holder(held).tensors()) == isinstance(held, tuple)


def test_a_bias_of_numbers_alone_has_a_dense_view() -> None:
    expected = biases.Alibi(torch.tensor([0.25, 0.5])).dense(1, 2, 3, 4)
    assert torch.equal(Holder(0.25).dense(1, 2, 3, 4), expected)
