"""xPos at any position and over any length, beside the formula in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zeta import masks
from zeta.caches import (
    DynamicCache,
    PagedCache,
    PagePool,
    QuantizedCache,
    RollingCache,
    StaticCache,
)
from zeta.nn import MultiheadAttention, RelativePositionBias, XPos, anchors
from zeta.nn.anchors import Blocks
from zeta.ops.call import AttentionCall

E, H, D, T = 32, 2, 16, 60
FAR = 1_000_000
LIMITS = {torch.float64: 3e-5, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of the output's error. float32 angles, those of training, are off by up to 5e-4 themselves."""

SHORT = 2.0
"""A scale base with which float32 has several anchors in 60 tokens, and float16 a dozen."""


def attention(base: float = 512, dtype: torch.dtype = torch.float32) -> MultiheadAttention:
    config = {"xpos_rel_pos": True, "xpos_scale_base": base}
    return MultiheadAttention(config, E, H, self_attention=True).eval().to(dtype)


def by_formula(module: MultiheadAttention, x: Tensor, positions: Tensor, base: float) -> Tensor:
    """The output in float64: a pair turns and decays by the distance of query and key alone."""

    def heads(projection: Any) -> Tensor:
        pairs = projection(x).double().unflatten(-1, (H, D // 2, 2)).transpose(1, 2)
        return torch.view_as_complex(pairs.contiguous())

    pair = torch.arange(0, D, 2, dtype=torch.float32)
    decay = ((pair + 0.4 * D) / (1.4 * D)).double()
    frequency = (1.0 / 10000.0 ** (pair / D)).double()
    distance = (positions[:, None] - positions).double()
    turn = torch.polar(decay ** (distance[..., None] / base), distance[..., None] * frequency)
    scores = torch.einsum(
        "bhip,ijp,bhjp->bhij", heads(module.q_proj), turn, heads(module.k_proj).conj()
    )
    hidden = positions[:, None] < positions
    weights = (scores.real / D**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
    value = module.v_proj(x).double().unflatten(-1, (H, D)).transpose(1, 2)
    out = (weights @ value).transpose(1, 2).flatten(2)
    return out @ module.out_proj.weight.double().T + module.out_proj.bias.double()


def pool(dtype: torch.dtype) -> PagePool:
    return PagePool(16, 8, num_kv_heads=H, head_dim=D, dtype=dtype)


CACHES: dict[str, Callable[[torch.dtype], Any]] = {
    "none": lambda dtype: None,
    "dict": lambda dtype: {},
    "dynamic": lambda dtype: DynamicCache(),
    "static": lambda dtype: StaticCache(T + 3),
    "rolling": lambda dtype: RollingCache(T),
    "paged": lambda dtype: PagedCache(pool(dtype)),
}
SIZES = (30, 1, 1, 20, 1, 7)


def decoded(
    module: MultiheadAttention, x: Tensor, cache: Any, positions: Tensor | None, **options: Any
) -> Tensor:
    sizes = [T] if cache is None else list(SIZES)
    parts = x.split(sizes, dim=1)
    at = [None] * len(sizes) if positions is None else positions.split(sizes)
    with torch.no_grad():
        outs = [
            module(p, p, p, cache, is_causal=True, positions=n, need_weights=False, **options)[0]
            for p, n in zip(parts, at, strict=True)
        ]
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("base", [512, SHORT])
@pytest.mark.parametrize("start", [0, 100_000, FAR])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kind", CACHES)
def test_any_position_means_what_the_formula_says(
    kind: str, dtype: torch.dtype, start: int, base: float
) -> None:
    module, x = attention(base, dtype), torch.randn(2, T, E).to(dtype)
    positions = torch.arange(start, start + T)
    with torch.no_grad():
        expected = by_formula(module, x, positions, base)
    found = decoded(module, x, CACHES[kind](dtype), positions if start else None)
    assert (found.double() - expected).abs().max() <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
def test_the_formula_tells_a_wrong_decay(dtype: torch.dtype) -> None:
    module, x = attention(SHORT, dtype), 3 * torch.randn(2, T, E).to(dtype)
    positions = torch.arange(T)
    with torch.no_grad():
        expected = by_formula(module, x, positions, 1.5 * SHORT)
    assert (decoded(module, x, {}, None).double() - expected).abs().max() > LIMITS[dtype]


def test_a_long_stream_keeps_its_meaning() -> None:
    """By its own count, without positions: a window that has rolled over a million tokens."""
    module = attention(dtype=torch.bfloat16)
    x = torch.randn(1, T, E, dtype=torch.bfloat16)
    near, far = RollingCache(16), RollingCache(16)
    decoded(module, x, far, None)
    state = far.state_dict()
    # The same, as if it had seen a multiple of its window and of a block of anchors before.
    blocks = Blocks.of(module.xpos, torch.bfloat16)
    far.load_state_dict(state | {"length": state["length"] + 16 * 2 * blocks.half * 4})
    assert far.length > FAR
    for cache in (near, far):
        decoded(module, x, cache, None)
    y = torch.randn(1, 1, E, dtype=torch.bfloat16)
    with torch.no_grad():
        ours, theirs = (module(y, y, y, cache)[0] for cache in (far, near))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LIMITS[torch.bfloat16])


def test_another_anchor_changes_no_digit() -> None:
    xpos = XPos(D)
    q, k = torch.randn(2, 1, 1, 1, D).unbind()
    products = set()
    for anchor in (0, 500, 1777, 6000):
        turned = xpos.queries(q, 4321, anchor) * xpos.keys(k, 1234, anchor)
        products.add(tuple(turned.flatten().tolist()))
    assert len(products) == 1


@pytest.mark.parametrize("need_weights", [True, "lazy", "mean"])
def test_weights_of_a_call_with_many_anchors(need_weights: Any) -> None:
    exact, module = attention(SHORT, torch.float64), attention(SHORT)
    module.load_state_dict(exact.state_dict())
    x = torch.randn(2, T, E, dtype=torch.float64)
    _, expected = exact(x, x, x, is_causal=True, need_weights=need_weights)
    state: dict[str, Tensor] = {}
    found = []
    for part in x.float().split([3, 40, T - 43], dim=1):
        weights = module(part, part, part, state, is_causal=True, need_weights=need_weights)[1]
        found.append(torch.nn.functional.pad(weights, (0, T - weights.shape[-1])))
    torch.testing.assert_close(torch.cat(found, -2).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [[59, 1], [1, 59], slice(0, None, 20), [3], range(T - 1, -1, -1)])
@pytest.mark.parametrize("kind", ["dynamic", "paged", "rolling"])
@pytest.mark.parametrize("is_causal", [False, True])
@torch.no_grad()
def test_rows_of_weights_may_be_any_of_a_call_with_many_anchors(
    rows: Any, kind: str, is_causal: bool
) -> None:
    module, x = attention(SHORT), torch.randn(2, T, E)
    padding = torch.arange(T) < torch.tensor([[5], [0]])
    options = {"is_causal": is_causal, "key_padding_mask": padding}
    _, weights = module(x, x, x, CACHES[kind](torch.float32), **options)
    _, expected = module(x, x, x, CACHES[kind](torch.float32), need_weights=True, **options)
    index = rows if isinstance(rows, slice) else list(rows)
    found = weights.rows(index)
    assert not weights.materialized
    torch.testing.assert_close(found, expected[..., index, :], rtol=0, atol=1e-5)


def test_masks_and_biases_of_a_call_with_many_anchors() -> None:
    exact, module = attention(SHORT, torch.float64), attention(SHORT, torch.float16)
    module.load_state_dict(exact.state_dict())
    x = torch.randn(2, T, E, dtype=torch.float64)
    bias = RelativePositionBias(False, n_heads=H).double()
    hidden = torch.rand(T, T) < 0.2
    padding = torch.rand(2, T) < 0.2
    options = {"attn_mask": hidden, "key_padding_mask": padding, "is_causal": True}
    expected = exact(x, x, x, rel_pos=bias, **options)[0]
    found = module(x.half(), x.half(), x.half(), rel_pos=bias.half(), **options)[0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-2)


@torch.no_grad()
def test_the_parts_of_a_chunk_may_be_of_different_backends() -> None:
    module = attention(0.1, torch.float64)
    half = Blocks.of(module.xpos, torch.float64).half
    # `sdpa` takes the row that is left over, and returns no log-sum-exp where it need not.
    sizes = [4, half + 1, 2 * half + 1]
    x = torch.randn(2, sum(sizes), E, dtype=torch.float64)
    options = {"rel_pos": RelativePositionBias(False, n_heads=H).double(), "is_causal": True}
    one_by_one: dict[str, Tensor] = {}
    expected = [module(y, y, y, one_by_one, **options)[0] for y in x.split(1, dim=1)]
    state: dict[str, Tensor] = {}
    found = [module(part, part, part, state, **options)[0] for part in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(expected, dim=1))


def test_gradients_of_a_call_with_many_anchors() -> None:
    exact, module = attention(0.4, torch.float64), attention(0.4)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(2, T, E)
    assert 2 * module.xpos.reach(torch.float32) < T
    gradients = []
    for m, y in ((module, x), (exact, x.double())):
        out, _ = m(y, y, y, is_causal=True, need_weights=False)
        gradients.append(torch.autograd.grad(out.square().sum(), list(m.parameters())))
    for ours, wide in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), wide, rtol=1e-3, atol=1e-3)


def test_sequences_of_one_batch_may_stand_far_apart() -> None:
    module, x = attention(SHORT), torch.randn(2, T, E)
    starts = torch.tensor([5, FAR])
    positions = starts[:, None] + torch.arange(T)
    cache, state = DynamicCache(), {}
    outs = []
    for part, at in zip(x.split(SIZES, 1), positions.split(SIZES, 1), strict=True):
        outs.append(module(part, part, part, cache, is_causal=True, positions=at)[0])
    found = torch.cat(outs, 1)
    for b in range(2):
        with torch.no_grad():
            expected = by_formula(module, x[b : b + 1], positions[b], SHORT)
        torch.testing.assert_close(found[b : b + 1].double(), expected, rtol=0, atol=3e-5)
    cache.reorder(torch.tensor([1, 0]))
    assert cache.state_dict()["origin"].tolist() == [FAR, 5]
    module(x, x, x, state, positions=positions)
    assert state["prev_key_origin"].tolist() == [5, FAR]


def test_padding_that_stands_nowhere_disturbs_nobody() -> None:
    module, x = attention(), torch.randn(1, T, E)
    positions = torch.arange(FAR, FAR + T)[None]
    with torch.no_grad():
        expected = by_formula(module, x[:, 4:], positions[0, 4:], 512)
        positions[:, :4] = -1
        found, _ = module(
            x, x, x, {}, positions < 0, positions=positions, is_causal=True, need_weights=False
        )
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 4:].double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_keys_are_as_good_far_from_the_first_as_near_it(bits: int) -> None:
    module = attention(8.0)
    x = torch.randn(4, 200, E)
    with torch.no_grad():
        exact = module(x, x, x, is_causal=True, need_weights=False)[0]
        cache = QuantizedCache(bits)
        found = [
            module(part, part, part, cache, is_causal=True, need_weights=False)[0]
            for part in x.split(20, dim=1)
        ]
    error = (torch.cat(found, 1) - exact).square().mean((0, 2)).sqrt()
    assert error[100:].mean() <= 1.5 * error[:100].mean()


def test_the_state_of_torchscale_may_be_long() -> None:
    module, x = attention(SHORT), torch.randn(2, T, E)
    key, value = (
        projection(x[:, :-1]).unflatten(-1, (H, D)).transpose(1, 2).detach()
        for projection in (module.k_proj, module.v_proj)
    )
    token = x[:, -1:]
    with torch.no_grad():
        expected = by_formula(module, x, torch.arange(T), SHORT)[:, -1:]
        found, _ = module(token, token, token, {"prev_key": key, "prev_value": value})
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-5)


def test_what_cannot_be_represented_is_refused() -> None:
    module, x = attention(0.4), torch.randn(1, T, E)
    lengths = torch.tensor([T])
    for mask in (None, masks.Padding(lengths), masks.PrefixLM(lengths)):
        with pytest.raises(ValueError, match=r"more than \d+ queries .*, needs is_causal=True"):
            module(x, x, x, attn_mask=mask)
    window = MultiheadAttention(
        {"xpos_rel_pos": True, "xpos_scale_base": 0.4}, E, H, self_attention=True, window=4
    )
    assert window(x, x, x)[0].isfinite().all()
    jump = torch.arange(T)
    jump[30:] += FAR
    for state in (None, {}, DynamicCache()):
        with pytest.raises(ValueError, match="positions must follow each other within"):
            attention()(x, x, x, state, positions=jump, is_causal=True)
    cache = DynamicCache()
    module(x[:, :3], x[:, :3], x[:, :3], cache, positions=torch.arange(3) + FAR)
    with pytest.raises(ValueError, match="positions must follow each other within"):
        module(x[:, :1], x[:, :1], x[:, :1], cache, positions=torch.tensor([3]))
    assert cache.length == 3


@pytest.mark.parametrize("kind", ["dict", "dynamic"])
def test_a_cache_that_began_elsewhere_is_told_where_it_goes_on(kind: str) -> None:
    module, x, cache = attention(), torch.randn(1, 3, E), CACHES[kind](torch.float32)
    module(x, x, x, cache, positions=torch.arange(3) + FAR)
    with pytest.raises(ValueError, match="positions must follow each other within"):
        module(x, x, x, cache)


@pytest.mark.parametrize("kind", ["dict", "dynamic", "static", "paged", "quantized"])
def test_every_cache_that_keeps_the_order_is_read_in_slices(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = CACHES | {"quantized": lambda dtype: QuantizedCache(8)}
    module, x = attention(SHORT), torch.randn(2, T, E)
    cache, read = kinds[kind](torch.float32), []

    def recorded(call: AttentionCall) -> Any:
        read.append(call.key)
        return run(call)

    run = anchors.run
    monkeypatch.setattr(anchors, "run", recorded)
    with torch.no_grad():
        for part in x.split([T - 1, 1], dim=1):
            read.clear()
            module(part, part, part, cache, is_causal=True, need_weights=False)
    half = Blocks.of(module.xpos, torch.float32, even=kind == "quantized").half
    blocks = -(-(T - half) // (2 * half))
    assert [key.shape[2] for key in read[:-1]] == [half, *[2 * half] * (blocks - 1)]
    assert sum(key.shape[2] for key in read) == T
    assert len({key.untyped_storage().data_ptr() for key in read}) == 1


def test_gradients_of_steps_with_many_anchors() -> None:
    exact, module = attention(0.4, torch.float64), attention(0.4)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(2, T, E)
    gradients = []
    for m, y in ((module, x), (exact, x.double())):
        state: dict[str, Tensor] = {}
        outs = [m(p, p, p, state, is_causal=True, need_weights=False)[0] for p in y.split(1, 1)]
        loss = torch.cat(outs, 1).square().sum()
        gradients.append(torch.autograd.grad(loss, list(m.parameters())))
    whole = exact(x.double(), x.double(), x.double(), is_causal=True, need_weights=False)[0]
    gradients.append(torch.autograd.grad(whole.square().sum(), list(exact.parameters())))
    for ours, wide, formula in zip(*gradients, strict=True):
        torch.testing.assert_close(wide, formula)
        torch.testing.assert_close(ours.double(), formula, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_one_graph_for_all_anchors() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module, x = attention(SHORT), torch.randn(2, T, E)
    cache = StaticCache(T)
    start = torch.tensor(FAR)

    def step(part: Tensor, positions: Tensor) -> Tensor:
        return module(
            part, part, part, cache, is_causal=True, positions=positions, need_weights=False
        )[0]

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    x, positions = x[:, :40], start + torch.arange(40)
    sizes = [30, *[1] * 10]
    assert 30 < Blocks.of(module.xpos, torch.float32).half < 40
    with torch.no_grad():
        expected = by_formula(module, x, positions, SHORT)
        outs = [
            compiled(p, n) for p, n in zip(x.split(sizes, 1), positions.split(sizes), strict=True)
        ]
    torch.testing.assert_close(torch.cat(outs, 1).double(), expected, rtol=0, atol=3e-5)
    assert counter.frame_count <= 3
    torch.compiler.reset()
