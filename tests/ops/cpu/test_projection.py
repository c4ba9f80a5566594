"""Linear layers of a few rows: the native pass against float64, and when it is left to torch."""

import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import zeta
from tests.nn.doubled_layers import DOUBLED
from tests.ops.cpu import units
from tests.ops.cpu.layers import PROJECTIONS, Projection
from zeta.nn import MultiheadAttention
from zeta.nn.projections import project as project_module
from zeta.nn.projections import project_heads
from zeta.ops import plain
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


@pytest.mark.usefixtures("unit")
@units.on_each(units.FEW_ROWS)
@pytest.mark.parametrize("case", PROJECTIONS, ids=lambda case: case.name)
def test_outputs(case: Projection, dtype: torch.dtype) -> None:
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
            found.append(torch.cat(projection.project_heads(x, layers, 64) or (), dim=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_infinities_and_nans_go_where_they_belong() -> None:
    x = torch.tensor([[1.0, float("inf"), float("nan"), 0.0]])
    weight = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, -1.0, 1.0, 0.0]])
    for rows in (x[:, :2], x):
        found = projection.project(rows, (weight[:, : rows.shape[1]], None))
        assert found is not None
        expected = F.linear(rows, weight[:, : rows.shape[1]])
        torch.testing.assert_close(found, expected, equal_nan=True)


Spoil = Callable[[Tensor, Tensor, Tensor], tuple[object, object, object]]


class _Subclass(Tensor):
    pass


SPOILT: dict[str, Spoil] = {
    "float64": lambda x, w, b: (x.double(), w.double(), b.double()),
    "the weight's dtype": lambda x, w, b: (x, w.bfloat16(), b),
    "the bias's dtype": lambda x, w, b: (x, w, b.bfloat16()),
    "a weight transposed": lambda x, w, b: (x, w.t().contiguous().t(), b),
    "a bias apart": lambda x, w, b: (x, w, b.repeat_interleave(2)[::2]),
    "a bias of another length": lambda x, w, b: (x, w, b[:8]),
    "a bias of two dimensions": lambda x, w, b: (x, w, b[None]),
    "a weight of one dimension": lambda x, w, b: (x, w[0], b),
    "a weight without features": lambda x, w, b: (x, w[:0], b[:0]),
    "rows apart": lambda x, w, b: (x.repeat(1, 2, 2)[..., :8], w, b),
    "too many rows": lambda x, w, b: (x.repeat(1, 65, 1), w, b),
    "no rows": lambda x, w, b: (x[:, :0], w, b),
    "a width": lambda x, w, b: (x[..., :7], w, b),
    "another device": lambda x, w, b: (x, w.to("meta"), b),
    "a sparse weight": lambda x, w, b: (x, w.to_sparse(), b),
    "a subclass": lambda x, w, b: (x, w.as_subclass(_Subclass), b),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_left_to_torch(name: str) -> None:
    x, weight, bias = torch.randn(1, 1, 8), torch.randn(16, 8), torch.randn(16)
    assert projection.project(x, (weight, bias)) is not None
    assert projection.project_heads(x, [(weight, bias)], 4) is not None
    x, weight, bias = SPOILT[name](x, weight, bias)  # type: ignore[assignment]
    assert projection.project(x, (weight, bias)) is None
    assert projection.project_heads(x, [(weight, bias)], 4) is None
    assert projection.project_heads(x, [(weight, None), (weight, bias)], 4) is None


def test_heads_that_do_not_divide_are_left_to_torch() -> None:
    x, layer = torch.randn(1, 1, 8), (torch.randn(16, 8), None)
    for head_dim in (3, 0, -4, 32):
        assert projection.project_heads(x, [layer], head_dim) is None
    assert projection.project_heads(x[0], [layer], 4) is None
    assert projection.project_heads(x, [layer] * 4, 4) is None


def test_rows_of_bfloat16_are_bounded_by_their_width() -> None:
    def is_taken(rows: int, width: int) -> bool:
        x, weight = torch.randn(1, rows, width), torch.randn(8, width)
        return projection.project(x.bfloat16(), (weight.bfloat16(), None)) is not None

    if library.load().has_tiles:
        assert is_taken(4, 64)
        assert not is_taken(5, 64)
    else:
        assert is_taken(64, 512)
        assert is_taken(16, 4096)
        assert not is_taken(33, 1024)


def test_the_builtins_refuse_what_they_cannot_read() -> None:
    direct = library.load().direct
    assert direct is not None
    x, out, weight = torch.randn(1, 1, 8), torch.zeros(1, 1, 16), torch.randn(16, 8)
    options = (64, 1)
    assert direct.project(x, out, *options, weight, None) == library.DONE
    torch.testing.assert_close(out, F.linear(x, weight))
    wrong: list[tuple[object, ...]] = [
        (),
        (x, out, *options, weight),
        (x, out, *options, weight, None, weight, None),
        (x, out, "64", 1, weight, None),
        (x, out, *options, weight, 0),
        (x, out, *options, None, None),
        (None, out, *options, weight, None),
        (x, out[..., :15], *options, weight, None),
        (x, torch.zeros(1, 2, 16), *options, weight, None),
        (x, torch.zeros(1, 1, 32)[..., ::2], *options, weight, None),
        (x, out.double(), *options, weight, None),
        (x, torch.zeros(()), *options, weight, None),
    ]
    for arguments in wrong:
        assert direct.project(*arguments) == library.NOT_PLAIN, arguments
        assert direct.project_heads(*arguments) == library.NOT_PLAIN, arguments


def test_heads_are_tensors_like_any_others() -> None:
    """They outlive what they were made from, can be written to, and their memory is given back."""
    x, layers = torch.randn(2, 3, 16), [(torch.randn(32, 16), None), (torch.randn(16, 16), None)]
    made = projection.project_heads(x, layers, 8)
    assert made is not None
    expected = [F.linear(x, weight).view(2, 3, -1, 8).transpose(1, 2) for weight, _ in layers]
    first, second = made
    del made, layers
    torch.testing.assert_close(first, expected[0])
    assert first.stride() == expected[0].stride()
    first.mul_(2)
    torch.testing.assert_close(first, 2 * expected[0])
    torch.testing.assert_close(second, expected[1])
    with torch.inference_mode():
        inside = projection.project_heads(x, [(torch.randn(8, 16), None)], 8)
        assert inside is not None
        assert inside[0].is_inference()
    assert pickle.loads(pickle.dumps(first)).equal(first)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_whatever_watches_torch_sees_it_compute() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(1, 2, 8)

    def heads() -> tuple[Tensor, ...] | None:
        return project_heads(x, [layer], 4)

    assert heads() is None  # The weights have a gradient.
    assert project_module(x, layer).requires_grad
    with torch.no_grad():
        assert heads() is not None
        for watching in (_Dispatch(), _Function(), torch.autocast("cpu", dtype=torch.bfloat16)):
            with watching:
                assert heads() is None
        assert project_heads(x.repeat(1, 33, 1), [layer], 4) is None
        mapped = torch.func.vmap(lambda x: project_module(x, layer))(x[None])
        torch.testing.assert_close(mapped[0], layer(x))
    layer.requires_grad_(False)
    assert heads() is not None
    x.requires_grad_()
    assert heads() is None


@torch.no_grad()
@pytest.mark.parametrize("way", DOUBLED)
def test_modules_that_do_more_than_multiply_are_called(way: str) -> None:
    """A step of an attention whose projection is another module, or hooked into, or replaced."""
    x = torch.randn(1, 1, 16)
    module = MultiheadAttention(None, 16, 2, self_attention=True, need_weights=False).eval()
    expected = 2 * module(x, x, x)[0]
    DOUBLED[way](module.out_proj)
    torch.testing.assert_close(module(x, x, x)[0], expected)


@torch.no_grad()
def test_hooks_on_all_modules_are_called() -> None:
    x = torch.randn(1, 1, 16)
    module = MultiheadAttention(None, 16, 2, self_attention=True, need_weights=False).eval()
    expected = 2 * module(x, x, x)[0]
    handle = nn.modules.module.register_module_forward_hook(
        lambda of, args, out: 2 * out if of is module.out_proj else None
    )
    try:
        torch.testing.assert_close(module(x, x, x)[0], expected)
    finally:
        handle.remove()


@torch.no_grad()
def test_a_linear_layer_that_somebody_replaced_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer = torch.randn(1, 1, 8), nn.Linear(8, 8)
    expected = 2 * layer(x)
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: 2 * F.linear(x, self.weight, self.bias)
    )
    torch.testing.assert_close(project_module(x, layer), expected)
    assert project_heads(x, [layer], 4) is None


def test_a_step_of_the_module_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four projections of a self-attention, in two passes; one of a cross-attention's query."""
    calls: list[int] = []
    project, heads = projection.project, projection.project_heads

    def counted(x: Tensor, layer: projection.Layer) -> Tensor | None:
        calls.append(1)
        return project(x, layer)

    def counted_heads(
        x: Tensor, layers: list[projection.Layer], head_dim: int
    ) -> tuple[Tensor, ...] | None:
        calls.append(len(layers))
        return heads(x, layers, head_dim)

    monkeypatch.setattr(projection, "project", counted)
    monkeypatch.setattr(projection, "project_heads", counted_heads)
    module = MultiheadAttention(None, 16, 2, self_attention=True, need_weights=False).eval()
    cross = MultiheadAttention(None, 16, 2, encoder_decoder_attention=True).eval()
    x, source = torch.randn(1, 1, 16), torch.randn(1, 70, 16)
    with torch.no_grad():
        module(x, x, x)
        assert calls == [3, 1]
        cross(x, source, source)
        assert calls == [3, 1, 1, 1]


def test_beside_a_torch_without_the_table_torch_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer = torch.randn(1, 1, 8), nn.Linear(8, 8)
    native = library.load()
    assert native.direct is not None
    monkeypatch.setattr(native, "direct", None)
    assert projection.project(x, (layer.weight, layer.bias)) is None
    assert projection.project_heads(x, [(layer.weight, layer.bias)], 4) is None
    q = torch.randn(1, 1, 1, 8)
    assert plain.attend(q, q, q, None, None) is None
    torch.testing.assert_close(zeta.attention(q, q, q), q)
