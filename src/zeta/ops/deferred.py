"""`Deferred`: a call whose weights are computed once, when somebody asks; and their gradients.

Shape suffixes: B batch, H heads, T target length, S source length.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from zeta.ops.call import AttentionCall, without_autocast
from zeta.ops.parts import Indivisible
from zeta.ops.substitution import with_tensors
from zeta.ops.versions import versions_of, written_to
from zeta.standin import PLAIN

Compute = Callable[[AttentionCall], Tensor]
"""Makes the weights ``call.result`` asks for, differentiably: ``(B, H, T, S)`` or ``(B, T, S)``."""

MAX_COPIED = 1 << 16
"""Elements up to which a parameter of a bias is copied when the call is made."""


class Deferred:
    """The weights of a call, to be computed when they are asked for, at most once.

    The tensors of the call are kept, not copied: one that is written to before the weights are
    computed is noticed by its version counter, and an error. Only a small parameter of a
    bias is copied, so that one may look at weights after an optimizer's step, or after FSDP has
    freed it.

    Args:
        call: Its ``result`` is ``"weights"`` or ``"mean_weights"``; its ``value`` is not read.
        compute: Makes the weights of a call.
        heads_first: Put the heads before the batch: ``(H, B, T, S)``.
        batched: Keep the dimension of the batch, which otherwise has one entry.
        keep: Keep the call when the weights are computed: they may be asked for a gradient.

    Attributes:
        call: The call, or None once it is not needed any more.
    """

    __slots__ = (
        "_copies",
        "_lock",
        "_tensors",
        "_value",
        "_versions",
        "batched",
        "call",
        "compute",
        "heads_first",
        "keep",
        "num_inputs",
    )

    def __init__(
        self,
        call: AttentionCall,
        compute: Compute,
        *,
        heads_first: bool,
        batched: bool,
        keep: bool,
    ) -> None:
        self.call: AttentionCall | None = call
        self.compute = compute
        self.heads_first = heads_first
        self.batched = batched
        self.keep = keep
        self._lock = threading.Lock()
        self._value: Tensor | None = None
        self._copies: dict[int, Tensor] = {}
        tensors = [call.query, call.key]
        parameters = [] if call.bias is None else call.bias.tensors()
        if call.sinks is not None:
            parameters.append(call.sinks)
        for tensor in parameters:
            if _is_parameter(tensor) and tensor.numel() <= MAX_COPIED:
                self._copies[len(tensors)] = tensor.detach().clone()
            tensors.append(tensor)
        self.num_inputs = len(tensors)
        if call.mask is not None:
            tensors += call.mask.tensors()
        if call.query_positions is not None:
            tensors.append(call.query_positions)
        if call.key_positions is not None:
            tensors.append(call.key_positions)
        self._tensors = tensors
        self._versions = versions_of(tensors)

    def arrange(self, weights: Tensor) -> Tensor:
        """``(B, H, T, S)`` or ``(B, T, S)`` in the layout asked for."""
        return arrange(weights, heads_first=self.heads_first, batched=self.batched)

    @property
    def inputs(self) -> list[Tensor]:
        """What the weights can be differentiated by: query, key, tensors of the bias, sinks."""
        return self._tensors[: self.num_inputs]

    @property
    def computed(self) -> bool:
        """Whether the weights are there."""
        return self._value is not None

    def value(self) -> Tensor:
        """The weights, without a gradient, in the layout asked for; always the same tensor.

        Raises:
            RuntimeError: A tensor of the call was written to in the meantime.
        """
        if self._value is None:
            with self._lock:
                if self._value is None:
                    self._value = self._whole()
                    if not self.keep:
                        self.call, self._tensors, self._copies = None, [], {}
        return self._value

    def _whole(self) -> Tensor:
        assert self.call is not None
        call = self.unchanged(differentiable=False)
        # A tensor made in inference mode could never again take part in a gradient.
        with torch.inference_mode(False), torch.no_grad(), without_autocast(call.query.device):
            weights = self.compute(call)
        # The strides that the tensor standing in for the weights has announced.
        sizes = [1]
        for size in weights.shape[:0:-1]:
            sizes.append(sizes[-1] * size)
        if weights.stride() != tuple(sizes[::-1]):
            weights = weights.clone(memory_format=torch.contiguous_format)
        return self.arrange(weights)

    def part(
        self, change: Callable[[AttentionCall], AttentionCall], *, differentiable: bool
    ) -> Tensor:
        """The weights of a changed call, in the layout asked for.

        Raises:
            Indivisible: The call cannot be changed so, or has no parameter to be differentiated by
                before its backward pass, or the whole is computed and the call gone.
        """
        if differentiable and any(map(_is_freed, self.inputs)):
            raise Indivisible("a parameter has no memory until the backward pass")
        with self._lock:
            if self.call is None:
                # Another thread has just computed the whole.
                raise Indivisible("the call is not kept once all weights are there")
            unchanged = self.unchanged(differentiable=differentiable)
        call = change(unchanged)
        with without_autocast(call.query.device):
            weights = self.compute(call)
        return self.arrange(weights)

    def unchanged(self, *, differentiable: bool) -> AttentionCall:
        """The call, checked to be what it was when it was made.

        Args:
            differentiable: Accept no copy in the place of a parameter.
        """
        assert self.call is not None
        copies = {} if differentiable else self._copies
        for index in written_to(self._tensors, self._versions):
            if index not in copies:
                raise RuntimeError(self._complaint(index))
        if differentiable or not (copies or any(tensor.is_neg() for tensor in self._tensors)):
            return self.call
        # Whatever their versions say: FSDP frees parameters, and fills them, without counting.
        tensors = [copies.get(index, tensor) for index, tensor in enumerate(self._tensors)]
        # The whole is computed below torch's dispatch, where operations no longer see a sign.
        return _with_tensors(self.call, [tensor.resolve_neg() for tensor in tensors])

    def _complaint(self, index: int) -> str:
        name = ("query", "key")[index] if index < 2 else "mask, a bias, sinks or positions"
        remedy = (
            "look at them under torch.no_grad() or before the optimizer's step"
            if index in self._copies
            else "use them before, or ask for them with need_weights=True"
        )
        return (
            "the attention weights were not computed yet, and cannot be: a tensor of the "
            f"{name} has been changed in place since the call; {remedy}"
        )

    def gradients(
        self, inputs: Sequence[Tensor], needed: Sequence[bool], gradient: Tensor
    ) -> list[Tensor | None]:
        """The gradient of each of the `inputs`, of which the caller gives their saved versions.

        The weights are computed again for it, so that nothing of their size is kept in between.

        Raises:
            RuntimeError: A tensor of the mask or of positions was written to in the meantime.
        """
        assert self.call is not None
        fixed = self._tensors[self.num_inputs :]
        if written_to(fixed, self._versions[self.num_inputs :]):
            raise RuntimeError(
                "the attention weights cannot be differentiated: a tensor of the mask or of "
                "positions has been changed in place since the call"
            )
        twice = torch.is_grad_enabled()
        with torch.enable_grad(), without_autocast(gradient.device):
            # New tensors, so that one input which was computed from another does not count twice.
            leaves = [
                tensor.view_as(tensor) if twice and need else tensor.detach().requires_grad_(need)
                for tensor, need in zip(inputs, needed, strict=True)
            ]
            weights = self.compute(_with_tensors(self.call, leaves + fixed))
            wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
            found = iter(
                torch.autograd.grad(
                    self.arrange(weights), wanted, gradient, create_graph=twice, allow_unused=True
                )
            )
        return [next(found) if need else None for need in needed]


def _is_parameter(tensor: Tensor) -> bool:
    return tensor.is_leaf and (tensor.requires_grad or isinstance(tensor, Parameter))


def _is_freed(tensor: Tensor) -> bool:
    """Whether its memory was taken away, as FSDP does with parameters between the passes."""
    if type(tensor) not in PLAIN or not tensor.numel():
        return False
    return tensor.untyped_storage().size() == 0


def arrange(weights: Tensor, *, heads_first: bool, batched: bool) -> Tensor:
    """``(B, H, T, S)`` or ``(B, T, S)`` as asked for; see `Deferred`."""
    if not batched:
        return weights.squeeze(0)
    return weights.transpose(0, 1) if heads_first and weights.dim() == 4 else weights


def _with_tensors(call: AttentionCall, tensors: Sequence[Tensor]) -> AttentionCall:
    """The same call of others: query, key; tensors of the bias, sinks; of the mask; positions."""
    rest = iter(tensors)
    query, key = next(rest), next(rest)
    return dataclasses.replace(
        call,
        query=query,
        key=key,
        value=key,
        bias=None if call.bias is None else with_tensors(call.bias, rest),
        sinks=None if call.sinks is None else next(rest),
        mask=None if call.mask is None else with_tensors(call.mask, rest),
        query_positions=None if call.query_positions is None else next(rest),
        key_positions=None if call.key_positions is None else next(rest),
    )
