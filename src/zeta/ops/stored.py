"""Calls whose keys and values lie in a cache in a form of its own; see `zeta.stored`.

The backend that can reads them there. All others get the tensors.
"""

import dataclasses

from torch import Tensor

from zeta.ops.call import AttentionCall
from zeta.stored import StoredTensor

READER = "cpu"
"""The backend that reads a store."""


def is_stored(call: AttentionCall) -> bool:
    """Whether keys or values are not there yet."""
    return isinstance(call.key, StoredTensor) or isinstance(call.value, StoredTensor)


def unreadable(call: AttentionCall, backend: str) -> list[str]:
    """Why the keys and values of a call must be made before it runs; empty if they need not."""
    if backend not in ("auto", READER):
        return [f"the backend {backend!r} reads tensors only"]
    if call.result not in ("output", "lse"):
        return ["weights are made from tensors"]
    from zeta.ops.backends.cpu import stored

    return stored.unreadable(call)


def run(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp, read from the store; None if it cannot be.

    Raises:
        RuntimeError: What is stored was written over.
    """
    if unreadable(call, backend):
        return None
    from zeta.ops.backends.cpu import stored

    return stored.run(call)


def gathered(call: AttentionCall) -> AttentionCall:
    """The same call of plain tensors.

    Raises:
        RuntimeError: What is stored was written over.
    """
    key = _plain(call.key)
    value = key if call.value is call.key else _plain(call.value)
    return dataclasses.replace(call, key=key, value=value)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.plain() if isinstance(tensor, StoredTensor) else tensor
