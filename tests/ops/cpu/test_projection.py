"""Linear layers of a few rows: the native pass against float64, and when it is left to torch."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.cpu.layers import PROJECTIONS, Projection
from zeta.nn import MultiheadAttention
from zeta.nn.projections import project_together
from zeta.ops.backends.cpu import library, projection

pytestmark = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no native kernels: {library.obstacle()}"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def assert_exact(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within what float32 sums of so many products can be off, and one rounding to the dtype."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = F.linear(
        x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs()
    )
    allowed = 2 * EPSILON[torch.float32] * size + EPSILON[x.dtype] * exact.abs()
    assert actual.dtype == x.dtype
    assert bool(((actual.double() - exact).abs() <= allowed + 1e-30).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PROJECTIONS, ids=lambda case: case.name)
@pytest.mark.parametrize("instructions", library.INSTRUCTION_SETS)
def test_outputs(
    case: Projection, dtype: torch.dtype, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = library.load()
    if instructions not in native.usable:
        pytest.skip(f"no {instructions} here")
    number = library.INSTRUCTION_SETS.index(instructions) + 1
    monkeypatch.setattr(native, "instruction_set", number)
    monkeypatch.setattr(projection, "MOST_ROWS_BESIDE_TILES", projection.MOST_ROWS)
    x, layers = case.tensors(dtype)
    for out, (weight, bias) in zip(case.run(x, layers).values(), layers, strict=True):
        assert_exact(out, x, weight, bias)


def test_the_bound_catches_one_wrong_product() -> None:
    x, ((weight, bias), *_) = PROJECTIONS[0].tensors(torch.float32)
    out = F.linear(x, weight, bias)
    assert_exact(out, x, weight, bias)
    wrong = weight.clone()
    wrong[5, 7] += 0.001
    with pytest.raises(AssertionError):
        assert_exact(F.linear(x, wrong, bias), x, weight, bias)


def test_results_do_not_depend_on_threads() -> None:
    x, layers = Projection("wide", rows=3, width=512, features=(512, 512, 512)).tensors(
        torch.float32
    )
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.cat(projection.project(x, layers) or (), dim=-1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_infinities_and_nans_go_where_they_belong() -> None:
    x = torch.tensor([[1.0, float("inf"), float("nan"), 0.0]])
    weight = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, -1.0, 1.0, 0.0]])
    for rows in (x[:, :2], x):
        found = projection.project(rows, [(weight[:, : rows.shape[1]], None)])
        assert found is not None
        expected = F.linear(rows, weight[:, : rows.shape[1]])
        torch.testing.assert_close(found[0], expected, equal_nan=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, w, b: (x.double(), w.double(), b.double()),
        lambda x, w, b: (x, w.bfloat16(), b),
        lambda x, w, b: (x, w, b.bfloat16()),
        lambda x, w, b: (x, w.t().contiguous().t(), b),
        lambda x, w, b: (x, w, b.repeat_interleave(2)[::2]),
        lambda x, w, b: (x.repeat(17, 1), w, b),
        lambda x, w, b: (x[:0], w, b),
        lambda x, w, b: (x[:, :7], w, b),
    ],
    ids=[
        *("float64", "weight's dtype", "bias's dtype", "weight transposed", "bias apart"),
        *("rows", "no rows", "width"),
    ],
)
def test_what_is_left_to_torch(
    spoil: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> None:
    x, weight, bias = torch.randn(1, 8), torch.randn(16, 8), torch.randn(16)
    assert projection.project(x, [(weight, bias)]) is not None
    x, weight, bias = spoil(x, weight, bias)
    assert projection.project(x, [(weight, bias)]) is None


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_whatever_watches_torch_sees_it_compute() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(1, 2, 8)
    assert project_together(x, layer) is None  # The weights have a gradient.
    with torch.no_grad():
        assert project_together(x, layer) is not None
        for watching in (_Dispatch(), _Function(), torch.autocast("cpu", dtype=torch.bfloat16)):
            with watching:
                assert project_together(x, layer) is None
        assert project_together(x.repeat(1, 9, 1), layer) is None
        assert torch.func.vmap(lambda x: layer(x))(x).shape == (1, 2, 4)


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
def test_modules_that_do_more_than_multiply_are_called() -> None:
    """A step of an attention whose projection is another module, or hooked into, or replaced."""
    x = torch.randn(1, 1, 16)
    plain = MultiheadAttention(None, 16, 2, self_attention=True, need_weights=False).eval()
    expected = plain(x, x, x)[0]

    def doubles(spoil: Callable[[nn.Linear], object]) -> None:
        module = copy.deepcopy(plain)
        before = module.out_proj
        spoil(before)
        torch.testing.assert_close(module(x, x, x)[0], 2 * expected)

    doubles(lambda layer: layer.register_forward_hook(lambda module, args, out: 2 * out))
    doubles(
        lambda layer: setattr(layer, "forward", lambda x: 2 * F.linear(x, layer.weight, layer.bias))
    )
    doubles(lambda layer: setattr(layer, "__class__", _Doubled))

    def halve_input(layer: nn.Linear) -> None:
        layer.bias.mul_(2)
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))

    doubles(halve_input)

    def parametrize(layer: nn.Linear) -> None:
        class Twice(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return 2 * weight

        layer.bias.mul_(2)
        nn.utils.parametrize.register_parametrization(layer, "weight", Twice())

    doubles(parametrize)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 2 * out if module is plain.out_proj else None
    )
    try:
        torch.testing.assert_close(plain(x, x, x)[0], 2 * expected)
    finally:
        handle.remove()


def test_a_step_of_the_module_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four projections of a self-attention, in two passes; one of a cross-attention's query."""
    calls: list[int] = []
    project = projection.project

    def counted(x: Tensor, layers: list[projection.Layer]) -> tuple[Tensor, ...] | None:
        calls.append(len(layers))
        return project(x, layers)

    monkeypatch.setattr(projection, "project", counted)
    module = MultiheadAttention(None, 16, 2, self_attention=True, need_weights=False).eval()
    cross = MultiheadAttention(None, 16, 2, encoder_decoder_attention=True).eval()
    x, source = torch.randn(1, 1, 16), torch.randn(1, 40, 16)
    with torch.no_grad():
        module(x, x, x)
        assert calls == [3, 1]
        cross(x, source, source)
        assert calls == [3, 1, 1, 1]


def test_a_record_of_another_version_is_refused() -> None:
    record = projection._PROJECTION.pack(8, *[0] * (projection.NUM_BYTES // 8 - 1))
    with pytest.raises(RuntimeError, match="another version"):
        library.check(library.load().project(record))
