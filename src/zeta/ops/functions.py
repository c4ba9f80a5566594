"""What the ``torch.autograd`` functions of the backends share: a short call, and gradients that
cannot be differentiated again.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

from zeta.transforms import TWICE, mapped_one_by_one

Compute = Callable[..., tuple[Tensor | None, ...]]


class Once(Function):
    """Base of functions whose ``backward`` is `differentiated_once`.

    Attributes:
        backend: Whose it is.
    """

    backend: ClassVar[str]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]  # torch's own
        # Torch would ask for the signature of `forward` each time, to fill in defaults, of which
        # there are none: longer than a short call.
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]  # C's

    @classmethod
    def vmap(cls, *_: Any) -> NoReturn:
        raise NotImplementedError(
            f"the backend {cls.backend!r} has no torch.func.vmap; make the mapped dimension part "
            "of the batch, or use backend='reference'"
        )


class _Gradients(Once):
    """Gradients that know what they were made from, so that a second derivative is an error."""

    @staticmethod
    def forward(
        backend: str, compute: Compute, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return tuple(compute(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.backend = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(asked_twice(ctx.backend))

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """Of many incoming gradients, as for ``torch.func.jacrev``."""
        return mapped_one_by_one(cls.apply, info, in_dims, args)


def can_be_differentiated() -> bool:
    """Whether somebody could differentiate what is computed now: in a backward pass, only under
    ``create_graph=True`` or inside a transform.
    """
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def differentiated_once(
    backend: str, compute: Compute, *tensors: Tensor | None
) -> tuple[Tensor | None, ...]:
    """``compute(*tensors)``, gradients of which a second derivative is an error."""
    if not can_be_differentiated():
        return compute(*tensors)
    found: tuple[Tensor | None, ...] = _Gradients.apply(backend, compute, *tensors)
    return found


def asked_twice(backend: str) -> str:
    """What is said to whoever asks a backend for a second derivative."""
    return f"the backend {backend!r} differentiates once; {TWICE}"
