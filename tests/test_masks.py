"""Masks against their definitions, pair by pair, alone and joined."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from zeta import masks
from zeta.values import Tile

BATCH, HEADS, LENGTH = 2, 3, 6
Predicate = Callable[[int, int, int, int], bool]


def atoms() -> st.SearchStrategy[tuple[masks.Mask, Predicate]]:
    """A mask, and its definition as a predicate of (batch, head, query, key) positions."""
    lengths = st.lists(st.integers(0, LENGTH), min_size=BATCH, max_size=BATCH)
    ids = st.lists(
        st.lists(st.integers(0, 2), min_size=LENGTH, max_size=LENGTH),
        min_size=BATCH,
        max_size=BATCH,
    )
    bits = st.lists(
        st.booleans(), min_size=HEADS * LENGTH * LENGTH, max_size=HEADS * LENGTH * LENGTH
    ).map(lambda flat: torch.tensor(flat).view(HEADS, LENGTH, LENGTH))
    return st.one_of(
        st.just((masks.Causal(), lambda b, h, i, j: j <= i)),
        st.integers(1, LENGTH).map(
            lambda n: (masks.SlidingWindow(n), lambda b, h, i, j: i - n < j <= i)
        ),
        lengths.map(
            lambda n: (
                masks.PrefixLM(torch.tensor(n)),
                lambda b, h, i, j: j <= i or j < n[b],
            )
        ),
        lengths.map(lambda n: (masks.Padding(torch.tensor(n)), lambda b, h, i, j: j < n[b])),
        ids.map(
            lambda d: (masks.Documents(torch.tensor(d)), lambda b, h, i, j: d[b][i] == d[b][j])
        ),
        bits.map(lambda t: (masks.keep(t), lambda b, h, i, j: bool(t[h, i, j]))),
        bits.map(lambda t: (masks.drop(t), lambda b, h, i, j: not t[h, i, j])),
    )


def join(
    left: tuple[masks.Mask, Predicate], right: tuple[masks.Mask, Predicate], both: bool
) -> tuple[masks.Mask, Predicate]:
    (a, p), (b, q) = left, right
    if both:
        return a & b, lambda *at: p(*at) and q(*at)
    return a | b, lambda *at: p(*at) or q(*at)


EXPRESSIONS = st.recursive(
    atoms(), lambda inner: st.builds(join, inner, inner, st.booleans()), max_leaves=4
)


@given(EXPRESSIONS)
def test_a_mask_is_its_definition(pair: tuple[masks.Mask, Predicate]) -> None:
    mask, predicate = pair
    expected = [
        [
            [[predicate(b, h, i, j) for j in range(LENGTH)] for i in range(LENGTH)]
            for h in range(HEADS)
        ]
        for b in range(BATCH)
    ]
    assert mask.dense(BATCH, HEADS, LENGTH, LENGTH).tolist() == expected


@given(EXPRESSIONS, st.data())
def test_bounds_and_covers_never_promise_too_much(
    pair: tuple[masks.Mask, Predicate], data: st.DataObject
) -> None:
    mask, _ = pair
    queries = sorted(data.draw(st.lists(st.integers(0, LENGTH - 1), min_size=2, max_size=2)))
    keys = sorted(data.draw(st.lists(st.integers(0, LENGTH - 1), min_size=2, max_size=2)))
    rows, columns = slice(queries[0], queries[1] + 1), slice(keys[0], keys[1] + 1)
    seen = mask.dense(BATCH, HEADS, LENGTH, LENGTH)[:, :, rows]
    first, last = mask.key_bounds(*queries)
    outside = [
        j
        for j in range(LENGTH)
        if (first is not None and j < first) or (last is not None and j > last)
    ]
    assert not seen[..., outside].any()
    if mask.covers(*queries, *keys):
        assert seen[..., columns].all()


@given(EXPRESSIONS)
def test_a_tile_is_a_part_of_the_whole(pair: tuple[masks.Mask, Predicate]) -> None:
    mask, _ = pair
    whole = Tile.whole(LENGTH, LENGTH)
    rows, columns, heads, batches = slice(2, 5), slice(1, 4), slice(1, 3), slice(1, 2)
    tile = Tile(
        whole.query_position[:, :, rows],
        whole.key_position[..., columns],
        batches,
        heads,
        rows,
        columns,
    )
    part = mask.visible(tile).expand(1, 2, 3, 3)
    assert torch.equal(part, mask.dense(BATCH, HEADS, LENGTH, LENGTH)[1:, 1:, rows, columns])


@given(EXPRESSIONS)
def test_flatten_and_unflatten_are_inverse(pair: tuple[masks.Mask, Predicate]) -> None:
    mask, _ = pair
    spec, tensors = mask.flatten()
    again = masks.Mask.unflatten(spec, tensors)
    sizes = (BATCH, HEADS, LENGTH, LENGTH)
    assert torch.equal(again.dense(*sizes), mask.dense(*sizes))
    assert again.flatten()[0] == spec


@given(EXPRESSIONS)
def test_shape_is_the_shape_of_visible(pair: tuple[masks.Mask, Predicate]) -> None:
    mask, _ = pair
    sizes = (BATCH, HEADS, LENGTH, LENGTH)
    seen = mask.visible(Tile.whole(LENGTH, LENGTH))
    assert mask.shape(*sizes) == tuple(seen.shape)


def test_queries_continue_after_the_cached_keys() -> None:
    whole = masks.Causal().dense(1, 1, 6, 6)
    assert torch.equal(masks.Causal().dense(1, 1, 2, 6), whole[:, :, 4:])
    assert masks.Causal().dense(1, 1, 4, 2).sum(-1).tolist() == [[[0, 0, 1, 2]]]


def test_a_window_of_one_is_the_query_itself() -> None:
    assert torch.equal(
        masks.SlidingWindow(1).dense(1, 1, 4, 4)[0, 0], torch.eye(4, dtype=torch.bool)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_a_query_before_the_first_key_is_of_no_document(dtype: torch.dtype) -> None:
    least = torch.iinfo(dtype).min + (dtype == torch.int64)
    mask = masks.Documents(torch.tensor([[least, least, 1, 1]], dtype=dtype))
    expected = [[False, False], [False, False], [True, True], [True, True]]
    assert mask.dense(1, 1, 4, 2)[0, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
@pytest.mark.parametrize("kind", [masks.Padding, masks.PrefixLM])
def test_lengths_are_integers_of_any_dtype(
    kind: type[masks.Padding | masks.PrefixLM], dtype: torch.dtype
) -> None:
    lengths = torch.tensor([3, 1])
    found = kind(lengths.to(dtype))
    assert torch.equal(found.dense(2, 1, 2, 4), kind(lengths).dense(2, 1, 2, 4))
    assert found.key_bounds(2, 3) == kind(lengths).key_bounds(2, 3)
    assert found.covers(2, 3, 0, 0) == kind(lengths).covers(2, 3, 0, 0)


def test_no_position_is_beyond_a_length_that_is_none_of_int64() -> None:
    lengths = torch.tensor([2**64 - 1], dtype=torch.uint64)
    assert masks.Padding(lengths).dense(1, 1, 2, 3).all()


def test_a_dense_mask_is_broadcast_however_it_is_made() -> None:
    visible = torch.rand(3, 4) < 0.5
    for mask in (masks.Dense(visible), masks.keep(visible), masks.drop(~visible)):
        assert torch.equal(mask.dense(2, 2, 3, 4), visible.expand(2, 2, 3, 4))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: masks.SlidingWindow(0), ValueError, "size must be at least 1.*got 0"),
        (
            lambda: masks.SlidingWindow(2**63),
            ValueError,
            r"size must be below 2\*\*63; got 9223372036854775808",
        ),
        (lambda: masks.keep(torch.zeros(2, 2)), TypeError, "must be a bool tensor.*float32"),
        (lambda: masks.drop(torch.zeros(2, 2)), TypeError, "must be a bool tensor.*float32"),
        (lambda: masks.keep([True]), TypeError, "must be a bool tensor.*list"),
        (lambda: masks.Dense(torch.ones(2, 2)), TypeError, "must be a bool tensor.*float32"),
        (lambda: masks.Dense(torch.ones(2, 2).byte()), TypeError, "must be a bool tensor.*uint8"),
        (
            lambda: masks.keep(torch.zeros(1, 1, 1, 2, 2, dtype=torch.bool)),
            ValueError,
            "at most 4 dimensions",
        ),
        (lambda: masks.Padding(torch.ones(2)), TypeError, "must be an integer tensor; got.*float"),
        (lambda: masks.PrefixLM([1, 2]), TypeError, "must be an integer tensor; got list"),
        (
            lambda: masks.Documents(torch.zeros(3, dtype=torch.int64)),
            ValueError,
            r"\(batch, length\); got \(3,\)",
        ),
        (
            lambda: masks.Padding(torch.tensor([1, 2, 3])).dense(2, 1, 4, 4),
            ValueError,
            r"shape \(2,\), one a sequence; got \(3,\)",
        ),
        (
            lambda: masks.keep(torch.ones(3, 4, dtype=torch.bool)).dense(1, 1, 4, 4),
            ValueError,
            r"must broadcast to .*\(1, 1, 4, 4\); got \(1, 1, 3, 4\)",
        ),
        (
            lambda: masks.Documents(torch.zeros(2, 3, dtype=torch.int64)).dense(2, 1, 4, 4),
            ValueError,
            r"shape \(2, 4 or more\); got \(2, 3\)",
        ),
        (
            lambda: masks.Documents(torch.zeros(2, 3, dtype=torch.int64)).dense(2, 1, 4, 3),
            ValueError,
            r"shape \(2, 4 or more\); got \(2, 3\)",
        ),
        (lambda: masks.SlidingWindow(2.5), TypeError, "size must be an integer; got float"),
        (lambda: masks.SlidingWindow("2"), TypeError, "size must be an integer; got str"),
        (
            lambda: masks.SlidingWindow(torch.tensor(2)),
            TypeError,
            "size must be an integer; got a torch.int64 tensor",
        ),
        (lambda: masks.Padding([1, 2]), TypeError, "lengths must be an integer tensor; got list"),
        (
            lambda: masks.Causal() & torch.ones(2, 2, dtype=torch.bool),
            TypeError,
            "a mask joins masks; of a tensor masks.keep or masks.drop makes one",
        ),
        (
            lambda: masks.Causal() | torch.ones(2, 2, dtype=torch.bool),
            TypeError,
            "a mask joins masks; of a tensor masks.keep or masks.drop makes one",
        ),
        (lambda: masks.Causal() and masks.SlidingWindow(2), TypeError, "join masks with & and |"),
        (lambda: not masks.Causal(), TypeError, "a mask is neither true nor false"),
        (lambda: masks.Causal() | None, TypeError, "unsupported operand .*'Causal' and 'NoneType'"),
    ],
)
def test_bad_masks_are_refused(
    make: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()
