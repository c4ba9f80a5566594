"""What is special to the chunked backend: blocks, vectors of offsets, operators, memory."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.cases import assert_within_bound
from zeta import biases, masks
from zeta.ops.backends import chunked, reference
from zeta.ops.backends.chunked import blocks, functions, operators, passes, products
from zeta.ops.backends.chunked.description import Plan
from zeta.ops.backends.chunked.offsets import sum_diagonals
from zeta.ops.call import AttentionCall

Results = dict[str, Tensor]
MASKS: dict[str, Callable[[int, int], masks.Mask | None]] = {
    "none": lambda target, source: None,
    "causal": lambda target, source: masks.Causal(),
    "window": lambda target, source: masks.SlidingWindow(70),
    "padding": lambda target, source: (
        masks.Padding(torch.tensor([source - 90, source])) & masks.Causal()
    ),
    "prefix": lambda target, source: masks.PrefixLM(torch.tensor([150, 1])),
    "dense": lambda target, source: masks.keep(torch.rand(2, 1, target, source) < 0.7),
    "either": lambda target, source: masks.SlidingWindow(9) | masks.Padding(torch.tensor([40, 0])),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 48 rows and units of few heads, so that small calls have many of them."""
    monkeypatch.setattr(passes, "_MANY_SCORES", 2**30)
    monkeypatch.setattr(blocks, "ROWS", (48, 48))
    monkeypatch.setattr(blocks, "BOUNDED_ROWS", 48)
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", 2**14)
    monkeypatch.setattr(blocks, "SINGLE_ELEMENTS", 2**11)


def make(
    target: int = 190,
    source: int = 201,
    heads: int = 4,
    key_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    head_dim: int = 8,
) -> Results:
    """Fresh leaves for two sequences."""
    shapes = {
        "query": (2, heads, target, head_dim),
        "key": (2, key_heads, source, head_dim),
        "value": (2, key_heads, source, head_dim + 3),
        "table": (12, heads),
    }
    return {
        name: torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def bucketed(made: Results) -> biases.Bucketed:
    return biases.Bucketed(made["table"], max_distance=20)


def outcome(
    backend: object, made: Results, *, bias: biases.Bias | None = None, **arguments: object
) -> Results:
    """Output, log-sum-exp, and gradients of all leaves through both."""
    leaves = {name: leaf for name, leaf in made.items() if bias is not None or name != "table"}
    call = AttentionCall.checked(
        made["query"], made["key"], made["value"], bias=bias, result="lse", **arguments
    )
    out, lse = backend.run(call)
    return {"out": out, "lse": lse} | gradients([out, lse.nan_to_num(neginf=0.0)], leaves)


def outcome_of_weights(
    backend: object,
    made: Results,
    result: str,
    *,
    bias: biases.Bias | None = None,
    **arguments: object,
) -> Results:
    """Weights, and gradients of the leaves they depend on."""
    used = ("query", "key") if bias is None else ("query", "key", "table")
    call = AttentionCall.checked(
        made["query"], made["key"], made["value"], bias=bias, result=result, **arguments
    )
    weights = backend.weights(call)
    return {"weights": weights} | gradients([weights], {name: made[name] for name in used})


def gradients(results: list[Tensor], leaves: Results) -> Results:
    generator = torch.Generator().manual_seed(0)
    grads = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results
    ]
    found = torch.autograd.grad(results, list(leaves.values()), grads)
    return {f"grad {name}": grad for name, grad in zip(leaves, found, strict=True)}


def assert_same(actual: Results, expected: Results, tolerance: float = 1e-11) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("positions", ["by index", "explicit"])
@pytest.mark.parametrize("mask", MASKS)
def test_many_blocks_give_what_the_textbook_gives(mask: str, positions: str) -> None:
    made = make()
    arguments: dict[str, object] = {"mask": MASKS[mask](190, 201), "dropout_p": 0.2, "seed": 5}
    if positions == "explicit":
        arguments["query_positions"] = torch.arange(190) + 30
        arguments["key_positions"] = torch.stack([torch.arange(201) - 3, torch.arange(201).flip(0)])
    actual = outcome(chunked, made, bias=bucketed(made), **arguments)
    assert_same(actual, outcome(reference, made, bias=bucketed(made), **arguments))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("result", ["weights", "mean_weights"])
@pytest.mark.parametrize("mask", MASKS)
def test_weights_of_many_blocks(mask: str, result: str) -> None:
    made, value = make(), MASKS[mask](190, 201)
    actual = outcome_of_weights(chunked, made, result, mask=value, bias=bucketed(made))
    assert_same(
        actual, outcome_of_weights(reference, made, result, mask=value, bias=bucketed(made))
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mask", MASKS)
def test_skipping_hidden_blocks_changes_nothing(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, value = make(), MASKS[mask](190, 201)
    skipped = outcome(chunked, made, mask=value)
    monkeypatch.setattr(blocks, "_columns", lambda call, rows: slice(0, call.source))
    monkeypatch.setattr(blocks, "_partial", lambda call, rows, columns: iter([columns]))
    assert_same(skipped, outcome(chunked, made, mask=value))


def test_a_causal_mask_halves_the_scores_and_a_window_bounds_them(small_blocks: None) -> None:
    def scores(mask: masks.Mask | None) -> int:
        made = make(480, 480)
        call = AttentionCall.checked(made["query"], made["key"], made["value"], mask=mask)
        return sum(b.num_rows * (b.columns.stop - b.columns.start) for b in blocks.blocks(call))

    assert scores(None) == 480 * 480
    assert scores(masks.Causal()) == 48 * 48 * (10 * 11 // 2)
    assert scores(masks.SlidingWindow(30)) <= 480 * (48 + 29)


def test_only_the_diagonal_is_masked(small_blocks: None) -> None:
    made = make(480, 480)
    call = AttentionCall.checked(made["query"], made["key"], made["value"], mask=masks.Causal())
    for block in blocks.blocks(call):
        (run,) = block.partial
        assert run.start > block.rows.start - blocks.SEGMENT
        assert run.stop == block.columns.stop == block.rows.stop


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_size_of_blocks_does_not_matter(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(dtype=dtype)
    arguments: dict[str, object] = {"mask": masks.Causal(), "dropout_p": 0.3, "seed": 8}
    whole = outcome(chunked, made, bias=bucketed(made), **arguments)
    for rows, elements in ((16, 2**10), (37, 2**13), (512, 2**10)):
        monkeypatch.setattr(blocks, "ROWS", (rows, rows))
        monkeypatch.setattr(blocks, "BOUNDED_ROWS", rows)
        monkeypatch.setattr(blocks, "CPU_ELEMENTS", elements)
        monkeypatch.setattr(blocks, "SINGLE_ELEMENTS", elements)
        tolerance = 1e-11 if dtype == torch.float64 else 3e-5
        assert_same(outcome(chunked, made, bias=bucketed(made), **arguments), whole, tolerance)


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
def test_products_of_single_heads_are_as_exact(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(dtype=torch.float32, head_dim=64)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in made.items()}
    arguments: dict[str, object] = {"mask": masks.Causal(), "dropout_p": 0.1, "seed": 8}
    oracle = outcome(reference, wide, bias=bucketed(wide), **arguments)
    low = outcome(reference, made, bias=bucketed(made), **arguments)
    assert products.prefers_single_heads(torch.device("cpu"), torch.float32)
    assert_within_bound(outcome(chunked, made, bias=bucketed(made), **arguments), low, oracle)
    monkeypatch.setattr(products, "_onednn_linear", lambda: None)
    assert not products.prefers_single_heads(torch.device("cpu"), torch.float32)
    assert_within_bound(outcome(chunked, made, bias=bucketed(made), **arguments), low, oracle)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (7, 3), (5, 5)])
def test_sums_of_diagonals(rows: int, width: int) -> None:
    matrix = torch.randn(2, 3, rows, width, dtype=torch.float64)
    expected = [matrix.diagonal(d, -2, -1).sum(-1) for d in range(1 - rows, width)]
    torch.testing.assert_close(sum_diagonals(matrix), torch.stack(expected, -1))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("lengths", [(190, 201), (201, 190), (7, 201), (201, 7)])
@pytest.mark.parametrize("softcap", [False, True])
def test_table_gradients_are_those_through_the_dense_bias(
    bidirectional: bool, lengths: tuple[int, int], softcap: bool
) -> None:
    made = make(*lengths)

    def both(bias: biases.Additive) -> biases.Bias:
        return bias + biases.Softcap(1.5) if softcap else bias

    structured = biases.Bucketed(made["table"], bidirectional=bidirectional, max_distance=20)
    dense = biases.Dense(structured.dense(2, 4, *lengths))
    assert_same(
        outcome(chunked, made, bias=both(structured), mask=masks.Causal()),
        outcome(chunked, made, bias=both(dense), mask=masks.Causal()),
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "shape", [(2, 4, 190, 201), (1, 4, 190, 201), (2, 1, 1, 201), (1, 4, 190, 1), (1, 1, 1, 1)]
)
def test_dense_biases_get_gradients_in_their_own_shape(shape: tuple[int, ...]) -> None:
    made = make() | {"table": torch.randn(shape, dtype=torch.float64, requires_grad=True)}
    dense = biases.Softcap(2.0) + biases.Dense(made["table"])
    actual = outcome(chunked, made, bias=dense, mask=masks.Causal())
    assert actual["grad table"].shape == shape
    assert_same(actual, outcome(reference, made, bias=dense, mask=masks.Causal()))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("explicit", [False, True])
def test_slopes_get_gradients(explicit: bool) -> None:
    made = make() | {"table": torch.rand(4, dtype=torch.float64, requires_grad=True)}
    positions = {"query_positions": torch.arange(190) * 2} if explicit else {}
    alibi = biases.Alibi(made["table"])
    actual = outcome(chunked, made, bias=alibi, **positions)
    assert_same(actual, outcome(reference, made, bias=alibi, **positions), 1e-10)


def test_strided_operands() -> None:
    made = make()
    strided = {
        "query": made["query"]
        .detach()
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)
        .requires_grad_(),
        "key": made["key"].detach().mT.contiguous().mT.requires_grad_(),
        "value": made["value"].detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(),
        "table": made["table"],
    }
    assert_same(
        outcome(chunked, strided, bias=bucketed(made)), outcome(chunked, made, bias=bucketed(made))
    )


def test_expanded_operands_and_incoming_gradients() -> None:
    query = torch.randn(1, 1, 5, 8, dtype=torch.float64).expand(2, 4, 5, 8).requires_grad_()
    made = make(5, 5, key_heads=4) | {"query": query}
    call = AttentionCall.checked(query, made["key"], made["value"], mask=masks.Causal())
    out, _ = chunked.run(call)
    expected, _ = reference.run(call)
    operands = (query, made["key"], made["value"])
    actual_grads = torch.autograd.grad(out.sum(), operands)  # The gradient of a sum is expanded.
    for actual, wanted in zip(
        actual_grads, torch.autograd.grad(expected.sum(), operands), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.usefixtures("small_blocks")
def test_nan_in_hidden_keys_does_not_leak_across_blocks() -> None:
    made = make(dtype=torch.float32)
    mask = masks.Padding(torch.tensor([100, 150])) & masks.Causal()
    clean = outcome(chunked, made, bias=bucketed(made), mask=mask)
    with torch.no_grad():
        for name in ("key", "value"):
            made[name][0, :, 100:] = float("nan")
            made[name][1, :, 150:] = float("inf")
    assert_same(outcome(chunked, made, bias=bucketed(made), mask=mask), clean, 0.0)


def test_nan_keys_are_unseen_by_earlier_queries() -> None:
    made = make()
    clean, _ = chunked.run(
        AttentionCall.checked(made["query"], made["key"], made["value"], mask=masks.Causal())
    )
    with torch.no_grad():
        made["key"][:, :, 100] = float("nan")
    out, _ = chunked.run(
        AttentionCall.checked(made["query"], made["key"], made["value"], mask=masks.Causal())
    )
    torch.testing.assert_close(out[:, :, :89], clean[:, :, :89])
    assert out[:, :, 89:].isnan().all()


class _Largest(TorchDispatchMode):
    """Remembers the most elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(
                    self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize
                )
        return result


def test_nothing_of_target_by_source_is_made(small_blocks: None) -> None:
    length = 1024
    made = make(length, length, heads=2, key_heads=1, dtype=torch.float32)
    mask = masks.Causal() & masks.Padding(torch.tensor([900, length]))
    with _Largest() as seen:
        outcome(
            chunked,
            made,
            bias=bucketed(made) + biases.Softcap(9.0),
            mask=mask,
            dropout_p=0.1,
            seed=2,
        )
    assert 0 < seen.elements < length * length / 8


def test_mean_weights_hold_one_head_at_a_time(small_blocks: None) -> None:
    length = 512
    made = make(length, length, heads=8, key_heads=8, dtype=torch.float32)
    with _Largest() as seen:
        outcome_of_weights(chunked, made, "mean_weights", bias=bucketed(made))
    assert 0 < seen.elements <= 2 * length * length


_PEAK = """
import resource
import torch
from zeta import biases, masks
from zeta.ops.backends import chunked
from zeta.ops.call import AttentionCall

def step(length):
    kept = [torch.randn(1, 8, length, 64).requires_grad_() for _ in range(3)]
    for leaf in kept:
        leaf.grad = torch.zeros_like(leaf)
    table = torch.randn(32, 8, requires_grad=True)
    incoming = torch.randn(1, 8, length, 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call = AttentionCall.checked(
        *kept, mask=masks.Causal(), bias=biases.Bucketed(table), dropout_p=0.1, seed=1)
    chunked.run(call)[0].backward(incoming)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

step(512)  # Libraries, threads, code.
print(step({length}) // 1024)
"""


@pytest.mark.serial
@pytest.mark.parametrize(
    ("length", "most"), [(4096, 320), pytest.param(16384, 1024, marks=pytest.mark.slow)]
)
def test_peak_memory_of_a_training_step(length: int, most: int) -> None:
    """In MiB, over inputs and gradients; one copy of the scores takes 512 MiB and 8 GiB."""
    script = _PEAK.replace("{length}", str(length))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < most


def _packed(**arguments: object) -> tuple[Results, Plan, list[Tensor]]:
    made = make(9, 9)
    call = AttentionCall.checked(made["query"], made["key"], made["value"], **arguments)
    plan, tensors = Plan.of(call)
    return made, plan, [tensor.detach().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("explicit", [False, True])
def test_operators_are_declared_as_they_are(explicit: bool) -> None:
    table = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    positions = (
        {"query_positions": torch.arange(9), "key_positions": torch.arange(9)} if explicit else {}
    )
    made, plan, tensors = _packed(
        mask=masks.Causal() & masks.Padding(torch.tensor([9, 4])),
        bias=biases.Bucketed(table, max_distance=20)
        + biases.Softcap(5.0)
        + biases.Dense(torch.randn(9, 9)),
        dropout_p=0.1,
        seed=3,
        **positions,
    )
    others, spec = plan.pack()
    query, key, value = made["query"], made["key"], made["value"]
    torch.library.opcheck(
        operators.attention, (query, key, value, tensors, others, spec, plan.scale, 0.1)
    )
    for mean in (False, True):
        torch.library.opcheck(
            operators.weights, (query, key, tensors, others, spec, plan.scale, mean)
        )


def test_a_plan_survives_packing() -> None:
    _, plan, _ = _packed(
        mask=masks.SlidingWindow(3) | masks.Documents(torch.zeros(2, 9, dtype=torch.int64)),
        bias=biases.Softcap(2.5) + biases.Alibi(torch.rand(4)),
        dropout_p=0.25,
        seed=3,
        key_positions=torch.arange(9),
    )
    others, spec = plan.pack()
    again = Plan.unpack(others, spec, plan.scale, plan.dropout_p)
    assert again.words == plan.words
    assert again.seed is plan.seed
    assert again.query_positions is None
    assert again.key_positions is plan.key_positions
    assert again.mask is not None
    assert plan.mask is not None
    assert torch.equal(again.mask.dense(2, 4, 9, 9), plan.mask.dense(2, 4, 9, 9))


def test_compiled_calls_give_the_same() -> None:
    made = make(30, 33)

    def run(
        query: Tensor, key: Tensor, value: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = {
            "mask": masks.Causal(),
            "bias": biases.Bucketed(table, max_distance=20) + biases.Softcap(4.0),
        }
        out, lse = chunked.run(AttentionCall.checked(query, key, value, **arguments))
        mean = chunked.weights(
            AttentionCall.checked(query, key, value, result="mean_weights", **arguments)
        )
        return out, lse, mean

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, actual = run(*made.values()), compiled(*made.values())
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    grads = gradients(list(actual), made)
    assert_same(grads, gradients(list(expected), made))


def test_autocast_leaves_the_inside_alone() -> None:
    made = make(dtype=torch.bfloat16)
    operands = (made["query"], made["key"], made["value"])
    expected, expected_lse = chunked.run(AttentionCall.checked(*operands))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = chunked.run(AttentionCall.checked(*operands))
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def _loss(query: Tensor) -> Tensor:
    key = torch.linspace(-1, 1, 40, dtype=torch.float64).view(1, 1, 5, 8)
    out, _ = chunked.run(AttentionCall.checked(query, key, key, mask=masks.Causal()))
    return out.square().sum()


def test_functional_gradients() -> None:
    query = torch.randn(1, 1, 5, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(_loss(query), query)
    torch.testing.assert_close(torch.func.grad(_loss)(query), expected)


def test_vmap_is_refused_with_a_way_out() -> None:
    with pytest.raises(NotImplementedError, match=r"no torch\.func\.vmap; .* backend='reference'"):
        torch.func.vmap(_loss)(torch.randn(3, 1, 1, 5, 8, dtype=torch.float64))


def test_second_derivatives_are_refused_with_a_way_out() -> None:
    query = torch.randn(1, 1, 5, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(_loss(query), query, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"'chunked' differentiates once; .* backend='reference'"
    ):
        grad.sum().backward()


def test_results_that_are_not_used_cost_no_gradient() -> None:
    made = make(5, 5)
    call = AttentionCall.checked(made["query"], made["key"], made["value"], result="lse")
    _, lse = chunked.run(call)
    grad_query, grad_value = torch.autograd.grad(
        lse.sum(), (made["query"], made["value"]), materialize_grads=True
    )
    _, wanted = reference.run(call)
    torch.testing.assert_close(grad_query, torch.autograd.grad(wanted.sum(), made["query"])[0])
    assert not grad_value.any()


def test_an_unknown_bias_is_refused_by_name() -> None:
    class Doubled(biases.Bias):
        pass

    made = make(5, 5)
    call = AttentionCall.checked(made["query"], made["key"], made["value"], bias=Doubled())
    assert chunked.unsupported(call) == ["it cannot apply the bias Doubled"]


def test_eager_calls_do_not_pack() -> None:
    made = make(5, 5)
    out, _ = chunked.run(AttentionCall.checked(made["query"], made["key"], made["value"]))
    assert isinstance(out.grad_fn, functions.Attention._backward_cls)  # type: ignore[attr-defined]
