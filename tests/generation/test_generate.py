"""`generate` and `stream`: each sequence is continued as it would be alone, without a cache."""

import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.generation.models import Toy
from tests.generation.prompts import CACHES, PROMPTS, greedily, padded
from zeta.caches import DynamicCache, RollingCache, StaticCache
from zeta.generation import Greedy, Sampling, Step, beam_search, generate, stream


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


def test_a_bar_is_drawn_only_when_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = Toy(), torch.tensor([[1, 2, 3]])
    silent = generate(model, prompt, model.caches(), max_new_tokens=5)
    assert capfd.readouterr().err == ""
    shown = generate(model, prompt, model.caches(), max_new_tokens=5, progress=True)
    assert "/5 [" in capfd.readouterr().err
    assert torch.equal(silent.tokens, shown.tokens)
    in_pieces: dict[str, Any] = {"max_new_tokens": 5, "prefill_chunk": 2}
    list(stream(model, prompt, model.caches(), **in_pieces))
    assert capfd.readouterr().err == ""
    list(stream(model, prompt, model.caches(), **in_pieces, progress=True))
    drawn = capfd.readouterr().err
    assert "/2 [" in drawn
    assert "chunk of the prompt" in drawn
    assert "/5 [" not in drawn
    beam_search(model, prompt, model.caches(), num_beams=2, **in_pieces, progress=True)
    assert "chunk of the prompt" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"needs tqdm: pip install 'zeta-attention\[demo\]'"):
        generate(model, prompt, model.caches(), max_new_tokens=5, progress=True)
