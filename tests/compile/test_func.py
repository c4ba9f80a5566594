"""``torch.func``, forward mode and second derivatives: they work, or say what would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import zeta
from zeta import biases, masks
from zeta.caches import DynamicCache
from zeta.nn import MultiheadAttention, RelativePositionBias, XPos
from zeta.nn.state import IncrementalState
from zeta.ops.call import BackendUnsupported

pytestmark = [
    # torch maps over its own fused kernel one sample at a time, and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    # torch.func.jvp uses it itself.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def operands(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, batch, 4, 6, 8, dtype=torch.float64).unbind()
    return query, key, value


def attending(backend: str, **arguments: Any) -> Attend:
    if backend != "sdpa" and not arguments:
        table = torch.linspace(-1, 1, 64, dtype=torch.float64).view(16, 4)
        arguments["bias"] = biases.Bucketed(table, max_distance=20)
        arguments["mask"] = masks.Causal() & masks.SlidingWindow(4)
    return lambda query, key, value: zeta.attention(query, key, value, backend=backend, **arguments)


BACKENDS = ["reference", "chunked", "sdpa", "auto"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad(backend: str) -> None:
    attend = attending(backend)
    query, key, value = operands()
    found = torch.func.grad(lambda *three: attend(*three).square().sum(), argnums=(0, 1, 2))(
        query, key, value
    )
    leaves = [tensor.requires_grad_() for tensor in operands()]
    expected = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
def test_vmap(backend: str) -> None:
    attend = attending(backend)
    query, key, value = (torch.stack([tensor, tensor * 2]) for tensor in operands())
    mapped = torch.func.vmap(attend)(query, key, value)
    torch.testing.assert_close(
        mapped, torch.stack([attend(*one) for one in zip(query, key, value, strict=True)])
    )
    # Of the keys alone, and gradients of each.
    grad = torch.func.grad(lambda k: attend(query[0], k, value[0]).square().sum())
    torch.testing.assert_close(torch.func.vmap(grad)(key), torch.stack([grad(k) for k in key]))


def test_vmap_of_chunked_is_refused() -> None:
    attend = attending("chunked")
    with pytest.raises(BackendUnsupported, match=r"torch.func.vmap cannot map over it"):
        torch.func.vmap(attend)(*(tensor[:, None] for tensor in operands()))
    # Mapping over something else is none of its business.
    query, key, value = operands()
    scales = torch.tensor([1.0, 2.0], dtype=torch.float64)
    mapped = torch.func.vmap(lambda scale: attend(query, key, value) * scale)(scales)
    torch.testing.assert_close(mapped[1], attend(query, key, value) * 2)


@pytest.mark.parametrize(
    "arguments", [{}, {"mask": masks.Padding(torch.tensor([4, 6, 1]))}], ids=str
)
def test_transforms_inside_of_compiled_code(arguments: dict[str, Any]) -> None:
    query, key, value = (tensor.float() for tensor in operands())

    def attend(query: Tensor) -> Tensor:
        return zeta.attention(query, key, value, **arguments)

    def mapped(queries: Tensor) -> Tensor:
        return torch.func.vmap(attend)(queries)

    def differentiated(query: Tensor) -> Tensor:
        return torch.func.grad(lambda query: attend(query).square().sum())(query)

    for transformed, x in ((mapped, torch.stack([query, -query])), (differentiated, query)):
        torch.compiler.reset()
        compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), transformed(x))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_forward_mode(backend: str) -> None:
    attend = attending(backend)
    query, key, value = operands()
    tangent = torch.ones_like(query)
    _, found = torch.func.jvp(lambda query: attend(query, key, value), (query,), (tangent,))
    step = 1e-6
    higher, lower = (attend(query + sign * step, key, value) for sign in (1, -1))
    torch.testing.assert_close(found, (higher - lower) / (2 * step), rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        dual = attend(forward_ad.make_dual(query, tangent), key, value)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, found)


@pytest.mark.parametrize("backend", ["chunked", "sdpa"])
def test_forward_mode_of_the_others_is_refused(backend: str) -> None:
    query, key, value = operands()
    attend = attending(backend)
    with pytest.raises(BackendUnsupported, match=r"no forward-mode derivative \(torch.func.jvp\)"):
        torch.func.jvp(lambda query: attend(query, key, value), (query,), (query,))


def module_loss(module: MultiheadAttention, bias: RelativePositionBias) -> Callable[..., Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out, weights = torch.func.functional_call(
            module, parameters, (x, x, x), {"rel_pos": bias, "is_causal": True}
        )
        return out.square().sum() + weights.square().sum()

    return loss


def test_gradients_of_each_sample_of_a_module() -> None:
    module = MultiheadAttention(None, 16, 4, self_attention=True, subln=True)
    loss = module_loss(module, RelativePositionBias(n_heads=4))
    x = torch.randn(3, 1, 5, 16)
    parameters = dict(module.named_parameters())
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        got = [found[name][index] for name in parameters]
        torch.testing.assert_close(got, list(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "function", [zeta.attention, lambda *four, **rest: zeta.attention_weights(*four[:2], **rest)]
)
def test_jacobians_in_reverse_mode(
    function: Callable[..., Tensor], backend: str, dtype: torch.dtype
) -> None:
    if backend == "sdpa" and function is not zeta.attention:
        pytest.skip("it has no weights")
    bias = biases.Dense(torch.randn(3, 4, 6, 6, dtype=dtype))
    query, key, value = (tensor.to(dtype) for tensor in operands())

    def attend(key: Tensor) -> Tensor:
        return function(query, key, value, bias=bias, backend=backend)[:, :, :2]

    expected = torch.autograd.functional.jacobian(attend, key)
    torch.testing.assert_close(torch.func.jacrev(attend)(key), expected)
    batched = torch.autograd.functional.jacobian(attend, key, vectorize=True)
    torch.testing.assert_close(batched, expected)


@pytest.mark.parametrize("make", [dict, DynamicCache])
@pytest.mark.parametrize("position", [None, XPos(4)], ids=["plain", "xpos"])
def test_decoding_is_followed_by_transforms(
    make: Callable[[], IncrementalState], position: XPos | None
) -> None:
    module = MultiheadAttention(None, 16, 4, self_attention=True, position=position)

    def whole(x: Tensor) -> Tensor:
        return module(x, x, x, is_causal=True)[0]

    def decoded(x: Tensor) -> Tensor:
        state = make()
        return torch.cat([module(t, t, t, state, is_causal=True)[0] for t in x.split(2, 1)], 1)

    x, tangent = torch.randn(2, 2, 5, 16).unbind()
    with torch.no_grad():
        for derivative in (
            lambda function: torch.func.jvp(function, (x,), (tangent,))[1],
            lambda function: torch.func.vmap(function)(torch.stack([x, tangent])),
        ):
            torch.testing.assert_close(derivative(decoded), derivative(whole), rtol=1e-4, atol=1e-5)


def test_weights_inside_a_transform_are_plain() -> None:
    module = MultiheadAttention(None, 16, 4)
    x = torch.randn(2, 5, 16)
    kinds = []

    def total(x: Tensor) -> Tensor:
        _, weights = module(x, x, x)
        kinds.append(type(weights))
        return weights.square().sum()

    found = torch.func.grad(total)(x)
    assert kinds == [Tensor]
    # Outside they are lazy, and may be taken into a transform.
    weights = module(x, x, x)[1]
    mapped = torch.func.vmap(lambda factor: weights * factor)(torch.ones(2))
    torch.testing.assert_close(mapped[0], weights.clone())
    x.requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(total(x), x)[0])


SMALL = (1, 2, 3, 2)


@pytest.mark.parametrize("function", [zeta.attention, zeta.attention_with_lse])
def test_second_derivatives_of_the_reference(function: Callable[..., Any]) -> None:
    leaves = [torch.randn(SMALL, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    table = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Any:
        bias = biases.Bucketed(table, max_distance=8) + biases.Softcap(2.0)
        mask = masks.Causal()
        return function(query, key, value, mask=mask, bias=bias, backend="reference")

    assert torch.autograd.gradgradcheck(attend, (*leaves, table))


@pytest.mark.parametrize("function", ["output", "weights"])
def test_second_derivatives_of_chunked_name_the_backend_that_has_them(function: str) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in operands())
    if function == "output":
        result = zeta.attention(query, key, value, backend="chunked")
    else:
        result = zeta.attention_weights(query, key, backend="chunked")
    (first,) = torch.autograd.grad(result.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="for second derivatives use backend='reference'"):
        first.sum().backward()


def test_a_gradient_that_is_traced_gets_a_backend_that_can() -> None:
    query = torch.randn(1, 2, 9, 8)

    def gradient(backend: str) -> Callable[[Tensor], Tensor]:
        def loss(query: Tensor) -> Tensor:
            out = zeta.attention(query, query, query, mask=masks.Causal(), backend=backend)
            return out.square().sum()

        found: Callable[[Tensor], Tensor] = torch.func.grad(loss)
        return found

    graph, other = make_fx(gradient("auto"))(query), torch.randn_like(query)
    torch.testing.assert_close(graph(other), gradient("reference")(other))
    with pytest.raises(BackendUnsupported, match=r"torch\.func, where a mode traces it"):
        make_fx(gradient("cpu"))(query)
