"""The language model of the examples, and the textbook's attention beside Zeta's."""

import math

import pytest
import torch
from torch.nn import functional as F

from zeta.examples.language_model import LanguageModel, bits_per_byte, continue_text, window_loss
from zeta.examples.textbook import TextbookAttention

TEXT = b"It is a truth universally acknowledged, that a test must be able to fail."


def random_model(**arguments: object) -> LanguageModel:
    """A small model whose output is not that of an untrained head."""
    model = LanguageModel(embed_dim=32, num_heads=4, num_layers=2, **arguments).double().eval()  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def as_batch(text: bytes) -> torch.Tensor:
    return torch.tensor([list(text)])


def test_untrained_model_knows_nothing() -> None:
    model = LanguageModel(embed_dim=32, num_layers=1).eval()
    assert bits_per_byte(model, TEXT, 16) == pytest.approx(8.0)


def test_later_bytes_change_nothing_before_them() -> None:
    model = random_model()
    one, other = model(as_batch(TEXT[:40] + b"one")), model(as_batch(TEXT[:40] + b"two"))
    torch.testing.assert_close(one[:, :40], other[:, :40], rtol=0, atol=1e-12)
    assert not torch.allclose(one[:, 40:], other[:, 40:])


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [3, 1, 8]])
def test_cached_logits_are_the_full_ones(pieces: list[int]) -> None:
    model, caches = random_model(), None
    caches = model.empty_caches()
    parts = torch.tensor([list(TEXT[:12])]).split(pieces, dim=1)
    cached = torch.cat([model(part, caches) for part in parts], dim=1)
    torch.testing.assert_close(cached, model(as_batch(TEXT[:12])), rtol=0, atol=1e-10)
    assert caches[0]["prev_key"].shape == (1, 4, 12, 8)


def test_same_text_with_the_cache_and_without() -> None:
    model = random_model()
    written, logits = continue_text(model, TEXT[:20], 30, seed=5)
    again, full_logits = continue_text(model, TEXT[:20], 30, seed=5, use_cache=False)
    assert written == again
    torch.testing.assert_close(logits, full_logits, rtol=0, atol=1e-10)
    assert continue_text(model, TEXT[:20], 30, seed=6)[0] != written


def test_generation_leaves_the_prompt_alone() -> None:
    prompt = bytearray(TEXT[:20])
    continue_text(random_model(), prompt, 1)
    assert prompt == TEXT[:20]


@pytest.mark.parametrize("length", [8, 64, 512])
def test_bits_per_byte_counts_every_byte_once(length: int) -> None:
    model = random_model()
    half = length // 2
    bits = 8.0
    for index in range(1, len(TEXT)):
        # The window's start is the one whose second half holds the byte.
        first = max(0, (index - 1) // half * half - half)
        logits_V = model(as_batch(TEXT[first:index]))[0, -1]
        bits -= F.log_softmax(logits_V, dim=-1)[TEXT[index]].item() / math.log(2)
    assert bits_per_byte(model, TEXT, length) == pytest.approx(bits / len(TEXT), rel=1e-9)


def test_window_loss_reaches_both_ends_of_the_text() -> None:
    class Recorder(LanguageModel):
        def forward(self, bytes_BT, caches=None, rel_pos=None):  # type: ignore[no-untyped-def]
            seen.update(bytes_BT.flatten().tolist())
            return super().forward(bytes_BT, caches, rel_pos)

    seen: set[int] = set()
    window_loss(
        Recorder(embed_dim=32, num_layers=1), torch.arange(8), torch.Generator(), 200, 4
    ).backward()
    assert seen == set(range(7))


def test_textbook_computes_the_same() -> None:
    model = random_model()
    textbook = random_model(attention=TextbookAttention)
    textbook.load_state_dict(model.state_dict(), strict=True)
    text_1T = as_batch(TEXT)
    length = text_1T.shape[1]
    logits = model(text_1T)
    expected = textbook(text_1T, rel_pos=textbook.rel_pos(1, length, length))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    for module, result in ((model, logits), (textbook, expected)):
        result.square().sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
    theirs = dict(textbook.named_parameters())
    for name, ours in model.named_parameters():
        torch.testing.assert_close(ours.grad, theirs[name].grad, rtol=1e-8, atol=1e-8, msg=name)


def test_textbook_refuses_what_it_is_not_written_for() -> None:
    with pytest.raises(ValueError, match="written for self-attention with subln alone"):
        TextbookAttention(None, 32, 4, subln=False)
    with pytest.raises(ValueError, match="has no cache; got an incremental_state"):
        TextbookAttention(None, 32, 4)(*3 * [torch.ones(1, 2, 32)], incremental_state={})
