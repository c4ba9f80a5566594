"""Subclasses of Zeta's own masks and biases: what they change is changed on every backend."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.blockwise import assert_same, make, outcome
from zeta import attention, biases, explain, masks
from zeta.ops import backends
from zeta.ops.backends import chunked, cpu, reference
from zeta.ops.call import AttentionCall
from zeta.ops.parts import Indivisible, heads_of
from zeta.values import Tile


class Symmetric(masks.SlidingWindow):
    def visible(self, tile: Tile) -> Tensor:
        return (tile.key_position - tile.query_position).abs() < self.size


class Backwards:
    def visible(self, tile: Tile) -> Tensor:
        return tile.key_position >= tile.query_position


class Anticausal(Backwards, masks.Causal):
    pass


class Widened(masks.Padding):
    def visible(self, tile: Tile) -> Tensor:
        return tile.key_position < self.lengths[tile.batches, None, None, None] + 1


class Parity(masks.Documents):
    def at(self, position: Tensor, batches: slice | None = None) -> Tensor:
        return super().at(position, batches) % 2


class Inverted(masks.Dense):
    def visible(self, tile: Tile) -> Tensor:
        return ~super().visible(tile)


class NotBoth(masks.AllOf):
    def visible(self, tile: Tile) -> Tensor:
        return ~super().visible(tile)


class Doubled(biases.Dense):
    def values(self, tile: Tile) -> Tensor:
        return 2 * super().values(tile)


class Linear(biases.Softcap):
    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        return scores / self.limit


class Squared(biases.Alibi):
    def at(self, offset: Tensor) -> Tensor:
        return -(offset.unsqueeze(-1) ** 2) * self.slopes


class Factor(biases.Alibi):
    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        return scores * self.slopes[tile.heads, None, None]


class Subtracted(biases.Bucketed):
    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        return scores - self.values(tile)


class Negated(biases.Bucketed):
    def at(self, offset: Tensor) -> Tensor:
        return -super().at(offset)


class Averaged(biases.Sum):
    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        return (scores + super().apply(scores, tile)) / 2


LENGTH = 70
MASKS: dict[str, Callable[[], masks.Mask]] = {
    "visible of a window": lambda: Symmetric(5),
    "visible of a window, joined": lambda: Symmetric(5) & masks.Padding(torch.tensor([60, 70])),
    "visible of a base beside it": Anticausal,
    "visible of padding": lambda: Widened(torch.tensor([9, 60])),
    "at of documents": lambda: Parity(torch.randint(0, 4, (2, LENGTH))),
    "visible of a tensor": lambda: Inverted(torch.rand(LENGTH, LENGTH) < 0.5),
    "visible of a join": lambda: NotBoth((masks.Causal(), masks.SlidingWindow(9))),
}
BIASES: dict[str, Callable[[], biases.Bias]] = {
    "values of a tensor": lambda: Doubled(torch.randn(4, LENGTH, LENGTH)),
    "apply of a soft cap": lambda: Linear(3.0),
    "at of slopes": lambda: Squared(torch.rand(4) / 99),
    "apply of slopes": lambda: Factor(torch.rand(4)),
    "apply of buckets": lambda: Subtracted(torch.randn(8, 4), max_distance=20),
    "at of buckets": lambda: Negated(torch.randn(8, 4), max_distance=20),
    "apply of a sum": lambda: Averaged((biases.Softcap(1.0), biases.Alibi(torch.rand(4)))),
}


def _operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 2, 4, LENGTH, 8, dtype=dtype).unbind()
    return query, key, value


def _assert_as_the_textbook(dtype: torch.dtype, **arguments: Any) -> None:
    operands = _operands(dtype)
    expected, _ = reference.run(AttentionCall.checked(*operands, **arguments))
    run = 0
    for name in ("auto", "cpu", "sdpa", "chunked"):
        call = AttentionCall.checked(*operands, **arguments)
        if name == "auto" or not backends.load(name).unsupported(call):
            run += 1
            found = attention(*operands, **arguments, backend=name)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert run >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("made", MASKS)
def test_a_mask_of_one_of_zetas_is_what_it_says(made: str, dtype: torch.dtype) -> None:
    _assert_as_the_textbook(dtype, mask=MASKS[made]())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("made", BIASES)
def test_a_bias_of_one_of_zetas_is_what_it_says(made: str, dtype: torch.dtype) -> None:
    _assert_as_the_textbook(dtype, bias=BIASES[made]())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("made", MASKS)
def test_blocks_are_skipped_by_what_the_subclass_says(made: str) -> None:
    operands, mask = make(LENGTH, LENGTH), MASKS[made]()
    assert_same(outcome(chunked, operands, mask=mask), outcome(reference, operands, mask=mask))


@pytest.mark.parametrize("made", ["visible of a window", "at of documents", "visible of a join"])
def test_compiled_too(made: str) -> None:
    mask, operands = MASKS[made](), _operands()

    def attend(query: Tensor) -> Tensor:
        return attention(query, *operands[1:], mask=mask)

    found = torch.compile(attend, fullgraph=True, backend="aot_eager")(operands[0])
    expected = attention(*operands, mask=mask, backend="reference")
    torch.testing.assert_close(found, expected)


def test_kernels_say_that_they_cannot_apply_them() -> None:
    operands = _operands()
    reasons = explain(*operands, mask=Symmetric(5), bias=Linear(3.0)).reasons["cpu"]
    assert reasons == (
        "it cannot apply the mask Symmetric", "it cannot apply the bias Linear",
    )  # fmt: skip


def test_a_subclass_that_changes_nothing_is_as_fast_as_its_base() -> None:
    @dataclasses.dataclass(frozen=True, eq=False)
    class Named(masks.SlidingWindow):
        name: int = 0

        def __str__(self) -> str:
            return f"window {self.name}"

    class Gentle(biases.Softcap):
        """One of another name."""

    call = AttentionCall.checked(*_operands(), mask=Named(5, 1), bias=Gentle(3.0))
    assert not cpu.unsupported(call)
    torch.testing.assert_close(cpu.run(call)[0], reference.run(call)[0])


def test_heads_of_one_with_numbers_of_its_own_are_not_cut() -> None:
    call = AttentionCall.checked(*_operands(), bias=Negated(torch.randn(8, 4), max_distance=20))
    with pytest.raises(Indivisible, match="a Negated cannot be cut"):
        heads_of(call, slice(0, 1))
