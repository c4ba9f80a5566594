"""Tables of rotations that are kept between the layers of a step: the same numbers as made anew."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from zeta.nn import Llama3Scaling, RotaryEmbedding, XPos, tables
from zeta.nn.tables import Positions

LLAMA = Llama3Scaling(
    8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
PLACES: list[Positions] = [
    0,
    70_000,
    torch.tensor([3, 1, 4]),
    torch.tensor([[5, 6, 7]]),
    torch.tensor([[5, 6, 7], [0, -1, 900]]),
]


@pytest.fixture
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "can_keep", lambda device: False)


def rotated(positions: Positions, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, 3, 16, generator=generator).to(dtype).unbind()
    anchor = 70_000 if isinstance(positions, int) and positions else 0
    origin = torch.tensor([1]) if isinstance(positions, Tensor) else None
    return [
        *RotaryEmbedding(16).pair(query, key, positions),
        *RotaryEmbedding(16, base=500.0, rotary_dim=8).pair(query, key, positions),
        *RotaryEmbedding(16, scaling=LLAMA).pair(query, key, positions),
        *XPos(16).both(query, key, positions, anchor, origin),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", PLACES, ids=str)
def test_kept_tables_are_those_made_anew(
    positions: Positions, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    kept = [rotated(positions, dtype) for _ in range(2)]
    request.getfixturevalue("_nothing_kept")
    anew = rotated(positions, dtype)
    for found in kept:
        for one, other in zip(found, anew, strict=True):
            assert torch.equal(one, other)


def test_each_layer_of_a_step_takes_the_same() -> None:
    x = torch.randn(1, 2, 1, 16)
    layers = [RotaryEmbedding(16) for _ in range(4)]
    tables.few_rotation_tables.cache_clear()
    for step in range(3):
        for layer in layers:
            layer.pair(x, x, torch.tensor([[step]]))
    found = tables.few_rotation_tables.cache_info()
    assert (found.misses, found.hits) == (3, 9)


def test_what_inference_mode_kept_can_be_differentiated_by() -> None:
    rotary, x = RotaryEmbedding(16), torch.randn(1, 2, 1, 16, requires_grad=True)
    tables.few_rotation_tables.cache_clear()
    with torch.inference_mode():
        rotary.pair(x, x, 5)
    turned, _ = rotary.pair(x, x, 5)
    turned.square().sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    assert tables.few_rotation_tables.cache_info().hits == 1
    # A rotation keeps lengths.
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_nothing_fake_is_kept() -> None:
    tables.few_rotation_tables.cache_clear()
    with FakeTensorMode():
        x = torch.randn(1, 2, 1, 16)
        RotaryEmbedding(16).pair(x, x, 5)
    torch.func.vmap(lambda x: RotaryEmbedding(16).pair(x, x, 5)[0])(torch.randn(2, 1, 2, 1, 16))
    assert tables.few_rotation_tables.cache_info().currsize == 0


def _kept(length: int, positions: Positions) -> tuple[int, int]:
    """How many tables are kept of so many positions: of a few, and of whole sequences."""
    few, rows = tables.few_rotation_tables, tables._long_rotation_tables
    few.cache_clear()
    rows.cache_clear()
    x = torch.randn(1, 1, length, 16)
    RotaryEmbedding(16).pair(x, x, positions)
    return few.cache_info().currsize, rows.cache_info().currsize


def test_many_positions_are_kept_if_they_are_consecutive() -> None:
    few = tables.FEW
    assert _kept(few, 5) == (1, 0)
    assert _kept(few, torch.arange(few)) == (1, 0)
    assert _kept(few, torch.arange(few).flip(0)) == (1, 0)
    assert _kept(few + 1, 5) == (0, 1)
    assert _kept(few + 1, torch.arange(few + 1)) == (0, 0)
    most = tables.MAX_FEATURES // 16
    assert _kept(most, 0) == (0, 1)
    assert _kept(most + 1, 0) == (0, 0)


def test_the_next_steps_are_made_with_the_first() -> None:
    x = torch.randn(1, 2, 1, 16)
    tables._xpos_block.cache_clear()
    tables.few_xpos_tables.cache_clear()
    for step in range(2 * tables.FEW):
        XPos(16).both(x, x, step)
        XPos(16).both(x, x, torch.tensor([[step]]), torch.tensor([[0]]))
    assert tables._xpos_block.cache_info().misses == 2
    assert tables.few_xpos_tables.cache_info().misses == 2 * tables.FEW


@pytest.mark.parametrize(("dim", "rows"), [(256, 2 * tables.FEW), (258, 2)])
def test_blocks_of_many_features_are_not_kept(dim: int, rows: int) -> None:
    tables.few_rotation_tables.cache_clear()
    place = tables.looked_up(torch.empty(1, 1, 2, dim), 70)
    assert place is not None
    for table in tables.kept_rotation_tables(dim, 10000.0, None, torch.float32, place):
        assert table.shape == (2, dim // 2)
        assert table.untyped_storage().nbytes() == rows * dim // 2 * 4


@pytest.mark.parametrize("first", [2**62 + 5, 2**63 - 4, -(2**63)])
def test_the_furthest_positions_have_no_block(first: int) -> None:
    x = torch.randn(1, 2, 3, 16)
    for positions in (first, torch.arange(3) + first):
        turned = RotaryEmbedding(16).pair(x, x, positions)[0]
        assert turned.norm().allclose(x.norm())


@pytest.mark.parametrize("length", [3, tables.FEW + 1])
def test_an_offset_of_numpy(length: int) -> None:
    x = torch.randn(1, 2, length, 16)
    rotary = RotaryEmbedding(16)
    assert torch.equal(rotary(x, np.int64(5)), rotary(x, 5))
    assert torch.equal(XPos(16)(x, np.int64(5)), XPos(16)(x, 5))
