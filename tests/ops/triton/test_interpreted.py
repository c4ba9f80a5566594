"""The kernels in Triton's interpreter, against the reference in float64: every feature, small."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests.ops.bound import assert_within_bound
from tests.ops.cases import T5, T5_CAUSAL, Case, taken, widened
from zeta import (
    BackendUnsupported,
    attention,
    attention_weights,
    attention_with_lse,
    biases,
    explain,
    masks,
)
from zeta.ops.backends.triton import arguments, configs, gradients, passes

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
    ),
    # Of numpy: the interpreter makes scalars of arrays, and exponentials of infinities.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SMALL = [case for case in taken("triton") if case.target <= 9]
HALF_AND_FULL = [torch.float16, torch.float32]


def _tiled(name: str, **changes: object) -> Case:
    """Several tiles of rows and columns, none of them full at the end; fewer queries than keys."""
    sizes = {"batch": 2, "heads": 2, "key_heads": 1, "target": 70, "source": 101, "head_dim": 12}
    return Case(name, **(sizes | changes))  # type: ignore[arg-type]


def _t5_and_dense(made: dict[str, Tensor]) -> biases.Bias:
    return biases.Bucketed(made["table"], max_distance=9) + biases.Dense(made["bias"])


NEAR = {
    "learned": {"table": (8, 2)},
    "bias": lambda made: biases.Bucketed(made["table"], max_distance=9),
}
NOTHING_FAR = torch.zeros(8, 1).index_fill_(0, torch.tensor([3, 7]), float("-inf"))
"""Added to a table, hides what lies in the last bucket of each side."""
TILED = [
    _tiled("tiled", target=130),
    _tiled("tiled t5, nothing far", learned=NEAR["learned"], target=130,
           bias=lambda made: biases.Bucketed(made["table"] + NOTHING_FAR, max_distance=9)),
    _tiled("tiled t5", **NEAR),
    _tiled("tiled t5 causal", **NEAR, mask=masks.Causal),
    _tiled(
        "tiled t5 prefix padding", **NEAR, source=70,
        mask=lambda: masks.PrefixLM(torch.tensor([40, 3])) & masks.Padding(torch.tensor([64, 70])),
    ),
    _tiled("tiled t5 window", **NEAR, mask=lambda: masks.SlidingWindow(38)),
    _tiled(
        "tiled t5, then softcap", learned=NEAR["learned"],
        bias=lambda made: biases.Bucketed(made["table"], max_distance=9) + biases.Softcap(2.0),
    ),
    _tiled(
        "tiled softcap, then alibi", learned={"slopes": (2,)}, source=70,
        bias=lambda made: biases.Softcap(2.0) + biases.Alibi(made["slopes"]),
    ),
    _tiled(
        "tiled documents", source=70,
        mask=lambda: masks.Documents(torch.arange(70).div(13).long().expand(2, 70)),
    ),
    _tiled(
        "tiled everything", source=70, dropout_p=0.2, bias=_t5_and_dense, key_heads=2,
        learned={"table": (8, 2), "bias": (1, 1, 70, 70)},
        mask=lambda: masks.Causal() & masks.Padding(torch.tensor([70, 41])),
    ),
    _tiled("tiled bias of keys", learned={"bias": (1, 2, 1, 101)},
           bias=lambda made: biases.Dense(made["bias"])),
]  # fmt: skip
SPLIT = [
    _tiled("split", target=1, source=150, heads=4, key_heads=2),
    _tiled("split t5 causal", target=5, source=170, heads=4, key_heads=2, **T5_CAUSAL),
    _tiled(
        "split tiles of rows", target=25, source=140, heads=4, key_heads=2, dropout_p=0.2,
        mask=lambda: masks.SlidingWindow(70),
    ),
    _tiled(
        "split window padding dropout", target=3, source=140, dropout_p=0.2,
        mask=lambda: masks.SlidingWindow(60) & masks.Padding(torch.tensor([140, 20])),
    ),
    _tiled(
        "split dense, then softcap", target=4, source=133, learned={"bias": (1, 2, 4, 133)},
        bias=lambda made: biases.Dense(made["bias"]) + biases.Softcap(3.0),
    ),
]  # fmt: skip


def _id(case: Case) -> str:
    return case.name


def _check(case: Case, dtype: torch.dtype) -> None:
    made = case.tensors(dtype)
    low, oracle = case.run(made, "reference"), case.run(widened(made), "reference")
    # What is not written yet is NaN.
    torch.use_deterministic_algorithms(True)
    try:
        actual = case.run(made, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_within_bound(actual, low, oracle)


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=_id)
def test_small_calls(case: Case, dtype: torch.dtype) -> None:
    _check(case, dtype)


@pytest.mark.parametrize("limit", [5.0, 50.0, 1e4])
def test_soft_caps_far_above_the_scores_are_exact_in_float32(limit: float) -> None:
    _check(Case("softcap", bias=lambda made: biases.Softcap(limit)), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("case", TILED, ids=_id)
def test_calls_of_several_tiles(case: Case) -> None:
    _check(case, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("case", SPLIT, ids=_id)
@pytest.mark.parametrize("most_splits", [passes.MAX_SPLITS, 1])
def test_few_queries_over_many_keys(
    case: Case, dtype: torch.dtype, most_splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "MAX_SPLITS", most_splits)
    _check(case, dtype)


@pytest.mark.parametrize(
    ("queries", "heads", "most_splits", "kernels"),
    [
        (17, 1, passes.MAX_SPLITS, ["split_kernel", "merge_kernel"]),
        (16, 1, 1, ["split_kernel"]),
        (17, 2, 1, ["split_kernel"]),
        (17, 1, 1, ["forward_kernel"]),
    ],
)
def test_few_queries_are_packed_or_split_where_that_is_of_use(
    queries: int, heads: int, most_splits: int, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(passes, "MAX_SPLITS", most_splits)
    monkeypatch.setattr(passes, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    key = torch.randn(1, 1, 128, 16)
    attention(torch.randn(1, heads, queries, 16), key, key, backend="triton")
    assert launched == kernels


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [(16, 32), (64, 16)], ids=str)
def test_other_tiles(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "INTERPRETED", configs.Tiles(*tiles, num_warps=4, num_stages=1))
    _check(_tiled("t5 causal", **NEAR, mask=masks.Causal, batch=1), torch.float16)
    _check(_tiled("t5", **NEAR, batch=1, target=40), torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in TILED if "t5" in case.name], ids=_id)
def test_biases_written_out_for_the_tiles_that_their_band_cuts(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "SPREAD_SCORES", 0)
    written = []

    def spread(*operands: Any, **how: Any) -> object:
        written.append(operands)
        return arguments.spread_from(*operands, **how)

    monkeypatch.setattr(gradients, "spread_from", spread)
    _check(case, torch.float16)
    assert written


def test_only_the_first_axis_of_a_grid_grows_with_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes no more than 65535 programs on the others."""
    grids = []

    def launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
        grids.append(grid)
        arguments.launch(kernel, grid, *operands, **constants)

    monkeypatch.setattr(gradients, "launch", launch)
    slopes, query = torch.ones(2, requires_grad=True), torch.randn(1, 2, 150, 16)
    for length in (50, 150):
        x = query[:, :, :length]
        out = attention(x, x, x, bias=biases.Alibi(slopes), backend="triton")
        torch.autograd.grad(out.sum(), slopes)
    half = len(grids) // 2
    assert grids[:half] != grids[half:]
    assert [grid[1:] for grid in grids[:half]] == [grid[1:] for grid in grids[half:]]


@pytest.mark.slow
@pytest.mark.parametrize("reduce", [None, "mean"])
@pytest.mark.parametrize(
    "case",
    [
        _tiled("weights", batch=1, source=70),
        _tiled("weights t5 causal", **NEAR, mask=masks.Causal, batch=1),
        _tiled("weights dense", learned={"bias": (1, 2, 1, 101)},
               bias=lambda made: biases.Dense(made["bias"])),
        Case("weights softcap", **T5, target=20, source=20),
        Case("weights of an empty row", mask=lambda: masks.Padding(torch.tensor([0, 5]))),
    ],
    ids=_id,
)  # fmt: skip
def test_weights(case: Case, reduce: str | None) -> None:
    made = case.tensors(torch.float32)
    actual = case.run_weights(made, "triton", reduce)
    low = case.run_weights(made, "reference", reduce)
    assert_within_bound(actual, low, case.run_weights(widened(made), "reference", reduce))


def test_nan_in_padding_does_not_leak() -> None:
    case = Case("padding", mask=lambda: masks.Padding(torch.tensor([7, 3])) & masks.Causal())
    clean, planted = case.tensors(torch.float16), case.tensors(torch.float16)
    with torch.no_grad():
        for name in ("key", "value"):
            planted[name][1, :, 3:] = float("nan")
    expected, actual = case.run(clean, "triton"), case.run(planted, "triton")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)


@pytest.mark.parametrize("transposed", [False, True])
def test_masks_whose_rows_or_columns_lie_beyond_31_bits(transposed: bool) -> None:
    apart = 1 << 28
    # Of the memory only what is written to is ever there.
    keep = torch.empty(15 * apart + 16, dtype=torch.bool).as_strided((16, 16), (apart, 1))
    keep = (keep.T if transposed else keep).copy_(torch.rand(16, 16) < 0.5)[None, None]
    query, key, value = (torch.randn(1, 1, 16, 16) for _ in range(3))

    def attended(mask: Tensor, backend: str) -> Tensor:
        return attention(query, key, value, mask=masks.Dense(mask), backend=backend)

    torch.testing.assert_close(attended(keep, "triton"), attended(keep.clone(), "reference"))


@pytest.mark.slow
def test_two_runs_give_the_same_bits() -> None:
    case = _tiled("same", **NEAR, dropout_p=0.1, batch=1, target=40)
    made = case.tensors(torch.float16)
    first, second = case.run(made, "triton"), case.run(made, "triton")
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
def test_the_whole_call_is_one_graph_under_compile() -> None:
    query, key, value = (torch.randn(1, 2, 20, 16).requires_grad_() for _ in range(3))
    table = torch.randn(8, 2, requires_grad=True)

    def run(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        bias = biases.Bucketed(table, max_distance=9)
        return attention(query, key, value, bias=bias, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = (query, key, value, table)
    out, expected = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.sum(), leaves)
    for got, want in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_operators_keep_the_contract_of_torch_library() -> None:
    from zeta.ops.backends.triton import operators

    query, key, value = (torch.randn(1, 2, 5, 16).requires_grad_() for _ in range(3))
    offsets = torch.randn(2, 7, requires_grad=True)
    fixed = ([None] * 9, 0.25, True, 0, 0.0, False, 0.0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        operators.attention.overload, (query, key, value, offsets, None, *fixed), test_utils=checks
    )
    torch.library.opcheck(
        operators.weights.overload, (query, key, offsets, None, True, *fixed), test_utils=checks
    )


@pytest.mark.parametrize(
    "attend",
    [
        lambda query: attention_weights(query, query, backend="triton"),
        lambda query: attention(query, query, query, dropout_p=0.2, seed=1, backend="triton"),
    ],
    ids=["weights", "output"],
)
def test_second_derivatives_are_refused(attend: Callable[[Tensor], Tensor]) -> None:
    query = torch.randn(1, 1, 5, 16, requires_grad=True)
    loss = attend(query).square().sum()
    (plain,) = torch.autograd.grad(loss, query, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, query, create_graph=True)
    torch.testing.assert_close(grad, plain)
    with pytest.raises(RuntimeError, match=r"second derivatives use backend='reference'"):
        grad.sum().backward()


def test_without_gradients_it_is_the_same() -> None:
    query = torch.randn(1, 2, 5, 16, requires_grad=True)

    def results() -> tuple[Tensor, ...]:
        call: dict[str, Any] = {"dropout_p": 0.3, "seed": 1, "backend": "triton"}
        weights = attention_weights(query, query, mask=masks.Causal(), backend="triton")
        return *attention_with_lse(query, query, query, mask=masks.Causal(), **call), weights

    expected = results()
    with torch.no_grad():
        for found, other in zip(results(), expected, strict=True):
            assert torch.equal(found, other)
            assert not found.requires_grad


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("function", [attention, attention_with_lse, attention_weights])
def test_many_gradients_at_once(function: Callable[..., Any], create_graph: bool) -> None:
    leaves = [torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(3)]
    leaves.append(torch.randn(1, 2, 5, 5, requires_grad=True))
    *operands, bias = leaves
    if function is attention_weights:
        operands, leaves = operands[:2], [*operands[:2], bias]
    found = function(*operands, bias=biases.Dense(bias), backend="triton")
    outputs = found if isinstance(found, tuple) else (found,)
    many = [torch.randn(3, *output.shape) for output in outputs]

    def gradients(incoming: list[Tensor], *, batched: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outputs, leaves, incoming, retain_graph=True, create_graph=create_graph,
            is_grads_batched=batched,
        )  # fmt: skip

    expected = [gradients(list(one), batched=False) for one in zip(*many, strict=True)]
    for batch, *each in zip(gradients(many, batched=True), *expected, strict=True):
        assert torch.equal(batch, torch.stack(each))


def test_transforms_of_torch_func_are_refused() -> None:
    query = torch.randn(1, 2, 5, 16)

    def total(query: Tensor) -> Tensor:
        return attention(query, query, query, backend="triton").sum()

    with pytest.raises(BackendUnsupported, match=r"torch\.func does not wrap"):
        torch.func.grad(total)(query)


def test_what_traces_sees_the_operator() -> None:
    query = torch.randn(1, 2, 5, 16)
    traced = make_fx(lambda query: attention(query, query, query, backend="triton"))(query)
    assert "zeta.triton_attention" in traced.code
    query = torch.randn(1, 2, 5, 16)
    torch.testing.assert_close(traced(query), attention(query, query, query, backend="triton"))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "words"),
    [
        (torch.float64, 8, "no kernels for torch.float64"),
        (torch.float32, 264, "head_dim goes up to 256; got 264 and 264"),
        (torch.bfloat16, 8, "interpreter multiplies no bfloat16"),
    ],
)
def test_refusals_say_why(dtype: torch.dtype, head_dim: int, words: str) -> None:
    tensor = torch.randn(1, 1, 4, head_dim, dtype=dtype)
    with pytest.raises(BackendUnsupported, match=words):
        attention(tensor, tensor, tensor, backend="triton")


def test_refusals_of_masks_and_biases_say_why() -> None:
    tensor = torch.randn(1, 1, 4, 8)
    either = masks.Causal() | masks.keep(torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(BackendUnsupported, match="the mask AnyOf"):
        attention(tensor, tensor, tensor, mask=either, backend="triton")
    dense = biases.Dense(torch.zeros(4, 4))
    with pytest.raises(BackendUnsupported, match="before or after everything"):
        attention(
            tensor, tensor, tensor, bias=dense + biases.Softcap(1.0) + dense, backend="triton"
        )


def test_without_the_interpreter_a_cpu_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    tensor = torch.randn(1, 1, 4, 8)
    assert explain(tensor, tensor, tensor).reasons["triton"] == ("it needs a CUDA device",)
    with pytest.raises(BackendUnsupported, match="needs a CUDA device"):
        attention_weights(tensor, tensor, backend="triton")
