"""Checks of what a generation is given.

Shapes: B sequences, N tokens of a call, V vocabulary.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

from torch import Tensor

from zeta.caches import CrossCache, DecodingCache


def check_int(name: str, value: object, least: int | None = None) -> int:
    """A whole number, checked, as one of Python's: NumPy's narrow ones would wrap around.

    Raises:
        TypeError: It is none, as a bool is none.
        ValueError: It is below ``least``.
    """
    message = f"{name} must be an int; got {value!r}"
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(message)
    try:
        number = operator.index(value)
    except TypeError as error:  # Of a tensor of fractions.
        raise TypeError(message) from error
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return number


def check_caches(name: str, caches: object) -> None:
    """Check the caches of a model.

    Raises:
        TypeError: They are no sequence, or one of them cannot be decoded with, as a dict.
        ValueError: One is there twice: attentions would write into each other's.
    """
    if not isinstance(caches, Sequence):
        raise TypeError(
            f"{name} must be a sequence of caches, one for each attention; "
            f"got {type(caches).__name__}"
        )
    for cache in caches:
        if isinstance(cache, type) or not isinstance(cache, DecodingCache | CrossCache):
            raise TypeError(
                f"{name} must hold caches of zeta.caches, such as DynamicCache(); "
                f"got {type(cache).__name__}"
            )
    if len(set(map(id, caches))) < len(caches):
        raise ValueError(f"{name} must be different objects, one for each attention")


def check_logits(logits: object, tokens_BN: Tensor) -> None:
    """Check what a model returns for tokens: ``(B, N, V)``.

    Raises:
        TypeError: It is no tensor.
        ValueError: It has another shape.
    """
    batch, count = tokens_BN.shape
    wanted = f"the model must return logits ({batch}, {count}, vocabulary)"
    if not isinstance(logits, Tensor):
        raise TypeError(f"{wanted}; got {type(logits).__name__}")
    if logits.dim() != 3 or logits.shape[:2] != tokens_BN.shape or not logits.shape[2]:
        raise ValueError(f"{wanted}; got {tuple(logits.shape)}")


def has_no_token(logits: Tensor) -> Tensor:
    """Where none of the tokens can be chosen, bool: a logit is NaN, or all are -inf.

    Args:
        logits: ``(..., V)``.
    """
    # The largest is NaN where any is.
    return ~(logits.amax(-1) > -math.inf)


def check_choice(is_none: bool, logits: Tensor, number: int) -> None:
    """Raise ValueError if the model has returned logits of which no token can be chosen.

    Args:
        is_none: Whether there are such, by `has_no_token`: the caller asks the device for all that
            it needs at once.
        logits: They, to tell what is wrong.
        number: Of the token that they are for, from 0 on.
    """
    if is_none:
        kind = "NaN" if bool(logits.isnan().any()) else "-inf for every token"
        raise ValueError(
            f"the model returned logits that are {kind}, for new token number {number}"
        )


def stops_of(stop_tokens: Iterable[SupportsIndex]) -> list[int]:
    """Stop tokens as different numbers, in order; TypeError unless they are ints.

    Numbers that int64 does not have, of which no token is, are left out.
    """
    try:
        listed = list(stop_tokens)
        for token in listed:
            check_int("a stop token", token)
    except TypeError as error:
        raise TypeError(f"stop_tokens must be a collection of ints; got {stop_tokens!r}") from error
    return sorted(filter(_is_int64, set(map(operator.index, listed))))


def check_fill(fill: object) -> None:
    """Check what stands behind the end of a continuation, in int64.

    Raises:
        TypeError: It is no int.
        ValueError: It is out of int64's range.
    """
    check_int("fill", fill)
    if not _is_int64(fill):
        raise ValueError(f"fill must be in [-2**63, 2**63); got {fill}")


def _is_int64(number: Any) -> bool:
    return -(2**63) <= operator.index(number) < 2**63
