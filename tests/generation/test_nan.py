"""A model that returns NaN: no token can be chosen, and every way of generating says so."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.generation.models import Toy
from tests.generation.test_speculation import similar
from zeta.generation import Draft, Greedy, Sampling, beam_search, generate

PROMPT = torch.tensor([[1, 2, 3], [3, 2, 1]])


class Spoilt:
    """A `Toy` whose ``failing``-th call returns one NaN, for the last sequence."""

    def __init__(self, failing: int) -> None:
        self.model = Toy()
        self._calls, self._failing = itertools.count(1), failing

    def __call__(self, *arguments: Any) -> Tensor:
        logits: Tensor = self.model(*arguments)
        if next(self._calls) == self._failing:
            logits = logits.clone()
            logits[-1, -1, 3] = float("nan")
        return logits


@pytest.mark.parametrize("choose", [Greedy(), Sampling(seed=1), Sampling(top_k=2)], ids=str)
@pytest.mark.parametrize("failing", [1, 4])
def test_it_is_an_error(failing: int, choose: Greedy | Sampling) -> None:
    spoilt = Spoilt(failing)
    caches = spoilt.model.caches()
    with pytest.raises(ValueError, match=rf"are NaN, for new token number {failing - 1}$"):
        generate(spoilt, PROMPT, caches, max_new_tokens=6, choose=choose)


@pytest.mark.parametrize("failing", [1, 3])
def test_it_is_an_error_of_beams(failing: int) -> None:
    spoilt = Spoilt(failing)
    caches = spoilt.model.caches()
    with pytest.raises(ValueError, match=rf"are NaN, for new token number {failing - 1}$"):
        beam_search(spoilt, PROMPT, caches, num_beams=2, max_new_tokens=6)


@pytest.mark.parametrize("failing", [1, 2])
def test_it_is_an_error_with_a_draft(failing: int) -> None:
    spoilt = Spoilt(failing)
    other = similar(spoilt.model, 0.1)
    draft = Draft(other, other.caches())
    with pytest.raises(ValueError, match=rf"are NaN, for new token number {failing - 1}$"):
        generate(spoilt, PROMPT, spoilt.model.caches(), max_new_tokens=9, draft=draft)


def test_infinite_logits_are_none() -> None:
    def model(tokens: Tensor, *_: Any) -> Tensor:
        logits = torch.full((*tokens.shape, 5), float("-inf"))
        logits[..., 2] = float("inf")
        return logits

    found = generate(model, PROMPT, [], max_new_tokens=3)
    assert found.tokens.tolist() == [[2, 2, 2], [2, 2, 2]]
