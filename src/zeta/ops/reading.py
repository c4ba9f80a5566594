"""What backends that read keys and values in a cache's own form share; see `zeta.stored`.

Shapes: B batch.
"""

import dataclasses

import torch

from zeta import biases, masks
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import Lowered, lower
from zeta.ops.parts import reads_positions
from zeta.standin import PLAIN
from zeta.stored import Pages, Store, StoredTensor

_OF_EXISTENCE = (masks.Dense, masks.Padding, biases.Dense, biases.Softcap)
"""What asks for no more of a key than that it exists, and not where a query stands."""

NO_STORE = "its keys and values do not lie in one store, or were read before"


def store_of(call: AttentionCall) -> Store | None:
    """What keys and values of a call stand for; None if they are not of one store, or made."""
    key, value = call.key, call.value
    if not (isinstance(key, StoredTensor) and isinstance(value, StoredTensor)):
        return None
    if key.is_value or not value.is_value or key.materialized or value.materialized:
        return None
    is_one = key.store is value.store and key.first == value.first
    return key.store if is_one else None


def reasons_of_tensors(call: AttentionCall, store: Store, most_packed: int) -> list[str]:
    """Why a call needs tensors, whatever reads the store; empty if it does not.

    Args:
        call: Any.
        store: Of the call.
        most_packed: How many queries of a key head the backend takes together.
    """
    reasons = []
    packed = call.target * (call.heads // call.key_heads)
    if packed > most_packed:
        reasons.append(f"it takes up to {most_packed} queries of a key head; got {packed}")
    if type(call.query) not in PLAIN or torch.compiler.is_compiling():
        reasons.append("what traces a call sees tensors only")
    if torch._C._are_functorch_transforms_active():
        reasons.append("torch.func sees tensors only")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors()):
        reasons.append("it has no gradient")
    if (
        isinstance(store, Pages)
        and store.positions is not None
        and call.key_positions is not store.positions
    ):
        reasons.append("its sequences differ in length, which the key positions do not say")
    return reasons


def lower_pages(call: AttentionCall, store: Pages) -> Lowered:
    """The call's mask and bias, taken apart.

    Where nothing asks for the positions of sequences that differ in length, their lengths are
    padding, which a kernel skips.
    """
    padding_B = store.lengths
    if padding_B is None or reads_positions(call, _OF_EXISTENCE):
        return lower(call)
    lowered = lower(dataclasses.replace(call, query_positions=None, key_positions=None))
    if lowered.padding_B is not None:
        padding_B = torch.minimum(padding_B, lowered.padding_B)
    return lowered._replace(padding_B=padding_B)
