"""Linear layers of a few rows for the native projection, of odd and even sizes."""

import dataclasses
import math
from unittest import mock

import torch
from torch import Tensor

from zeta.ops.backends.cpu import projection

Layers = list[tuple[Tensor, Tensor | None]]


@dataclasses.dataclass(frozen=True)
class Projection:
    """Rows, and the layers that they go through.

    Attributes:
        features: Of each layer.
        spacing: Elements between two rows of a weight, beyond the row itself.
    """

    name: str
    rows: int = 1
    width: int = 64
    features: tuple[int, ...] = (64, 64, 64)
    biased: bool = True
    spacing: int = 0

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Layers]:
        generator = torch.Generator().manual_seed(self.rows + self.width)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        x = normal(1, self.rows, self.width)
        layers: Layers = []
        for features in self.features:
            weight = normal(features, self.width + self.spacing)[:, : self.width]
            layers.append((weight, normal(features) if self.biased else None))
        return x, layers

    def run(self, x: Tensor, layers: Layers) -> dict[str, Tensor]:
        """The outputs by their number, of layers one by one; those of all together are the same."""
        width = math.gcd(*self.features)
        # Beside tiles too, where torch is left more of them.
        with mock.patch.object(projection, "FEW_ROWS_BESIDE_TILES", projection.MAX_ROWS):
            singly = [projection.project(x, layer) for layer in layers]
            together = projection.project_heads(x, layers, width)
        assert together is not None
        found = {}
        for number, (out, heads) in enumerate(zip(singly, together, strict=True)):
            assert out is not None
            assert heads.shape == (1, out.shape[2] // width, self.rows, width)
            assert torch.equal(heads.transpose(1, 2).flatten(2), out)
            found[str(number)] = out
        return found


PROJECTIONS = [
    Projection("projection"),
    Projection("projection of the smallest", width=1, features=(1,)),
    Projection("projection of odd sizes", rows=3, width=37, features=(65, 3, 130)),
    Projection("projection without biases", rows=2, width=96, features=(96, 24, 24), biased=False),
    Projection("projection of rows apart", rows=5, width=40, features=(33, 7), spacing=9),
    Projection("projection of all rows", rows=64, width=80, features=(72, 24)),
    Projection("projection of an odd number of rows", rows=23, width=64, features=(64, 32, 32)),
    Projection("projection of long rows", rows=4, width=1100, features=(70, 20, 20)),
]
