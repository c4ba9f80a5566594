"""Whatever happens to a cache, attention with it is attention over the whole sequence.

``make histories`` runs 100,000 histories in place of the few of ``make test``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

from tests.caches.histories import HISTORIES, History, Setting, settings
from tests.caches.kinds import KINDS, new_history
from zeta.caches import Cached, DynamicCache


@pytest.mark.parametrize("kind", KINDS)
def test_any_history_equals_the_full_forward(kind: str, num_histories: int) -> None:
    attended = 0

    @hypothesis_settings(max_examples=-(-num_histories // len(KINDS)))
    @given(settings(), HISTORIES)
    def run(setting: Setting, operations: list[str]) -> None:
        nonlocal attended
        with torch.no_grad():
            history = new_history(kind, setting)
            for operation in operations:
                history.perform(operation)
        attended += history.steps

    run()
    # Most operations are updates; a history that compares nothing shows nothing.
    assert attended > num_histories // len(KINDS)


SETTING = Setting(2, 4, 2, "causal", "t5", "rope", "inside", 7)
HISTORY = [
    "chunk",
    "one",
    "fork",
    "long",
    "reorder",
    "one",
    "rollback",
    "one",
    "crop",
    "one",
    "select",
]
HISTORY += ["chunk", "one", "fork", "chunk", "commit", "one", "crop", "one", "crop", "one"]


def perform(cache: Callable[[], Any], setting: Setting = SETTING) -> None:
    history = History(setting, cache)
    for operation in HISTORY:
        history.perform(operation)


def test_the_history_of_the_wrong_caches_is_right_with_a_right_one() -> None:
    perform(DynamicCache)


class ForgetsPadding(DynamicCache):
    def update(self, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Cached:
        return super().update(key, value, key_padding_mask)._replace(padding=None)


class ReordersKeysAlone(DynamicCache):
    def _take(self, index: Tensor) -> None:
        value = self._state.parts[1]
        super()._take(index)
        if len(index) == len(value):
            self._state = self._state._replace(parts=(self._state.parts[0], value))


class KeepsTokensOnRollback(DynamicCache):
    def rollback(self) -> None:
        if len(self._forks):
            self._forks.close("rollback")
        else:
            super().rollback()


class CropsNothing(DynamicCache):
    def crop(self, length: int) -> None:
        pass


class IsSlightlyOff(DynamicCache):
    def update(self, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Cached:
        return super().update(key, value + 1e-8, key_padding_mask)


class CountsFromOne(DynamicCache):
    def next_positions(self, num_tokens: int, device: torch.device) -> Tensor:
        return super().next_positions(num_tokens, device) + min(1, self.length)


@pytest.mark.parametrize(
    "wrong",
    [
        ForgetsPadding,
        ReordersKeysAlone,
        KeepsTokensOnRollback,
        CropsNothing,
        IsSlightlyOff,
        CountsFromOne,
    ],
)
def test_a_wrong_cache_is_found(wrong: type[DynamicCache]) -> None:
    with pytest.raises(AssertionError):
        perform(wrong)
