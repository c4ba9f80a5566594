"""Linear layers of a few rows in compiled code: the same bits, and where they are left to torch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compile.captured import Captured
from tests.ops.cpu.layers import PROJECTIONS, Projection
from zeta.nn import MultiheadAttention
from zeta.ops.backends.cpu import library, projection, projection_operators

pytestmark = [
    pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle())),
    # torch maps over its own fused kernel one sample at a time, and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

ONE, THREE = "zeta.cpu_project_kernel.default", "zeta.cpu_project_three_kernel.default"


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


def calls_of_torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each linear layer that Python's kernels leave to torch, as they come."""
    found: list[int] = []

    def noted(x: Tensor, *layer: Tensor | None) -> Tensor:
        found.append(x.shape[:-1].numel())
        return F.linear(x, *layer)

    class Noting:
        linear = staticmethod(noted)

    monkeypatch.setattr(projection_operators, "F", Noting)
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PROJECTIONS, ids=lambda case: case.name)
def test_the_same_bits_at_the_same_places(
    case: Projection, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_torch = calls_of_torch(monkeypatch)
    x, layers = case.tensors(dtype)
    for weight, bias in layers:
        found = torch.ops.zeta.cpu_project(x, weight, bias, 64)
        direct = projection.project(x, (weight, bias))
        if direct is not None:
            assert torch.equal(found, direct)
            assert found.stride() == direct.stride()
    if len(layers) == 3:
        width = 1 if any(len(weight) % 4 for weight, _ in layers) else 4
        given = [tensor for layer in layers for tensor in layer]
        three = torch.ops.zeta.cpu_project_three(x, *given, width, 64)
        heads = projection.project_heads(x, layers, width)
        for one, other in zip(three, heads or (), strict=heads is not None):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
    assert of_torch == []


def test_what_is_not_plain_is_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    of_torch = calls_of_torch(monkeypatch)
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16)
    for given, most in ((x, 5), (x.repeat(1, 30, 1), 1000), (x.mT.contiguous().mT, 64)):
        of_torch.clear()
        out = torch.ops.zeta.cpu_project(given, weight, bias, most)
        torch.testing.assert_close(out, F.linear(given, weight, bias))
        three = torch.ops.zeta.cpu_project_three(given, *(weight, bias) * 3, 4, most)
        for heads in three:
            torch.testing.assert_close(heads.transpose(1, 2).flatten(2), out)
        assert of_torch == [given.shape[0] * given.shape[1]] * 4
    with pytest.raises(RuntimeError):
        torch.ops.zeta.cpu_project(x, weight[:, :7], bias, 64)


# By torch 2.14, of what `opcheck` itself does.
@pytest.mark.filterwarnings("ignore:.*_prims_common.check.*:FutureWarning")
def test_the_operators_are_as_torch_wants_them() -> None:
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16)
    torch.library.opcheck(projection_operators._project.overload, (x, weight, None, 64))
    torch.library.opcheck(
        projection_operators._project_three.overload, (x, *(weight, bias) * 3, 4, 64)
    )


def projections(captured: Captured) -> list[str]:
    """The library's in the last graph."""
    return [name for name in captured.graphs[-1] if "cpu_project" in name]


def attending(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x, x, x, need_weights=False)[0]


def of_width(width: int = 32, **options: Any) -> MultiheadAttention:
    options.setdefault("self_attention", True)
    return MultiheadAttention(None, width, 4, **options).eval()


# Inductor still defines methods of `torch.jit`.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 4)])
def test_few_tokens_of_the_module_take_them(shape: tuple[int, int]) -> None:
    captured, module = Captured(), of_width()
    x = torch.randn(*shape, 32)
    compiled = torch.compile(attending(module), backend=captured.backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), attending(module)(x))
    assert projections(captured) == [THREE, ONE]
    inductor = torch.compile(attending(module), fullgraph=True)
    torch.testing.assert_close(inductor(x), attending(module)(x))


@torch.no_grad()
def test_one_graph_serves_all_lengths_and_batches() -> None:
    captured, module = Captured(), of_width()
    compiled = torch.compile(
        attending(module), backend=captured.backend, fullgraph=True, dynamic=True
    )
    for shape in ((2, 7), (3, 4), (4, 80)):
        x = torch.randn(*shape, 32)
        torch.testing.assert_close(compiled(x), attending(module)(x))
    assert len(captured.graphs) == 1
    assert projections(captured) == []
    for batch in (2, 63, 65, 300):  # Of single tokens there may be too many after all.
        x = torch.randn(batch, 1, 32)
        torch.testing.assert_close(compiled(x), attending(module)(x))
    assert len(captured.graphs) == 2
    assert projections(captured) == [THREE, ONE]


@torch.no_grad()
def test_queries_of_cross_attention_take_one() -> None:
    module = of_width(self_attention=False, encoder_decoder_attention=True)
    captured, x, source = Captured(), torch.randn(1, 1, 32), torch.randn(1, 70, 32)

    def attend(x: Tensor, source: Tensor) -> Tensor:
        return module(x, source, source, need_weights=False)[0]

    compiled = torch.compile(attend, backend=captured.backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, source), attend(x, source))
    assert projections(captured) == [ONE, ONE]


@torch.no_grad()
def test_whatever_asks_for_torchs_own_has_them() -> None:
    captured, module, x = Captured(), of_width(), torch.randn(1, 1, 32)

    def is_left(function: Callable[[Tensor], Tensor], x: Tensor = x) -> bool:
        torch.compiler.reset()
        compiled = torch.compile(function, backend=captured.backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-2, atol=1e-2)
        return projections(captured) == []

    assert not is_left(attending(module))
    with torch.enable_grad():
        assert is_left(attending(module))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_left(attending(module))
    assert is_left(attending(module), torch.randn(65, 1, 32))
    assert is_left(lambda x: torch.func.vmap(attending(module))(x), x[None])
    assert is_left(attending(copy.deepcopy(module).double()), x.double())


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
@pytest.mark.parametrize("way", ["hook", "pre hook", "forward", "class", "global hook"])
def test_modules_that_do_more_than_multiply_are_called(way: str) -> None:
    x, module = torch.randn(1, 1, 32), of_width()
    expected = 2 * attending(module)(x)
    layer, handle = module.out_proj, None
    if way == "hook":
        layer.register_forward_hook(lambda module, args, out: 2 * out)
    elif way == "pre hook":
        layer.bias.mul_(2)
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif way == "forward":
        # What some libraries do to a layer, though a checker would not have it.
        layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]
    elif way == "class":
        layer.__class__ = _Doubled
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: 2 * out if module is layer else None
        )
    try:
        compiled = torch.compile(attending(module), backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def test_an_exported_step_has_none() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = of_width()

        def forward(self, x: Tensor) -> Tensor:
            return attending(self.attention)(x)

    program = torch.export.export(Step(), (torch.randn(1, 1, 32),))
    assert "zeta" not in program.graph_module.code
