"""Masks and biases with other tensors in the place of theirs."""

import dataclasses

import torch
from torch import Tensor

from tests.ops.lazy import Small
from zeta import biases, masks
from zeta.ops.attention import run_weights
from zeta.ops.substitution import with_tensors
from zeta.ops.weights import lazy_weights
from zeta.values import Tile


def test_every_tensor_is_replaced_in_order() -> None:
    mask = masks.Causal() & (
        masks.Padding(torch.tensor([1, 2])) | masks.keep(torch.ones(4, 4, dtype=torch.bool))
    )
    bias = biases.Dense(torch.zeros(4)) + biases.Softcap(2.0) + biases.Alibi(torch.ones(3))
    for value in (mask, bias):
        before = value.tensors()
        others = [torch.zeros_like(tensor) for tensor in before]
        found = with_tensors(value, iter(others))
        assert all(one is other for one, other in zip(found.tensors(), others, strict=True))
        assert all(one is other for one, other in zip(value.tensors(), before, strict=True))
        assert found.flatten()[0] == value.flatten()[0]


def _mask_of(number: int) -> masks.Mask:
    """Of a class whose name all of them have."""

    @dataclasses.dataclass(frozen=True, eq=False)
    class Far(masks.Mask):
        least: Tensor

        def visible(self, tile: Tile) -> Tensor:
            return (tile.key_position - tile.query_position).abs() * number >= self.least

    return Far(torch.tensor(2))


def test_a_class_of_the_same_name_is_another() -> None:
    small, first, second = Small(), _mask_of(1), _mask_of(2)
    assert type(with_tensors(first, iter([torch.tensor(3)]))) is type(first) is not type(second)
    call = dataclasses.replace(small.call(), mask=first)
    lazily, plainly = (
        torch.autograd.grad(weights.square().sum(), small.leaves)
        for weights in (lazy_weights(call, small.compute), run_weights(call, "reference"))
    )
    torch.testing.assert_close(lazily, plainly)
