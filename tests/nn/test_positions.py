"""Rotations: what they do to scores, in any precision and at any distance."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from zeta.nn import XPOS, MultiheadAttention, RotaryEmbedding, XPos

D, T, E = 8, 7, 32
EXACT = {"rtol": 0.0, "atol": 1e-12}


def vectors(length: int = T, **options: Any) -> Tensor:
    return torch.randn(2, 3, length, D, **{"dtype": torch.float64, **options})


def test_spelling_of_torchscale() -> None:
    assert XPOS is XPos


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_turns_pairs_as_complex_numbers(interleaved: bool) -> None:
    x = vectors()
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    turn = torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        expected = torch.view_as_real(pairs * turn).flatten(-2)
    else:
        pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        expected = torch.cat((pairs.real, pairs.imag), -1)
    found = RotaryEmbedding(D, interleaved=interleaved)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_part_of_a_head_can_be_rotated() -> None:
    x = vectors()
    found = RotaryEmbedding(D, rotary_dim=4)(x)
    assert torch.equal(found[..., 4:], x[..., 4:])
    torch.testing.assert_close(found[..., :4], RotaryEmbedding(4)(x[..., :4]), **EXACT)


@pytest.mark.parametrize(
    "rotation", [RotaryEmbedding(D), RotaryEmbedding(D, interleaved=False), XPos(D)]
)
def test_scores_depend_on_distances_alone(rotation: Any) -> None:
    q, k = vectors(), vectors()
    expected = rotation.queries(q, 0) @ rotation.keys(k, 0).mT
    for shift, anchor in ((11, 0), (100, 100), (0, 7), (300, 40)):
        found = rotation.queries(q, shift, anchor) @ rotation.keys(k, shift, anchor).mT
        # xPos angles are rounded to float32, as they were in training.
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("rotation", [RotaryEmbedding(D), XPos(D)])
def test_positions_of_every_form_agree(rotation: Any) -> None:
    x = vectors()
    expected = rotation(x, offset=5)
    positions = torch.arange(5, 5 + T)
    for form in (positions, positions[None], positions.expand(2, T), positions.int()):
        torch.testing.assert_close(rotation(x, positions=form), expected, **EXACT)
    single = rotation(x[:, :, 3:4], offset=8)
    torch.testing.assert_close(single, expected[:, :, 3:4], **EXACT)
    per_sample = torch.stack([positions, positions + 9])
    found = rotation(x, positions=per_sample)
    torch.testing.assert_close(found[1], rotation(x, offset=14)[1], **EXACT)


def test_xpos_call_of_torchscale() -> None:
    xpos, x = XPOS(D, 64), vectors()
    keys = xpos(x, offset=0, downscale=True)
    queries = xpos(x, offset=0, downscale=False)
    torch.testing.assert_close(keys, xpos.keys(x, 0), **EXACT)
    torch.testing.assert_close(queries, xpos.queries(x, 0), **EXACT)
    assert not torch.allclose(keys, queries)


def module_with(rotation: str, **options: Any) -> MultiheadAttention:
    args = {"xpos_rel_pos": rotation == "xpos"}
    if rotation == "rotary":
        options["position"] = RotaryEmbedding(D)
    return MultiheadAttention(args, E, E // D, self_attention=True, **options).eval()


@pytest.mark.parametrize("rotation", ["rotary", "xpos"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules_keep_exact_angles(rotation: str, dtype: torch.dtype) -> None:
    """Rounding the angles to the module's dtype would leave few distinct ones at this distance."""
    module = module_with(rotation)
    low = copy.deepcopy(module).to(dtype)
    x = torch.randn(1, 512, D, dtype=torch.float64).to(dtype)
    q, exact = low.xpos.queries(x, 4096, 4096), module.xpos.queries(x.double(), 4096, 4096)
    torch.testing.assert_close(
        q.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * exact.abs().max().item()
    )


def test_state_of_a_half_precision_xpos_is_never_read() -> None:
    xpos = XPos(D)
    x = vectors()
    expected = xpos(x)
    for changed in (copy.deepcopy(xpos).bfloat16(), copy.deepcopy(xpos)):
        changed.scale.fill_(0.5)
        torch.testing.assert_close(changed(x), expected, **EXACT)


@pytest.mark.parametrize(
    ("dtype", "length"), [(torch.float32, 60_000), (torch.bfloat16, 60_000), (torch.float16, 8192)]
)
def test_xpos_does_not_overflow_over_long_sequences(dtype: torch.dtype, length: int) -> None:
    xpos = XPos(D)
    x = torch.ones(1, 1, 2, D, dtype=dtype)
    ends = torch.tensor([0, length - 1])
    anchor = length // 2
    for turned in (
        xpos(x, positions=ends, anchor=anchor),
        xpos(x, 0, True, positions=ends, anchor=anchor),
    ):
        assert turned.isfinite().all()


def test_position_that_xpos_cannot_represent_is_refused() -> None:
    module, x = XPos(D), torch.ones(1, 1, 1, D)
    reach = module.reach(torch.float32)
    for offset in (reach, -reach):
        for turned in (module(x, offset), module(x, offset, True)):
            assert turned.isfinite().all()
            assert turned.any()
    for offset in (reach + 1, -reach - 1):
        with pytest.raises(ValueError, match=f"xPos reaches {reach} positions in torch"):
            module(x, offset)
    with pytest.raises(ValueError, match=r"in torch\.float16"):
        module(x.half(), reach)


@pytest.mark.parametrize("rotation", ["rotary", "xpos"])
def test_keys_in_the_cache_are_rotated_once(rotation: str) -> None:
    module, x = module_with(rotation), torch.randn(2, T, E)
    state: dict[str, Any] = {}
    seen: list[Tensor] = []
    for t in range(T):
        token = x[:, t : t + 1]
        module(token, token, token, state)
        assert all(
            torch.equal(state["prev_key"][:, :, i : i + 1], key) for i, key in enumerate(seen)
        )
        seen.append(state["prev_key"][:, :, -1:].clone())


@pytest.mark.parametrize("rotation", ["rotary", "xpos"])
def test_positions_undo_left_padding(rotation: str) -> None:
    module, x = module_with(rotation), torch.randn(2, T, E)
    shift = torch.tensor([0, 3])
    padded = torch.stack([x[0], torch.cat((torch.randn(3, E), x[1, : T - 3]))])
    positions = torch.arange(T) - shift[:, None]
    padding = positions < 0
    out, _ = module(
        padded, padded, padded, key_padding_mask=padding, positions=positions, is_causal=True
    )
    expected, _ = module(x, x, x, is_causal=True)
    torch.testing.assert_close(out[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(out[1, 3:], expected[1, : T - 3], rtol=0, atol=1e-5)
    # HF-style positions give padding some valid position; it is hidden all the same.
    out, _ = module(
        padded, padded, padded, key_padding_mask=padding, positions=positions.clamp(min=1),
        is_causal=True,
    )  # fmt: skip
    assert out.isfinite().all()


NARROW = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", ["rotary", "xpos", "multiway"])
def test_positions_of_narrow_integers_do_not_wrap(kind: str, dtype: torch.dtype) -> None:
    module = MultiheadAttention(
        {"xpos_rel_pos": kind == "xpos", "multiway": kind == "multiway"}, E, 4, self_attention=True,
        position=RotaryEmbedding(D) if kind == "rotary" else None,
    )  # fmt: skip
    x = torch.randn(1, T, E)
    positions = torch.tensor([3, 0, 1, 2, 100, 101, 5])
    split = 3 if kind == "multiway" else None
    expected, _ = module(x, x, x, positions=positions, split_position=split)
    found, _ = module(x, x, x, positions=positions.to(dtype), split_position=split)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rotation", [RotaryEmbedding(D), XPos(D)])
def test_rotations_take_narrow_integers_too(rotation: Any, dtype: torch.dtype) -> None:
    x, positions = vectors(), torch.tensor([3, 0, 1, 2, 100, 101, 5])
    found = rotation(x, positions=positions.to(dtype))
    assert torch.equal(found, rotation(x, positions=positions))


def test_positions_of_packed_documents_start_again() -> None:
    from zeta import masks

    module, x = module_with("rotary"), torch.randn(1, T, E)
    ids, positions = torch.tensor([[0, 0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    out, _ = module(x, x, x, attn_mask=masks.Documents(ids), positions=positions, is_causal=True)
    for part in (x[:, :4], x[:, 4:]):
        expected, _ = module(part, part, part, is_causal=True)
        start = 0 if part.shape[1] == 4 else 4
        found = out[:, start : start + part.shape[1]]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_rotations_matter() -> None:
    plain, x = module_with("none"), torch.randn(2, T, E)
    for rotation in ("rotary", "xpos"):
        module = module_with(rotation)
        module.load_state_dict(plain.state_dict(), strict=False)
        assert not torch.allclose(module(x, x, x)[0], plain(x, x, x)[0], atol=1e-3)


def test_xpos_of_the_configuration_and_of_the_argument_are_one() -> None:
    by_args = module_with("xpos")
    by_position = MultiheadAttention(None, E, E // D, self_attention=True, position=XPos(D)).eval()
    by_position.load_state_dict(by_args.state_dict(), strict=True)
    x = torch.randn(2, T, E)
    assert torch.equal(by_args(x, x, x)[0], by_position(x, x, x)[0])


def test_rotation_can_be_shared_by_modules() -> None:
    rotation = RotaryEmbedding(D)
    modules = [
        MultiheadAttention(None, E, E // D, self_attention=True, position=rotation)
        for _ in range(2)
    ]
    assert modules[0].xpos is modules[1].xpos


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use() -> None:
    module, x = module_with("xpos"), torch.randn(2, T, E)
    with torch.inference_mode():
        module(x, x, x)
    module(x, x, x)[0].sum().backward()


def test_scores_of_xpos_decay_with_distance() -> None:
    xpos = XPos(D, scale_base=8)
    ones = torch.ones(1, 1, 64, D, dtype=torch.float64)
    size = xpos.queries(ones, 0).norm(dim=-1) * xpos.keys(ones[:, :, :1], 0).norm(dim=-1)
    assert (size.diff() < 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryEmbedding(7), "head_dim must be even; got 7"),
        (lambda: XPos(7), "head_dim must be even; got 7"),
        (lambda: XPos(0), "head_dim must be positive; got 0"),
        (
            lambda: RotaryEmbedding(8, rotary_dim=10),
            "rotary_dim must be at most head_dim = 8; got 10",
        ),
        (lambda: RotaryEmbedding(8, rotary_dim=3), "must be even; got 3"),
        (
            lambda: MultiheadAttention({"xpos_rel_pos": True}, 9, 3, self_attention=True),
            "head_dim must be even; got 3",
        ),
        (
            lambda: MultiheadAttention(None, E, 2, self_attention=True, position=XPos(D)),
            "position must have head_dim=16; got 8",
        ),
    ],
)
def test_wrong_size_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_buffer_of_xpos_is_whole_after_any_move() -> None:
    expected = XPos(8).scale
    for moved in (XPos(8).to_empty(device="cpu"), XPos(8, device="meta").to_empty(device="cpu")):
        assert torch.equal(moved.scale, expected)
    assert torch.equal(XPos(8).half().float().scale, expected)
    with torch.device("meta"):
        moved = XPos(8).to_empty(device="cpu")
    assert torch.equal(moved.scale, expected)


@pytest.mark.parametrize("flag", ["False", None, 2, 1.0])
def test_flags_are_true_or_false(flag: Any) -> None:
    with pytest.raises(TypeError, match="interleaved must be True or False; got"):
        RotaryEmbedding(D, interleaved=flag)
    with pytest.raises(TypeError, match="downscale must be True or False; got"):
        XPos(D)(torch.ones(1, 1, 1, D), 0, flag)


@pytest.mark.parametrize("rotation", [RotaryEmbedding(D), XPos(D)], ids=["rotary", "xpos"])
@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((2, 1, 3, D + 2), {}, ValueError, rf"x must have shape \(..., length, {D}\); got"),
        ((2, 1, 3, D - 2), {}, ValueError, rf"x must have shape \(..., length, {D}\); got"),
        ((D,), {}, ValueError, rf"x must have shape \(..., length, {D}\); got"),
        ((3, D), {"offset": 1.0}, TypeError, "offset must be an integer; got float"),
        ((3, D), {"positions": [0, 1, 2]}, TypeError, "positions must be a tensor; got list"),
        ((3, D), {"positions": torch.tensor(0)}, ValueError, r"positions must have shape \(3,\)"),
        ((3, D), {"positions": torch.arange(4)}, ValueError, r"positions must have shape \(3,\)"),
        ((3, D), {"positions": torch.arange(3)[None]}, ValueError, "x must be .batch, heads"),
        (
            (2, 1, 3, D),
            {"positions": torch.arange(9).view(3, 3)},
            ValueError,
            r"positions must have shape \(3,\) or \(1 or 2, 3\); got \(3, 3\)",
        ),
    ],
)
def test_wrong_tokens_are_refused(
    rotation: Any, shape: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rotation(torch.ones(shape), **options)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        rotation(torch.ones(3, D, dtype=torch.int64))
