"""Few queries over many keys, in every width, number of rows and hole among the keys."""

import pytest
import torch
from torch import Tensor

from tests.ops.bound import assert_within_bound
from tests.ops.cpu import units
from zeta import attention_with_lse, masks
from zeta.ops.backends.cpu import library

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle()))

KEY_HEADS = 2
ROWS = [(1, 1), (1, 2), (3, 1), (1, 4), (5, 1), (2, 4), (4, 4)]
"""Queries, and query heads of a key head: up to 16 that go together."""
WIDTHS = [(16, 16), (40, 24), (64, 64), (72, 200), (128, 96), (256, 256), (5, 3)]
"""Features of keys, and of values."""


def results(
    operands: tuple[Tensor, ...], mask: masks.Mask | None, backend: str
) -> dict[str, Tensor]:
    out, lse = attention_with_lse(*operands, mask=mask, backend=backend)
    return {"out": out, "lse": lse}


def check(operands: tuple[Tensor, ...], mask: masks.Mask | None) -> None:
    """Against the reference in the same dtype and in float64."""
    torch.use_deterministic_algorithms(True)  # What is allocated is full of NaN.
    try:
        actual = results(operands, mask, "cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    low = results(operands, mask, "reference")
    oracle = results(tuple(tensor.double() for tensor in operands), mask, "reference")
    assert_within_bound(actual, low, oracle)


def random(
    rows: tuple[int, int], widths: tuple[int, int], source: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    (target, group), (head_dim, value_dim) = rows, widths
    shapes = (
        (2, KEY_HEADS * group, target, head_dim),
        (2, KEY_HEADS, source, head_dim),
        (2, KEY_HEADS, source, value_dim),
    )
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


@pytest.mark.usefixtures("unit")
@units.on_each(units.FEW_ROWS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_and_widths(
    rows: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype
) -> None:
    for source in (1, 2, 37, 300):
        if source >= rows[0]:
            check(random(rows, widths, source, dtype), None)


@pytest.mark.usefixtures("unit")
@units.on_each(units.FEW_ROWS, torch.float32, torch.bfloat16)
@pytest.mark.parametrize("of_heads", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (2, 4)], ids=str)
def test_keys_that_are_hidden_are_not_even_read(
    rows: tuple[int, int], of_heads: bool, dtype: torch.dtype
) -> None:
    query, key, value = random(rows, (64, 64), 45, dtype)
    # Holes that begin and end at odd and at even keys, single keys between them, a hidden last one.
    keep = torch.ones(2, 45, dtype=torch.bool)
    keep[:, [0, 3, 5, 8, 9, 10, 17, 44]] = False
    keep[1, 21:38] = False
    for tensor in (key, value):
        tensor.transpose(1, 2)[~keep] = float("nan")
    mask = masks.keep(keep[:, None, None].repeat(1, query.shape[1] if of_heads else 1, 1, 1))
    actual = results((query, key, value), mask, "cpu")
    clean = tuple(torch.where(tensor.isnan(), 7.0, tensor) for tensor in (query, key, value))
    assert not actual["out"].isnan().any()
    expected = results(clean, mask, "cpu")["out"]
    if of_heads:  # Such keys are read, unless that shows.
        torch.testing.assert_close(actual["out"], expected)
    else:
        assert torch.equal(actual["out"], expected)
    check(clean, mask)
