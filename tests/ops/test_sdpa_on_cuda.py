"""What keeps torch's fused CUDA kernels to the calls that they compute right."""

from typing import Any

import pytest
import torch
from torch import Tensor

import zeta
from tests.ops.bound import assert_within_bound
from zeta import biases, masks
from zeta.nn import MultiheadAttention

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALVES = (torch.bfloat16, torch.float16)
UNFUSED = "its CUDA kernels do not agree on a row whose keys are all hidden by a mask tensor"


def _leaves(
    length: int, dtype: torch.dtype, *, heads: int = 8, key_heads: int = 8
) -> dict[str, Tensor]:
    shapes = {"query": heads, "key": key_heads, "value": key_heads}
    return {
        name: torch.randn(2, count, length, 64, device=DEVICE, dtype=dtype, requires_grad=True)
        for name, count in shapes.items()
    }


def _results(made: dict[str, Tensor], learned: Tensor | None = None, **call: Any) -> Any:
    """The output, and the gradient of each leaf that has one."""
    out = zeta.attention(**made, **call)
    leaves = {name: leaf for name, leaf in made.items() if leaf.requires_grad}
    if learned is not None:
        leaves["learned"] = learned
    loss = (out.double() * torch.linspace(-1, 1, 64, device=DEVICE)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out} | dict(zip(leaves, found, strict=True))


def _check(made: dict[str, Tensor], learned: Tensor | None = None, **call: Any) -> None:
    """What "auto" takes is right, outputs and gradients."""
    actual = _results(made, learned, **call)
    assert all(bool(tensor.isfinite().all()) for tensor in actual.values())
    low = _results(made, learned, backend="reference", **call)
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in made.items()}
    assert_within_bound(actual, low, _results(wide, learned, backend="reference", **call))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("length", [64, 192, 320, 1088])
@pytest.mark.parametrize("is_causal", [True, False])
def test_lengths_of_64_beyond_a_multiple_of_128(
    length: int, is_causal: bool, dtype: torch.dtype
) -> None:
    """With a mask tensor, cuDNN's gradient of queries is NaN there."""
    made = _leaves(length, dtype)
    mask = masks.Causal() if is_causal else None
    explained = zeta.explain(**made, mask=mask)
    assert explained.backend == "sdpa"
    _check(made, mask=mask)
    tensor = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
    dense = masks.keep(tensor) if is_causal else masks.keep(tensor | tensor.mT)
    explained = zeta.explain(**made, mask=dense)
    assert explained.backend != "sdpa"
    assert UNFUSED in explained.reasons["sdpa"]
    _check(made, mask=dense)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("is_causal", [True, False])
def test_grouped_heads(is_causal: bool, key_heads: int, dtype: torch.dtype) -> None:
    made = _leaves(200, dtype, key_heads=key_heads)
    mask = masks.Causal() if is_causal else None
    assert zeta.explain(**made, mask=mask).backend == "sdpa"
    _check(made, mask=mask)


def test_grouped_heads_in_float32_are_not_given_to_torch() -> None:
    made = _leaves(200, torch.float32, key_heads=2)
    explained = zeta.explain(**made)
    assert explained.backend != "sdpa"
    assert "it runs unfused on CUDA with grouped heads in float32" in explained.reasons["sdpa"]
    _check(made)


@pytest.mark.parametrize("target", [1, 130])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_a_row_without_keys_never_reaches_torch(dtype: torch.dtype, target: int) -> None:
    made = _leaves(130, dtype)
    made["query"] = made["query"].detach()[:, :, :target].requires_grad_()
    hidden = torch.zeros(2, 1, 1, 130, dtype=torch.bool, device=DEVICE)
    hidden[0] = True
    lengths = torch.tensor([0, 77], device=DEVICE)
    padding = masks.Padding(lengths)
    for mask in (masks.drop(hidden), padding, padding & masks.Causal()):
        explained = zeta.explain(**made, mask=mask)
        assert explained.backend != "sdpa"
        assert UNFUSED in explained.reasons["sdpa"]
        _check(made, mask=mask)
        results = _results(made, mask=mask)
        assert not results["out"][0].any()
        assert not results["query"][0].any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("target", [1, 130])
def test_a_bias_in_another_dtype_is_read_as_what_it_is(target: int, dtype: torch.dtype) -> None:
    made = _leaves(130, dtype)
    made["query"] = made["query"].detach()[:, :, :target].requires_grad_()
    bias = biases.Dense(torch.randn(2, 1, target, 130, device=DEVICE))
    explained = zeta.explain(**made, bias=bias)
    assert explained.backend != "sdpa"
    assert UNFUSED in explained.reasons["sdpa"]
    _check(made, bias=bias)


def test_a_module_s_mask_in_another_dtype() -> None:
    attention = MultiheadAttention(None, 256, 4, self_attention=True, device=DEVICE).bfloat16()
    x = torch.randn(2, 192, 256, device=DEVICE, dtype=torch.bfloat16)
    mask = torch.randn(192, 192, device=DEVICE)
    out, _ = attention(x, x, x, attn_mask=mask)
    wide, _ = attention.float()(x.float(), x.float(), x.float(), attn_mask=mask)
    torch.testing.assert_close(out.float(), wide, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "row", "t5"])
def test_only_a_bias_may_be_learned(kind: str, dtype: torch.dtype) -> None:
    """torch's kernels crash, or have no gradient for it."""
    made = {name: leaf.detach() for name, leaf in _leaves(192, dtype).items()}
    shape = {"dense": (1, 8, 192, 192), "row": (2, 1, 1, 192), "t5": (32, 8)}[kind]
    learned = torch.randn(shape, device=DEVICE, requires_grad=True)
    bias = biases.Bucketed(learned) if kind == "t5" else biases.Dense(learned)
    explained = zeta.explain(**made, bias=bias)
    assert explained.backend != "sdpa"
    assert any("needs a gradient" in reason for reason in explained.reasons["sdpa"])
    _check(made, learned, bias=bias)
