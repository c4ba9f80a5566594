"""The blocks of the chunked backend: cutting and skipping, products, biases and their gradients."""

from collections.abc import Callable

import pytest
import torch

from tests.ops.blockwise import assert_same, bucketed, make, outcome, outcome_of_weights
from tests.ops.bound import assert_within_bound
from zeta import biases, masks
from zeta.ops.backends import chunked, reference
from zeta.ops.backends.chunked import blocks, products
from zeta.ops.backends.chunked.offsets import sum_diagonals
from zeta.ops.call import AttentionCall

MASKS: dict[str, Callable[[int, int], masks.Mask | None]] = {
    "none": lambda target, source: None,
    "causal": lambda target, source: masks.Causal(),
    "window": lambda target, source: masks.SlidingWindow(70),
    "padding": lambda target, source: (
        masks.Padding(torch.tensor([source - 90, source])) & masks.Causal()
    ),
    "prefix": lambda target, source: masks.PrefixLM(torch.tensor([150, 1])),
    "dense": lambda target, source: masks.keep(torch.rand(2, 1, target, source) < 0.7),
    "dense of each head": lambda target, source: masks.keep(torch.rand(4, target, source) < 0.7),
    "either": lambda target, source: masks.SlidingWindow(9) | masks.Padding(torch.tensor([40, 0])),
}


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
    assert scores(masks.PrefixLM(torch.tensor([48, 0]))) == scores(masks.Causal())
    assert scores(masks.PrefixLM(torch.tensor([480, 0]))) == 480 * 480


def test_only_the_diagonal_is_masked(small_blocks: None) -> None:
    made = make(480, 480)
    call = AttentionCall.checked(made["query"], made["key"], made["value"], mask=masks.Causal())
    for block in blocks.blocks(call):
        (run,) = block.partial
        assert run.start > block.rows.start - blocks.SEGMENT
        assert run.stop == block.columns.stop == block.rows.stop


def test_a_prefix_is_not_masked(small_blocks: None) -> None:
    made, lengths = make(480, 480), torch.tensor([200, 150])
    call = AttentionCall.checked(
        made["query"], made["key"], made["value"], mask=masks.PrefixLM(lengths)
    )
    for block in blocks.blocks(call):
        for run in block.partial:
            assert run.start > max(150, block.rows.start) - blocks.SEGMENT


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


@pytest.mark.parametrize("arguments", [{}, {"query_positions": torch.arange(3)}], ids=list)
def test_nan_in_what_every_query_sees_stays(arguments: dict[str, torch.Tensor]) -> None:
    query, key, value = (torch.randn(2, 2, length, 8) for length in (3, 5, 5))
    value[0, 1, 2, 3] = float("inf")
    value[1, 0, 4, 5] = float("nan")
    call = AttentionCall.checked(query, key, value, **arguments)
    found, expected = (backend.run(call)[0] for backend in (chunked, reference))
    torch.testing.assert_close(found, expected, equal_nan=True)
