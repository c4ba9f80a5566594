"""Decoding by the module over pages and codes: read where they lie, gathered, and in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.caches.stored import KEY_HEADS
from tests.ops.bound import assert_within_bound
from zeta.caches import DecodingCache, PagedCache, PagePool, QuantizedCache
from zeta.nn import ALiBi, MultiheadAttention, RelativePositionBias, RotaryEmbedding
from zeta.ops.backends.cpu import library, stored
from zeta.ops.weights import LazyWeights

EMBED, HEADS, HEAD_DIM, PROMPT = 32, 4, 8, 20
pytestmark = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no native kernels: {library.obstacle()}"
)

# What is done between updates of so many tokens. The prompt is too long to be read in place.
STEPS: list[Any] = [
    PROMPT, 1, 1, "fork", 3, 1, "rollback", 1, ("reorder", [1, 1, 0]), 1, 2, "fork", 2, "commit",
    ("select", [0, 2, 2, 1]), 1, ("crop", 17), 1, 4, ("select", [3, 0]), 1, 1,
]  # fmt: skip
NUM_SHORT = sum(isinstance(step, int) for step in STEPS) - 1

MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"position": RotaryEmbedding(HEAD_DIM)},
    "xpos": {"args": {"xpos_rel_pos": True}},
    "window": {"window": 6, "position": RotaryEmbedding(HEAD_DIM)},
    "multiway": {"args": {"multiway": True}, "qk_norm": "rms", "subln": True},
}
BIASES = {
    "none": None,
    "alibi": ALiBi(HEADS),
    "t5": RelativePositionBias(
        bidirectional=False, num_buckets=8, n_heads=HEADS, max_distance=12
    ).requires_grad_(False),
}
CASES = [(kind, "none") for kind in MODULES] + [
    ("plain", "alibi"),
    ("rope", "t5"),
    ("window", "t5"),
]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call that was given to the kernel, whether it took it."""
    found: list[bool] = []
    run = stored.run

    def counting(call: Any) -> Any:
        result = run(call)
        found.append(result is not None)
        return result

    monkeypatch.setattr(stored, "run", counting)
    return found


def module(kind: str, **options: Any) -> MultiheadAttention:
    args = {"args": None, "num_kv_heads": KEY_HEADS, "self_attention": True} | MODULES[kind]
    args |= {"embed_dim": EMBED, "num_heads": HEADS} | options
    return MultiheadAttention(**args).eval().requires_grad_(False)


def new_cache(kind: str, dtype: torch.dtype) -> DecodingCache:
    if kind == "codes":
        return QuantizedCache()
    pool = PagePool(90, 5, num_kv_heads=KEY_HEADS, head_dim=HEAD_DIM, dtype=dtype)
    return PagedCache(pool)


def decoded(attention: MultiheadAttention, cache: DecodingCache, **call: Any) -> Tensor:
    """The output of all steps after the prompt, one after the other."""
    generator = torch.Generator().manual_seed(7)
    dtype, lengths, batch = call.pop("dtype"), call.pop("lengths"), 3
    outs = []
    for step in STEPS:
        if isinstance(step, str):
            getattr(cache, step)()
        elif isinstance(step, tuple) and step[0] == "crop":
            cache.crop(step[1])
        elif isinstance(step, tuple):
            getattr(cache, step[0])(torch.tensor(step[1]))
            batch = len(step[1])
        else:
            x = torch.randn(batch, step, EMBED, generator=generator, dtype=torch.float64).to(dtype)
            padding = None
            if step == PROMPT and lengths is not None:
                padding = torch.arange(step) >= torch.tensor(lengths)[:, None]
            out, weights = attention(x, x, x, cache, padding, is_causal=True, **call)
            assert not isinstance(weights, LazyWeights) or not weights.materialized
            if step != PROMPT:
                outs.append(out.flatten(0, 1))
    return torch.cat(outs)


def gather_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "unreadable", lambda call: ["the test says so"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [None, (20, 7, 13)], ids=["even", "ragged"])
@pytest.mark.parametrize(("kind", "bias"), CASES)
def test_steps_over_pages(
    kind: str,
    bias: str,
    lengths: tuple[int, ...] | None,
    dtype: torch.dtype,
    counted: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention = module(kind).to(dtype)
    call = {"lengths": lengths, "rel_pos": BIASES[bias], "dtype": dtype}
    if kind == "multiway":
        call["split_position"] = 9
    with torch.no_grad():
        direct = decoded(attention, new_cache("pages", dtype), **call)
        assert counted == [True] * NUM_SHORT
        wide = call | {"dtype": torch.float64}
        cache = new_cache("pages", torch.float64)
        oracle = decoded(copy.deepcopy(attention).double(), cache, **wide)
        gather_all(monkeypatch)
        gathered = decoded(attention, new_cache("pages", dtype), **call)
    assert len(counted) == NUM_SHORT
    assert_within_bound({"out": direct}, {"out": gathered}, {"out": oracle})


@pytest.mark.parametrize(("kind", "bias"), CASES)
def test_steps_over_codes(
    kind: str, bias: str, counted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = module(kind)
    call = {"lengths": None, "rel_pos": BIASES[bias], "dtype": torch.float32}
    if kind == "multiway":
        call["split_position"] = 9
    with torch.inference_mode():
        direct = decoded(attention, new_cache("codes", torch.float32), **call)
        assert counted == [True] * NUM_SHORT
        gather_all(monkeypatch)
        gathered = decoded(attention, new_cache("codes", torch.float32), **call)
    torch.testing.assert_close(direct, gathered)


@pytest.mark.parametrize(("kind", "base"), [("pages", 0.05), ("codes", 8)])
def test_blocks_of_xpos_are_read_where_they_lie(
    kind: str, base: float, counted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so small a base, a few tokens have several anchors: each of their blocks is a slice."""
    attention = module("xpos", args={"xpos_rel_pos": True, "xpos_scale_base": base})
    call = {"lengths": None, "dtype": torch.float32}
    with torch.no_grad():
        direct = decoded(attention, new_cache(kind, torch.float32), **call)
        assert len(counted) > NUM_SHORT
        gather_all(monkeypatch)
        gathered = decoded(attention, new_cache(kind, torch.float32), **call)
    torch.testing.assert_close(direct, gathered)


@pytest.mark.parametrize("kind", ["pages", "codes"])
def test_weights_gather_when_they_are_looked_at(kind: str, counted: list[bool]) -> None:
    attention, cache = module("rope"), new_cache(kind, torch.float32)
    x = torch.randn(3, PROMPT + 2, EMBED)
    with torch.no_grad():
        attention(x[:, :-2], x[:, :-2], x[:, :-2], cache, is_causal=True)
        step = x[:, -2:-1]
        out, weights = attention(step, step, step, cache, is_causal=True)
        # Later tokens do not change what these saw.
        attention(x[:, -1:], x[:, -1:], x[:, -1:], cache, is_causal=True)
        assert counted == [True, True]
        _, whole = attention(x[:, :-1], x[:, :-1], x[:, :-1], is_causal=True)
        bound = 1e-6 if kind == "pages" else 2e-3
        assert (weights - whole[:, :, -1:]).abs().max() <= bound
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("kind", ["pages", "codes"])
def test_a_step_that_fails_is_taken_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = module("rope")
    cache, other = new_cache(kind, torch.float32), new_cache(kind, torch.float32)
    x = torch.randn(3, PROMPT + 1, EMBED)
    prompt, step = x[:, :-1], x[:, -1:]
    with torch.no_grad():
        for one in (cache, other):
            attention(prompt, prompt, prompt, one, is_causal=True)

        def fail(*arguments: Any) -> int:
            return library.NO_MEMORY

        with monkeypatch.context() as patch:
            patch.setattr(library.load(), "decode", fail)
            with pytest.raises(MemoryError, match="no memory left"):
                attention(step, step, step, cache, is_causal=True)
        assert cache.length == PROMPT
        found = attention(step, step, step, cache, is_causal=True)[0]
        assert torch.equal(found, attention(step, step, step, other, is_causal=True)[0])
