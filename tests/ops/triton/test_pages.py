"""The kernel of a few queries reads pages where they lie: in the interpreter, against the reference
in float64 and against the same keys and values gathered."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import zeta
from tests.caches import stored as cases
from tests.caches.stored import BATCH, HEAD_DIM, HEADS, features, filled, is_read
from tests.caches.test_stored import BOTH, learned, options
from tests.ops.bound import assert_within_bound
from zeta import biases, masks
from zeta.caches import Cached, PagedCache, PagePool
from zeta.nn import MultiheadAttention, RotaryEmbedding
from zeta.ops import backends

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
    ),
    # Of numpy: the interpreter makes scalars of arrays, and exponentials of infinities.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
PAGES = ("pages", "ragged pages")


def attend(backend: str, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> dict[str, Any]:
    out, lse = zeta.attention_with_lse(query, key, value, backend=backend, **call)
    return {"out": out, "lse": lse}


def assert_read_in_place(query: Tensor, cached: Cached, **call: Any) -> None:
    """It is right, as right as over tensors, and nobody has looked at the keys and values."""
    explained = zeta.explain(query, cached.key, cached.value, backend="triton", **call)
    assert (explained.backend, explained.gathered) == ("triton", ())
    actual = attend("triton", query, cached.key, cached.value, **call)
    assert not is_read(cached)
    key, value = features(cached.key), features(cached.value)
    oracle = attend("reference", query.double(), key, value, **call)
    key, value = key.to(query.dtype), value.to(query.dtype)
    assert_within_bound(actual, attend("reference", query, key, value, **call), oracle)
    gathered = attend("triton", query, key, value, **call)
    for name, found in actual.items():
        torch.testing.assert_close(found, gathered[name])


@pytest.mark.parametrize(("mask", "bias"), BOTH)
@pytest.mark.parametrize("kind", PAGES)
def test_every_mask_and_bias(kind: str, mask: str, bias: str) -> None:
    cached = filled(kind, torch.float32).update(*cases.new_tokens(1, torch.float32))
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    assert_read_in_place(query, cached, **options(mask, bias, cached))


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_several_queries_in_half_precision(kind: str, mask: str) -> None:
    cached = filled(kind, torch.float16).update(*cases.new_tokens(5, torch.float16))
    query = torch.randn(BATCH, HEADS, 5, HEAD_DIM).half()
    assert_read_in_place(query, cached, **options(mask, "alibi", cached))


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("change", [{"dropout_p": 0.3, "seed": 5}, {"sinks": learned(HEADS)}])
def test_dropout_and_sinks(kind: str, change: dict[str, Any]) -> None:
    cached = filled(kind, torch.float32).update(*cases.new_tokens(2, torch.float32))
    query = torch.randn(BATCH, HEADS, 2, HEAD_DIM)
    assert_read_in_place(query, cached, **options("causal", "none", cached), **change)


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("page_size", [1, 16, 40])
def test_short_sequences_and_other_pages(length: int, page_size: int) -> None:
    cache = cases.new_cache("pages", torch.float32, page_size=page_size)
    lengths = torch.tensor([length, max(1, length // 2), 0])
    padding = torch.arange(length) >= lengths[:, None]
    cache.update(*cases.new_tokens(length, torch.float32), padding)
    cached = cache.update(*cases.new_tokens(1, torch.float32))
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    for mask in ("none", "causal"):
        assert_read_in_place(query, cached, **options(mask, "none", cached))


@pytest.mark.parametrize("ends", [(0, 302), (7, 60), (13, 302), (300, 302)], ids=str)
@pytest.mark.parametrize(("mask", "bias"), [("none", "dense"), ("causal", "t5")])
def test_some_of_the_tokens(mask: str, bias: str, ends: tuple[int, int]) -> None:
    whole = filled("pages", torch.float32).update(*cases.new_tokens(2, torch.float32))
    keys = slice(*ends)
    cached = whole._replace(key=whole.key[:, :, keys], value=whole.value[:, :, keys])
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    assert_read_in_place(query, cached, **options(mask, bias, cached))
    assert not is_read(whole)


def test_what_is_hidden_may_be_nan() -> None:
    cache = cases.on_used_pages()
    for mask in ("none", "window"):
        cached = cache.update(*cases.new_tokens(1, torch.float32))
        query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
        assert_read_in_place(query, cached, **options(mask, "none", cached))


def test_what_was_written_over_is_not_read() -> None:
    cache = filled("pages", torch.float32, length=30)
    cached = cache.update(*cases.new_tokens(1, torch.float32))
    cache.crop(20)
    cache.update(*cases.new_tokens(3, torch.float32))
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    with pytest.raises(RuntimeError, match="were not looked at before, and cannot be now"):
        zeta.attention(query, cached.key, cached.value, backend="triton")


@pytest.mark.parametrize(
    ("kind", "queries", "change", "words"),
    [
        ("codes", 1, {}, "it reads no codes"),
        ("pages", 65, {"mask": masks.Causal()}, "up to 128 queries of a key head; got 130"),
        ("pages", 1, {"bias": biases.Alibi(torch.ones(4).requires_grad_())}, "no gradient"),
    ],
)
def test_everything_else_is_gathered(
    kind: str, queries: int, change: dict[str, Any], words: str
) -> None:
    cached = filled(kind, torch.float32, length=40).update(
        *cases.new_tokens(queries, torch.float32)
    )
    query = torch.randn(BATCH, HEADS, queries, HEAD_DIM)
    call = {"backend": "triton"} | change
    explained = zeta.explain(query, cached.key, cached.value, **call)
    assert explained.backend == "triton"
    assert any(words in reason for reason in explained.gathered), explained
    found = zeta.attention(query, cached.key, cached.value, **call)
    assert is_read(cached)
    torch.testing.assert_close(
        found, zeta.attention(query, cached.key, cached.value, **change, backend="reference")
    )


def test_on_the_cpu_it_is_asked_by_name_only() -> None:
    cached = filled("pages", torch.float64).update(*cases.new_tokens(1, torch.float64))
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM, dtype=torch.float64)
    explained = zeta.explain(query, cached.key, cached.value)
    assert explained.backend != "triton"
    assert not any("interpreter" in reason for reason in explained.gathered)


@pytest.mark.parametrize("window", [None, 9])
def test_a_module_decodes(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where it is the first that is asked: no page is gathered."""
    attention = MultiheadAttention(
        None, 32, 4, self_attention=True, num_kv_heads=2, position=RotaryEmbedding(8), window=window
    ).eval()
    x = torch.randn(2, 30, 32)
    expected, _ = attention(x, x, x, is_causal=True)
    lengths = torch.tensor([20, 13])
    cache = PagedCache(PagePool(20, 4, num_kv_heads=2, head_dim=8))

    def fail(*arguments: Any, **named: Any) -> None:
        raise AssertionError("gathered")

    with torch.no_grad():
        prompt, padding = x[:, :20], torch.arange(20) >= lengths[:, None]
        attention(prompt, prompt, prompt, cache, padding, is_causal=True, need_weights=False)
        monkeypatch.setattr(backends, "order", lambda call: backends.ORDER)
        monkeypatch.setattr(PagePool, "read", fail)
        for step in range(3):
            at = torch.arange(2), lengths + step
            token = x[at][:, None]
            out, _ = attention(token, token, token, cache, is_causal=True, need_weights=False)
            torch.testing.assert_close(out[:, 0], expected[at])


def test_wrong_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = filled("pages", torch.float32).update(*cases.new_tokens(1, torch.float32))
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    monkeypatch.setitem(globals(), "features", lambda tensor: cases.features(tensor) * (1 + 1e-5))
    with pytest.raises(AssertionError, match=r"error .* exceeds"):
        assert_read_in_place(query, cached)
