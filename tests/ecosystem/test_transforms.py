"""``torch.func`` of whole modules: ensembles, forward mode, second derivatives.

What a backend alone can do and refuses to do is in ``tests/compile/test_func.py``.
"""

import copy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vjp, vmap

from tests.ecosystem.layers import Layer, tokens

# torch maps over its own fused kernel one sample at a time, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def test_an_ensemble_by_vmap() -> None:
    layers = [Layer(biased=True, causal=True).eval() for _ in range(3)]
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.normal_(std=0.3)
    parameters, buffers = stack_module_state(layers)  # type: ignore[arg-type]  # a list of modules is one
    skeleton = copy.deepcopy(layers[0]).to("meta")
    x = tokens()

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(skeleton, (parameters, buffers), (x,))
        return out

    expected = torch.stack([layer(x) for layer in layers])
    torch.testing.assert_close(vmap(run)(parameters, buffers), expected, rtol=1e-5, atol=1e-5)


# torch.func.jvp uses it itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_and_backward_mode_agree() -> None:
    layer = Layer(biased=True, causal=True, subln=True).double()
    x = tokens().double()
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    tangents = {name: torch.randn_like(value) for name, value in parameters.items()}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(layer, parameters, (x,))
        return out

    out, pushed = jvp(run, (parameters,), (tangents,))
    torch.testing.assert_close(out, layer(x))
    cotangent = torch.randn_like(out)
    _, pull = vjp(run, parameters)
    (pulled,) = pull(cotangent)
    # Both are the same bilinear form of tangent and cotangent.
    backward = sum((pulled[name] * tangents[name]).sum() for name in parameters)
    torch.testing.assert_close((pushed * cotangent).sum(), backward)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_second_derivatives_by_forward_over_reverse() -> None:
    layer = Layer(biased=True, causal=True).double()
    x = tokens(1, 5).double()
    table = layer.bias.relative_attention_bias.weight.detach()[:, :1]

    def total(column: Tensor) -> Tensor:
        whole = torch.cat([column, torch.zeros(len(table), 3, dtype=torch.float64)], 1)
        out = functional_call(layer, {"bias.relative_attention_bias.weight": whole}, (x,))
        return out.square().sum()

    found = hessian(total)(table).squeeze()
    step = 1e-5
    for row in (0, 1):
        moved = torch.zeros_like(table)
        moved[row] = step
        higher, lower = (grad(total)(table + sign * moved) for sign in (1, -1))
        expected = (higher - lower).squeeze() / (2 * step)
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-7)
    assert found.abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_one_in_reverse_mode_alone_says_what_a_module_has() -> None:
    layer, x = Layer(causal=True), tokens(1, 4)

    def total(x: Tensor) -> Tensor:
        out: Tensor = layer(x)
        return out.square().sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"a module has them by torch\.func\.hessian"):
        first.sum().backward()
    found = hessian(total)(x)
    layer.double()
    torch.testing.assert_close(found.double(), hessian(total)(x.double()), rtol=1e-4, atol=1e-5)
