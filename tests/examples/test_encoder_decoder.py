"""The encoder-decoder of the examples: padding, caches, weights."""

import pytest
import torch

from zeta.examples import numbers_to_words as task
from zeta.examples.encoder_decoder import EncoderDecoder

NUMBERS = [7, 40, 123, 98_765]


@pytest.fixture
def model() -> EncoderDecoder:
    return EncoderDecoder(len(task.DIGITS), len(task.WORDS), embed_dim=32).double().eval()


def test_padding_changes_nothing(model: EncoderDecoder) -> None:
    together = model(task.encode_digits(NUMBERS), task.encode_words(NUMBERS))
    for index, number in enumerate(NUMBERS):
        target_1T = task.encode_words([number])
        alone = model(task.encode_digits([number]), target_1T)
        torch.testing.assert_close(
            together[index : index + 1, : target_1T.shape[1]], alone, rtol=0, atol=1e-10
        )


def test_cached_logits_are_the_full_ones(model: EncoderDecoder) -> None:
    target_BT = task.encode_words(NUMBERS)
    source_BSE, padding_BS = model.encode(task.encode_digits(NUMBERS))
    caches = model.empty_caches()
    cached = [
        model.decode(ids_B1, source_BSE, padding_BS, caches)[0]
        for ids_B1 in target_BT.split(1, dim=1)
    ]
    full = model.decode(target_BT, source_BSE, padding_BS)[0]
    torch.testing.assert_close(torch.cat(cached, dim=1), full, rtol=0, atol=1e-10)


def test_written_ids_are_the_likeliest(model: EncoderDecoder) -> None:
    source_BS = task.encode_digits(NUMBERS)
    written_BT = model.write(source_BS, task.START, 6)
    start_B1 = torch.full((len(NUMBERS), 1), task.START)
    logits_BTV = model(source_BS, torch.cat([start_B1, written_BT[:, :-1]], dim=1))
    assert torch.equal(logits_BTV.argmax(dim=-1), written_BT)


def test_cross_attention_is_over_the_digits(model: EncoderDecoder) -> None:
    source_BS = task.encode_digits(NUMBERS)
    _, weights = model.decode(task.encode_words(NUMBERS), *model.encode(source_BS))
    assert len(weights) == 2
    heads, batch, _, source = weights[-1].shape
    assert (heads, batch, source) == (4, len(NUMBERS), source_BS.shape[1])
    total = weights[-1].sum(dim=-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert not weights[-1].permute(1, 3, 0, 2)[source_BS == task.PAD].any()
