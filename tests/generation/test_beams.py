"""Beam search against the enumeration of every continuation."""

import itertools
import math
import sys

import pytest
import torch
from torch import Tensor

from tests.generation.models import Toy
from tests.generation.prompts import CACHES, greedily
from zeta.generation import beam_search, beams

PROMPT = torch.tensor([[1, 2, 0], [2, 1, 1]])
PADDING = torch.tensor([[False, False, True], [False, False, False]])


def every_continuation(
    model: Toy, prompt: list[int], vocabulary: int, count: int, stop: int, penalty: float
) -> list[tuple[float, list[int]]]:
    found: dict[tuple[int, ...], float] = {}
    for tokens in itertools.product(range(vocabulary), repeat=count):
        end = tokens.index(stop) + 1 if stop in tokens else count
        kept = tokens[:end]
        if kept not in found:
            total = 0.0
            for n, token in enumerate(kept):
                logits = model.logits_after([*prompt, *kept[:n]])
                total += float(logits.log_softmax(-1)[token])
            found[kept] = total / end**penalty
    return sorted(((score, list(kept)) for kept, score in found.items()), reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("kind", CACHES)
def test_enough_beams_find_the_best_of_all(kind: str, penalty: float) -> None:
    model = Toy(vocabulary=3)
    found = beam_search(
        model,
        PROMPT,
        CACHES[kind](),
        num_beams=27,
        max_new_tokens=3,
        length_penalty=penalty,
        padding=PADDING,
        stop_tokens=[0],
        fill=-1,
    )
    for b, prompt in enumerate([[1, 2], [2, 1, 1]]):
        expected = every_continuation(model, prompt, 3, 3, 0, penalty)
        count = len(expected)
        scores = torch.tensor([score for score, _ in expected], dtype=torch.float64)
        torch.testing.assert_close(found.scores[b, :count], scores)
        assert (found.scores[b, count:] == float("-inf")).all()
        for k, (_, tokens) in enumerate(expected):
            assert found.tokens[b, k, : found.lengths[b, k]].tolist() == tokens


def test_one_beam_is_greedy() -> None:
    model = Toy()
    found = beam_search(
        model, PROMPT, model.caches(), num_beams=1, max_new_tokens=9, padding=PADDING
    )
    for b, prompt in enumerate([[1, 2], [2, 1, 1]]):
        assert found.tokens[b, 0].tolist() == greedily(model, prompt, 9)


class Chain:
    """A model in which the next token depends on the last alone, and a third of them cannot be."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(5, 5, dtype=torch.float64, generator=generator)
        impossible = torch.rand(5, 5, generator=generator) < 1 / 3
        self.table.masked_fill_(impossible.fill_diagonal_(False), -torch.inf)
        self.calls = 0

    def __call__(self, tokens: Tensor, *_: object) -> Tensor:
        self.calls += 1
        return self.table[tokens]

    def logits_after(self, tokens: list[int]) -> Tensor:
        return self.table[tokens[-1]]


def plain_beams(
    model: Toy | Chain, prompt: list[int], width: int, count: int, stop: int, penalty: float = 1.0
) -> Tensor:
    """Beam search with a dict of hypotheses and the whole sequence at each step: best scores."""
    going: dict[tuple[int, ...], float] = {(): 0.0}
    finished: list[float] = []
    for n in range(count):
        grown: dict[tuple[int, ...], float] = {}
        for tokens, total in going.items():
            for token, more in enumerate(model.logits_after([*prompt, *tokens]).log_softmax(-1)):
                if token == stop:
                    finished.append((total + float(more)) / (n + 1) ** penalty)
                elif more > -torch.inf:
                    grown[(*tokens, token)] = total + float(more)
        best = sorted(grown.items(), key=lambda item: -item[1])[:width]
        going = dict(best)
    finished += [total / count**penalty for total in going.values()]
    finished += [-torch.inf] * width
    return torch.tensor(sorted(finished, reverse=True)[:width], dtype=torch.float64)


@pytest.mark.parametrize("width", [2, 3])
def test_few_beams_find_what_a_plain_search_finds(width: int) -> None:
    model = Toy()
    found = beam_search(
        model,
        PROMPT,
        model.caches(),
        num_beams=width,
        max_new_tokens=6,
        padding=PADDING,
        stop_tokens=[4],
    )
    for b, prompt in enumerate([[1, 2], [2, 1, 1]]):
        torch.testing.assert_close(found.scores[b], plain_beams(model, prompt, width, 6, 4))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_search_ends_early_and_misses_nothing(width: int, penalty: float) -> None:
    calls = 0
    for seed in range(40):
        model = Chain(seed)
        found = beam_search(
            model,
            torch.tensor([[1], [2]]),
            [],
            num_beams=width,
            max_new_tokens=6,
            length_penalty=penalty,
            stop_tokens=[0],
        )
        for b, prompt in enumerate([[1], [2]]):
            expected = plain_beams(model, prompt, width, 6, 0, penalty)
            torch.testing.assert_close(found.scores[b], expected)
        assert torch.equal(found.lengths == 0, found.scores == -torch.inf)
        calls += model.calls
    # A token can always follow itself: without an early end there are six calls.
    assert penalty == 2.0 or calls < 40 * 6


@pytest.mark.parametrize("longest", [1, 6])
def test_a_search_ends_when_nothing_else_is_possible(longest: int) -> None:
    model = Chain(0)
    model.table[1, 1:] = -torch.inf
    model.table[1, 0] = 0
    options = {"num_beams": 3, "max_new_tokens": longest, "stop_tokens": [0]}
    found = beam_search(model, torch.tensor([[1]]), [], **options)
    assert (model.calls, found.lengths.tolist()) == (1, [[1, 0, 0]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1; got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"length_penalty": -1.0}, "length_penalty must be finite and not negative; got -1.0"),
        ({"length_penalty": math.nan}, "length_penalty must be finite and not negative; got nan"),
        ({"length_penalty": math.inf}, "length_penalty must be finite and not negative; got inf"),
        (
            {"fill": -(2**63) - 1},
            r"fill must be in \[-2\*\*63, 2\*\*63\); got -9223372036854775809",
        ),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, float], words: str) -> None:
    model = Toy()
    arguments = {"num_beams": 2, "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=words):
        beam_search(model, PROMPT, model.caches(), **arguments)


def test_a_penalty_beyond_floats_makes_all_long_ones_equal() -> None:
    model = Toy()
    options = {"num_beams": 2, "max_new_tokens": 3, "padding": PADDING}
    found = beam_search(model, PROMPT, model.caches(), length_penalty=1e4, **options)
    assert torch.equal(found.scores, torch.zeros_like(found.scores))
    near = beam_search(model, PROMPT, model.caches(), length_penalty=100.0, **options)
    assert bool((near.scores < 0).all())


def test_a_bar_is_drawn_only_when_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = Toy(), {"num_beams": 2, "max_new_tokens": 5, "padding": PADDING}
    silent = beam_search(model, PROMPT, model.caches(), **options)
    assert capfd.readouterr().err == ""
    shown = beam_search(model, PROMPT, model.caches(), progress=True, **options)
    assert "/5 [" in capfd.readouterr().err
    assert torch.equal(silent.tokens, shown.tokens)
    with pytest.raises(TypeError, match="progress must be True or False; got 'no'"):
        beam_search(model, PROMPT, model.caches(), progress="no", **options)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model.calls.clear()
    with pytest.raises(ImportError, match=r"needs tqdm: pip install 'zeta-attention\[demo\]'"):
        beam_search(model, PROMPT, model.caches(), progress=True, **options)
    assert not model.calls


@pytest.mark.parametrize("name", ["num_beams", "max_new_tokens", "fill"])
def test_whole_numbers_are_ints(name: str) -> None:
    model = Toy()
    options = {"num_beams": 2, "max_new_tokens": 2} | {name: 2.5}
    with pytest.raises(TypeError, match=rf"{name} must be an int; got 2\.5"):
        beam_search(model, PROMPT, model.caches(), **options)


@pytest.mark.parametrize("stop_tokens", [[4, 4], [4, -1], [4, 7], [4, 99], torch.tensor([4])])
def test_stop_tokens_are_a_set_of_tokens(stop_tokens: object) -> None:
    model = Toy()
    options = {"num_beams": 3, "max_new_tokens": 5, "padding": PADDING}
    plain = beam_search(model, PROMPT, model.caches(), stop_tokens=[4], **options)
    found = beam_search(model, PROMPT, model.caches(), stop_tokens=stop_tokens, **options)
    assert torch.equal(found.tokens, plain.tokens)
    assert torch.equal(found.scores, plain.scores)


def test_hypotheses_are_on_the_host_beside_another_default_device() -> None:
    with torch.device("meta"):
        search = beams._Search(2, 2, 2, 1.0, [0])
        for hypotheses in (1, 2):
            sources, tokens = search.advance(torch.zeros(2, hypotheses, 5, device="cpu"))
            assert sources.device == tokens.device == torch.device("cpu")
        found = search.result(0, torch.device("cpu"))
    assert found.lengths.min() > 0
