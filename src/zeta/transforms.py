"""Which of torch's function transforms are going on, for what cannot live inside one."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])
ParametersT = ParamSpec("ParametersT")
ResultT = TypeVar("ResultT")

Results: TypeAlias = tuple[Tensor | None, ...]

# Every backward pass asks. A torch without that older way of mapping will not have it either.
_is_in_batch = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)

NO_FORWARD_MODE = "it has no forward-mode derivative (torch.func.jvp)"

TWICE = "for second derivatives use backend='reference'; a module has them by torch.func.hessian"
"""What to do where a backend differentiates once. A module names none, but in forward mode, over
reverse, a call gets another."""


def constant_in_graphs(function: FunctionT) -> FunctionT:
    """A compiler calls it while it traces, and takes the answer for a constant: what
    `torch.compiler.assume_constant_result` does, which imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch's own mark
    return function


def uncompiled(function: Callable[ParametersT, ResultT]) -> Callable[ParametersT, ResultT]:
    """Compiled code calls it as it is: one graph ends before the call, another begins behind it.

    For bookkeeping in Python whose numbers are others in each call. What `torch.compiler.disable`
    does, which imports the compiler.
    """
    outside = torch._disable_dynamo(function)  # type: ignore[attr-defined]  # as custom_op does

    @functools.wraps(function)
    def call(*args: ParametersT.args, **kwargs: ParametersT.kwargs) -> ResultT:
        found: ResultT = (outside if torch.compiler.is_compiling() else function)(*args, **kwargs)
        return found

    # What was compiled is kept, and limited in number, by code object: each has its own.
    call.__code__ = call.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]  # functions have one, which `wraps` hides
    return call


def is_exporting() -> bool:
    """Inside ``torch.export``. In torch 2.11 ``torch.compiler.is_exporting`` says so inside
    ``torch.compile`` too.
    """
    return torch.compiler._is_exporting_flag


def is_closed_to_operators() -> bool:
    """While a compiler traces: whether what it makes must be of torch's own operators alone, for a
    program runs where Zeta is not installed, and transforms look into no others.
    """
    return is_exporting() or torch._C._are_functorch_transforms_active() or is_forward_mode()


def is_traced() -> bool:
    """While a compiler traces, or inside any transform of ``torch.func``, forward-mode
    differentiation or ``torch.jit.trace``.
    """
    # `is_forward_mode`, written out, here and below: short calls ask.
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def is_watched() -> bool:
    """Whether a transform or one of torch's dispatch modes must see each operator."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or has_dispatch_modes()
    )


def is_overridden() -> bool:
    """Whether something must see each operator (`is_watched`), or each of torch's functions."""
    return is_watched() or torch._C._len_torch_function_stack() > 0


def has_dispatch_modes() -> bool:
    """Whether one of torch's dispatch modes must see each operator."""
    if torch._C._len_torch_dispatch_stack():
        return True
    # `make_fx` before dispatch has a stack of its own for them, beside a mode of the other kind.
    return (
        torch._C._len_torch_function_stack() > 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
    )


def is_forward_mode() -> bool:
    """Inside forward-mode differentiation, ``torch.func.jvp`` included."""
    return forward_ad._current_level >= 0


def reasons_of_opaque(tensors: Callable[[], Iterable[Tensor]]) -> list[str]:
    """Why these tensors cannot enter a function that torch cannot look into; empty if they can."""
    reasons = []
    if is_forward_mode():
        reasons.append(NO_FORWARD_MODE)
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            reasons.append("inside of torch.compile, torch.func sees torch's own operators only")
        return reasons
    if torch._C._is_tracing():
        reasons.append("torch.jit.trace sees torch's own operators only")
    if torch._C._are_functorch_transforms_active() and any(
        _is_mapped(tensor) for tensor in tensors()
    ):
        reasons.append(
            "torch.func.vmap cannot map over it; the mapped dimension can join the batch"
        )
    return reasons


def one_by_one(
    function: Callable[..., Results], size: int, arguments: Sequence[Any], dims: Sequence[Any]
) -> Results:
    """What a function gives for each entry of a mapped dimension, stacked along a new first one.

    Args:
        function: It may return None in places, then always in the same ones.
        size: Of the mapped dimension.
        arguments: Of the function.
        dims: An integer where an argument is a tensor with the dimension, which it names.
    """
    pairs = list(zip(arguments, dims, strict=True))
    found = []
    for index in range(size):
        parts = (item.select(dim, index) if isinstance(dim, int) else item for item, dim in pairs)
        found.append(function(*parts))
    return tuple(
        None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True)
    )


def mapped_one_by_one(
    function: Callable[..., Results], info: Any, dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[Results, tuple[int | None, ...]]:
    """What a ``torch.autograd.Function`` returns of its ``vmap``: `one_by_one`, and where it lies.

    Args:
        function: See `one_by_one`.
        info: As ``vmap`` is given it.
        dims: See ``info``.
        arguments: See ``info``.
    """
    found = one_by_one(function, info.batch_size, arguments, dims)
    return found, tuple(None if tensor is None else 0 for tensor in found)


def of_each_gradient(function: Callable[..., Results], *tensors: Tensor | None) -> Results:
    """``function(*tensors)`` of a backward pass, of one incoming gradient after the other where
    autograd gives many at once, as for ``torch.autograd.grad(..., is_grads_batched=True)``.

    It maps over them in a way of its own, older than ``torch.func.vmap``.
    """
    if _is_in_batch is None:
        return function(*tensors)
    batched = [tensor is not None and _is_in_batch(tensor) for tensor in tensors]
    if not any(batched):
        return function(*tensors)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # Of tensors that have the dimension its size, given as 1, is not asked.
    whole: list[Any] = [
        torch._remove_batch_dim(tensor, level, 1, 0) if is_batched else tensor  # type: ignore[arg-type]  # not None
        for tensor, is_batched in zip(tensors, batched, strict=True)
    ]
    dims = [0 if is_batched else None for is_batched in batched]
    size = next(len(tensor) for tensor, dim in zip(whole, dims, strict=True) if dim == 0)
    found = one_by_one(function, size, whole, dims)
    return tuple(None if part is None else torch._add_batch_dim(part, 0, level) for part in found)


def needs_gradient(tensor: Tensor) -> bool:
    """Whether autograd asks for its gradient; vmap's wrapper of a tensor does not say so."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return tensor.requires_grad
    while not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def _is_mapped(tensor: Tensor) -> bool:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
