"""From the mask functions of Transformers to mask values of Zeta.

Transformers says what a query may see by a function of (batch, head, query index, key index). The
usual ones are recognised, by the code that they were made from, and become values; of any other a
dense tensor is made.

Shape suffixes: B batch, T target length, S source length.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from zeta.masks import Causal, Documents, Mask, SlidingWindow

MaskFunction = Callable[..., Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """What a mask function says, padding apart.

    Attributes:
        causal: No key after the query.
        window: Only the last ``window`` positions, the query included; None, all.
        documents: ``(B, S)`` integers, the packed sequence of each position, or None.
    """

    causal: bool = False
    window: int | None = None
    documents: Tensor | None = None

    @property
    def has_value(self) -> bool:
        """Whether Zeta has a mask for it: not for a window to both sides, nor for an empty one."""
        return self.window is None or (self.causal and self.window > 0)


@functools.cache
def _functions() -> tuple[dict[MaskFunction, Rule], dict[CodeType, str]]:
    """Rules of Transformers' plain functions, and names of the code of those it makes on demand."""
    from transformers import masking_utils as made

    causal = made.causal_mask_function
    plain = {causal: Rule(causal=True), made.bidirectional_mask_function: Rule()}
    closures = {
        "and": made.and_masks(causal),
        "window": made.sliding_window_overlay(1),
        "packed": made.packed_sequence_mask_function(torch.zeros(0)),
        "remapped": made.remap_positions_for_packed_sequence(causal, torch.zeros(0)),
    }
    return plain, {function.__code__: name for name, function in closures.items()}


def recognise(function: MaskFunction) -> Rule | None:
    """The rule of a mask function; None if it is of another kind."""
    plain, codes = _functions()
    if function in plain:
        return plain[function]
    if not isinstance(function, FunctionType) or function.__code__ not in codes:
        return None
    name = codes[function.__code__]
    captured = _captured(function)
    if name == "window":
        return Rule(window=captured["sliding_window"])
    if name == "packed":
        return Rule(documents=captured["packed_sequence_mask"])
    if name == "remapped":
        # Positions count up by one inside each packed sequence, so indices say the same there.
        return recognise(captured["mask_function"])
    joined: Rule | None = Rule()
    for part in captured["mask_functions"]:
        joined = _both(joined, recognise(part))
    return joined


def _captured(function: FunctionType) -> dict[str, Any]:
    """The variables of the function around it, by name."""
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _both(one: Rule | None, other: Rule | None) -> Rule | None:
    if one is None or other is None:
        return None
    if None not in (one.window, other.window) or None not in (one.documents, other.documents):
        return None
    return Rule(
        one.causal or other.causal,
        one.window if other.window is None else other.window,
        one.documents if other.documents is None else other.documents,
    )


def as_mask(rule: Rule, keys: int) -> Mask | None:
    """The value of a rule that has one, over ``keys`` keys of which the queries are the last."""
    mask: Mask | None = None
    if rule.window is not None and rule.window < keys:
        mask = SlidingWindow(rule.window)
    elif rule.causal:
        mask = Causal()
    if rule.documents is None:
        return mask
    documents = Documents(rule.documents)
    return documents if mask is None else mask & documents
