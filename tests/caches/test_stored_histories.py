"""Random histories in float32, in which every short step is read from pages or codes."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

import zeta
from tests.caches.histories import HEAD_DIM, HISTORIES, VALUE_DIM, History, Row, Setting, settings
from tests.caches.kinds import through
from zeta.caches import Cached, PagedCache, PagePool, QuantizedCache
from zeta.ops.backends.cpu import library, stored
from zeta.stored import StoredTensor

pytestmark = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no native kernels: {library.obstacle()}"
)
TOLERANCE = 2e-4


class StoredHistory(History):
    """A history whose steps run on the backend that can read them, and are compared in float64."""

    num_read = 0

    def normal(self, *shape: int) -> Tensor:
        return super().normal(*shape).float()

    def attend(self, query: Tensor, cached: Cached) -> Tensor:
        mask, bias = self.mask_and_bias(cached.padding)
        out = zeta.attention(
            query.float(),
            cached.key,
            cached.value,
            mask=mask,
            bias=bias,
            query_positions=cached.query_positions,
            key_positions=cached.positions,
        )
        assert isinstance(cached.key, StoredTensor)
        self.num_read += not cached.key.materialized
        return out

    def rotated(self, x: Tensor, positions: Tensor, *, sign: int) -> Tensor:
        return super().rotated(x, positions, sign=sign).float()

    def full(self, row: Row) -> Tensor:
        """In float64, of what the cache keeps of float32."""
        positions = torch.arange(row.length)[None]
        mask, bias = self.mask_and_bias(row.padding[None])
        query = self.rotated(row.query[None], positions, sign=1)
        key = self.keep(self.rotated(row.key[None], positions, sign=-1))
        value = self.keep(row.value[None])
        return zeta.attention(
            query.double(), key.double(), value.double(), mask=mask, bias=bias, backend="reference"
        )[0]

    def compare(self, found: Tensor, expected: Tensor, query: Tensor, cached: Cached) -> None:
        error = (found - expected).abs().max()
        assert error <= TOLERANCE, f"step {self.steps}: off by {error:.1e}"


def history(kind: str, setting: Setting) -> StoredHistory:
    if kind == "codes":
        return StoredHistory(setting, QuantizedCache, keep=through(8))
    pool = PagePool(90, 3, num_kv_heads=setting.key_heads, head_dim=HEAD_DIM, value_dim=VALUE_DIM)
    options: dict[str, Any] = {"drops_trailing_padding": setting.padding != "float"}
    return StoredHistory(setting, lambda: PagedCache(pool), **options)


@pytest.mark.parametrize("kind", ["pages", "codes"])
def test_any_history_read_in_place_equals_the_full_forward(kind: str, num_histories: int) -> None:
    attended = read = 0

    @hypothesis_settings(max_examples=-(-num_histories // 10))
    @given(settings(), HISTORIES)
    def run(setting: Setting, operations: list[str]) -> None:
        nonlocal attended, read
        with torch.no_grad():
            done = history(kind, setting)
            for operation in operations:
                done.perform(operation)
        attended, read = attended + done.steps, read + done.num_read

    run()
    # Long chunks are not; nearly everything else is.
    assert attended > num_histories // 10
    assert read > attended / 2


def test_a_wrong_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = stored.run

    def slightly_off(call: Any) -> Any:
        return run(dataclasses.replace(call, scale=call.scale * 1.01))

    monkeypatch.setattr(stored, "run", slightly_off)
    done = history("pages", Setting(2, 4, 2, "causal", "t5", "rope", "inside", 7))
    with torch.no_grad():
        done.perform("long")
        with pytest.raises(AssertionError, match="off by"):
            done.perform("one")
