"""Models with attentions to be swapped."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torchscale.component.multihead_attention import MultiheadAttention as TorchScale

BATCH, LENGTH, EMBED, HEADS = 2, 5, 8, 2
TORCHS = "torch.nn.modules.activation.MultiheadAttention"
ZETAS = "zeta.integrations.pytorch.MultiheadAttention"


class Block(nn.Module):
    """One attention of torch's, and something else."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, **options)
        self.linear = nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x + self.attention(x, x, x)[0])
        return out


def torchscale(**options: Any) -> TorchScale:
    args = SimpleNamespace(
        multiway=options.pop("multiway", False),
        layernorm_eps=1e-5,
        xpos_rel_pos=options.pop("xpos", False),
        xpos_scale_base=512,
    )
    return TorchScale(args, EMBED, HEADS, self_attention=True, **options)
