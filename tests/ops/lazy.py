"""Lazy weights of a small call, and the plain tensor that they must be like."""

import dataclasses

import torch
from torch import Tensor

from zeta import biases, masks
from zeta.ops.attention import run_weights
from zeta.ops.call import AttentionCall
from zeta.ops.weights import LazyWeights, lazy_weights


class Counted:
    """Computes weights on the reference, and remembers each call."""

    def __init__(self, backend: str = "reference") -> None:
        self.backend = backend
        self.calls: list[AttentionCall] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        self.calls.append(call)
        return run_weights(call, self.backend)

    def largest(self) -> int:
        """The most weights that were held at once."""
        return max(
            call.query.shape[:3].numel()
            * call.source
            // (call.heads if call.result == "mean_weights" else 1)
            for call in self.calls
        )


@dataclasses.dataclass
class Small:
    """Two sequences, three heads, four queries, five keys; causal, with a learned relative bias.

    Keyword arguments of `lazy` and `plain` are those of `AttentionCall.checked`.
    """

    requires_grad: bool = True
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.query = self._leaf(2, 3, 4, 8)
        self.key = self._leaf(2, 3, 5, 8)
        self.table = self._leaf(8, 3)
        self.compute = Counted()

    def _leaf(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype).requires_grad_(self.requires_grad)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query, self.key, self.table]

    def call(self, result: str = "weights") -> AttentionCall:
        return AttentionCall.checked(
            self.query,
            self.key,
            self.key,
            mask=masks.Causal(),
            bias=biases.Bucketed(self.table, max_distance=16),
            result=result,
        )

    def lazy(self, *, heads_first: bool = True, result: str = "weights") -> LazyWeights:
        weights = lazy_weights(self.call(result), self.compute, heads_first=heads_first)
        assert isinstance(weights, LazyWeights)
        return weights

    def plain(self, *, heads_first: bool = True) -> Tensor:
        weights = run_weights(self.call(), "reference")
        return weights.transpose(0, 1) if heads_first else weights
