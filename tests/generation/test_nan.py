"""A model that returns NaN, or -inf for every token: every way of generating says so."""

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
    """A `Toy` whose ``failing``-th call returns what no token can be chosen of, for the last
    sequence at position ``at``.
    """

    def __init__(self, failing: int, kind: str, at: int = -1) -> None:
        self.model = Toy()
        self._calls, self._failing = itertools.count(1), failing
        self._kind, self._at = kind, at

    def __call__(self, *arguments: Any) -> Tensor:
        logits: Tensor = self.model(*arguments)
        if next(self._calls) == self._failing:
            logits = logits.clone()
            if self._kind == "NaN":
                logits[-1, self._at, 3] = float("nan")
            else:
                logits[-1, self._at] = float("-inf")
        return logits


KINDS = pytest.mark.parametrize("kind", ["NaN", "-inf for every token"])


@KINDS
@pytest.mark.parametrize("choose", [Greedy(), Sampling(seed=1), Sampling(top_k=2)], ids=str)
@pytest.mark.parametrize("failing", [1, 4])
def test_it_is_an_error(failing: int, choose: Greedy | Sampling, kind: str) -> None:
    spoilt = Spoilt(failing, kind)
    caches = spoilt.model.caches()
    with pytest.raises(ValueError, match=rf"are {kind}, for new token number {failing - 1}$"):
        generate(spoilt, PROMPT, caches, max_new_tokens=6, choose=choose)


@KINDS
@pytest.mark.parametrize("failing", [1, 3])
def test_it_is_an_error_of_beams(failing: int, kind: str) -> None:
    spoilt = Spoilt(failing, kind)
    caches = spoilt.model.caches()
    with pytest.raises(ValueError, match=rf"are {kind}, for new token number {failing - 1}$"):
        beam_search(spoilt, PROMPT, caches, num_beams=2, max_new_tokens=6)


@KINDS
@pytest.mark.parametrize("choose", [Greedy(), Sampling(seed=1)], ids=str)
@pytest.mark.parametrize(("failing", "at"), [(1, -1), (2, 0), (2, 2), (2, 4)])
def test_it_is_an_error_with_a_draft(
    failing: int, at: int, choose: Greedy | Sampling, kind: str
) -> None:
    spoilt = Spoilt(failing, kind, at)
    # All that it proposes is accepted.
    other = similar(spoilt.model, 0.0)
    draft = Draft(other, other.caches())
    number = max(at, 0) + failing - 1
    with pytest.raises(ValueError, match=rf"are {kind}, for new token number {number}$"):
        generate(
            spoilt, PROMPT, spoilt.model.caches(), max_new_tokens=9, choose=choose, draft=draft
        )


@KINDS
def test_behind_a_rejected_token_it_is_none(kind: str) -> None:
    model, other = Toy(), Toy()
    with torch.no_grad():
        other.head.weight.copy_(-model.head.weight)

    def spoilt(tokens: Tensor, *rest: Any) -> Tensor:
        logits = model(tokens, *rest)
        if tokens.shape[1] > 1 and tokens.shape[1] != PROMPT.shape[1]:
            logits[:, -1] = float("nan" if kind == "NaN" else "-inf")
        return logits

    plain = generate(model, PROMPT, model.caches(), max_new_tokens=4)
    found = generate(
        spoilt, PROMPT, model.caches(), max_new_tokens=4, draft=Draft(other, other.caches())
    )
    assert torch.equal(found.tokens, plain.tokens)


@pytest.mark.parametrize("choose", [Greedy(), Sampling()], ids=str)
def test_infinite_logits_are_none(choose: Greedy | Sampling) -> None:
    def model(tokens: Tensor, *_: Any) -> Tensor:
        logits = torch.full((*tokens.shape, 5), float("-inf"))
        logits[..., 2] = float("inf")
        return logits

    found = generate(model, PROMPT, [], max_new_tokens=3, choose=choose)
    assert found.tokens.tolist() == [[2, 2, 2], [2, 2, 2]]
    beams = beam_search(model, PROMPT, [], num_beams=1, max_new_tokens=3)
    assert torch.equal(beams.tokens[:, 0], found.tokens)
    assert beams.scores.tolist() == [[0.0], [0.0]]
