"""Extra keys beside torch's module and a textbook: masks, biases, forms of attention, caches."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nn import textbook
from tests.nn.extra_keys import (
    BOTH,
    EXACT,
    EXTRAS,
    PADDING,
    B,
    E,
    H,
    S,
    T,
    attend,
    check_same,
    make,
    tokens,
)
from zeta import biases, convert
from zeta.caches import (
    DynamicCache,
    PagedCache,
    PagePool,
    QuantizedCache,
    RollingCache,
    StaticCache,
)
from zeta.nn import (
    ALiBi,
    RelativePositionBias,
    RotaryEmbedding,
    set_split_position,
)
from zeta.nn.anchors import Blocks

MASKS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "none": dict,
    "bool": lambda: {"attn_mask": torch.rand(T, S) < 0.4},
    "bool by head": lambda: {"attn_mask": torch.rand(B * H, T, S) < 0.4},
    "float": lambda: {"attn_mask": torch.randn(T, S, dtype=torch.float64)},
    "padding": lambda: {"key_padding_mask": PADDING},
    "padding and mask": lambda: {
        "key_padding_mask": PADDING, "attn_mask": torch.rand(T, S) < 0.4,
    },
    "some rows hidden": lambda: {"attn_mask": (torch.arange(T) % 2 == 0)[:, None].expand(T, S)},
    "all hidden": lambda: {"key_padding_mask": torch.ones(B, S, dtype=torch.bool)},
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS.keys())
def test_torchs_module(extra: dict[str, bool], name: str) -> None:
    """Rows with every key hidden see the extra keys alone, as there."""
    theirs = nn.MultiheadAttention(
        E, H, kdim=12, vdim=10, batch_first=True, dtype=torch.float64, **extra
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.4)
    ours = convert.from_module(theirs)
    inputs = [tokens(T), tokens(S, 12), tokens(S, 10)]
    options = MASKS[name]()
    given = [x.clone().requires_grad_() for x in inputs]
    out, weights = theirs(*given, average_attn_weights=False, **options)
    cotangents = torch.randn_like(out), torch.randn_like(weights)
    torch.autograd.backward((out, weights), cotangents)
    for need_weights in ("lazy", True):
        taken = [x.clone().requires_grad_() for x in inputs]
        ours.zero_grad()
        found = ours(*taken, need_weights=need_weights, **options)
        torch.testing.assert_close(found[0], out, **EXACT)
        torch.testing.assert_close(torch.as_tensor(found[1]), weights.transpose(0, 1), **EXACT)
        torch.autograd.backward(found, (cotangents[0], cotangents[1].transpose(0, 1)))
        for mine, other in zip(taken, given, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, **EXACT)
        for part in ("bias_k", "bias_v", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            parameter = getattr(theirs, part)
            if parameter is not None:
                mine = ours.get_parameter(part.replace("_weight", ".weight"))
                torch.testing.assert_close(mine.grad, parameter.grad, **EXACT)
    mean = ours(*inputs, need_weights="mean", **options)[1]
    torch.testing.assert_close(mean, weights.mean(1), **EXACT)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"num_kv_heads": 2, "head_dim": 6, "scale": 0.7},
    "sub-LN": {"subln": True},
    "norms": {"qk_norm": "rms"},
    "rotary": {"position": RotaryEmbedding(4)},
    "xPos": {"args": {"xpos_rel_pos": True}, "subln": True},
    "window": {"window": 2},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS.keys())
def test_every_form(extra: dict[str, bool], form: str) -> None:
    """The extra key is neither normalised nor rotated, and has no place in a window."""
    module = make(self_attention=True, **extra, **FORMS[form])
    x = tokens(T).requires_grad_()
    visible = textbook.causal(T, T)
    if module.window is not None:
        visible &= ~textbook.causal(T, T).tril(-module.window)
    expected = attend(module, x, x, x, visible=visible)
    found = module(x, x, x, is_causal=True)
    check_same(found, expected, [x, *module.parameters()])


BIASES: dict[str, Callable[[], tuple[Any, float | None]]] = {
    "T5": lambda: (RelativePositionBias(n_heads=H).double(), None),
    "ALiBi": lambda: (ALiBi(H).double(), None),
    "tensor": lambda: (torch.randn(H, T, T, dtype=torch.float64), None),
    "softcap": lambda: (biases.Softcap(0.5), 0.5),
    "bias, softcap": lambda: (
        biases.Dense(torch.randn(H, T, T, dtype=torch.float64)) + biases.Softcap(0.5), 0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASES)
def test_biases_are_about_tokens_and_a_softcap_about_scores(name: str) -> None:
    module, (rel_pos, cap) = make(self_attention=True, **BOTH), BIASES[name]()
    x = tokens(T).requires_grad_()
    added = rel_pos
    if isinstance(rel_pos, RelativePositionBias | ALiBi):
        added = rel_pos.value().dense(B, H, T, T)
    elif isinstance(rel_pos, biases.Bias):
        terms = biases.summands(rel_pos)
        added = terms[0].tensor if isinstance(terms[0], biases.Dense) else None
    found = module(x, x, x, rel_pos=rel_pos)
    check_same(found, attend(module, x, x, x, bias=added, cap=cap), [x, *module.parameters()])


def pool(heads: int, dim: int) -> PagePool:
    return PagePool(16, 4, num_kv_heads=heads, head_dim=dim, dtype=torch.float64)


CACHES: dict[str, Callable[[], Any]] = {
    "dict": dict,
    "dynamic": DynamicCache,
    "static": lambda: StaticCache(24),
    "rolling": lambda: RollingCache(20),
    "paged": lambda: PagedCache(pool(2, 4)),
}
SIZES = (6, 1, 1, 5, 1, 1)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4},
    "rotary": {"position": RotaryEmbedding(4)},
    "xPos": {"args": {"xpos_rel_pos": True}},
    "xPos of many anchors": {"args": {"xpos_rel_pos": True, "xpos_scale_base": 0.02}},
}


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("kind", CACHES)
def test_decoding_is_the_whole(kind: str, form: str) -> None:
    module = make(self_attention=True, num_kv_heads=2, **BOTH, **KINDS[form])
    x, cache = tokens(sum(SIZES)), CACHES[kind]()
    with torch.no_grad():
        out, weights = module(x, x, x, is_causal=True)
        start = 0
        for part in x.split(SIZES, dim=1):
            stop = start + part.shape[1]
            step, seen = module(part, part, part, cache, is_causal=True)
            torch.testing.assert_close(step, out[:, start:stop], rtol=0.0, atol=1e-9)
            torch.testing.assert_close(
                seen[..., -2:].clone(), weights[:, :, start:stop, -2:], rtol=0.0, atol=1e-9
            )
            rows = seen.sum(-1)
            torch.testing.assert_close(rows, torch.ones_like(rows))
            start = stop


def test_many_anchors_are_many() -> None:
    """Else nothing was merged above; and the share of an extra key needs that of all blocks."""
    module = make(self_attention=True, num_kv_heads=2, **BOTH, **KINDS["xPos of many anchors"])
    x, state = tokens(sum(SIZES)), {}
    module(x, x, x, state, is_causal=True)
    assert Blocks.of(module.xpos, torch.float64).half * 4 < sum(SIZES)
    y = tokens(1).requires_grad_()
    found = module(y, y, y, state)[0]
    gradient = torch.autograd.grad(found.sum(), [y, module.bias_k, module.bias_v])
    assert all(part.isfinite().all() and part.any() for part in gradient)


def test_a_quantised_cache_keeps_tokens_alone() -> None:
    module, x, cache = make(self_attention=True, **BOTH), tokens(T), QuantizedCache(8)
    with torch.no_grad():
        steps = [module(part, part, part, cache, is_causal=True) for part in x.split((3, 1, 1), 1)]
        expected, weights = attend(module, x, x, x, visible=textbook.causal(T, T))
    assert cache.length == T
    out = torch.cat([step for step, _ in steps], 1)
    torch.testing.assert_close(out, expected, rtol=0.0, atol=0.02)
    torch.testing.assert_close(steps[-1][1].clone(), weights[:, :, -1:], rtol=0.0, atol=0.02)


def test_a_failed_call_leaves_its_cache_alone() -> None:
    module, x, cache = make(self_attention=True, **BOTH), tokens(T), DynamicCache()
    module(x, x, x, cache)
    module.bias_k = nn.Parameter(torch.zeros(1, 1, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="invalid for input of size 3"):
        module(x, x, x, cache)
    assert cache.length == T


def test_cross_attention_reuses_its_keys() -> None:
    module = make(encoder_decoder_attention=True, **BOTH)
    query, source, state = tokens(T), tokens(S), {}
    expected = attend(module, query, source, source, visible=~PADDING[:, None, None])[0]
    for start in range(T):
        given = (source, source) if start == 0 else (None, None)
        padding = PADDING if start == 0 else None
        step, _ = module(query[:, start : start + 1], *given, state, padding)
        torch.testing.assert_close(step, expected[:, start : start + 1], rtol=0.0, atol=1e-9)


def test_unbatched_and_multiway() -> None:
    module = make(args={"multiway": True}, self_attention=True, **BOTH)
    assert module.bias_k is not None
    assert module.bias_k.shape == (1, 1, E)
    module.apply(set_split_position(2))
    x = tokens(T)
    out, weights = module(x, x, x)
    alone, own = module(x[0], x[0], x[0])
    torch.testing.assert_close(alone, out[0], **EXACT)
    assert own.shape == (H, T, T + 2)
    torch.testing.assert_close(own.clone(), weights[:, 0], **EXACT)


@pytest.mark.parametrize("name", ["bias_k", "bias_v", "q_proj.weight"])
def test_the_comparison_tells_another_parameter(name: str) -> None:
    module, x = make(**BOTH), tokens(T)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.get_parameter(name).view(-1)[0] += 1e-6
    leaves = [x.requires_grad_()]
    check_same(module(x, x, x), attend(module, x, x, x), leaves)
    with pytest.raises(AssertionError, match="not close"):
        check_same(module(x, x, x), attend(other, x, x, x), leaves)
