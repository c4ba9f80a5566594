"""The backends, in the order in which ``backend="auto"`` asks them; imported when first asked.

A backend is a module with ``NAME``, ``unsupported(call) -> list[str]`` (empty: it can) and
``run(call) -> (out, lse)``, differentiable; ``lse`` may be None unless ``call.result`` is
``"lse"``. One that can make attention weights has ``weights(call)`` as well; one that can read keys
and values where a cache keeps them is a `Reader`, one that makes output and weights at once a
`Weigher`. Backends do not import each other.
"""

from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor

from zeta.ops.call import AttentionCall
from zeta.transforms import is_exporting

ORDER = ("sdpa", "triton", "chunked", "reference", "cpu")
ORDER_ON_CPU = ("cpu", "sdpa", "chunked", "reference", "triton")
ORDER_OF_GROUPS = ("triton", *(name for name in ORDER if name != "triton"))
_OF_TORCH = ("sdpa", "reference")
"""Made of torch's own operators."""
ORDER_OF_PROGRAMS = (*_OF_TORCH, *(name for name in ORDER_ON_CPU if name not in _OF_TORCH))
_LAST = "chunked"
"""What reads a cache's own form and stands after it in an order is not made for that device."""

MAX_PACKED = 128
"""Queries of a group of heads that read their key head together, in one tile of a kernel."""
LONG_CACHE = 1024
"""Keys from which reading each of them once is what matters."""


class Backend(Protocol):
    """What `load` returns."""

    NAME: str

    def unsupported(self, call: AttentionCall) -> list[str]: ...

    def run(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]: ...

    def weights(self, call: AttentionCall) -> Tensor: ...


class Weigher(Backend, Protocol):
    """A backend that makes output and weights, or their mean over heads, in one pass.

    None: this call takes `run` and `weights`.
    """

    def run_with_weights(self, call: AttentionCall, mean: bool) -> tuple[Tensor, Tensor] | None: ...


class Reader(Backend, Protocol):
    """A backend that reads keys and values in the form in which a cache keeps them.

    ``unreadable`` says why it cannot for a call; empty: it can. ``run_stored`` then returns output
    and log-sum-exp, and raises RuntimeError if what is stored was written over.
    """

    def unreadable(self, call: AttentionCall) -> list[str]: ...

    def run_stored(self, call: AttentionCall) -> tuple[Tensor, Tensor]: ...


def order(call: AttentionCall) -> tuple[str, ...]:
    """The backends as ``"auto"`` asks them for this call.

    On CPU tensors the native kernels come first; Triton's run in its interpreter only, slower than
    the textbook: last. On a GPU Triton's come first where a few queries of grouped heads meet a
    long cache, which they read once for a whole group.

    A program that ``torch.export`` makes is to run where Zeta is not installed, and in other
    runtimes: first come those that are made of torch's own operators.
    """
    if torch.compiler.is_compiling() and is_exporting():
        return ORDER_OF_PROGRAMS
    if call.query.is_cpu:
        return ORDER_ON_CPU
    packed = call.target * (call.heads // call.key_heads)
    if call.key_heads < call.heads and packed <= MAX_PACKED and call.source >= LONG_CACHE:
        return ORDER_OF_GROUPS
    return ORDER


def weigher(found: Backend) -> Weigher | None:
    """The backend, if it is one."""
    return cast(Weigher, found) if hasattr(found, "run_with_weights") else None


def readers(call: AttentionCall, backend: str) -> Iterator[Reader]:
    """The backends that may read this call's keys and values where they lie: the named one, or
    those that ``"auto"`` asks.
    """
    for name in order(call) if backend == "auto" else (backend,):
        found = load(name)
        if hasattr(found, "unreadable"):
            yield cast(Reader, found)
        if name == _LAST:
            return


def load(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: If there is none.
    """
    # Plain import statements, which torch.compile can follow.
    if name == "sdpa":
        from zeta.ops.backends import sdpa

        return sdpa  # type: ignore[return-value]  # it refuses the calls that ask for weights
    if name == "cpu":
        from zeta.ops.backends import cpu

        return cpu
    if name == "triton":
        from zeta.ops.backends import triton

        return triton
    if name == "chunked":
        from zeta.ops.backends import chunked

        return chunked
    if name == "reference":
        from zeta.ops.backends import reference

        return reference
    raise ValueError(
        f"backend must be 'auto' or one of {', '.join(map(repr, ORDER))}; got {name!r}"
    )
