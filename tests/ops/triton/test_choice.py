"""Which GPU kernels serve a call, those for Hopper or portable ones; and what they are given."""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from zeta import biases, masks
from zeta.ops.backends.triton import arguments, hopper
from zeta.ops.backends.triton.kernels.operands import Score
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import lower


def _score(call: AttentionCall) -> Score:
    lowered = lower(call)
    fixed = arguments.Fixed(*lowered.fixed())
    return arguments.score_operand(call.query, call.key, lowered.offsets, lowered.dense, fixed)


def _takes(query: Tensor, value: Tensor | None = None, **extras: object) -> bool:
    call = AttentionCall.checked(query, query, query if value is None else value, **extras)
    return hopper.takes(_score(call), call.query, call.key, call.value)


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "device_capability", lambda tensor: (9, 0))
    monkeypatch.setattr(hopper.triton, "__version__", hopper.VERSIONS[0] + "0")


@pytest.mark.usefixtures("on_hopper")
def test_what_hoppers_kernels_take() -> None:
    query = _random(2, 4, 300, 64)
    table = torch.zeros(32, 4)
    assert _takes(query)
    assert _takes(_random(2, 300, 4, 128).transpose(1, 2), mask=masks.Causal())
    assert _takes(query.half(), bias=biases.Bucketed(table))
    assert _takes(_random(2, 4, 300, 72))


@pytest.mark.usefixtures("on_hopper")
def test_what_they_leave_to_the_portable_ones() -> None:
    query = _random(2, 4, 300, 64)
    assert not _takes(query.float())
    assert not _takes(_random(2, 4, 300, 32)), "a narrow head"
    assert not _takes(_random(2, 4, 300, 144)), "a wide head"
    assert not _takes(query, _random(2, 4, 300, 128)), "values of another width"
    assert not _takes(_random(2, 4, 300, 68)[..., :66]), "rows that the copy engine cannot read"
    assert not _takes(_random(2, 4, 300, 72)[..., 4:68]), "a start that it cannot read"
    assert not _takes(query[:, :1].expand(2, 4, 300, 64)), "strides of 0"
    assert not _takes(query, bias=biases.Dense(torch.zeros(1, 1, 300, 300)))
    assert not _takes(query, bias=biases.Softcap(5.0))
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.01])
    assert not _takes(query, bias=biases.Alibi(slopes))
    assert not _takes(query, query_positions=torch.arange(300))
    assert not _takes(query, mask=masks.Dense(torch.ones(1, 1, 300, 300, dtype=torch.bool)))


def test_other_devices_and_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    query = _random(2, 4, 300, 64)
    monkeypatch.setattr(hopper.triton, "__version__", hopper.VERSIONS[0] + "0")
    for capability in (None, (8, 0), (10, 0)):
        monkeypatch.setattr(hopper, "device_capability", lambda tensor, found=capability: found)
        assert not _takes(query)
    monkeypatch.setattr(hopper, "device_capability", lambda tensor: (9, 0))
    assert _takes(query)
    monkeypatch.setattr(hopper.triton, "__version__", "3.60.0")
    assert not _takes(query)


def test_numbers_of_numpy_reach_kernels_as_pythons() -> None:
    """Triton takes no others, but its interpreter does."""
    query = _random(1, 1, 20, 16)
    call = AttentionCall.checked(
        query, query, query, mask=masks.SlidingWindow(np.int64(5)),
        bias=biases.Softcap(np.float32(3.0)), dropout_p=np.float32(0.5), scale=np.float32(2.0),
        seed=1,
    )  # fmt: skip
    score = _score(call)
    assert type(score.window) is int
    assert score.dropout is not None
    assert score.softcap is not None
    numbers = (score.scale, score.slope, score.dropout.keep, *score.softcap[:2])
    assert all(type(number) is float for number in numbers)
    assert type(score.dropout.threshold) is int


def test_windows_too_long_for_32_bits_are_none() -> None:
    query, key = _random(1, 1, 9, 16), _random(1, 1, 5, 16)

    def window(size: int, positions: Tensor | None) -> object:
        mask = masks.SlidingWindow(size)
        return _score(
            AttentionCall.checked(query, key, key, mask=mask, query_positions=positions)
        ).window

    sizes = (5, 2**30 - 1, 2**30, 2**31 - 1, 2**63 - 1)
    for positions in (None, torch.arange(9)):
        found = [window(size, positions) for size in sizes]
        assert found == [5, 2**30 - 1, None, None, None]


def test_rows_too_far_apart_for_a_kernel_are_brought_together() -> None:
    near = torch.empty(200, 1 << 16, 4, 64, device="meta").permute(1, 2, 0, 3)
    assert arguments.given_rows(near).row == 1 << 24
    far = torch.empty(200, (1 << 16) + 1, 4, 64, device="meta").permute(1, 2, 0, 3)
    assert arguments.given_rows(far).row == 64
