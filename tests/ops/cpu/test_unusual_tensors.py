"""Tensors whose memory does not hold their numbers: right results, or an error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import zeta
from zeta import biases, masks
from zeta.nn import MultiheadAttention
from zeta.nn.projections import project
from zeta.ops.attention import run_with_weights
from zeta.ops.backends.cpu import library
from zeta.ops.call import AttentionCall

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle()))
BACKENDS = ("auto", "cpu")
SHAPE = (1, 2, 6, 8)


def operands(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape), torch.randn(shape)


def negated(shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Numbers that are the opposite of what memory holds."""
    found = torch.randn(shape, dtype=torch.complex64).conj().imag
    assert found.is_neg()
    return found


def assert_right(backend: str, *made: Tensor, **options: object) -> None:
    actual = zeta.attention(*made, backend=backend, **options)  # type: ignore[arg-type]
    expected = zeta.attention(*made, backend="reference", **options)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negated_numbers(backend: str) -> None:
    query, key, value = operands()
    assert_right(backend, query, key, value, bias=biases.Dense(negated((1, 2, 6, 6))))
    narrow = operands((1, 2, 6, 1))
    for place in range(3):
        for made, one in ((operands(), torch._neg_view(query)), (narrow, negated((1, 2, 6, 1)))):
            assert_right(backend, *made[:place], one, *made[place + 1 :])


NEGATED: dict[str, tuple[Tensor, Callable[[Tensor], dict[str, object]]]] = {
    "padding": (torch.tensor([3, 5]), lambda lengths: {"mask": masks.Padding(lengths)}),
    "prefix": (torch.tensor([3, 5]), lambda lengths: {"mask": masks.PrefixLM(lengths)}),
    "documents": (
        torch.tensor([0, 0, 0, 1, 1, -1]).expand(2, 6),
        lambda ids: {"mask": masks.Documents(ids)},
    ),
    "slopes": (torch.tensor([0.5, 0.25]), lambda slopes: {"bias": biases.Alibi(slopes)}),
    "dense": (torch.ones(6, 6).triu(), lambda scores: {"bias": biases.Dense(scores)}),
    "positions": (
        torch.arange(6),
        lambda at: {"mask": masks.Causal(), "query_positions": at, "key_positions": at},
    ),
    "seed": (torch.tensor(5), lambda seed: {"dropout_p": 0.5, "seed": seed}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NEGATED)
def test_negated_numbers_of_masks_and_biases(name: str, compiled: bool, backend: str) -> None:
    numbers, options = NEGATED[name]
    made = operands((2, 2, 6, 8))

    def attend(numbers: Tensor) -> Tensor:
        found = zeta.attention(*made, backend=backend, **options(numbers))  # type: ignore[arg-type]
        return found

    torch._dynamo.reset()
    on_paper = torch._neg_view(-numbers)
    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    torch.testing.assert_close(run(on_paper), attend(numbers))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negated_gradient(backend: str) -> None:
    query, key, value = operands((1, 2, 6, 1))
    query.requires_grad_()
    out = zeta.attention(query, key, value, backend=backend)
    grad_out = negated((1, 2, 6, 1))
    (actual,) = torch.autograd.grad(out, query, grad_out, retain_graph=True)
    (expected,) = torch.autograd.grad(out, query, grad_out.resolve_neg())
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_that_are_none_anywhere(backend: str) -> None:
    query, key, value = operands()
    zeros = torch._efficientzerotensor(SHAPE)
    expected = zeta.attention(torch.zeros(SHAPE), key, value)
    assert torch.equal(zeta.attention(zeros, key, value, backend=backend), expected)
    query.requires_grad_()
    out = zeta.attention(query, key, value, backend=backend)
    (gradient,) = torch.autograd.grad(out, query, zeros)
    assert not gradient.any()


def _freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("spoil", [_freed, torch._to_functional_tensor], ids=["freed", "wrapped"])
def test_a_tensor_without_memory_is_an_error(
    spoil: Callable[[Tensor], Tensor], place: int, backend: str
) -> None:
    made = list(operands())
    made[place] = spoil(made[place])
    with pytest.raises(RuntimeError, match="has no memory of its own"):
        zeta.attention(*made, backend=backend)  # type: ignore[misc]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_without_memory_is_an_error(backend: str) -> None:
    query, key, value = operands()
    query.requires_grad_()
    out = zeta.attention(query, key, value, backend=backend)
    ones = torch.ones_like(out)
    with pytest.raises(RuntimeError, match=r"TwoTensor .* has no memory of its own"):
        torch.autograd.grad(out, query, TwoTensor(ones, ones.clone()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", range(3))
def test_a_class_of_its_own_beside_plain_tensors(place: int, backend: str) -> None:
    made: list[Tensor] = list(operands())
    expected = zeta.attention(*made)  # type: ignore[misc]
    made[place] = TwoTensor(made[place], made[place].clone())
    found = zeta.attention(*made, backend=backend)  # type: ignore[misc]
    assert type(found) is TwoTensor
    torch.testing.assert_close(found.a, expected)
    call = AttentionCall.checked(*made)  # type: ignore[misc]
    out, weights = run_with_weights(call, mean=False, backend=backend)
    torch.testing.assert_close(out.a, expected)  # type: ignore[attr-defined]
    assert type(weights) is (Tensor if place == 2 else TwoTensor)


def test_projections_of_such_tensors_are_torchs() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    for x in (
        torch._efficientzerotensor((1, 2, 8)),
        torch._neg_view(torch.randn(1, 2, 8)),
        torch._to_functional_tensor(torch.randn(1, 2, 8)),
    ):
        torch.testing.assert_close(project(x, layer), layer(x))
    _freed(layer.weight)
    with pytest.raises(RuntimeError, match="out of bounds"):
        project(torch.randn(1, 2, 8), layer)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_negated_parameters_are_read_negated(name: str) -> None:
    module = MultiheadAttention(None, 8, 2, need_weights=False)
    for layer in (module.v_proj, module.out_proj):
        numbers = torch.randn(getattr(layer, name).shape)
        setattr(layer, name, nn.Parameter(torch._neg_view(numbers)))
    x = torch.randn(1, 3, 8)
    with_gradients, _ = module(x, x, x)
    with torch.no_grad():
        torch.testing.assert_close(module(x, x, x)[0], with_gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_recorded_graph_computes(pre_dispatch: bool, tracing_mode: str, backend: str) -> None:
    query, key, value = operands()

    def attend(query: Tensor) -> Tensor:
        return zeta.attention(query, key, value, backend=backend)

    graph = make_fx(
        attend, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True
    )(query)
    torch.testing.assert_close(graph(query + 1), attend(query + 1))
