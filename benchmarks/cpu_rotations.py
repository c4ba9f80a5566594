"""The rows of the CPU benchmark about rotary embeddings: ours and Transformers'.

Heads lie side by side, as projections leave them. Transformers' cosines and sines are ready made,
as its models keep them between layers; ours are found by position, in each call.

Shape suffixes: B batch, H heads, T length, D head dimension.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.cpu_problem import Results, Run, Shape
from benchmarks.cpu_rows import BOUNDS, DTYPES, QUICK_SHAPES, SHAPES, Row, Work
from zeta.nn import RotaryEmbedding
from zeta.positions import rotary_tables, rotate

Turn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
STEP: Shape = (1, 8, 1, 64)


def rotation_rows(quick: bool) -> Iterator[Row]:
    """Queries and keys of whole sequences, turned and turned back, and of a single token."""
    shapes = QUICK_SHAPES if quick else SHAPES
    for dtype in DTYPES:
        for name, train in (("forward", False), ("training", True)):
            for label, shape in (shapes if train else shapes | {"1 token": STEP}).items():

                def make(dtype: str = dtype, train: bool = train, shape: Shape = shape) -> Work:
                    return _work(shape, DTYPES[dtype], train)

                yield Row(f"{dtype} rotary {name}", label, make)


def _work(shape: Shape, dtype: torch.dtype, train: bool) -> Work:
    batch, heads, length, head_dim = shape
    query, key, *incoming = (
        torch.randn(batch, length, heads, head_dim).to(dtype).transpose(1, 2) for _ in range(4)
    )
    rotary = RotaryEmbedding(head_dim, interleaved=False)
    wide = rotary_tables(torch.arange(length), head_dim, dtype=torch.float64)

    def textbook(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        turned = [rotate(x, *wide, interleaved=False) for x in (query, key)]
        return turned[0], turned[1]

    def run(turn: Turn, to: torch.dtype) -> Run:
        leaves = [x.to(to).requires_grad_(train) for x in (query.detach(), key.detach())]
        gradients = [x.to(to) for x in incoming]

        def one() -> Results:
            turned = turn(leaves[0], leaves[1])
            found = dict(zip(("out", "out of keys"), turned, strict=True))
            if train:
                made = torch.autograd.grad(turned, leaves, gradients)
                found |= dict(zip(("grad query", "grad key"), made, strict=True))
            return found

        return one

    ours = run(lambda query, key: rotary.pair(query, key, 0), dtype)
    peer = run(_transformers(wide, dtype), dtype)
    checked = {"ours": ours, "peer": peer}
    calls = 50 if length == 1 else 1
    return Work(ours, peer, run(textbook, torch.float64), checked, BOUNDS[dtype], calls=calls)


def _transformers(tables: tuple[Tensor, Tensor], dtype: torch.dtype) -> Turn:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    # Each half of a head has the same angles.
    cos, sin = (torch.cat((table, table), dim=-1).to(dtype)[None] for table in tables)

    def turn(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = apply_rotary_pos_emb(query, key, cos, sin)
        return found

    return turn
