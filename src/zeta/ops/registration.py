"""Operators of ``torch.library`` that cost little each time a compiled graph runs.

One of `torch.library.custom_op` goes through autograd in Python in every run, also in a graph that
has its gradients already. Here each is two: one with a gradient, which is called, and one below it
that has none, which is what ends up in a graph.
"""

import functools
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from zeta.transforms import TWICE

ResultT = TypeVar("ResultT")

_LIBRARY = torch.library.Library("zeta", "FRAGMENT")


class Operator(Generic[ResultT]):
    """As `torch.library.custom_op` makes them: what it does is opaque to compilers, and without a
    registered gradient none can be had of it.
    """

    def __init__(self, name: str, function: Callable[..., ResultT]) -> None:
        self._name = name
        self._gradient: Callable[..., Any] = self._refuse
        self._setup_context: Callable[..., None] | None = None
        schema = torch.library.infer_schema(function, mutates_args=())
        # What runs outside of a graph is not to be compiled either.
        opaque = torch._disable_dynamo(function)  # type: ignore[attr-defined]  # as custom_op does
        self._define = functools.partial(_define, schema=schema, function=opaque)
        for each in (name, f"{name}_kernel"):
            self._define(each)
        self.overload = getattr(torch.ops.zeta, name).default
        self._kernel = getattr(torch.ops.zeta, f"{name}_kernel").default
        _LIBRARY.impl(name, self._under_autograd(), "Autograd")

    def __call__(self, *args: Any) -> ResultT:
        found: ResultT = self.overload(*args)
        return found

    def register_fake(self, function: Callable[..., Any]) -> None:
        """What its results are like, of tensors without numbers."""
        for each in (self.overload, self._kernel):
            torch.library.register_fake(each, function, lib=_LIBRARY)

    def register_autograd(
        self, gradient: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Its gradient, as of `torch.autograd.Function`; tensors in lists have none."""
        self._gradient, self._setup_context = gradient, setup_context

    def keep_python_kernel(self) -> None:
        """The function as ``zeta::<name>_python``, for a kernel in C that is put before it."""
        self._define(f"{self._name}_python")
        self.python_kernel = getattr(torch.ops.zeta, f"{self._name}_python").default

    def _under_autograd(self) -> Callable[..., Any]:
        """The kernel, with the gradient that is registered when it is asked for."""

        class Differentiable(Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = self._kernel(*inputs)
                if self._setup_context is not None:
                    self._setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return self._gradient(ctx, *gradients)

        def run(*args: Any) -> Any:
            args = tuple(map(_resolved, args))
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return Differentiable.apply(*args)  # type: ignore[no-untyped-call]
            return self._kernel(*args)

        return run

    def _refuse(self, *_: Any) -> NoReturn:
        raise RuntimeError(f"zeta::{self._name} has no gradient; {TWICE}")


def _resolved(argument: Any) -> Any:
    """A list of tensors, none negated on paper alone, as torch's dispatcher gives single ones."""
    if not isinstance(argument, list | tuple):
        return argument
    return [one.resolve_neg() if isinstance(one, Tensor) else one for one in argument]


def _define(name: str, schema: str, function: Callable[..., Any]) -> None:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")


def operator(name: str) -> Callable[[Callable[..., ResultT]], Operator[ResultT]]:
    """Makes a function the operator ``zeta::name``; it must change none of its tensors."""

    def made(function: Callable[..., ResultT]) -> Operator[ResultT]:
        return Operator(name, function)

    return made
