"""`Greedy` and `Sampling`: tokens by their probabilities, and penalties of repetitions."""

import math

import pytest
import torch
from torch import Tensor

from tests.generation.models import VOCABULARY, Toy
from tests.generation.prompts import PROMPTS, padded
from zeta.generation import Greedy, Sampling, generate


def drawn(choose: Sampling, logits: Tensor, count: int = 20000) -> Tensor:
    """How often each token is drawn."""
    start = choose.start(torch.zeros(count, 1, dtype=torch.int64), torch.zeros(count, 1).bool())
    tokens = start(logits.expand(count, -1), torch.arange(count))
    return tokens.bincount(minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        (Sampling(), [0.5, 0.25, 0.125, 0.125]),
        (Sampling(temperature=0.5), [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_k=1), [1, 0, 0, 0]),
        (Sampling(top_p=0.5), [1, 0, 0, 0]),
        (Sampling(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(min_p=0.4), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(min_p=0.6), [1, 0, 0, 0]),
        (Sampling(top_k=3, min_p=0.2, top_p=0.8), [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(choose: Sampling, expected: list[float]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    want = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(choose.probabilities(logits[None])[0], want, atol=1e-6, rtol=0)
    found = drawn(choose, logits)
    # Five standard deviations of a frequency among 20,000.
    assert ((found - want).abs() <= 5 * (want * (1 - want) / 20000).sqrt() + 1e-12).all()


@pytest.mark.parametrize(
    ("choose", "logits", "expected"),
    [
        (Sampling(), [0.0, math.inf, 5.0], [0, 1, 0]),
        (Sampling(top_k=2), [math.inf, -math.inf, math.inf], [0.5, 0, 0.5]),
        (Sampling(top_p=0.5), [1.0, 1.0], [1, 0]),
        (Sampling(min_p=1.0), [3.0, 1.0, 3.0], [0.5, 0, 0.5]),
        (Sampling(seed=-(2**63)), [0.0, -100.0], [1, math.exp(-100)]),
        (Sampling(temperature=1e-320), [0.0, 1.0, 50.0], [0, 0, 1]),
        (Sampling(temperature=1e-320), [3.0, -math.inf, 3.0], [0.5, 0, 0.5]),
        (Sampling(temperature=math.inf), [3.0, -math.inf, 1.0], [0.5, 0, 0.5]),
        (Sampling(temperature=1e308), [3.0, -math.inf, math.inf], [0, 0, 1]),
    ],
)
def test_the_limits_of_the_distribution(
    choose: Sampling, logits: list[float], expected: list[float]
) -> None:
    found = choose.probabilities(torch.tensor([logits]))
    assert found.tolist() == [expected]


def test_a_repetition_is_penalised_by_the_formula() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.9, 0.5]])
    prompt = torch.tensor([[0, 1, 2]])
    real = torch.tensor([[True, True, False]])
    choosing = Greedy(repetition_penalty=2.0).start(prompt, real)
    rows = torch.arange(1)
    # 2.0 becomes 1.0; the 2 in the prompt is padding, and only counts once it was chosen.
    assert choosing(logits, rows).tolist() == [2]
    assert choosing(logits, rows).tolist() == [0]
    assert Greedy().start(prompt, real)(logits, rows).tolist() == [0]
    # Of two sequences the second goes on, which has the 1.
    two = Greedy(repetition_penalty=2.0).start(torch.tensor([[0], [1]]), real[:, :1].expand(2, 1))
    assert two(torch.tensor([[1.9, 2.0]]), torch.tensor([1])).tolist() == [0]
    assert two(torch.tensor([[1.9, 2.0]]), torch.tensor([0])).tolist() == [1]


def test_a_repetition_penalty_is_each_sequences_own() -> None:
    model = Toy()
    tokens, padding = padded("left")
    choose = Sampling(repetition_penalty=1.7, top_k=1)
    found = generate(
        model, tokens, model.caches(), max_new_tokens=6, padding=padding, choose=choose
    )
    for b, prompt in enumerate(PROMPTS):
        mine = list(prompt)
        for _ in range(6):
            logits = model.logits_after(mine)
            seen = torch.zeros(VOCABULARY, dtype=torch.bool)
            seen[mine] = True
            changed = torch.where(logits > 0, logits / 1.7, logits * 1.7)
            mine.append(int(torch.where(seen, changed, logits).argmax()))
        assert found.tokens[b].tolist() == mine[len(prompt) :]


@pytest.mark.parametrize("padding", [-1, 99])
def test_a_repetition_penalty_passes_over_what_is_no_token(padding: int) -> None:
    # Of the four in the prompt one is padding, and 50 has no logit, as an image has none.
    prompt, real = torch.tensor([[padding, 1, 50, 0]]), torch.tensor([[False, True, True, True]])
    choosing = Greedy(repetition_penalty=2.0).start(prompt, real)
    assert choosing(torch.tensor([[2.0, 1.9, 1.1]]), torch.arange(1)).tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_repetition_penalty_is_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    # 10.0625 / 1.1 is 9.148, which bfloat16 rounds to 9.125.
    logits = torch.tensor([[9.125, 10.0625]], dtype=dtype)
    choosing = Greedy(repetition_penalty=1.1).start(torch.tensor([[1]]), torch.tensor([[True]]))
    assert choosing(logits, torch.arange(1)).tolist() == [1]
    # Not even -60000 becomes so low that there is none.
    alone = Sampling(repetition_penalty=2.0).start(torch.tensor([[0, 1]]), torch.ones(1, 2).bool())
    assert alone(torch.tensor([[-60000.0, -40000.0]], dtype=dtype), torch.arange(1)).tolist() == [1]
