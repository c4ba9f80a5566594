"""Calls of the kernels of rotations: queries and keys of any layout, tables of every form.

Shape suffixes: B batch, H heads, G key heads, L length, D head dimension, P pairs of features.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.ops.bound import assert_within_bound
from zeta.nn import MultiheadAttention, RotaryEmbedding
from zeta.nn.tables import position_tensor, rotation_tables, xpos_tables
from zeta.ops.rotation import Table
from zeta.ops.turning import Kernel
from zeta.positions import rotate


@dataclasses.dataclass(frozen=True)
class Turning:
    """Queries and keys, and where they stand."""

    name: str
    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    length: int = 5
    head_dim: int = 16
    rotary_dim: int | None = None
    interleaved: bool = True
    xpos: bool = False
    positions: str = "shared"
    layout: str = "BLHD"
    key_length: int | None = None

    def tensors(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Leaves, the same numbers in every dtype up to rounding."""
        generator = torch.Generator().manual_seed(len(self.name))
        made = {}
        for name, heads, length in (
            ("query", self.heads, self.length),
            ("key", self.key_heads, self.key_length or self.length),
        ):
            shape = self.batch, length, heads, self.head_dim
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            x = x.to(device).transpose(1, 2)
            if self.layout == "BHLD":
                x = x.contiguous()
            elif self.layout == "sliced":
                x = torch.cat((x, x), dim=-1)[..., self.head_dim :]
            elif self.layout == "BHDL":
                x = x.mT.contiguous().mT
            made[name] = x.detach().requires_grad_()
        return made

    def tables(self, device: str, dtype: torch.dtype) -> tuple[Table, Table]:
        """Of queries and of keys."""
        tables = []
        for length, sign in ((self.length, 1), (self.key_length or self.length, -1)):
            at = torch.arange(length, device=device) * 3 + 7
            if self.positions == "own":
                at = at + torch.arange(self.batch, device=device)[:, None] * 11
            elif self.positions == "one row":
                at = at[None]
            position = position_tensor(at, length, at.device)
            if self.xpos:
                both = xpos_tables(self.head_dim, 512, dtype, position, 0, None)
                tables.append(both[0] if sign > 0 else both[1])
            else:
                form = self.rotary_dim or self.head_dim, 10000.0, None
                wide = torch.promote_types(dtype, torch.float32)
                tables.append(rotation_tables(*form, wide, position))
        return tables[0], tables[1]

    def run(self, made: dict[str, Tensor], kernel: Kernel | None) -> dict[str, Tensor]:
        """Results and gradients, by a kernel or by torch's operations."""
        query, key = made["query"], made["key"]
        of_query, of_key = self.tables(str(query.device), query.dtype)
        if kernel is not None:
            turned = kernel(query, key, (*of_query, *of_key), self.interleaved)
        else:
            turned = self._turned(query, of_query), self._turned(key, of_key)
        loss = sum(((x.double() ** 2) * (1 + x.detach().double())).sum() for x in turned)
        assert isinstance(loss, Tensor)
        gradients = torch.autograd.grad(loss, (query, key))
        return dict(
            zip(("query", "key", "grad query", "grad key"), turned + gradients, strict=True)
        )

    def _turned(self, x: Tensor, table: Table) -> Tensor:
        pairs = 2 * table[0].shape[-1]
        turned = rotate(x[..., :pairs], *table, interleaved=self.interleaved)
        return torch.cat((turned, x[..., pairs:]), dim=-1)

    def check(self, kernel: Kernel, dtype: torch.dtype, device: str = "cpu") -> None:
        """Hold a kernel against the textbook in float64."""
        made = self.tensors(dtype, device)
        wide = {name: x.detach().double().requires_grad_() for name, x in made.items()}
        low, oracle = self.run(made, None), self.run(wide, None)
        assert_within_bound(self.run(made, kernel), low, oracle)


TURNINGS = [
    Turning("interleaved"),
    Turning("halves", interleaved=False),
    Turning("part", rotary_dim=6, head_dim=20),
    Turning("part, halves", rotary_dim=10, head_dim=17, interleaved=False),
    Turning("one token", length=1, batch=3),
    Turning("odd", length=13, heads=5, key_heads=5, head_dim=26, batch=1),
    Turning("own positions", positions="own"),
    Turning("one row of positions", positions="one row", interleaved=False),
    Turning("heads outside", layout="BHLD"),
    Turning("sliced", layout="sliced", positions="own"),
    Turning("last dimension strided", layout="BHDL"),
    Turning("more keys", key_length=9, heads=6),
    Turning("xpos", xpos=True),
    Turning("xpos, own positions", xpos=True, positions="own", heads=7, key_heads=1),
]


def wrongly_turned(kernel: Kernel) -> Kernel:
    """A kernel whose results are off by a hundred roundings."""

    def wrong(
        query: Tensor, key: Tensor | None, tables: Sequence[Tensor], interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        return kernel(query, key, [table * (1 + 1e-5) for table in tables], interleaved)

    return wrong


MODULES = ("interleaved", "halves", "part", "xpos")


def run_of_module(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    """Results and gradients of an attention with a rotation of `MODULES`, by ``positions=``."""
    position = {
        "interleaved": RotaryEmbedding(8),
        "halves": RotaryEmbedding(8, interleaved=False),
        "part": RotaryEmbedding(8, rotary_dim=4),
        "xpos": None,
    }[kind]
    attention = MultiheadAttention(
        {"xpos_rel_pos": kind == "xpos"}, 32, 4, self_attention=True, num_kv_heads=2,
        position=position,
    )  # fmt: skip
    x = torch.randn(2, 6, 32)
    parameters = list(attention.parameters())

    def run(**options: Tensor) -> tuple[Tensor, ...]:
        out, _ = attention(x, x, x, is_causal=True, **options)
        return out, *torch.autograd.grad(out.square().sum(), parameters)

    return run
