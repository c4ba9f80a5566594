"""Draws from distributions, by numbers that a counter-based hash makes.

A number is a function of (seed, draw, place in the batch) alone, the same on every device. All
arithmetic is on 64-bit two's complement integers that wrap around::

    mix(x):  x ^= x >>> 30;  x *= 0xbf58476d1ce4e5b9;  x ^= x >>> 27;  x *= 0x94d049bb133111eb
             x ^= x >>> 31
    s = mix(seed) + draw * 0xd1b54a32d192ed03
    number = (mix(s + place * 0x9e3779b97f4a7c15) >>> 11) / 2**53

Draws count from 1, places from 0; ``>>>`` shifts in zeros; ``mix`` is that of SplitMix64 (Steele,
Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014).

Shapes: R sequences that still go on, V vocabulary.
"""

import operator
from typing import SupportsIndex

import torch
from torch import Tensor


def draw(probability_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Tokens ``(R,)`` at quantiles ``(R,)`` in ``[0, 1)`` of distributions, both float64."""
    total_RV = probability_RV.cumsum(-1)
    below_RV = total_RV <= uniform_R[:, None] * total_RV[:, -1:]
    # Rounding must not lead behind the last token that can be drawn.
    last_R1 = (probability_RV > 0).int().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(below_RV.sum(-1, keepdim=True), last_R1)[:, 0]


class Uniforms:
    """Numbers in ``[0, 1)``, for the sequences that still go on.

    Those of a sequence are the same whatever its neighbours are, and none waits for the device.
    """

    def __init__(self, seed: SupportsIndex) -> None:
        self._state = int(_mixed(torch.tensor(_signed(operator.index(seed)))))

    def __call__(self, rows_R: Tensor) -> Tensor:
        """``(R,)`` float64, for the places ``rows_R`` in the batch; others in each call."""
        self._state = _signed(self._state + _DRAW)
        number_R = _shifted(_mixed(rows_R * _PLACE + self._state), 11)
        return number_R.double() * 2.0**-53


def _signed(number: int) -> int:
    """The low 64 bits, as an int64."""
    return (number + 2**63) % 2**64 - 2**63


_DRAW, _PLACE = _signed(0xD1B54A32D192ED03), _signed(0x9E3779B97F4A7C15)
_ROUNDS = (30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB))


def _mixed(x: Tensor) -> Tensor:
    for shift, factor in _ROUNDS:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros."""
    return x.bitwise_right_shift(by).bitwise_and(2 ** (64 - by) - 1)
