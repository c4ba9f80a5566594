"""`LazyWeights`: attention weights that are a tensor to their users, and computed when first used.

Shape suffixes: B batch, H heads, T target length, S source length.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zeta.ops.call import AttentionCall
from zeta.ops.deferred import Compute, Deferred, arrange
from zeta.ops.parts import Indivisible, Part, heads_of, rows_of
from zeta.standin import StandIn
from zeta.transforms import is_traced
from zeta.values import wide_dtype

Index = int | slice | Sequence[int] | Tensor
"""Which rows or heads: as in ``tensor[index]``, at most one-dimensional."""

BLOCK = 1 << 21
"""Weights that are held at once where the whole is not made."""


def lazy_weights(
    call: AttentionCall, compute: Compute, *, heads_first: bool = False, batched: bool = True
) -> Tensor:
    """The weights of a call, computed when they are first used: a `LazyWeights`.

    Where torch traces or transforms a function (``torch.compile``, ``torch.export``,
    ``torch.func``, forward-mode differentiation) it is a plain tensor, made by ordinary operations;
    a compiler removes those whose result nobody uses.

    Args:
        call: Its ``result`` is ``"weights"`` or ``"mean_weights"``. Its ``value`` is never read:
            pass the key, lest the values be kept alive.
        compute: Makes the weights of a call.
        heads_first: Put the heads before the batch, as the module does.
        batched: Keep the dimension of the batch; otherwise it has one entry, and is left out.

    Returns:
        ``(B, H, T, S)`` or ``(H, B, T, S)``, or ``(B, T, S)`` for ``"mean_weights"``, in the
        query's dtype.
    """
    if is_traced():
        return arrange(compute(call), heads_first=heads_first, batched=batched)
    keep = torch.is_grad_enabled()
    deferred = Deferred(call, compute, heads_first=heads_first, batched=batched, keep=keep)
    if keep:
        inputs = deferred.inputs
        for tensor in inputs:
            if tensor.requires_grad:
                weights: Tensor = AttentionWeights.apply(deferred, *inputs)  # type: ignore[no-untyped-call]
                return weights
        deferred.keep = False
    return LazyWeights(deferred)


def without_batch(weights: Tensor) -> Tensor:
    """Weights of a batch of one, without its dimension; lazy ones stay lazy."""
    if isinstance(weights, LazyWeights):
        deferred = weights._deferred
        if deferred.call is not None and not deferred.computed:
            return lazy_weights(deferred.call, deferred.compute, batched=False)
    return weights.squeeze(-3)


class LazyWeights(StandIn):
    """Attention weights that are computed when first used, and cost nothing if they are not.

    A tensor like any other, ``(H, B, T, S)``, ``(B, H, T, S)`` or, averaged over the heads,
    ``(B, T, S)``; unbatched without B. Shape, dtype, device and ``requires_grad`` are known from
    the start; the first operation that reads a number computes all weights, once, whatever the
    number of threads. What operations return are plain tensors, and so is what ``torch.save``,
    ``pickle`` and ``copy`` make of it. Gradients flow from it to the query, the key and the bias;
    the backward pass computes the weights again.

    Some questions are answered without ever holding all weights, as long as they are not computed
    yet: `rows`, `heads`, `mean` over the heads, `topk` along the keys, `entropy`.

    Holding on to it holds the query and the key of the call (and a dense mask or bias): until the
    weights are computed or, if they require a gradient, as long as it lives. To keep weights of
    many calls, keep ``weights.detach()``, a plain tensor, or ``weights.rows(...)``.

    If one of those tensors, of the mask or of positions is changed in place before the weights are
    computed, using them is an error, and afterwards their gradient; of tensors that were made in
    inference mode it goes unnoticed, for torch does not count that. Only the learned parameters of
    a relative position bias may change, as by an optimizer's step: the weights are those of the
    call.

    Operations that would change its own shape in place (``resize_``, ``unsqueeze_``) are refused.
    Code in C++ that takes its memory without asking torch's dispatcher needs ``weights.detach()``.
    """

    _deferred: Deferred

    @staticmethod
    def __new__(cls, deferred: Deferred) -> "LazyWeights":
        call = deferred.call
        assert call is not None
        (batch, heads, target, _), source = call.query.shape, call.key.shape[2]
        area = target * source
        sizes: tuple[int, ...]
        strides: tuple[int, ...]
        if call.result == "mean_weights":
            sizes, strides = (batch, target, source), (area, source, 1)
            if not deferred.batched:
                sizes, strides = sizes[1:], strides[1:]
        elif not deferred.batched:
            sizes, strides = (heads, target, source), (area, source, 1)
        elif deferred.heads_first:
            sizes, strides = (heads, batch, target, source), (area, heads * area, source, 1)
        else:
            sizes, strides = (batch, heads, target, source), (heads * area, area, source, 1)
        self: LazyWeights = cls.announce(sizes, strides, call.query.dtype, call.query.device)
        self._deferred = deferred
        return self

    def _value(self) -> Tensor:
        return self._deferred.value()

    @property
    def materialized(self) -> bool:
        """Whether all weights have been computed."""
        return self._deferred.computed

    def rows(self, index: Index) -> Tensor:
        """The weights of some queries, ``weights[..., index, :]``, and no others.

        In autograd's graph the result hangs on the query and the key, not on these weights.
        """
        part, single = _part(index, self.shape[-2], self.device)
        found = None if _is_empty(part, self.shape[-2]) else self._ask(lambda c: rows_of(c, part))
        if found is None:
            found = self[..., part, :]
        return found.squeeze(-2) if single else found

    def heads(self, index: Index) -> Tensor:
        """The weights of some heads, and no others: ``weights[index]`` as the module lays them out.

        Raises:
            ValueError: These weights are averaged over the heads.
        """
        dim = self._heads_dim
        if dim is None:
            raise ValueError(
                "these weights are averaged over the heads, and have none to choose from"
            )
        part, single = _part(index, self.shape[dim], self.device)
        found = None if _is_empty(part, self.shape[dim]) else self._ask(lambda c: heads_of(c, part))
        if found is None:
            found = self[part] if dim == 0 else self[:, part]
        return found.squeeze(dim) if single else found

    def mean(
        self,
        dim: int | Sequence[int] | None = None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> Tensor:
        """`torch.Tensor.mean`; an average over the heads never holds them all at once.

        ``weights.mean(0)``, 0 being the dimension of the heads as the module lays them out, gives
        ``(B, T, S)``. Without arguments it is the mean of all numbers, a scalar, as for every
        tensor: code that works on any tensor must not find another shape here.
        """
        # Torch takes NumPy's names too.
        dim, keepdim = others.pop("axis", dim), others.pop("keepdims", keepdim)
        given = (dim,) if isinstance(dim, SupportsIndex) else dim
        every = range(self.dim()) if given is None else [operator.index(d) for d in given]
        dims = sorted(d % self.dim() for d in every if -self.dim() <= d < self.dim())
        lazily = self._heads_dim in dims and dtype in (None, self.dtype) and not others
        lazily = lazily and len(dims) == len(every)  # Torch says which there are.
        averaged = self._ask(_averaged) if lazily else None
        if averaged is None:
            return super().mean(dim, keepdim, dtype=dtype, **others)  # type: ignore[arg-type]  # dim may be None
        assert self._heads_dim is not None
        averaged = averaged.unsqueeze(self._heads_dim).mean(dims, keepdim=True)
        return averaged if keepdim else averaged.squeeze(dims)

    def topk(  # type: ignore[override]  # the same arguments; torch's result is a type it does not name
        self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> Any:
        """`torch.Tensor.topk`; along the keys, a block of queries at a time."""
        if self.materialized or dim not in (-1, self.dim() - 1):
            return super().topk(k, dim, largest, sorted)
        found = self._by_rows(lambda weights: weights.topk(k, -1, largest, sorted))
        return torch.return_types.topk((found[0], found[1]))

    def entropy(self) -> Tensor:
        """How widely each query looks, in nats: 0 for one key, ``log(n)`` for ``n`` keys alike.

        A block of queries at a time. A query with every key hidden has 0.

        Returns:
            The shape of the weights without the last dimension, in float32 (float64 for float64).
        """
        return self._by_rows(lambda weights: (_entropy(weights).unsqueeze(-1),))[0].squeeze(-1)

    @property
    def _heads_dim(self) -> int | None:
        deferred = self._deferred
        if self.dim() < 3 + deferred.batched:
            return None
        return 1 if deferred.batched and not deferred.heads_first else 0

    def _ask(
        self, change: Callable[[AttentionCall], AttentionCall], *, anew: bool = False
    ) -> Tensor | None:
        """The weights of a changed call; None where those of the whole are to be used.

        Args:
            change: Of the call.
            anew: Though all may be computed already, of weights that require a gradient.
        """
        own = self.requires_grad and self.is_leaf
        if own or (self.materialized and not anew):
            return None
        with_grad = self.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(with_grad):
            try:
                return self._deferred.part(change, differentiable=with_grad)
            except Indivisible:
                return None

    def _by_rows(self, function: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        """``function`` of the weights of blocks of queries, its results joined along dim -2."""

        def again(rows: slice) -> tuple[Tensor, ...]:
            # In the same way both times, though all weights may be computed in between.
            found = self._ask(lambda call: rows_of(call, rows), anew=True)
            return tuple(function(self[..., rows, :] if found is None else found))

        target = self.shape[-2]
        step = max(1, BLOCK * target // self.numel())
        blocks: list[Sequence[Tensor]] = []
        for start in range(0, target, step):
            rows = slice(start, min(start + step, target))
            if self.requires_grad and torch.is_grad_enabled() and not self.materialized:
                # Each block is computed again for its gradient, so that they are not all kept.
                block = checkpoint(again, rows, use_reentrant=False, preserve_rng_state=False)
            else:
                block = function(self.rows(rows))
            blocks.append(block)
        return [torch.cat(parts, -2) for parts in zip(*blocks, strict=True)]


class AttentionWeights(torch.autograd.Function):
    """Ties weights that may never be computed to what they can be differentiated by."""

    @staticmethod
    def forward(ctx: Any, deferred: Deferred, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.deferred = deferred
        return LazyWeights(deferred)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        needed = ctx.needs_input_grad[1:]
        if gradient is None:
            return (None,) * (1 + len(needed))
        return None, *ctx.deferred.gradients(ctx.saved_tensors, needed, gradient)


def _averaged(call: AttentionCall) -> AttentionCall:
    return dataclasses.replace(call, result="mean_weights")


def _entropy(weights: Tensor) -> Tensor:
    wide = weights.to(wide_dtype(weights.dtype))
    if not wide.requires_grad:
        terms: Tensor = torch.special.entr(wide)
        return terms.sum(-1)
    # The logarithm of 1 where the weight is 0: no contribution, and no infinite gradient.
    return -(wide * torch.where(wide > 0, wide, 1.0).log()).sum(-1)


def _part(index: Index, length: int, device: torch.device) -> tuple[Part, bool]:
    """What to take along a dimension, and whether that dimension then goes."""
    if isinstance(index, slice):
        return index, False
    if isinstance(index, int):
        if not -length <= index < length:
            raise IndexError(f"index must be in [{-length}, {length}); got {index}")
        return slice(index % length, index % length + 1), True
    chosen = torch.as_tensor(index, device=device)
    if not isinstance(index, Tensor) and not chosen.numel():
        chosen = chosen.to(torch.int64)
    if chosen.dim() > 1:
        raise ValueError(f"index must have at most one dimension; got {tuple(chosen.shape)}")
    if chosen.dtype == torch.bool:
        if chosen.shape != (length,):
            raise IndexError(f"a bool index must have shape ({length},); got {tuple(chosen.shape)}")
        return chosen.nonzero().squeeze(1), False
    return chosen.reshape(-1), chosen.dim() == 0


def _is_empty(part: Part, length: int) -> bool:
    """Whether nothing is chosen: there is no call of nothing."""
    if isinstance(part, Tensor):
        return not part.numel()
    return not range(*part.indices(length))
