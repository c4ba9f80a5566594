"""One process of a distributed run: ``python -m tests.ecosystem.ranks KIND RANK FOLDER``.

Trains a step on its half of the batch; the first process saves gradients and the state after it.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.ecosystem.layers import Layer, loss, padding, tokens
from zeta.nn import set_split_position

WORLD = 2
BATCH, LENGTH = 4, 9


class Stack(nn.Module):
    """Two layers, one of them multiway."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                Layer(biased=True, causal=True, subln=True),
                Layer({"multiway": True, "xpos_rel_pos": True}, causal=True),
            ]
        )
        self.apply(set_split_position(LENGTH))  # Way B has no token.

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, hidden)
        return x


def replicated(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    assert isinstance(model, Stack)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "replicated": replicated,
    "sharded": sharded,
}


def step(model: nn.Module, parts: slice = slice(None)) -> dict[str, dict[str, Tensor]]:
    """Gradients and parameters, whole, after a step on some of the sequences."""
    x, hidden = tokens(BATCH, LENGTH)[parts], padding(BATCH, LENGTH)[parts]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss(model(x, hidden), x).backward()
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grads[name.removeprefix("module.")] = whole(parameter.grad).clone()
    optimizer.step()
    named = model.named_parameters()
    after = {name.removeprefix("module."): whole(value.detach()) for name, value in named}
    return {"gradients": grads, "parameters": after}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(kind: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD
    )
    try:
        half = BATCH // WORLD
        results = step(KINDS[kind](Stack()), slice(rank * half, (rank + 1) * half))
        if rank == 0:
            torch.save(results, folder / "results.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
