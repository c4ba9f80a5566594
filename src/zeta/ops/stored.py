"""Calls whose keys and values lie in a cache in a form of its own; see `zeta.stored`.

The first backend that can reads them there. All others get the tensors.
"""

import dataclasses

from torch import Tensor

from zeta.ops import backends
from zeta.ops.backends import Reader
from zeta.ops.call import AttentionCall
from zeta.stored import StoredTensor, plain


def is_stored(call: AttentionCall) -> bool:
    """Whether keys or values are not there yet."""
    return isinstance(call.key, StoredTensor) or isinstance(call.value, StoredTensor)


def choose(call: AttentionCall, backend: str) -> tuple[Reader | None, tuple[str, ...]]:
    """The backend that reads the store; or None, and why keys and values are made before it runs.

    Args:
        call: Of stored keys or values.
        backend: A name, or ``"auto"``.
    """
    if call.result not in ("output", "lse"):
        return None, ("weights are made from tensors",)
    reasons: list[str] = []
    for reader in backends.readers(call, backend):
        refused = reader.unreadable(call)
        if not refused:
            return reader, ()
        reasons += refused
    return None, tuple(reasons) or (f"the backend {backend!r} reads tensors only",)


def run(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp, read from the store; None if it cannot be.

    Raises:
        RuntimeError: What is stored was written over.
    """
    reader, _ = choose(call, backend)
    return None if reader is None else reader.run_stored(call)


def gathered(call: AttentionCall) -> AttentionCall:
    """The same call of plain tensors.

    Raises:
        RuntimeError: What is stored was written over.
    """
    key = plain(call.key)
    value = key if call.value is call.key else plain(call.value)
    return dataclasses.replace(call, key=key, value=value)
