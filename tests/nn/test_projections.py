"""Linear layers in half precision on processors without products for it."""

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.nn.doubled_layers import DOUBLED
from zeta.nn import MultiheadAttention, MultiwayNetwork, projections
from zeta.nn.projections import HALVES, MIN_ROWS, called, project_heads

EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half a unit in the last place of 1: what one rounding costs at most."""


class _Products(TorchFunctionMode):
    """Notes the dtype of every linear product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        if func is nn.functional.linear:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def products(function: Callable[[], Any]) -> list[torch.dtype]:
    """The dtypes of the linear products inside."""
    with _Products() as seen:
        function()
    return seen.dtypes


@pytest.fixture(autouse=True)
def _without_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies float32 alone."""
    monkeypatch.setattr(projections, "has_products", lambda dtype: False)


def rounded(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Assert that it is ``exact``, rounded, and no more."""
    assert found.dtype == dtype
    allowed = EPS[dtype] * exact.abs() + 1e-5 * exact.abs().max()
    assert ((found.double() - exact).abs() <= allowed).all()


def test_rounded_notices_a_second_rounding() -> None:
    exact = torch.linspace(1, 2, 1001, dtype=torch.float64)
    rounded(exact.bfloat16(), exact, torch.bfloat16)
    with pytest.raises(AssertionError):
        rounded((exact * 1.006).bfloat16(), exact, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_results_and_gradients_are_rounded_once(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 80, bias=has_bias).to(dtype)
    wide = nn.Linear(48, 80, bias=has_bias).double()
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(3, 40, 48).to(dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    out, exact = called(layer, x), wide(x64)
    rounded(out, exact, dtype)
    incoming = torch.randn(out.shape).to(dtype)
    found = torch.autograd.grad(out, [x, *layer.parameters()], incoming)
    expected = torch.autograd.grad(exact, [x64, *wide.parameters()], incoming.double())
    for one, other in zip(found, expected, strict=True):
        rounded(one, other, dtype)


def test_products_are_in_float32_from_some_rows_on() -> None:
    layer = nn.Linear(8, 8).bfloat16()
    few, enough = (torch.randn(1, rows, 8).bfloat16() for rows in (MIN_ROWS - 1, MIN_ROWS))
    assert products(lambda: called(layer, few)) == [torch.bfloat16]
    assert products(lambda: called(layer, enough)) == [torch.float32]
    assert products(lambda: project_heads(enough, [layer] * 3, 4)) == [torch.float32] * 3
    assert products(lambda: called(layer.float(), enough.float())) == [torch.float32]
    assert project_heads(enough.float(), [layer] * 3, 4) is None


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)]
)
def test_a_processor_with_products_uses_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, expected: torch.dtype
) -> None:
    monkeypatch.setattr(projections, "has_products", lambda dtype: dtype == torch.float16)
    layer, x = nn.Linear(8, 8).to(dtype), torch.randn(1, MIN_ROWS, 8).to(dtype)
    assert products(lambda: called(layer, x)) == [expected]


@pytest.mark.parametrize(
    ("machine", "onednn", "expected"), [("aarch64", True, True), ("x86_64", False, False)]
)
def test_other_machines_have_theirs_and_x86_needs_onednn(
    monkeypatch: pytest.MonkeyPatch, machine: str, onednn: bool, expected: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    found = projections._halves_with_products.__wrapped__()
    assert [dtype in found for dtype in HALVES] == [expected, expected]


@pytest.mark.parametrize(
    ("has_avx512", "has_bf16", "expected"),
    [(True, True, True), (True, False, False), (False, False, True)],
)
def test_avx512_needs_its_extension(
    monkeypatch: pytest.MonkeyPatch, has_avx512: bool, has_bf16: bool, expected: bool
) -> None:
    """oneDNN says that it has bfloat16 without, and takes several times as long as in float32."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    found = projections._halves_with_products.__wrapped__()
    assert (torch.bfloat16 in found) == expected


@pytest.mark.parametrize("way", DOUBLED)
def test_layers_that_do_more_are_called(way: str) -> None:
    layer, x = nn.Linear(8, 8).bfloat16(), torch.randn(1, MIN_ROWS, 8).bfloat16()
    expected = 2 * called(layer, x)
    DOUBLED[way](layer)
    torch.testing.assert_close(called(layer, x), expected)
    assert products(lambda: called(layer, x)) == [torch.bfloat16]


def test_autocast_and_dtypes_that_differ_are_for_torch() -> None:
    layer, x = nn.Linear(8, 8).bfloat16(), torch.randn(1, MIN_ROWS, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products(lambda: called(layer, x)) == [torch.bfloat16]
    with pytest.raises(RuntimeError, match="dtype"):
        called(layer.float(), x)


def test_mapped_and_differentiated_twice() -> None:
    layer, x = nn.Linear(8, 8).bfloat16(), torch.randn(5, 1, MIN_ROWS, 8).bfloat16()
    mapped = torch.func.vmap(lambda part: called(layer, part))(x)
    assert mapped.equal(torch.stack([called(layer, part) for part in x]))

    def loss(x: Tensor) -> Tensor:
        return called(layer, x).float().pow(3).sum()

    curvature = torch.func.jacrev(torch.func.grad(loss))(x[0])
    point = x[0].double().requires_grad_()
    wide = nn.Linear(8, 8).double()
    wide.load_state_dict(layer.state_dict())
    expected = torch.autograd.functional.hessian(lambda x: wide(x).pow(3).sum(), point)
    # The outer derivative goes through roundings of the inner one.
    torch.testing.assert_close(curvature.double(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "options",
    [
        {"self_attention": True},
        {"self_attention": True, "subln": True},
        {"encoder_decoder_attention": True},
    ],
)
def test_every_projection_of_the_module(dtype: torch.dtype, options: dict[str, bool]) -> None:
    module = MultiheadAttention(None, 32, 2, **options).to(dtype)
    x = torch.randn(2, 70, 32).to(dtype)
    source = x if "self_attention" in options else torch.randn(2, 80, 32).to(dtype)
    assert products(lambda: module(x, source, source)) == [torch.float32] * 4


class _Returns(nn.Module):
    """A layer of another library, which returns what it computes with."""

    def __init__(self, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(16, features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype))


@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize(
    ("features", "dtype", "message"),
    [(16, torch.float64, "query's dtype and device"), (8, torch.float32, "same heads|multiple of")],
)
def test_layers_that_return_something_else_are_refused(
    name: str, features: int, dtype: torch.dtype, message: str, has_gradient: bool
) -> None:
    module, x = MultiheadAttention(None, 16, 4), torch.randn(2, 5, 16)
    setattr(module, name, _Returns(features, dtype))
    with torch.set_grad_enabled(has_gradient), pytest.raises(ValueError, match=message):
        module(x, x, x)


@pytest.mark.parametrize("split", [MIN_ROWS, torch.tensor(MIN_ROWS)], ids=["int", "tensor"])
def test_every_way_of_a_multiway_network(split: int | Tensor) -> None:
    network = MultiwayNetwork(nn.Linear(8, 8)).bfloat16()
    x = torch.randn(1, 2 * MIN_ROWS, 8).bfloat16()
    assert products(lambda: network(x, split_position=split)) == [torch.float32] * 2


def test_compiled_in_one_graph_for_all_lengths() -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(None, 32, 2, self_attention=True).bfloat16()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (70, 33, 90):
        x = torch.randn(2, length, 32).bfloat16().requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=length != 70):
            out = compiled(x, x, x)[0]
        expected = module(x, x, x)[0]
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0]
        )
