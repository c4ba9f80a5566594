"""Pages and codes are read where they lie, and nothing is gathered; or everything is, as before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zeta
from tests.caches import stored as cases
from tests.caches.stored import BATCH, HEAD_DIM, HEADS, KINDS, features, filled, is_read
from tests.ops.bound import assert_within_bound
from tests.ops.cpu import units
from zeta import biases, masks
from zeta.caches import Cached, DynamicCache, PagedCache, QuantizedCache, quantized
from zeta.caches.pool import PagePool
from zeta.ops.backends.cpu import library
from zeta.stored import StoredTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
native = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no native kernels: {library.obstacle()}"
)


def inside(cached: Cached) -> Tensor:
    """Which keys are not hidden, ``(B, 1, 1, L)``: not the first of them, and a third at random."""
    length = cached.key.shape[2]
    generator = torch.Generator().manual_seed(length)
    kept = torch.rand(BATCH, 1, 1, length, generator=generator) > 0.3
    kept[..., 0] = False
    return kept


def learned(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


MASKS: dict[str, Callable[[Cached], masks.Mask | None]] = {
    "none": lambda cached: None,
    "causal": lambda cached: masks.Causal(),
    "window": lambda cached: masks.SlidingWindow(20),
    "inside": lambda cached: masks.keep(inside(cached)),
    "inside and causal": lambda cached: masks.keep(inside(cached)) & masks.Causal(),
    "padding": lambda cached: masks.Padding(torch.tensor([301, 50, 0])),
    "prefix": lambda cached: masks.PrefixLM(torch.tensor([3, 301, 100])),
    "documents": lambda cached: masks.Documents(
        torch.arange(cached.key.shape[2]).expand(BATCH, -1) // 64
    ),
}
BIASES: dict[str, Callable[[Cached], biases.Bias | None]] = {
    "none": lambda cached: None,
    "alibi": lambda cached: biases.Alibi(learned(HEADS).abs()),
    "t5": lambda cached: biases.Bucketed(learned(8, HEADS), bidirectional=False),
    "cap first": lambda cached: biases.Softcap(2.0) + biases.Alibi(learned(HEADS).abs()),
    "cap last": lambda cached: biases.Alibi(learned(HEADS).abs()) + biases.Softcap(2.0),
    "dense": lambda cached: biases.Dense(learned(1, HEADS, 1, cached.key.shape[2])),
}
BOTH = [(mask, "none") for mask in MASKS] + [("causal", bias) for bias in BIASES if bias != "none"]
BOTH += [("window", "t5"), ("inside", "dense"), ("none", "cap last")]


def options(mask: str, bias: str, cached: Cached) -> dict[str, Any]:
    return {
        "mask": MASKS[mask](cached),
        "bias": BIASES[bias](cached),
        "query_positions": cached.query_positions,
        "key_positions": cached.positions,
    }


def attend(backend: str, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> dict[str, Any]:
    out, lse = zeta.attention_with_lse(query, key, value, backend=backend, **call)
    return {"out": out, "lse": lse}


def assert_read_in_place(query: Tensor, cached: Cached, **call: Any) -> None:
    """It is right, and nobody has looked at the keys and values as tensors."""
    actual = attend("auto", query, cached.key, cached.value, **call)
    assert not is_read(cached)
    key, value = features(cached.key), features(cached.value)
    oracle = attend("reference", query.double(), key, value, **call)
    low = attend("reference", query, key.to(query.dtype), value.to(query.dtype), **call)
    assert_within_bound(actual, low, oracle)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("added", [1, 3])
@pytest.mark.parametrize(("mask", "bias"), BOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_read_where_they_lie(
    kind: str, mask: str, bias: str, added: int, dtype: torch.dtype
) -> None:
    cache = filled(kind, dtype)
    cached = cache.update(*cases.new_tokens(added, dtype))
    query = torch.randn(BATCH, HEADS, added, HEAD_DIM).to(dtype)
    assert_read_in_place(query, cached, **options(mask, bias, cached))


@native
@pytest.mark.parametrize(("name", "dtype"), units.FEW_ROWS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set(
    kind: str, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    units.use(name, monkeypatch)
    cached = filled(kind, dtype).update(*cases.new_tokens(2, dtype))
    query = torch.randn(BATCH, HEADS, 2, HEAD_DIM).to(dtype)
    assert_read_in_place(query, cached, **options("window", "t5", cached))


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("change", [{"dropout_p": 0.3, "seed": 5}, {"sinks": learned(HEADS)}])
def test_dropout_and_sinks(kind: str, mask: str, change: dict[str, Any]) -> None:
    cached = filled(kind, torch.float32).update(*cases.new_tokens(2, torch.float32))
    query = torch.randn(BATCH, HEADS, 2, HEAD_DIM)
    assert_read_in_place(query, cached, **options(mask, "none", cached), **change)


@native
@pytest.mark.parametrize("kind", KINDS)
def test_queries_whose_features_lie_apart(kind: str) -> None:
    cached = filled(kind, torch.float32).update(*cases.new_tokens(3, torch.float32))
    query = torch.randn(BATCH, HEADS, HEAD_DIM, 3).mT
    assert_read_in_place(query, cached, **options("causal", "none", cached))


@native
@pytest.mark.parametrize("ends", [(0, 302), (7, 60), (10, 200), (13, 302), (300, 302)], ids=str)
@pytest.mark.parametrize(
    ("mask", "bias"),
    [
        ("none", "none"), ("none", "dense"), ("causal", "t5"), ("inside", "alibi"),
        ("documents", "none"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pages", "codes"])
def test_some_of_the_tokens_are_read_where_they_lie(
    kind: str, mask: str, bias: str, ends: tuple[int, int]
) -> None:
    whole = filled(kind, torch.float32).update(*cases.new_tokens(2, torch.float32))
    keys = slice(*ends)
    cached = whole._replace(key=whole.key[:, :, keys], value=whole.value[:, :, keys])
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    assert_read_in_place(query, cached, **options(mask, bias, cached))
    positions = {
        "query_positions": torch.tensor([301]),
        "key_positions": torch.arange(302)[keys],
    }
    assert_read_in_place(query, cached, **options("none", bias, cached) | positions)
    assert not is_read(whole)
    assert torch.equal(cached.key, whole.key.clone()[:, :, keys])


@native
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_gathered_for_a_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("gathered")

    cache = filled(kind, torch.float32)
    monkeypatch.setattr(PagePool, "read", fail)
    monkeypatch.setattr(quantized, "dequantize", fail)
    cached = cache.update(*cases.new_tokens(1, torch.float32))
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    call = options("causal", "alibi", cached)
    with torch.inference_mode():
        zeta.attention(query, cached.key, cached.value, **call)
    explained = zeta.explain(query, cached.key, cached.value, **call)
    assert (explained.backend, explained.gathered) == ("cpu", ())
    with pytest.raises(AssertionError, match="gathered"):
        cached.key.sum()


@native
def test_what_is_hidden_may_be_nan() -> None:
    cache = cases.on_used_pages()
    for mask in ("none", "window"):
        cached = cache.update(*cases.new_tokens(1, torch.float32))
        query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
        assert_read_in_place(query, cached, **options(mask, "none", cached))


@native
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("kind", ["pages", "codes"])
def test_a_default_dtype_or_device_changes_nothing(kind: str, first: int) -> None:
    cached = filled(kind, torch.float32)
    cached = cached.update(*cases.new_tokens(1, torch.float32))
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    key, value = cached.key[:, :, first:], cached.value[:, :, first:]
    expected = zeta.attention(query, key, value)
    torch.set_default_dtype(torch.float64)
    try:
        found = zeta.attention(query, key, value)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    with torch.device("meta"):
        assert torch.equal(zeta.attention(query, key, value), expected)


class Late(biases.Bias):
    """A bias that no kernel knows."""

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return 1, 1, 1, 1

    def apply(self, scores: Tensor, tile: Any) -> Tensor:
        return scores + 1.0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another backend": ({"backend": "chunked"}, "the backend 'chunked' reads tensors only"),
    "a bias of one's own": ({"bias": Late()}, "it cannot apply the bias Late"),
    "a learned bias": ({"bias": biases.Alibi(torch.ones(4).requires_grad_())}, "no gradient"),
}


@native
@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_else_is_gathered(kind: str, reason: str) -> None:
    change, words = REFUSED[reason]
    cached = filled(kind, torch.float32).update(*cases.new_tokens(1, torch.float32))
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    call = options("none", "none", cached) | change
    explained = zeta.explain(query, cached.key, cached.value, **call)
    assert any(words in found for found in explained.gathered), explained
    assert f"keys and values are gathered first: {explained.gathered[0]}" in str(explained)
    assert not is_read(cached)
    out = zeta.attention(query, cached.key, cached.value, **call)
    assert is_read(cached)
    assert torch.equal(out, zeta.attention(query, cached.key.clone(), cached.value.clone(), **call))


@native
@pytest.mark.parametrize("kind", KINDS)
def test_many_queries_and_gradients_take_tensors(kind: str) -> None:
    cached = filled(kind, torch.float32).update(*cases.new_tokens(9, torch.float32))
    query = torch.randn(BATCH, HEADS, 9, HEAD_DIM)
    call = options("causal", "none", cached)
    explained = zeta.explain(query, cached.key, cached.value, **call)
    assert explained.gathered == ("it takes up to 16 queries of a key head; got 18",)
    query = query[:, :, :1].requires_grad_()
    call["query_positions"] = (
        None if cached.query_positions is None else call["query_positions"][:, :1]
    )
    zeta.attention(query, cached.key, cached.value, **call).sum().backward()
    assert is_read(cached)
    found, query.grad = query.grad, None
    zeta.attention(query, cached.key.clone(), cached.value.clone(), **call).sum().backward()
    assert torch.equal(found, query.grad)


@native
def test_lengths_that_a_call_does_not_tell_are_0() -> None:
    """Without the key positions of the cache, what a shorter sequence has not is a key of zeros."""
    cached = filled("ragged pages", torch.float32).update(*cases.new_tokens(1, torch.float32))
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    found = zeta.attention(query, cached.key, cached.value)
    expected = zeta.attention(query, features(cached.key).float(), features(cached.value).float())
    torch.testing.assert_close(found, expected)


@native
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_and_compilers_take_tensors(kind: str) -> None:
    cached = filled(kind, torch.float32).update(*cases.new_tokens(1, torch.float32))
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    call = options("none", "alibi", cached)
    plain = cached.key.clone(), cached.value.clone()
    fresh = filled(kind, torch.float32).update(*cases.new_tokens(1, torch.float32))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return zeta.attention(query, key, value, **call)

    gradient = torch.func.grad(lambda q: attention(q, cached.key, cached.value).sum())(query)
    expected = torch.func.grad(lambda q: attention(q, *plain).sum())(query)
    assert torch.equal(gradient, expected)
    if kind != "codes":
        return
    compiled = torch.compile(attention, backend="eager")
    with torch.no_grad():
        found = compiled(query, fresh.key, fresh.value)
        torch.testing.assert_close(found, attention(query, fresh.key.clone(), fresh.value.clone()))
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_modes_that_see_each_operator_take_tensors(kind: str) -> None:
    cache = filled(kind, torch.float32)
    with FlopCounterMode(display=False):
        cached = cache.update(*cases.new_tokens(1, torch.float32))
    assert type(cached.key) is type(cached.value) is Tensor


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_tensors_to_everybody(kind: str) -> None:
    cached = filled(kind, torch.bfloat16).update(*cases.new_tokens(2, torch.bfloat16))
    for tensor in (cached.key, cached.value):
        assert isinstance(tensor, StoredTensor)
        expected = features(tensor).to(torch.bfloat16)
        assert tensor.shape == expected.shape
        assert torch.equal(tensor[1:], expected[1:])
        assert tensor.plain().stride() == tensor.stride()
        assert torch.equal(tensor.detach() + 1, expected + 1)
        assert tensor[:, :, ::2].tolist() == expected[:, :, ::2].tolist()
        assert type(tensor * 2) is Tensor


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_over_is_not_read(kind: str) -> None:
    cache = filled(kind, torch.float32, length=30)
    seen = cache.update(*cases.new_tokens(1, torch.float32))
    seen.key.sum()
    expected = seen.key.clone()
    unseen = cache.update(*cases.new_tokens(1, torch.float32))
    cache.update(*cases.new_tokens(1, torch.float32))
    assert unseen.value.shape[2] == 32
    unseen.value.sum()  # What comes behind changes nothing.
    unseen = cache.update(*cases.new_tokens(1, torch.float32))
    cache.crop(cache.length)
    unseen.value.sum()  # Nor does it to forget nothing.
    cache.crop(20)
    cache.update(*cases.new_tokens(3, torch.float32))
    assert torch.equal(seen.key, expected)
    with pytest.raises(RuntimeError, match="were not looked at before, and cannot be now"):
        unseen.key.sum()
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    with pytest.raises(RuntimeError, match="were not looked at before, and cannot be now"):
        zeta.attention(query, unseen.key, unseen.key)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_taken_back_and_written_over_is_not_read(kind: str) -> None:
    cache = filled(kind, torch.float32, length=30)
    unseen = cache.update(*cases.new_tokens(2, torch.float32))
    cache.take_back()
    cache.update(*cases.new_tokens(2, torch.float32))
    with pytest.raises(RuntimeError, match="were not looked at before, and cannot be now"):
        unseen.key.sum()


def test_pages_that_went_to_others_are_not_read() -> None:
    pool = PagePool(12, 7, num_kv_heads=2, head_dim=HEAD_DIM, value_dim=cases.VALUE_DIM)
    first, second = PagedCache(pool), PagedCache(pool)
    begun = first.update(*cases.new_tokens(10, torch.float32))
    second.update(*cases.new_tokens(1, torch.float32))
    begun.key.sum()  # Others have taken other pages.
    beams = first.update(*cases.new_tokens(1, torch.float32))
    first.reorder(torch.tensor([1, 1, 0]))
    kept = beams.key.clone()
    assert torch.equal(kept, features(beams.key).float())
    one = first.update(*cases.new_tokens(1, torch.float32))
    other = first.update(*cases.new_tokens(1, torch.float32))
    first.crop(7)
    one.value.sum()  # Nobody writes to pages that are full.
    first.reset()
    one.key.sum()  # Nor has anybody taken them yet.
    second.update(*cases.new_tokens(20, torch.float32))
    with pytest.raises(RuntimeError, match="may be another's"):
        other.key.sum()


@native
def test_wrong_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = filled("codes", torch.float32).update(*cases.new_tokens(1, torch.float32))
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    assert_read_in_place(query, cached)
    monkeypatch.setitem(globals(), "features", lambda tensor: cases.features(tensor) * (1 + 1e-5))
    with pytest.raises(AssertionError, match=r"error .* exceeds"):
        assert_read_in_place(query, cached)


def test_other_caches_give_plain_tensors() -> None:
    cached = DynamicCache().update(*cases.new_tokens(3, torch.float32))
    assert type(cached.key) is Tensor
    cached = QuantizedCache(4).update(*cases.new_tokens(3, torch.float32))
    assert type(cached.key) is Tensor
