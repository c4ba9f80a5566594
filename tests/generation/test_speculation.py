"""Speculative decoding changes how often the model is called, and nothing else."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.generation.models import Toy
from tests.generation.test_generate import CACHES, padded
from zeta.caches import DynamicCache, RollingCache
from zeta.generation import Draft, Sampling, generate

VOCABULARY = 3


def similar(model: Toy, amount: float) -> Toy:
    """A model that is off by some noise."""
    other = Toy(model.head.out_features)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += amount * torch.randn_like(parameter)
    return other


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("kind", CACHES)
def test_greedy_is_the_same_with_any_draft(kind: str, noise: float) -> None:
    model = Toy()
    tokens, padding = padded("left")
    draft = similar(model, noise)
    options = {"max_new_tokens": 15, "padding": padding, "stop_tokens": [0], "fill": -1}
    plain = generate(model, tokens, CACHES[kind](), **options)
    model.calls.clear()
    found = generate(model, tokens, CACHES[kind](), draft=Draft(draft, draft.caches()), **options)
    assert torch.equal(found.tokens, plain.tokens)
    assert torch.equal(found.lengths, plain.lengths)
    if noise == 0.0:
        # The prompt, then five tokens a call.
        assert len(model.calls) <= 1 + 3


def exact(model: Toy, prompt: list[int], count: int, choose: Sampling) -> Tensor:
    """The probability of each continuation, ``(V, ..., V)``."""
    table = torch.zeros([VOCABULARY] * count, dtype=torch.float64)
    for tokens in itertools.product(range(VOCABULARY), repeat=count):
        probability = 1.0
        for n, token in enumerate(tokens):
            logits = model.logits_after([*prompt, *tokens[:n]])
            probability *= float(choose.probabilities(logits[None])[0, token])
        table[tokens] = probability
    return table


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.1, 2.0])
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_distribution_is_that_of_the_model(noise: float, num_tokens: int, batch: int) -> None:
    model = Toy(VOCABULARY)
    with torch.no_grad():
        model.head.weight.div_(3)
    draft = similar(model, noise)
    choose = Sampling(temperature=1.3, top_p=0.95)
    count, rounds = 3, 600
    found = torch.zeros([VOCABULARY] * count, dtype=torch.float64)
    for seed in range(rounds // batch):
        drawn = generate(
            model,
            torch.tensor([[1, 2]]).expand(batch, -1),
            model.caches(),
            max_new_tokens=count,
            choose=Sampling(temperature=1.3, top_p=0.95, seed=seed),
            draft=Draft(draft, draft.caches(), num_tokens),
        ).tokens
        for row in drawn.tolist():
            found[tuple(row)] += 1
    found /= found.sum()
    want = exact(model, [1, 2], count, choose)
    assert (found[want == 0] == 0).all()
    # Total variation of 600 draws over 27 outcomes is about 0.08; of wrong distributions more.
    assert (found - want).abs().sum() / 2 < 0.13


def test_a_window_can_be_rolled_back_too() -> None:
    model = Toy()
    tokens, padding = padded("left")
    draft = similar(model, 0.1)
    options = {"max_new_tokens": 15, "padding": padding}
    plain = generate(model, tokens, [RollingCache(5), RollingCache(5)], **options)
    found = generate(
        model,
        tokens,
        [RollingCache(5), RollingCache(5)],
        draft=Draft(draft, [DynamicCache(), DynamicCache()]),
        **options,
    )
    assert torch.equal(found.tokens, plain.tokens)


def test_wrong_drafts_are_refused() -> None:
    model, other = Toy(), Toy(vocabulary=9)
    prompt = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="the model's vocabulary, 7; got 9"):
        generate(
            model, prompt, model.caches(), max_new_tokens=2, draft=Draft(other, other.caches())
        )
    with pytest.raises(ValueError, match="draft goes without a repetition penalty"):
        generate(
            model,
            prompt,
            model.caches(),
            max_new_tokens=2,
            choose=Sampling(repetition_penalty=1.2),
            draft=Draft(model, model.caches()),
        )
    with pytest.raises(ValueError, match="num_tokens must be at least 1; got 0"):
        Draft(model, [], 0)
