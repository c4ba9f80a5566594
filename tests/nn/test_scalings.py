"""Scaled rotations: frequencies by the papers' words, and what they must not change."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from zeta.nn import (
    LinearScaling,
    Llama3Scaling,
    MultiheadAttention,
    RotaryEmbedding,
    YarnScaling,
)
from zeta.nn.scalings import Scaling

D, T, E, BASE = 8, 7, 32, 100.0
EXACT = {"rtol": 0.0, "atol": 1e-12}
LINEAR = LinearScaling(2.5)
LLAMA3 = Llama3Scaling(
    8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=48
)
YARN = YarnScaling(8.0, original_max_position_embeddings=48, beta_fast=6.0, beta_slow=0.5)
SCALINGS = {"linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}
each_scaling = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)


def textbook_llama3(turns: float, factor: float, low: float, high: float) -> float:
    """What a frequency is multiplied by."""
    if turns < low:
        return 1 / factor
    if turns > high:
        return 1.0
    smooth = (turns - low) / (high - low)
    return (1 - smooth) / factor + smooth


@pytest.mark.parametrize(("rotary_dim", "base"), [(8, 100.0), (128, 500000.0), (6, 7.0)])
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (0.3, 20.0)])
def test_llama3_by_the_turns_of_each_pair(
    rotary_dim: int, base: float, low: float, high: float
) -> None:
    scaling = Llama3Scaling(
        8.0, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=8192
    )
    expected = []
    for pair in range(rotary_dim // 2):
        wavelength = 2 * math.pi * base ** (2 * pair / rotary_dim)
        share = textbook_llama3(8192 / wavelength, 8.0, low, high)
        expected.append(share * 2 * math.pi / wavelength)
    found = scaling.frequencies(rotary_dim, base=base)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert found.dtype == torch.float64


def textbook_yarn(pair: int, dim: int, base: float, scaling: YarnScaling) -> float:
    """What a frequency is multiplied by."""

    def border(turns: float) -> float:
        # The pair whose wavelength fits so often in the original context.
        wavelength = scaling.original_max_position_embeddings / turns
        return dim / 2 * math.log(wavelength / (2 * math.pi), base)

    first, last = border(scaling.beta_fast), border(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if pair <= first:
        return 1.0
    if pair >= last:
        return 1 / scaling.factor
    divided = (pair - first) / (last - first)
    return (1 - divided) + divided / scaling.factor


@pytest.mark.parametrize(("rotary_dim", "base"), [(8, 100.0), (128, 10000.0), (64, 150000.0)])
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("length", [48, 4096])
def test_yarn_by_the_place_of_each_pair(
    rotary_dim: int, base: float, truncate: bool, length: int
) -> None:
    scaling = YarnScaling(16.0, original_max_position_embeddings=length, truncate=truncate)
    unscaled = RotaryEmbedding(rotary_dim, base=base)
    expected = [
        base ** (-2 * pair / rotary_dim) * textbook_yarn(pair, rotary_dim, base, scaling)
        for pair in range(unscaled.rotary_dim // 2)
    ]
    found = scaling.frequencies(rotary_dim, base=base)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_every_pair_is_of_every_kind_in_these_tests() -> None:
    """Fast, between and slow ones: no test here could pass for want of a case."""
    unscaled = 100.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    for scaling in (LLAMA3, YARN):
        share = scaling.frequencies(D, base=BASE) / unscaled
        assert share[0] == 1.0
        assert share[-1] == 0.125
        assert ((share > 0.125) & (share < 1.0)).any()


def test_linear_divides_positions() -> None:
    x, positions = torch.randn(2, 3, T, D, dtype=torch.float64), torch.arange(T) * 5 + 1000
    scaled = RotaryEmbedding(D, base=BASE, scaling=LINEAR)
    interpolated = RotaryEmbedding(D, base=BASE)(x, positions=positions / 2.5)
    torch.testing.assert_close(scaled(x, positions=positions), interpolated, **EXACT)


def test_scores_of_yarn_grow() -> None:
    assert (LINEAR.magnitude, LLAMA3.magnitude) == (1.0, 1.0)
    assert YARN.magnitude == pytest.approx(0.1 * math.log(8) + 1)
    assert YarnScaling(0.5, original_max_position_embeddings=48).magnitude == 1.0
    given = YarnScaling(8.0, original_max_position_embeddings=48, attention_factor=3)
    assert given.magnitude == 3.0
    x = torch.randn(2, 3, T, D, dtype=torch.float64)
    for scaling in (YARN, given):
        turned = RotaryEmbedding(D, base=BASE, scaling=scaling)(x, offset=90)
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1) * scaling.magnitude, **EXACT)


@pytest.mark.parametrize("interleaved", [True, False])
@each_scaling
def test_pairs_turn_by_their_frequencies(scaling: Scaling, interleaved: bool) -> None:
    x, positions = torch.randn(2, 3, T, D, dtype=torch.float64), torch.arange(T) + 3000
    angle = positions[:, None] * scaling.frequencies(D, base=BASE)
    turn = torch.polar(torch.full_like(angle, scaling.magnitude), angle)
    if interleaved:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        expected = torch.view_as_real(pairs * turn).flatten(-2)
    else:
        pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        expected = torch.cat((pairs.real, pairs.imag), -1)
    rotation = RotaryEmbedding(D, base=BASE, interleaved=interleaved, scaling=scaling)
    torch.testing.assert_close(rotation(x, positions=positions), expected, **EXACT)
    torch.testing.assert_close(rotation.keys(x, 3000), expected, **EXACT)
    torch.testing.assert_close(rotation.queries(x, 3000), expected, **EXACT)


@each_scaling
def test_part_of_a_head_has_frequencies_of_its_own_width(scaling: Scaling) -> None:
    x = torch.randn(2, 3, T, D, dtype=torch.float64)
    found = RotaryEmbedding(D, base=BASE, rotary_dim=4, scaling=scaling)(x, offset=50)
    assert torch.equal(found[..., 4:], x[..., 4:])
    alone = RotaryEmbedding(4, base=BASE, scaling=scaling)(x[..., :4], offset=50)
    torch.testing.assert_close(found[..., :4], alone, **EXACT)


def test_a_factor_of_one_changes_nothing() -> None:
    x = torch.randn(2, 3, T, D, dtype=torch.float64)
    expected = RotaryEmbedding(D, base=BASE)(x, offset=50)
    assert torch.equal(RotaryEmbedding(D, base=BASE, scaling=LinearScaling(1))(x, 50), expected)
    for scaling in (
        Llama3Scaling(
            1, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=48
        ),
        YarnScaling(1, original_max_position_embeddings=48),
    ):
        found = RotaryEmbedding(D, base=BASE, scaling=scaling)(x, 50)
        torch.testing.assert_close(found, expected, **EXACT)


@each_scaling
def test_scores_depend_on_distances_alone(scaling: Scaling) -> None:
    rotation = RotaryEmbedding(D, base=BASE, scaling=scaling)
    q, k = torch.randn(2, 2, 3, T, D, dtype=torch.float64)
    expected = rotation.queries(q, 0) @ rotation.keys(k, 0).mT
    for shift in (40, 100, 5000):
        found = rotation.queries(q, shift) @ rotation.keys(k, shift).mT
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_scaling
def test_half_precision_keeps_exact_angles(scaling: Scaling, dtype: torch.dtype) -> None:
    rotation = RotaryEmbedding(D, base=BASE, scaling=scaling)
    low = copy.deepcopy(rotation).to(dtype)
    x = torch.randn(1, 512, D, dtype=torch.float64).to(dtype)
    exact = rotation(x.double(), 65_536)
    found = low(x, 65_536)
    assert found.dtype == dtype
    atol = torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)


def module_with(scaling: Scaling | None, **options: Any) -> MultiheadAttention:
    position = RotaryEmbedding(D, base=BASE, interleaved=False, scaling=scaling)
    return MultiheadAttention(
        None, E, E // D, self_attention=True, position=position, **options
    ).eval()


@each_scaling
def test_decoding_equals_the_whole(scaling: Scaling) -> None:
    module, x = module_with(scaling, dtype=torch.float64), torch.randn(2, 130, E).double()
    expected, _ = module(x, x, x, is_causal=True)
    state: dict[str, Any] = {}
    kept: Tensor | None = None
    for part in x.split([60, 30, 1, 1, 1, 37], dim=1):
        length = 0 if kept is None else kept.shape[2]
        found, _ = module(part, part, part, state, is_causal=True)
        wanted = expected[:, length : length + part.shape[1]]
        torch.testing.assert_close(found, wanted, **EXACT)
        if kept is not None:
            # Rotated once.
            assert torch.equal(state["prev_key"][:, :, :length], kept)
        kept = state["prev_key"].clone()
    plain = module_with(None, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    assert not torch.allclose(plain(x, x, x, is_causal=True)[0], expected, atol=1e-3)


@each_scaling
def test_a_module_compiles_whole_and_is_exported(scaling: Scaling) -> None:
    torch._dynamo.reset()
    module, x = module_with(scaling, need_weights=False), torch.randn(2, 60, E)
    expected, _ = module(x, x, x, is_causal=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x, is_causal=True)[0], expected)
    program = torch.export.export(module, (x, x, x), {"is_causal": True})
    torch.testing.assert_close(program.module()(x, x, x, is_causal=True)[0], expected)


@each_scaling
def test_a_scaling_is_a_value(scaling: Scaling) -> None:
    assert pickle.loads(pickle.dumps(scaling)) == scaling
    assert copy.deepcopy(RotaryEmbedding(D, scaling=scaling)).scaling == scaling
    assert RotaryEmbedding(D, scaling=scaling).state_dict() == {}
    with pytest.raises(AttributeError):
        scaling.factor = 3.0  # type: ignore[misc]  # it is frozen


def llama3(**changes: Any) -> Llama3Scaling:
    return Llama3Scaling(
        **{
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, **changes,
        }
    )  # fmt: skip


def yarn(**changes: Any) -> YarnScaling:
    return YarnScaling(**{"factor": 8.0, "original_max_position_embeddings": 4096, **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(0.0), "factor must be positive and finite; got 0.0"),
        (lambda: LinearScaling(math.nan), "factor must be positive and finite; got nan"),
        (lambda: LinearScaling(math.inf), "factor must be positive and finite; got inf"),
        (lambda: llama3(factor=-8.0), "factor must be positive and finite; got -8.0"),
        (lambda: llama3(low_freq_factor=0), "low_freq_factor must be positive and finite; got 0"),
        (
            lambda: llama3(high_freq_factor=1.0),
            r"high_freq_factor must be more than low_freq_factor=1\.0; got 1\.0",
        ),
        (
            lambda: llama3(original_max_position_embeddings=-1),
            "original_max_position_embeddings must be positive and finite; got -1",
        ),
        (lambda: yarn(factor=0), "factor must be positive and finite; got 0"),
        (
            lambda: yarn(original_max_position_embeddings=0),
            "original_max_position_embeddings must be positive and finite; got 0",
        ),
        (lambda: yarn(beta_slow=-1.0), "beta_slow must be positive and finite; got -1.0"),
        (lambda: yarn(beta_fast=0.5), r"beta_fast must be more than beta_slow=1\.0; got 0\.5"),
        (
            lambda: yarn(attention_factor=0.0),
            "attention_factor must be positive and finite; got 0.0",
        ),
        (lambda: RotaryEmbedding(8, base=0.0), "base must be positive and finite; got 0.0"),
        (lambda: RotaryEmbedding(8, base=-3.0), "base must be positive and finite; got -3.0"),
    ],
)
def test_a_wrong_number_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling("2"), "factor must be a number; got str"),
        (lambda: LinearScaling(True), "factor must be a number; got bool"),
        (
            lambda: yarn(original_max_position_embeddings=None),
            "original_max_position_embeddings must be a number; got NoneType",
        ),
        (lambda: yarn(truncate="no"), "truncate must be True or False; got 'no'"),
        (
            lambda: RotaryEmbedding(8, scaling={"rope_type": "linear", "factor": 2.0}),
            "scaling must be a LinearScaling, a Llama3Scaling or a YarnScaling; got dict",
        ),
        (lambda: RotaryEmbedding(8, scaling=LinearScaling), "got type"),
    ],
)
def test_a_wrong_type_is_refused(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()
