"""The feed-forward half of a transformer layer, as sub-LN has it."""

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """Two projections with a GELU between them, and sub-LN's LayerNorm before the second.

    Args:
        embed_dim: Width of input and output; the inside is four times as wide.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.norm = nn.LayerNorm(4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """A tensor of the input's shape."""
        out_BTE: Tensor = self.fc2(self.norm(F.gelu(self.fc1(x_BTE))))
        return out_BTE
