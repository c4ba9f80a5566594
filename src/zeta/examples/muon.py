"""Muon in float32: the momentum of a matrix, made nearly orthogonal, is its step.

`torch.optim.Muon` does the same in bfloat16, which processors without instructions for it multiply
several times slower than float32.

Shapes: N matrices of one shape, R rows, C columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
RMS_OF_ADAM = 0.2


class Muon(Optimizer):
    """Muon with Nesterov momentum (Jordan, 2024; https://kellerjordan.github.io/posts/muon/).

    A step is as long as Adam's would be, so that both take the same learning rate (Liu et al.,
    2025, "Muon is Scalable for LLM Training", section 2.2).

    Args:
        matrices: The parameters, each of two dimensions.
        learning_rate: The root mean square of a step is a fifth of it.
        momentum: Share of the old mean in the running mean of the gradients.
        weight_decay: Share of a weight that a step at a learning rate of 1 would take away.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        learning_rate: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(matrices, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # none is needed here
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                momenta = [self._momentum(matrix, group["momentum"]) for matrix in matrices]
                step_NRC = orthogonalized(torch.stack(momenta))
                length = group["lr"] * RMS_OF_ADAM * math.sqrt(max(shape))
                for matrix, step_RC in zip(matrices, step_NRC, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(step_RC, alpha=-length)

    def _momentum(self, matrix: Tensor, momentum: float) -> Tensor:
        """Nesterov's: the running mean of the gradients, one step ahead."""
        state = self.state[matrix]
        gradient = matrix.grad
        assert gradient is not None, "a matrix without a gradient does not move"
        if not state:
            state["mean"] = torch.zeros_like(matrix)
        mean: Tensor = state["mean"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)


def orthogonalized(matrices_NRC: Tensor) -> Tensor:
    """Nearly U V^T for each matrix U S V^T: singular values come to about 0.7 to 1.2.

    Args:
        matrices_NRC: What is made nearly orthogonal; zeros stay zeros.

    Returns:
        A tensor of the same shape.
    """
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    wide = matrices_NRC.mT if is_tall else matrices_NRC
    # Their largest singular value is at most 1 then.
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    first, third, fifth = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        wide = torch.baddbmm(wide, polynomial, wide, beta=first)
    return wide.mT if is_tall else wide
