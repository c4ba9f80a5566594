"""What `generate` and `stream` refuse, with the name of the argument."""

import math

import numpy as np
import pytest
import torch

from tests.generation.models import Toy
from tests.generation.prompts import PROMPTS
from zeta.caches import DynamicCache
from zeta.generation import Draft, Greedy, Sampling, beam_search, generate


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prompt": torch.ones(3)}, ValueError, r"prompt must have shape \(batch, length\)"),
        ({"prompt": torch.tensor(5)}, ValueError, r"prompt must have shape .* got \(\)"),
        ({"prompt": torch.ones(1, 3)}, TypeError, "prompt must be int64; got torch.float32"),
        ({"prompt": torch.ones(1, 0).long()}, ValueError, "not empty"),
        ({"padding": torch.zeros(1, 2).bool()}, ValueError, r"padding must have shape \(1, 4\)"),
        ({"padding": torch.zeros(1, 4)}, TypeError, "padding must be bool"),
        (
            {"padding": torch.tensor([[False, True, False, False]])},
            ValueError,
            "at the left or at the right",
        ),
        ({"padding": torch.ones(1, 4).bool()}, ValueError, "at least one token"),
        ({"prompt": [[1, 2]]}, TypeError, "prompt must be a tensor; got list"),
        ({"padding": [[False] * 4]}, TypeError, "padding must be a tensor; got list"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1; got 0"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an int; got 2.0"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an int; got True"),
        (
            {"max_new_tokens": torch.tensor(2.0)},
            TypeError,
            r"max_new_tokens must be an int; got tensor\(2",
        ),
        ({"progress": "no"}, TypeError, "progress must be True or False; got 'no'"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk must be at least 1; got 0"),
        ({"prefill_chunk": 2.0}, TypeError, "prefill_chunk must be an int; got 2.0"),
        ({"stop_tokens": 3}, TypeError, "stop_tokens must be a collection of ints; got 3"),
        ({"stop_tokens": [3.5]}, TypeError, r"a collection of ints; got \[3.5\]"),
        ({"stop_tokens": [True]}, TypeError, r"a collection of ints; got \[True\]"),
        ({"stop_tokens": "ab"}, TypeError, "a collection of ints; got 'ab'"),
        ({"fill": 1.5}, TypeError, "fill must be an int; got 1.5"),
        (
            {"fill": 2**63},
            ValueError,
            r"fill must be in \[-2\*\*63, 2\*\*63\); got 9223372036854775808",
        ),
        ({"choose": "greedy"}, TypeError, r"choose must be Greedy\(\) or Sampling\(\).*'greedy'"),
        ({"choose": Greedy}, TypeError, r"choose must be Greedy\(\) or Sampling\(\)"),
    ],
)
def test_wrong_arguments_are_refused(
    options: dict[str, object], error: type[Exception], words: str
) -> None:
    model = Toy()
    arguments = {"prompt": torch.tensor([[1, 2, 3, 4]]), "max_new_tokens": 2} | options
    with pytest.raises(error, match=words):
        generate(model, caches=model.caches(), **arguments)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["prompt", "padding"])
def test_nested_tensors_are_refused(name: str) -> None:
    model = Toy()
    arguments = {"prompt": torch.tensor([[1, 2, 3, 4]]), "max_new_tokens": 2}
    nested = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])])
    with pytest.raises(TypeError, match=f"{name} must not be a nested tensor: pad it"):
        generate(model, caches=model.caches(), **arguments | {name: nested})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, r"temperature must be positive \(Greedy\(\) is its limit at 0\)"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]; got 1.5"),
        ({"temperature": float("nan")}, r"temperature must be positive .* got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive and finite; got 0.0"),
        ({"repetition_penalty": math.inf}, "must be positive and finite; got inf"),
        (
            {"seed": -(2**63) - 1},
            r"seed must be in \[-2\*\*63, 2\*\*64\); got -9223372036854775809",
        ),
        ({"seed": 2**64}, r"seed must be in \[-2\*\*63, 2\*\*64\); got 18446744073709551616"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**options)


@pytest.mark.parametrize("value", [2.5, True])
@pytest.mark.parametrize("name", ["top_k", "seed"])
def test_whole_numbers_are_ints(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an int; got {value}"):
        Sampling(**{name: value})


def test_a_class_of_caches_is_no_cache() -> None:
    with pytest.raises(TypeError, match="caches must hold caches"):
        generate(Toy(), torch.tensor(PROMPTS[:1]), [DynamicCache], max_new_tokens=2)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", ["0.5", None, [0.5]])
def test_numbers_are_numbers(name: str, value: object) -> None:
    words = f"^{name} must be a number; got {type(value).__name__}$"
    with pytest.raises(TypeError, match=words):
        Sampling(**{name: value})
    if name == "repetition_penalty":
        with pytest.raises(TypeError, match=words):
            Greedy(value)


@pytest.mark.parametrize(
    ("caches", "error", "words"),
    [
        (DynamicCache(), TypeError, "caches must be a sequence of caches.* got DynamicCache"),
        ((cache for cache in [DynamicCache()] * 2), TypeError, "a sequence.* got generator"),
        ([{}, {}], TypeError, r"must hold caches of zeta.caches.* got dict"),
        ([DynamicCache()] * 2, ValueError, "caches must be different objects, one for each"),
    ],
)
def test_caches_must_be_different_caches(
    caches: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        generate(Toy(), torch.tensor([[1, 2]]), caches, max_new_tokens=2)


def test_caches_must_be_empty_and_logits_of_the_right_shape() -> None:
    model = Toy()
    caches = model.caches()
    prompt = torch.tensor([[1, 2]])
    generate(model, prompt, caches, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"caches must be empty; got some that hold \[2, 2\]"):
        generate(model, prompt, caches, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"must return logits \(1, 2, vocabulary\); got \(1, 7\)"):
        generate(lambda *_: torch.zeros(1, 7), prompt, [], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"must return logits .* got \(1, 2, 0\)"):
        generate(lambda *_: torch.zeros(1, 2, 0), prompt, [], max_new_tokens=1)
    with pytest.raises(TypeError, match=r"must return logits \(1, 2, vocabulary\); got tuple"):
        generate(lambda *_: (torch.zeros(1, 2, 7),), prompt, [], max_new_tokens=1)


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_numbers_of_numpy_are_numbers(kind: type[np.integer]) -> None:
    model, prompt, draft = Toy(), torch.tensor([[1, 2, 3, 4]]), [DynamicCache(), DynamicCache()]
    found, expected = (
        generate(
            model,
            prompt,
            [DynamicCache(), DynamicCache()],
            choose=Greedy(),
            max_new_tokens=number(6),
            prefill_chunk=number(3),
            draft=Draft(model, [DynamicCache(), DynamicCache()], number(2)),
        )
        for number in (kind, int)
    )
    assert torch.equal(found.tokens, expected.tokens)
    assert type(Draft(model, draft, kind(4)).num_tokens) is int
    options = {"num_beams": kind(2), "max_new_tokens": kind(3), "prefill_chunk": kind(2)}
    best = beam_search(model, prompt, draft, **options)
    assert best.tokens.shape == (1, 2, 3)
