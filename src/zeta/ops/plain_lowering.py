"""`lowering` for calls that are soon over: what is common, each kind at most once, as it is.

Shape suffixes: B batch, H heads.
"""

from typing import NamedTuple

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
    if mask is None:
        found = NOTHING
    elif type(mask) is masks.Causal:
        found = LATER_KEYS
    else:
        hidden = _plainly_hidden(mask)
        if hidden is None:
            return None
        causal, window, padding, keep = hidden
        found = Plain(causal=causal, window=window, padding_B=padding, keep=keep)
    if bias is None:
        return found
    added = _plainly_added(bias, longest)
    if added is None:
        return None
    softcap, softcap_first, offsets, (table, buckets), slopes, dense = added
    return found._replace(
        softcap=softcap, softcap_first=softcap_first, offsets=offsets, table=table,
        buckets_R=buckets, slopes_H=slopes, dense=dense,
    )  # fmt: skip


def _plainly_hidden(mask: masks.Mask) -> tuple[bool, int, Tensor | None, Tensor | None] | None:
    """``causal``, ``window``, ``padding_B``, ``keep`` of `Plain`."""
    causal, window, padding, keep = False, 0, None, None
    for term in masks.conjuncts(mask):
        if type(term) is masks.Causal:
            causal = True
        elif type(term) is masks.SlidingWindow and not window:
            causal, window = True, term.size
        elif type(term) is masks.Padding and padding is None:
            padding = term.lengths
        elif type(term) is masks.Dense and keep is None:
            keep = term.tensor
        else:
            return None
    return causal, window, padding, keep


_Added = tuple[
    float,
    bool,
    Tensor | None,
    tuple[Tensor, Tensor] | tuple[None, None],
    Tensor | None,
    Tensor | None,
]


def _plainly_added(bias: biases.Bias, longest: int) -> _Added | None:
    """Softcap, and whether it is first, offsets, table and buckets, slopes, dense of `Plain`."""
    softcap, softcap_first, offsets, slopes, dense = 0.0, False, None, None, None
    looked_up: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    terms = biases.summands(bias)
    for place, term in enumerate(terms):
        if type(term) is biases.Softcap and not softcap and place in (0, len(terms) - 1):
            softcap, softcap_first = float(term.limit), place == 0
        elif type(term) is biases.Dense and dense is None:
            dense = term.tensor
        elif type(term) is biases.Alibi and slopes is None and not is_learned(term):
            slopes = term.slopes
        elif type(term) is biases.Bucketed and offsets is looked_up[0] is None:
            if not has_kept_buckets(term):
                return None
            reach = max(1, term.reach(longest))
            if is_learned(term):
                offsets = offset_vector(term, reach)
            else:
                looked_up = term.table, kept_buckets(term, reach)
        else:
            return None
    return softcap, softcap_first, offsets, looked_up, slopes, dense
