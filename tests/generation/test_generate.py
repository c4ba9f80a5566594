"""`generate` and `stream`: each sequence is continued as it would be alone, without a cache."""

import math
import sys
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.caches.kinds import new_pool
from tests.generation.models import VOCABULARY, Toy
from zeta.caches import DecodingCache, DynamicCache, PagedCache, RollingCache, StaticCache
from zeta.generation import Greedy, Sampling, Step, generate, stream

PROMPTS = [[1, 2, 3, 4, 5], [6, 1], [2, 5, 3]]


def padded(side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, PROMPTS))
    tokens = torch.full((len(PROMPTS), longest), 99)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        where = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        row[where] = torch.tensor(prompt)
    padding = tokens == 99
    return tokens.masked_fill(padding, 0), padding


def greedily(model: Toy, prompt: Sequence[int], count: int, stops: Sequence[int] = ()) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(model.logits_after(tokens).argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def _paged() -> list[DecodingCache]:
    pool = new_pool(200, 3, head_dim=4, value_dim=4)
    return [PagedCache(pool), PagedCache(pool)]


CACHES: dict[str, Callable[[], list[DecodingCache]]] = {
    "dynamic": lambda: [DynamicCache(), DynamicCache()],
    "static": lambda: [StaticCache(40), StaticCache(40)],
    "paged": _paged,
}


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CACHES)
def test_each_sequence_is_continued_as_if_alone(kind: str, side: str, chunk: int | None) -> None:
    model = Toy()
    tokens, padding = padded(side)
    found = generate(
        model,
        tokens,
        CACHES[kind](),
        max_new_tokens=12,
        padding=padding,
        stop_tokens=[0],
        prefill_chunk=chunk,
        fill=-7,
    )
    for b, prompt in enumerate(PROMPTS):
        expected = greedily(model, prompt, 12, [0])
        assert found.tokens[b, : found.lengths[b]].tolist() == expected
        assert (found.tokens[b, found.lengths[b] :] == -7).all()


def test_finished_sequences_leave_the_batch() -> None:
    model = Toy()
    tokens, padding = padded("left")
    alone = [greedily(model, prompt, 8) for prompt in PROMPTS]
    model.calls.clear()
    stop = alone[0][2]
    expected = [greedily(model, prompt, 8, [stop]) for prompt in PROMPTS]
    model.calls.clear()
    found = generate(
        model, tokens, model.caches(), max_new_tokens=8, padding=padding, stop_tokens=[stop]
    )
    assert found.lengths.tolist() == [len(row) for row in expected]
    going = [sum(len(row) > n for row in expected) for n in range(1, 8)]
    assert model.calls == [(3, 5)] + [(count, 1) for count in going if count]


def test_a_stream_can_be_left_and_reports_each_step() -> None:
    model = Toy()
    tokens, padding = padded("right")
    steps: list[Step] = []
    for now in stream(model, tokens, model.caches(), max_new_tokens=50, padding=padding):
        assert torch.is_grad_enabled()
        steps.append(now)
        if now.number == 3:
            break
    assert [now.number for now in steps] == [0, 1, 2, 3]
    assert len(model.calls) == 4
    seen: list[Step] = []
    found = generate(
        model, tokens, model.caches(), max_new_tokens=4, padding=padding, on_step=seen.append
    )
    assert torch.equal(torch.stack([now.tokens for now in seen], dim=1), found.tokens)


def test_draws_do_not_depend_on_neighbours() -> None:
    model = Toy()
    tokens, padding = padded("left")
    choose = Sampling(temperature=0.8, top_p=0.9, seed=3)

    def run(**options: object) -> Tensor:
        return generate(
            model,
            tokens,
            model.caches(),
            max_new_tokens=10,
            padding=padding,
            choose=choose,
            **options,
        ).tokens

    free = run()
    assert torch.equal(free, run())
    assert not torch.equal(
        free,
        generate(
            model,
            tokens,
            model.caches(),
            max_new_tokens=10,
            padding=padding,
            choose=Sampling(temperature=0.8, top_p=0.9, seed=4),
        ).tokens,
    )
    for count in (1, 2):
        fewer = generate(
            model,
            tokens[:count],
            model.caches(),
            max_new_tokens=10,
            padding=padding[:count],
            choose=choose,
        ).tokens
        assert torch.equal(fewer, free[:count])
    stop = int(free[0, 1])
    stopped = run(stop_tokens=[stop], fill=-1)
    for mine, theirs in zip(free, stopped, strict=True):
        count = int((theirs >= 0).sum())
        assert torch.equal(mine[:count], theirs[:count])


def test_two_threads_share_one_model() -> None:
    model = Toy()
    prompts = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])]
    expected = [
        generate(model, prompt, model.caches(), max_new_tokens=40).tokens for prompt in prompts
    ]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        caches = [StaticCache(50), DynamicCache()]
        found[number] = generate(model, prompts[number], caches, max_new_tokens=40).tokens

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


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


def test_a_stream_goes_on_outside_of_the_inference_mode_that_it_began_in() -> None:
    model = Toy()
    prompt = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 4, "choose": Greedy(repetition_penalty=1.5)}
    expected = generate(model, prompt, model.caches(), **options).tokens
    steps = stream(model, prompt, model.caches(), **options)
    with torch.inference_mode():
        found = [next(steps).tokens]
    found += [now.tokens for now in steps]
    assert torch.equal(torch.stack(found, dim=1), expected)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prompt": torch.ones(3)}, ValueError, r"prompt must have shape \(batch, length\)"),
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


def test_a_stop_token_that_no_token_can_be_changes_nothing() -> None:
    model, prompt = Toy(), torch.tensor([[1, 2, 3]])
    plain = generate(model, prompt, model.caches(), max_new_tokens=6)
    stops = [-1, 99, 2**63, -(2**70)]
    found = generate(model, prompt, model.caches(), max_new_tokens=6, stop_tokens=stops)
    assert torch.equal(found.tokens, plain.tokens)


@pytest.mark.parametrize("sinks", [0, 2])
def test_padding_is_never_a_sink(sinks: int) -> None:
    model, (tokens, padding) = Toy(), padded("right")

    def found(prompt: Tensor, **options: object) -> Tensor:
        caches = [RollingCache(3, sinks), RollingCache(3, sinks)]
        return generate(model, prompt, caches, max_new_tokens=8, **options).tokens

    alone = torch.cat([found(torch.tensor([prompt])) for prompt in PROMPTS])
    if not sinks:
        assert torch.equal(found(tokens, padding=padding), alone)
        return
    words = "prompt must have no padding where a RollingCache has sinks.* got padding, and sinks=2"
    with pytest.raises(ValueError, match=words):
        found(tokens, padding=padding)
    assert torch.equal(found(tokens[:1], padding=padding[:1]), alone[:1])


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


def test_a_bar_is_drawn_only_when_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = Toy(), torch.tensor([[1, 2, 3]])
    silent = generate(model, prompt, model.caches(), max_new_tokens=5)
    assert capfd.readouterr().err == ""
    shown = generate(model, prompt, model.caches(), max_new_tokens=5, progress=True)
    assert "/5 [" in capfd.readouterr().err
    assert torch.equal(silent.tokens, shown.tokens)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"needs tqdm: pip install 'zeta-attention\[demo\]'"):
        generate(model, prompt, model.caches(), max_new_tokens=5, progress=True)
