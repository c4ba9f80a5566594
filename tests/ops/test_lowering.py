"""Masks and biases taken apart: T5's offset vectors by buckets that are found once."""

import dataclasses
import functools
import operator

import pytest
import torch

from zeta import attention, biases, masks
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import lower
from zeta.ops.offsets import _buckets


def lowered(table: torch.Tensor, length: int, **options: object) -> torch.Tensor:
    query = torch.zeros(1, table.shape[1], length, 8, device="cpu")
    bias = biases.Bucketed(table, **options)  # type: ignore[arg-type]
    found = lower(AttentionCall.checked(query, query, query, bias=bias)).offsets
    assert found is not None
    return found


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", [1, 5, 40, 41, 90])
def test_the_vector_of_a_t5_bias(length: int, bidirectional: bool) -> None:
    table = torch.randn(16, 2)
    bias = biases.Bucketed(table, bidirectional=bidirectional, max_distance=40)
    expected = bias.offset_vector(bias.reach(length))
    found = lowered(table, length, bidirectional=bidirectional, max_distance=40)
    assert torch.equal(found, expected)


def test_the_vector_of_two_t5_biases_that_reach_differently_far() -> None:
    near, far = torch.randn(8, 2), torch.randn(32, 2)
    query = torch.randn(1, 2, 150, 8)
    bias = biases.Bucketed(near, max_distance=10) + biases.Bucketed(far, max_distance=100)
    found = attention(query, query, query, bias=bias, backend="cpu")
    torch.testing.assert_close(
        found, attention(query, query, query, bias=bias, backend="reference")
    )


class Doubled(biases.Bucketed):
    """One that a user made."""

    def at(self, offset: torch.Tensor) -> torch.Tensor:
        return 2 * super().at(offset)


def test_a_bias_made_of_t5s_is_asked_for_its_numbers() -> None:
    query, table = torch.randn(1, 2, 30, 8), torch.randn(16, 2)
    for backend in ("auto", "cpu", "chunked"):
        found = attention(query, query, query, bias=Doubled(table), backend=backend)
        expected = attention(query, query, query, bias=biases.Bucketed(2 * table))
        torch.testing.assert_close(found, expected)


def test_buckets_of_a_reach_without_end_are_not_kept() -> None:
    before = _buckets.cache_info().misses
    lowered(torch.randn(16, 2), 4, max_distance=2**40)
    assert _buckets.cache_info().misses == before


def test_buckets_found_in_inference_mode_serve_a_gradient() -> None:
    # Of a number of buckets that no other test uses: they are found here.
    table = torch.randn(22, 2)
    with torch.inference_mode():
        lowered(table, 30, max_distance=77)
    learned = table.clone().requires_grad_()
    lowered(learned, 30, max_distance=77).sum().backward()
    assert learned.grad is not None
    assert learned.grad.sum() == 2 * 61


def test_under_a_default_device_they_are_found_on_the_cpu() -> None:
    table = torch.randn(26, 2)
    with torch.device("meta"):
        found = lowered(table, 9, max_distance=31)
    assert torch.equal(found, lowered(table, 9, max_distance=31))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_a_query_before_the_first_key_is_of_no_document(dtype: torch.dtype) -> None:
    least = torch.iinfo(dtype).min + (dtype == torch.int64)
    mask = masks.Documents(torch.tensor([[least, least, 1, 1]], dtype=dtype))
    query, key = torch.zeros(1, 2, 4, 8), torch.randn(1, 2, 2, 8)
    for positions in ({}, {"query_positions": torch.arange(-2, 2)}):
        found = attention(query, key, key, mask=mask, backend="cpu", **positions)
        assert not found[:, :, :2].any()
        torch.testing.assert_close(found[:, :, 2:], key.mean(2, keepdim=True).expand(1, 2, 2, 8))


IDS = torch.tensor([-(2**62), -1, 0, 2**31, 2**33, 2**62])
"""Of documents, so far from each other that no two of them fit into one number."""


@pytest.mark.parametrize("compiled", [False, True])
def test_documents_of_documents_have_any_ids_and_lengths(compiled: bool) -> None:
    drawn = [IDS[torch.randint(0, 6, (2, length))] for length in (9, 12, 9)]
    mask = masks.Documents(drawn[0]) & masks.Documents(drawn[1]) & masks.Documents(drawn[2] % 2)
    query, key = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 7, 8)

    def attend(query: torch.Tensor) -> torch.Tensor:
        return attention(query, key, key, mask=mask, backend="cpu")

    expected = attention(query, key, key, mask=mask, backend="reference")
    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    torch.testing.assert_close(run(query), expected)


def test_documents_that_differ_in_both_ids_are_two() -> None:
    mask = masks.Documents(torch.tensor([[0, 1, 1]])) & masks.Documents(torch.tensor([[1, 0, 0]]))
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 3, 8)
    found = attention(query, key, key, mask=mask, backend="cpu")
    torch.testing.assert_close(found, attention(query, key[:, :, 1:], key[:, :, 1:]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dense_biases_that_half_precision_cannot_add(dtype: torch.dtype, compiled: bool) -> None:
    query, key = torch.randn(2, 4, 5, 8, dtype=dtype), torch.randn(2, 4, 6, 8, dtype=dtype)
    # Two numbers whose sum float16 cannot hold, and beside which bfloat16 keeps nothing else.
    least = torch.finfo(torch.float16).min
    shapes = (5, 6), (2, 1, 1, 6), (4, 5, 6)
    learned = [torch.full(shape, least, dtype=dtype) for shape in shapes[:2]]
    learned = [leaf.requires_grad_() for leaf in (*learned, torch.randn(shapes[2], dtype=dtype))]

    def attend(backend: str) -> torch.Tensor:
        first, *others = map(biases.Dense, learned)
        bias = functools.reduce(operator.add, others, first)
        return attention(query, key, key, bias=bias, backend=backend)

    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    found, expected = (
        (out, *torch.autograd.grad(out.float().square().sum(), learned))
        for out in (run("cpu"), attend("reference"))
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        # Such scores are a 128th apart in float32, and are rounded three times.
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1)


@dataclasses.dataclass(frozen=True, eq=False)
class Steps(biases.OffsetBias):
    """One without a tensor: its slopes are numbers."""

    size: int

    def reach(self, longest: int) -> int:
        return longest

    def at(self, offset: torch.Tensor) -> torch.Tensor:
        heads = torch.arange(2, device=offset.device)
        return -(offset.abs() // self.size).unsqueeze(-1) * (1.0 + heads)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_offset_bias_may_be_of_numbers_alone(compiled: bool) -> None:
    query = torch.randn(1, 2, 30, 8)
    expected = attention(query, query, query, bias=Steps(3), backend="reference")

    def attend(query: torch.Tensor, backend: str) -> torch.Tensor:
        return attention(query, query, query, bias=Steps(3), backend=backend)

    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    for backend in ("auto", "cpu", "chunked"):
        torch.testing.assert_close(run(query, backend), expected)
