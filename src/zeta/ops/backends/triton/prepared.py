"""`Backward`: what the backward passes of both sets of kernels are given.

Shape suffixes: B batch, H query heads, T target length, S source length.
"""

import dataclasses
from typing import Any

from torch import Tensor

from zeta.ops.backends.triton.arguments import Fixed, given_rows, plane_operand, shape_of_tiles
from zeta.ops.backends.triton.configs import Pass
from zeta.ops.backends.triton.kernels.operands import Plane, Rows, Score, Sizes


@dataclasses.dataclass(slots=True)
class Backward:
    """What every backward kernel of one call is given.

    Attributes:
        dweights: Of returned weights, seen as ``(B, H, T, S)``, in place of `dout` and values.
        total_H: The sum of all of dS of each head, or None for zero.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    dweights: Tensor | None
    statistics: Tensor
    delta: Tensor
    score: Score
    sizes: Sizes
    fixed: Fixed
    total_H: Tensor | None = None

    def operands(self) -> tuple[Rows, Rows, Rows, Rows, Plane | None, Tensor, Tensor]:
        """Query, key, value, and what arrives, as kernels take them."""
        return (
            given_rows(self.query), given_rows(self.key), given_rows(self.value),
            given_rows(self.dout),
            None if self.dweights is None else plane_operand(self.dweights), self.statistics,
            self.delta,
        )  # fmt: skip

    def constants(self, kind: Pass) -> dict[str, Any]:
        """Compile-time arguments of a kernel."""
        return shape_of_tiles(
            kind, self.query, self.fixed.causal, self.query.shape[-1], self.value.shape[-1],
            has_dense=self.score.dense is not None,
        )  # fmt: skip

    @property
    def keep(self) -> float:
        """The share of weights that dropout leaves."""
        return 1.0 - self.fixed.dropout_p
