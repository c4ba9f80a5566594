"""Numbers in words, against a reader written the other way round."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeta.examples import numbers_to_words as task


def read(words: list[str]) -> int:
    """The number that words stand for."""
    total = group = 0
    for word in words:
        if word in task.UNITS:
            group += task.UNITS.index(word)
        elif word in task.TENS:
            group += 10 * (task.TENS.index(word) + 2)
        elif word == "hundred":
            group *= 100
        else:
            total, group = total + group * {"thousand": 10**3, "million": 10**6}[word], 0
    return total + group


@pytest.mark.parametrize(
    ("number", "phrase"),
    [
        (0, "zero"),
        (7, "seven"),
        (13, "thirteen"),
        (20, "twenty"),
        (21, "twenty-one"),
        (100, "one hundred"),
        (110, "one hundred ten"),
        (1000, "one thousand"),
        (20_019, "twenty thousand nineteen"),
        (1_000_000, "one million"),
        (
            407_321_951,
            "four hundred seven million three hundred twenty-one thousand nine hundred fifty-one",
        ),
    ],
)
def test_known_numbers(number: int, phrase: str) -> None:
    assert task.phrase(task.to_words(number)) == phrase


@given(st.integers(0, 10**task.MAX_DIGITS - 1))
def test_words_read_back_as_the_number(number: int) -> None:
    words = task.to_words(number)
    assert read(words) == number
    assert len(words) <= task.MAX_WORDS
    ids = task.encode_words([number])[0].tolist()
    assert (ids[0], ids[-1]) == (task.START, task.END)
    assert task.decode_words(ids[1:]) == words


def test_longest_number_needs_all_words() -> None:
    assert len(task.to_words(777_777_777)) == task.MAX_WORDS


@pytest.mark.parametrize("number", [-1, 10**9])
def test_number_out_of_range(number: int) -> None:
    with pytest.raises(ValueError, match=rf"number must be in \[0, 10\*\*9\), got {number}"):
        task.to_words(number)


def test_rows_are_padded_on_the_right() -> None:
    end = len(task.DIGITS) - 1
    assert task.encode_digits([50, 7]).tolist() == [[6, 1, end], [8, end, 0]]
    assert task.encode_words([30, 101])[0, -2:].tolist() == [0, 0]


def test_excluded_numbers_are_never_drawn() -> None:
    excluded = set(range(5, 100))
    drawn = task.draw(500, random.Random(0), min_digits=1, max_digits=2, excluded=excluded)
    assert set(drawn) == {0, 1, 2, 3, 4}


def test_all_lengths_are_drawn_alike() -> None:
    drawn = task.draw(6000, random.Random(0), min_digits=3, max_digits=8, excluded=())
    lengths = [len(str(number)) for number in drawn]
    assert set(lengths) == set(range(3, 9))
    assert all(900 < lengths.count(length) < 1100 for length in range(3, 9))
