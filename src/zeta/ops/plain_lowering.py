"""`lowering` for calls that are soon over: what is common, each kind at most once, as it is.

Shape suffixes: B batch, H heads.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeta import biases, masks
from zeta.ops.lowering import Lowered
from zeta.ops.offsets import has_kept_buckets, is_learned, kept_buckets, offset_vector


class Plain(NamedTuple):
    """`Lowered` for calls that are soon over: of each kind at most one, as it is.

    Attributes:
        causal, window, softcap, softcap_first, dropout_p: As in `Lowered`.
        drop_below, seed: Of the dropout; see `zeta.ops.dropout`.
        padding_B: Of `masks.Padding`.
        keep: Of `masks.Dense`, bool.
        offsets: As in `Lowered`, where they are learned.
        table, buckets_R: Of `biases.Bucketed`, where it is not.
        slopes_H: Of `biases.Alibi`.
        dense: Of `biases.Dense`.
    """

    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    softcap_first: bool = False
    dropout_p: float = 0.0
    drop_below: int = 0
    seed: int = 0
    padding_B: Tensor | None = None
    keep: Tensor | None = None
    offsets: Tensor | None = None
    table: Tensor | None = None
    buckets_R: Tensor | None = None
    slopes_H: Tensor | None = None
    dense: Tensor | None = None

    def lowered(self, scale: float) -> Lowered:
        """The same for calls that may take longer."""
        keep = None if self.keep is None else self.keep.view(torch.uint8)
        offsets = self.offsets
        if self.table is not None and self.buckets_R is not None:
            offsets = self.table.detach()[self.buckets_R].T.float()
        return Lowered(
            offsets=offsets, dense=self.dense, slopes_H=self.slopes_H,
            padding_B=self.padding_B, keep=keep, scale=scale, causal=self.causal,
            window=self.window, softcap=self.softcap, softcap_first=self.softcap_first,
            dropout_p=self.dropout_p, seed=torch.tensor(self.seed) if self.dropout_p else None,
        )  # fmt: skip


NUM_NUMBERS = Plain._fields.index("padding_B")
"""Of its fields; then come tensors."""

NOTHING = Plain()
LATER_KEYS = Plain(causal=True)
"""What most calls have between products and softmax."""


def plainly_lowered(
    mask: masks.Mask | None, bias: biases.Bias | None, longest: int
) -> Plain | None:
    """Takes mask and bias apart, looked at but not checked; None where `lower` has to.

    Args:
        mask, bias: Whatever was given as these.
        longest: The longest distance between a query and a key.
    """
    if bias is None and mask is None:
        return NOTHING
    if bias is None and type(mask) is masks.Causal:
        return LATER_KEYS
    found: dict[str, Any] = {}
    is_plain = _take_mask(mask, found) and _take_bias(bias, longest, found)
    return Plain(**found) if is_plain else None


def _take_mask(mask: masks.Mask | None, found: dict[str, Any]) -> bool:
    """Adds the fields of `Plain` that a mask says; False where it says more."""
    for term in masks.conjuncts(mask):
        if type(term) is masks.Causal:
            found["causal"] = True
        elif type(term) is masks.SlidingWindow and "window" not in found:
            found |= {"causal": True, "window": term.size}
        elif type(term) is masks.Padding and "padding_B" not in found:
            found["padding_B"] = term.lengths
        elif type(term) is masks.Dense and "keep" not in found:
            found["keep"] = term.tensor
        else:
            return False
    return True


def _take_bias(bias: biases.Bias | None, longest: int, found: dict[str, Any]) -> bool:
    """The same of a bias."""
    terms = biases.summands(bias)
    for place, term in enumerate(terms):
        if type(term) is biases.Softcap and "softcap" not in found:
            if place not in (0, len(terms) - 1):
                return False
            found |= {"softcap": float(term.limit), "softcap_first": place == 0}
        elif type(term) is biases.Dense and "dense" not in found:
            found["dense"] = term.tensor
        elif type(term) is biases.Alibi and "slopes_H" not in found and not is_learned(term):
            found["slopes_H"] = term.slopes
        elif type(term) is biases.Bucketed and "offsets" not in found and "table" not in found:
            if not has_kept_buckets(term):
                return False
            reach = max(1, term.reach(longest))
            if torch.is_grad_enabled() and term.table.requires_grad:
                found["offsets"] = offset_vector(term, reach, term.table.device)
            else:
                found["table"], found["buckets_R"] = term.table, kept_buckets(term, reach)
        else:
            return False
    return True
