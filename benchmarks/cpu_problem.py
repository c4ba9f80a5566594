"""One call of attention with random inputs, done by us, by torch and in float64.

Shape suffixes: B batch, H heads, T length, D head dimension.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zeta import attention, biases, masks
from zeta.ops.precision import Precision
from zeta.positions import t5_buckets

Results = dict[str, Tensor]
Run = Callable[[], Results]
Shape = tuple[int, int, int, int]
PADDED = 7
"""Keys that padding hides where every feature is on: few, so that no work is saved."""


@dataclasses.dataclass(frozen=True)
class Features:
    """What a call is made with."""

    causal: bool = False
    window: int = 0
    t5: bool = False
    padding: bool = False
    dropout_p: float = 0.0
    precision: Precision = "highest"

    @property
    def exact(self) -> "Features":
        return dataclasses.replace(self, precision="highest")


def _drawn(shape: Shape, dtype: torch.dtype, side_by_side: bool) -> Tensor:
    """Heads apart from each other, or side by side, as projections leave them."""
    batch, heads, length, width = shape
    if not side_by_side:
        return torch.randn(shape).to(dtype)
    return torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2)


class Problem:
    """Random inputs of one call, and the ways to do it."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        features: Features,
        train: bool,
        *,
        side_by_side: bool = False,
    ) -> None:
        batch, heads, length, _ = shape
        self.shape, self.dtype, self.features, self.train = shape, dtype, features, train
        self.leaves: Results = {
            name: _drawn(shape, dtype, side_by_side).requires_grad_(train)
            for name in ("query", "key", "value")
        }
        if features.t5:
            table = torch.randn(32, heads).to(dtype)
            self.leaves["table"] = table.requires_grad_(train)
        self.incoming = _drawn(shape, dtype, side_by_side)
        self.lengths = length - 1 - torch.arange(batch) % PADDED

    def ours(self, backend: str = "auto") -> Results:
        """Our results and the gradients of all leaves."""
        return self._run(self.leaves, self.features, backend)

    def oracle(self) -> Results:
        """In float64; by the chunked backend where the reference would take too much memory."""
        leaves = {
            name: leaf.detach().double().requires_grad_(self.train)
            for name, leaf in self.leaves.items()
        }
        batch, heads, length, _ = self.shape
        backend = "reference" if batch * heads * length**2 <= 2**25 else "chunked"
        return self._run(leaves, self.features.exact, backend)

    def _run(self, leaves: Results, features: Features, backend: str) -> Results:
        hidden: masks.Mask | None = masks.Causal() if features.causal else None
        if features.window:
            hidden = masks.SlidingWindow(features.window)
        if features.padding:
            padding = masks.Padding(self.lengths)
            hidden = padding if hidden is None else hidden & padding
        out = attention(
            leaves["query"],
            leaves["key"],
            leaves["value"],
            mask=hidden,
            bias=biases.Bucketed(leaves["table"]) if features.t5 else None,
            dropout_p=features.dropout_p,
            seed=1 if features.dropout_p else None,
            backend=backend,
            precision=features.precision,
        )
        return {"out": out} | self.gradients(out, leaves)

    def gradients(self, out: Tensor, leaves: Results) -> Results:
        """Of the leaves, where it trains."""
        if not self.train:
            return {}
        found = torch.autograd.grad(out, list(leaves.values()), self.incoming.to(out.dtype))
        return {f"grad {name}": grad for name, grad in zip(leaves, found, strict=True)}

    def torch_does(self) -> Run:
        """`F.scaled_dot_product_attention`; a bias is a dense leaf with a gradient of its own, and
        padding and a window are bool masks, all made before.
        """
        leaves = {name: leaf for name, leaf in self.leaves.items() if name != "table"}
        features, bias = self.features, None
        query, key, value = leaves.values()
        if features.t5:
            bias = self._dense().requires_grad_(self.train)
            leaves["dense"] = bias
        elif features.padding:
            assert not features.causal
            bias = (torch.arange(self.shape[2]) < self.lengths[:, None])[:, None, None]
        elif features.window:
            whole = torch.ones(self.shape[2], self.shape[2], dtype=torch.bool)
            bias = whole.tril().triu(1 - features.window)

        def run() -> Results:
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=bias,
                dropout_p=features.dropout_p,
                is_causal=features.causal and bias is None,
            )
            return {"out": out} | self.gradients(out, leaves)

        return run

    def _dense(self) -> Tensor:
        position = torch.arange(self.shape[2])
        buckets = t5_buckets(position - position[:, None])
        table = self.leaves["table"].detach()
        dense = F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0).contiguous()
        if self.features.causal:
            dense.masked_fill_(position > position[:, None], float("-inf"))
        return dense
