"""Numbers and the English words for them: what the encoder-decoder learns from.

Shapes: B numbers, S digits, T words.
"""

import random
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = ("", "thousand", "million")

PAD, START, END = 0, 1, 2
WORDS = ["<pad>", "<start>", "<end>", *UNITS, *TENS, "hundred", *SCALES[1:]]
WORD_IDS = {word: index for index, word in enumerate(WORDS)}
DIGITS = ["<pad>", *"0123456789", "<end>"]
MAX_DIGITS = 3 * len(SCALES)
MAX_WORDS = 5 * len(SCALES) - 1


def below_thousand(number: int) -> list[str]:
    """The words for 1 to 999; none for 0."""
    hundreds, rest = divmod(number, 100)
    words = [UNITS[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        tens, rest = divmod(rest, 10)
        words.append(TENS[tens - 2])
    if rest:
        words.append(UNITS[rest])
    return words


def to_words(number: int) -> list[str]:
    """The words for a number below 10 ** MAX_DIGITS: 4021 is four thousand twenty one.

    Raises:
        ValueError: The number is negative or too long.
    """
    if not 0 <= number < 10**MAX_DIGITS:
        raise ValueError(f"number must be in [0, 10**{MAX_DIGITS}), got {number}")
    words: list[str] = []
    for exponent in reversed(range(len(SCALES))):
        group = below_thousand(number // 1000**exponent % 1000)
        if group:
            words += [*group, SCALES[exponent]] if exponent else group
    return words or ["zero"]


def draw(
    count: int, rng: random.Random, *, min_digits: int, max_digits: int, excluded: Collection[int]
) -> list[int]:
    """Draw numbers: their length uniformly, then the digits, so that short ones are not rare.

    Args:
        count: How many.
        rng: Draws them.
        min_digits: Fewest digits, from 1.
        max_digits: Most digits, up to MAX_DIGITS.
        excluded: Numbers never returned; a set, for speed.

    Returns:
        The numbers, in the order drawn; one may come twice.
    """
    numbers: list[int] = []
    while len(numbers) < count:
        digits = rng.randint(min_digits, max_digits)
        number = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
        if number not in excluded:
            numbers.append(number)
    return numbers


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """The rows as one int64 tensor, filled with PAD on the right."""
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[PAD] * (length - len(row))] for row in rows])


def encode_digits(numbers: Sequence[int]) -> Tensor:
    """The ids of the digits ``(B, S)``, most significant first, and of an end mark."""
    end = DIGITS.index("<end>")
    return padded([[*(int(digit) + 1 for digit in str(number)), end] for number in numbers])


def encode_words(numbers: Sequence[int]) -> Tensor:
    """The ids of the words ``(B, T)``, between START and END."""
    return padded(
        [[START, *(WORD_IDS[word] for word in to_words(number)), END] for number in numbers]
    )


def decode_words(ids_T: Sequence[int]) -> list[str]:
    """The words up to END."""
    ids = list(ids_T)
    return [WORDS[index] for index in (ids[: ids.index(END)] if END in ids else ids)]


def phrase(words: Sequence[str]) -> str:
    """Join words as they are written: twenty-one, not twenty one."""
    text = ""
    for previous, word in zip(["", *words], words, strict=False):
        hyphen = previous in TENS and word in UNITS[1:10]
        text += word if not text else ("-" if hyphen else " ") + word
    return text
