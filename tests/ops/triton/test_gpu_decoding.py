"""Decoding on a GPU: pages are read where they lie, and a step of a module is one CUDA graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zeta
from tests.caches import stored as cases
from tests.caches.stored import BATCH, HEAD_DIM, HEADS, features, filled, is_read
from tests.ops.bound import assert_within_bound
from zeta import biases, masks
from zeta.caches import Cached, PagedCache, PagePool, StaticCache
from zeta.nn import MultiheadAttention, RelativePositionBias, RotaryEmbedding

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "causal": lambda: {"mask": masks.Causal()},
    "window": lambda: {"mask": masks.SlidingWindow(700)},
    "padding": lambda: {"mask": masks.Padding(torch.tensor([3001, 50, 0]))},
    "alibi": lambda: {"mask": masks.Causal(), "bias": biases.Alibi(torch.rand(HEADS))},
    "t5": lambda: {
        "mask": masks.SlidingWindow(300),
        "bias": biases.Bucketed(torch.randn(8, HEADS), bidirectional=False),
    },
}


def _attended(backend: str, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Any:
    out, lse = zeta.attention_with_lse(query, key, value, backend=backend, **call)
    return {"out": out, "lse": lse}


def _positions(cached: Cached) -> dict[str, Tensor | None]:
    return {"query_positions": cached.query_positions, "key_positions": cached.positions}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("added", [1, 7])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["pages", "ragged pages"])
def test_pages_are_read_where_they_lie(
    kind: str, call: str, added: int, dtype: torch.dtype
) -> None:
    cache = filled(kind, dtype, length=3000, device="cuda")
    cached = cache.update(*cases.new_tokens(added, dtype, "cuda"))
    query = torch.randn(BATCH, HEADS, added, HEAD_DIM).to("cuda", dtype)
    with torch.device("cuda"):
        arguments = CALLS[call]() | _positions(cached)
    explained = zeta.explain(query, cached.key, cached.value, **arguments)
    assert (explained.backend, explained.gathered) == ("triton", ())
    actual = _attended("auto", query, cached.key, cached.value, **arguments)
    assert not is_read(cached)
    key, value = features(cached.key), features(cached.value)
    oracle = _attended("reference", query.double(), key, value, **arguments)
    low = _attended("reference", query, key.to(dtype), value.to(dtype), **arguments)
    assert_within_bound(actual, low, oracle)


def test_pages_beyond_31_bits() -> None:
    pool = PagePool(9000, 128, num_kv_heads=8, head_dim=256, dtype=torch.bfloat16, device="cuda")
    tokens = torch.randn(1, 8, 128, 256, dtype=torch.bfloat16, device="cuda")
    assert min(pool.take(8300)[-1:]) * 128 * 8 * 256 > 2**31
    cache = PagedCache(pool)
    for _ in range(4):
        cached = cache.update(tokens, tokens)
    query = torch.randn(1, 16, 1, 256, dtype=torch.bfloat16, device="cuda")
    found = zeta.attention(query, cached.key, cached.value)
    assert not is_read(cached)
    expected = zeta.attention(query, cached.key, cached.value, backend="reference")
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("window", [None, 200])
def test_a_module_decodes_from_pages(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = MultiheadAttention(
        None, 256, 4, self_attention=True, num_kv_heads=2, position=RotaryEmbedding(64),
        window=window, device="cuda",
    ).eval()  # fmt: skip
    x = torch.randn(2, 520, 256, device="cuda")
    lengths = torch.tensor([500, 130], device="cuda")
    cache = PagedCache(PagePool(100, 16, num_kv_heads=2, head_dim=64, device="cuda"))

    def fail(*arguments: Any, **named: Any) -> None:
        raise AssertionError("gathered")

    with torch.no_grad():
        expected, _ = attention(x, x, x, is_causal=True)
        padding = torch.arange(500, device="cuda") >= lengths[:, None]
        prompt = x[:, :500]
        attention(prompt, prompt, prompt, cache, padding, is_causal=True, need_weights=False)
        monkeypatch.setattr(PagePool, "read", fail)
        for step in range(20):
            at = torch.arange(2, device="cuda"), lengths + step
            token = x[at][:, None]
            out, _ = attention(token, token, token, cache, is_causal=True, need_weights=False)
            torch.testing.assert_close(out[:, 0], expected[at], atol=1e-4, rtol=1e-4)


def test_codes_are_gathered_and_explain_says_so() -> None:
    cached = filled("codes", torch.bfloat16, device="cuda").update(
        *cases.new_tokens(1, torch.bfloat16, "cuda")
    )
    query = torch.randn(BATCH, HEADS, 1, HEAD_DIM).to("cuda", torch.bfloat16)
    explained = zeta.explain(query, cached.key, cached.value)
    assert explained.gathered == ("it reads no codes",)
    found = zeta.attention(query, cached.key, cached.value)
    assert is_read(cached)
    plain = cached.key.clone(), cached.value.clone()
    assert torch.equal(found, zeta.attention(query, *plain))


CHARACTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rotary": ({}, {"position": RotaryEmbedding(64, interleaved=False)}),
    "rotary in part, window": ({}, {"position": RotaryEmbedding(64, rotary_dim=32), "window": 9}),
    "xpos": ({"xpos_rel_pos": True}, {}),
    "no position": ({}, {}),
}


def _recorded(attention: MultiheadAttention, cache: StaticCache, x: Tensor, **call: Any) -> Any:
    """A graph of one step, which reads its token from ``x``; and where it writes."""
    graph = torch.cuda.CUDAGraph()
    # Not before it is recorded does a step look like this: its kernels are loaded meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        out, _ = attention(x, x, x, cache, is_causal=True, need_weights=False, **call)
    return graph, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "t5"])
@pytest.mark.parametrize("character", CHARACTERS)
def test_a_step_of_a_module_is_one_cuda_graph(
    character: str, with_bias: bool, dtype: torch.dtype
) -> None:
    args, options = CHARACTERS[character]
    attention = MultiheadAttention(
        args, 512, 8, self_attention=True, num_kv_heads=2, device="cuda", dtype=dtype, **options
    ).eval()
    bias = RelativePositionBias(bidirectional=False, n_heads=8, device="cuda")
    call = {"rel_pos": bias} if with_bias else {}
    steps, length = 40, 300
    tokens = torch.randn(2, steps, 512, device="cuda", dtype=dtype)
    x = torch.zeros_like(tokens[:, :1])
    full, cache = StaticCache(length), StaticCache(length)
    cache.allocate(2, 2, 64, dtype=dtype, device="cuda")
    with torch.no_grad():
        attention(x, x, x, cache, is_causal=True, need_weights=False, **call)
        cache.reset()
        graph, out = _recorded(attention, cache, x, **call)
        cache.reset()
        for step in range(steps):
            token = tokens[:, step : step + 1]
            x.copy_(token)
            graph.replay()
            expected, _ = attention(
                token, token, token, full, is_causal=True, need_weights=False, **call
            )
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    assert cache.length == full.length == steps
