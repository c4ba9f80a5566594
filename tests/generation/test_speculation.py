"""Speculative decoding changes how often the model is called, and nothing else."""

import itertools
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.generation.models import Toy
from tests.generation.prompts import CACHES, padded
from zeta.caches import CrossCache, DynamicCache, RollingCache, StaticCache
from zeta.generation import Draft, Greedy, Sampling, generate, stream

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


@pytest.mark.parametrize("drafting", CACHES)
@pytest.mark.parametrize("kind", CACHES)
def test_sequences_that_differ_in_length_in_their_cache_give_back_what_is_refused(
    kind: str, drafting: str
) -> None:
    """`PagedCache` does not keep padding at the end of a chunk, so it ends at other lengths."""
    model = Toy()
    tokens, padding = padded("left")
    tokens, padding = (torch.nn.functional.pad(x, (2, 0), value=1) for x in (tokens, padding))
    options = {"max_new_tokens": 15, "padding": padding, "prefill_chunk": 1}
    plain = generate(model, tokens, CACHES[kind](), **options)
    draft = Draft(similar(model, 0.3), CACHES[drafting](), num_tokens=3)
    found = generate(model, tokens, CACHES[kind](), draft=draft, **options)
    assert torch.equal(found.tokens, plain.tokens)


@pytest.mark.parametrize("noise", [0.0, 0.3, 2.0])
def test_both_models_see_each_token_once_and_no_more_than_without_a_draft(noise: float) -> None:
    model = Toy()
    draft, calls = similar(model, noise), [0, 0]

    def watched(number: int) -> Any:
        def call(tokens: Tensor, caches: Any, positions: Tensor) -> Tensor:
            calls[number] += 1
            assert (positions[:, 0] == caches[0].length).all()
            return (model, draft)[number](tokens, caches, positions)

        return call

    prompt, options = torch.tensor([[1, 2, 3], [3, 2, 1]]), {"max_new_tokens": 12}
    plain = generate(model, prompt, model.caches(), **options)
    # The last token is in no cache.
    caches, drafted = ([StaticCache(3 + 12 - 1) for _ in range(2)] for _ in range(2))
    held = Draft(watched(1), drafted, num_tokens=3)
    steps = list(
        stream(watched(0), prompt, caches, draft=held, stop_tokens=[int(plain[0][0, 4])], **options)
    )
    for step in steps:
        assert len(step.rows) == len(step.tokens) == len(step.stopped)
        assert torch.equal(step.tokens, plain.tokens[step.rows, step.number])
    assert min(calls) > 1


def test_a_cross_attention_counts_the_tokens_that_stay() -> None:
    model = Toy()
    draft = similar(model, 0.3)

    def with_source(of: Toy) -> Any:
        def call(tokens: Tensor, caches: Any, positions: Tensor) -> Tensor:
            if not caches[2].length:
                caches[2].update(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4))
            caches[2].count_queries(tokens[..., None])
            return of(tokens, caches[:2], positions)

        return call

    caches, drafted = ([*model.caches(), CrossCache()] for _ in range(2))
    held = Draft(with_source(draft), drafted)
    prompt = torch.tensor([[1, 2, 3]])
    generate(with_source(model), prompt, caches, max_new_tokens=12, draft=held)
    for own in (caches, drafted):
        assert own[2].state_dict()["tensors"]["prev_queries"].tolist() == [own[0].length]


def test_logits_are_checked_at_every_step() -> None:
    model = Toy()

    def fails(tokens: Tensor, *rest: Any) -> Tensor:
        logits = model(tokens, *rest)
        return logits if tokens.shape[1] == 3 else logits[:, -1]

    prompt = torch.tensor([[1, 2, 3]])
    draft = Draft(similar(model, 0.0), model.caches())
    with pytest.raises(ValueError, match=r"must return logits \(1, 5, vocabulary\); got \(1, 7\)"):
        generate(fails, prompt, model.caches(), max_new_tokens=9, draft=draft)
    draft = Draft(fails, model.caches())
    with pytest.raises(ValueError, match=r"must return logits \(1, 1, vocabulary\); got \(1, 7\)"):
        generate(model, prompt, model.caches(), max_new_tokens=9, draft=draft)


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
@pytest.mark.parametrize(
    ("noise", "num_tokens", "batch"),
    [(0.1, 1, 24), (0.1, 3, 24), (2.0, 1, 24), (2.0, 3, 24), (2.0, 3, 1)],
)
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
    caches = model.caches()
    with pytest.raises(TypeError, match="like them, with repetition_penalty, seed, probabilities"):
        generate(
            model,
            prompt,
            caches,
            max_new_tokens=2,
            choose=types.SimpleNamespace(start=Greedy().start),
            draft=Draft(model, model.caches()),
        )
    assert caches[0].length == 0


def test_a_draft_needs_caches_that_grow() -> None:
    model, prompt = Toy(), torch.tensor([[1, 2]])
    for caches, drafted, words in (
        (model.caches(), [], "draft.caches must hold at least one cache that grows"),
        ([], model.caches(), "caches must hold at least one cache that grows"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(model, prompt, caches, max_new_tokens=2, draft=Draft(model, drafted))
    draft = Draft(model, [DynamicCache()] * 2)
    with pytest.raises(ValueError, match=r"draft\.caches must be different objects"):
        generate(model, prompt, model.caches(), max_new_tokens=2, draft=draft)
    with pytest.raises(TypeError, match="draft must be a Draft; got Toy"):
        generate(model, prompt, model.caches(), max_new_tokens=2, draft=model)


def test_a_window_must_be_longer_than_the_draft() -> None:
    model, prompt = Toy(), torch.tensor([[1, 2, 3, 4, 5, 6, 1, 2]])
    plain = generate(model, prompt, [RollingCache(4), RollingCache(4)], max_new_tokens=15)
    for num_tokens in (3, 4):
        draft = Draft(similar(model, 1.0), [RollingCache(4), RollingCache(4)], num_tokens)
        caches = [RollingCache(4), RollingCache(4)]
        if num_tokens == 3:
            found = generate(model, prompt, caches, max_new_tokens=15, draft=draft)
            assert torch.equal(found.tokens, plain.tokens)
            continue
        with pytest.raises(ValueError, match=r"num_tokens must be below the window.* 4; got 4"):
            generate(model, prompt, caches, max_new_tokens=15, draft=draft)


@pytest.mark.parametrize("failing", ["model", "draft"])
def test_a_failure_leaves_the_caches_as_they_were(failing: str) -> None:
    model, prompt = Toy(), torch.tensor([[1, 2, 3]])
    other = similar(model, 0.1)
    calls = 0

    def fails(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("no more")
        return (model if failing == "model" else other)(*arguments)

    caches, drafted = model.caches(), other.caches()
    draft = Draft(fails if failing == "draft" else other, drafted)
    steps = stream(
        fails if failing == "model" else model, prompt, caches, max_new_tokens=20, draft=draft
    )
    tokens: list[int] = []
    with pytest.raises(RuntimeError, match="no more"):
        tokens.extend(int(step.tokens) for step in steps)
    # The last token that came is in no cache yet.
    assert {cache.length for cache in caches} == {len(prompt[0]) + len(tokens) - 1}
    assert len({cache.length for cache in drafted}) == 1
    for cache in (*caches, *drafted):
        with pytest.raises(ValueError, match="needs an open fork"):
            cache.rollback()
