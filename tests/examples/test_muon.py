"""Muon in float32 against torch's in bfloat16."""

import pytest
import torch
from torch import nn

from zeta.examples.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (1, 24, 24), (2, 1, 5)])
def test_orthogonalized_keeps_directions_and_evens_out_lengths(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    left, lengths, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    found = orthogonalized((left * lengths.unsqueeze(1)) @ right)
    turned = left.mT @ found @ right.mT
    diagonal = turned.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(turned, torch.diag_embed(diagonal), rtol=0, atol=1e-5)
    assert diagonal.min() > 0.5
    assert diagonal.max() < 1.3


def test_zeros_stay_zeros() -> None:
    assert orthogonalized(torch.zeros(2, 3, 4)).eq(0).all()


def test_steps_are_those_of_torch() -> None:
    torch.manual_seed(0)
    shapes = [(32, 64), (64, 32), (32, 64), (48, 48)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(matrix.detach().clone()) for matrix in ours]
    optimizer = Muon(ours, 0.1, weight_decay=0.1)
    peer = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        before = [matrix.detach().clone() for matrix in ours]
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        peer.step()
        for mine, other, old in zip(ours, theirs, before, strict=True):
            # Torch multiplies in bfloat16.
            assert (mine - other).norm() < 0.05 * (mine - old).norm()
            mine.data.copy_(other)


def test_a_matrix_without_a_gradient_stays() -> None:
    still, moved = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    moved.grad = torch.ones(2, 3)
    Muon([still, moved], 0.1, weight_decay=0.5).step()
    assert still.eq(1).all()
    assert moved.ne(1).all()
