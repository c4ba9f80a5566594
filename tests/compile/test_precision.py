"""``torch.autocast`` and modules in half precision: dtypes, and errors of the size allowed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeta
from zeta import biases, masks
from zeta.nn import MultiheadAttention, RelativePositionBias
from zeta.ops.weights import LazyWeights

HALVES = [torch.bfloat16, torch.float16]
MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "documented": {"args": {"xpos_rel_pos": True}, "self_attention": True, "subln": True},
    "normalised": {"qk_norm": "rms", "num_kv_heads": 2},
    "multiway": {"args": {"multiway": True}, "self_attention": True},
}


def module_of(args: object = None, **options: Any) -> MultiheadAttention:
    return MultiheadAttention(args, 32, 4, **options)


def attend(
    module: MultiheadAttention, bias: RelativePositionBias, x: Tensor
) -> tuple[Tensor, Tensor]:
    out, weights = module(x, x, x, is_causal=True, rel_pos=bias)
    assert isinstance(weights, LazyWeights)
    return out, weights


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_module_under_autocast(options: dict[str, Any], dtype: torch.dtype) -> None:
    module, bias, x = module_of(**options), RelativePositionBias(n_heads=4), torch.randn(2, 9, 32)
    leaves = [*module.parameters(), *bias.parameters()]
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out, weights = attend(module, bias, x)
            loss = out.float().square().mean() + weights.float().square().mean()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([out, weights.detach(), *(g for g in grads if g is not None)])
    (out, weights, *grads), expected = results
    assert out.dtype == weights.dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in grads)
    for got, wide in zip(results[0], expected, strict=True):
        # The gradient of the key's bias is 0 but for rounding.
        if wide.norm() > 1e-4:
            assert relative_error(got, wide) < 40 * torch.finfo(dtype).eps


def gradients(
    out: Tensor, weights: Tensor, module: nn.Module, bias: nn.Module
) -> dict[str, Tensor]:
    """Of all parameters that a loss on both reaches."""
    parameters = dict(nn.ModuleDict({"module": module, "bias": bias}).named_parameters())
    loss = out.square().mean() + weights.square().mean()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return {name: grad for name, grad in pairs if grad is not None}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_module_in_half_precision(options: dict[str, Any], dtype: torch.dtype) -> None:
    module, bias, x = module_of(**options), RelativePositionBias(n_heads=4), torch.randn(2, 9, 32)
    module.to(dtype), bias.to(dtype)
    x = x.to(dtype)
    out, weights = attend(module, bias, x)
    grads = gradients(out.float(), weights.float(), module, bias)
    assert out.dtype == weights.dtype == dtype
    assert all(grad.dtype == dtype for grad in grads.values())
    # The same numbers in a wide module.
    wide_out, wide_weights = attend(module.double(), bias.double(), x.double())
    for name, wide in gradients(wide_out, wide_weights, module, bias).items():
        # The gradient of the key's bias is 0 but for rounding.
        if wide.norm() > 1e-4:
            assert relative_error(grads[name], wide) < 40 * torch.finfo(dtype).eps, name
    assert relative_error(out, wide_out) < 20 * torch.finfo(dtype).eps
    assert relative_error(weights, wide_weights) < 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        weights.sum(-1).float(), torch.ones(4, 2, 9), rtol=0, atol=16 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", ["reference", "chunked", "sdpa"])
def test_op_under_autocast_is_that_of_narrow_operands(backend: str, dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 8, requires_grad=True).unbind()
    arguments: dict[str, Any] = {"backend": backend, "mask": masks.Causal()}
    if backend != "sdpa":
        arguments["bias"] = biases.Bucketed(torch.randn(32, 4), max_distance=20)
    narrow = zeta.attention(query.to(dtype), key.to(dtype), value.to(dtype), **arguments)
    with torch.autocast("cpu", dtype=dtype):
        # One operand may come narrow from a projection, another wide from a norm.
        out = zeta.attention(query, key.to(dtype), value, **arguments)
    assert torch.equal(out, narrow)
    if backend != "sdpa":
        with torch.autocast("cpu", dtype=dtype):
            weights = zeta.attention_weights(query, key, **arguments)
            _, lse = zeta.attention_with_lse(query, key, value, **arguments)
        assert weights.dtype == dtype
        assert lse.dtype == torch.float32
        expected = zeta.attention_weights(query.to(dtype), key.to(dtype), **arguments)
        assert torch.equal(weights, expected)


@pytest.mark.parametrize("bias", [biases.Alibi(torch.rand(4)), biases.Dense(torch.randn(9, 9))])
def test_a_bias_stays_wide_under_autocast(bias: biases.Bias) -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 64, dtype=torch.bfloat16).unbind()
    expected = zeta.attention(query, key, value, bias=bias, backend="sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = zeta.attention(query, key, value, bias=bias, backend="sdpa")
    assert torch.equal(out, expected)


def test_float64_stays_under_autocast() -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = zeta.attention(query, key, value, backend="reference")
    assert torch.equal(out, zeta.attention(query, key, value, backend="reference"))


def test_gradient_scaling_of_float16() -> None:
    module, x = module_of(self_attention=True), torch.randn(2, 9, 32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module.q_proj.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.float16):
        out, weights = module(x, x, x)
        loss = out.float().square().mean() + weights.float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert not torch.equal(module.q_proj.weight, before)
