"""Fixtures of the op."""

from collections.abc import Iterator

import pytest
import torch

from tests.ops.cpu import units
from zeta.ops.backends.chunked import blocks


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What a backend allocates is full of NaN until it writes there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native CPU kernel runs on the instruction set that is the parameter."""
    units.use(request.param, monkeypatch)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 48 rows and units of few heads, so that small calls have many of them."""
    monkeypatch.setattr(blocks, "ROWS", (48, 48))
    monkeypatch.setattr(blocks, "BOUNDED_ROWS", 48)
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", 2**14)
    monkeypatch.setattr(blocks, "SINGLE_ELEMENTS", 2**11)
