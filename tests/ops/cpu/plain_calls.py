"""Calls that go to the library as they are: sizes, masks, biases, for test_plain*.py.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D head
dimension.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zeta.biases import Alibi, Bias, Bucketed, Dense, Softcap
from zeta.masks import Causal, Mask, Padding, SlidingWindow, keep

Operands = tuple[Tensor, Tensor, Tensor]
SHAPES = {  # B, H, G, T, S, D
    "one number": (1, 1, 1, 1, 1, 1),
    "a step": (2, 4, 2, 1, 37, 64),
    "a chunk of grouped heads": (1, 8, 2, 3, 50, 40),
    "blocks": (2, 2, 1, 130, 300, 72),
    "more queries than keys": (1, 2, 2, 70, 33, 16),
}


MASKS: dict[str, Callable[..., Mask | None]] = {  # of B, H, T, S
    "none": lambda *_: None,
    "causal": lambda *_: Causal(),
    "window": lambda *_: SlidingWindow(3),
    "a window of everything": lambda *_: SlidingWindow(2**31 - 1),
    "padding": lambda batch, _, __, source: Padding(torch.arange(batch) * 30 + source % 30),
    "padding of everything": lambda batch, *_: Padding(torch.full((batch,), -5)),
    "padding of any length": lambda batch, *_: Padding(torch.full((batch,), 2**40)),
    "keys": lambda batch, _, __, source: keep(bits(batch, 1, 1, source)),
    "all pairs": lambda *shape: keep(bits(*shape)),
    "pairs across": lambda batch, heads, target, source: keep(
        bits(batch, heads, source, target).mT
    ),
    "pairs of every sequence": lambda _, __, target, source: keep(bits(target, source)),
    "all of them": lambda batch, _, target, source: (
        Causal() & Padding(torch.full((batch,), source - 1)) & keep(bits(1, 1, target, 1))
        & SlidingWindow(40)
    ),
}  # fmt: skip


BIASES: dict[str, Callable[..., Bias]] = {  # of B, H, T, S, the dtype
    "dense": lambda batch, heads, target, source, _: Dense(_dense(batch, heads, target, source)),
    "dense across": lambda _, heads, target, source, dtype: Dense(
        _dense(heads, source, target).mT.to(dtype)
    ),
    "dense of keys": lambda batch, _, __, source, dtype: Dense(
        _dense(batch, 1, 1, source).masked_fill(bits(batch, 1, 1, source), -torch.inf).half()
    ),
    "table": lambda _, heads, *__: table_of(heads),
    "table in half": lambda _, heads, *__: Bucketed(table_of(heads).table.bfloat16()),
    "slopes": lambda _, heads, *__: Alibi(torch.rand(heads)),
    "cap": lambda *_: Softcap(2),
    "cap, then table": lambda _, heads, *__: Softcap(0.5) + table_of(heads),
    "all of them": lambda batch, heads, target, source, dtype: (
        table_of(heads) + Alibi(torch.rand(heads)) + Dense(_dense(batch, 1, target, 1).to(dtype))
        + Softcap(0.5)
    ),
}  # fmt: skip


def _dense(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def bias_of(kind: str, made: Operands) -> Bias:
    query, key, _ = made
    return BIASES[kind](*query.shape[:3], key.shape[2], query.dtype)


def bits(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.6


def mask_of(kind: str, made: Operands) -> Mask | None:
    return MASKS[kind](*made[0].shape[:3], made[1].shape[2])


KINDS = [
    *((kind, "none") for kind in MASKS),
    *(("none", kind) for kind in BIASES),
    ("all of them", "all of them"),
]


def scores_of(kinds: tuple[str, str], made: Operands) -> tuple[Mask | None, Bias | None]:
    mask, bias = kinds
    return mask_of(mask, made), None if bias == "none" else bias_of(bias, made)


def operands(name: str, dtype: torch.dtype = torch.float32, inside: bool = False) -> Operands:
    """Query, key and value; ``inside``: their heads lie inside the length, as projected ones."""
    batch, heads, key_heads, target, source, dim = SHAPES[name]

    def made(number: int, length: int) -> Tensor:
        if inside:
            # Of a wider tensor, so that nothing is contiguous.
            wide = torch.randn(batch, length, number + 1, dim, dtype=dtype)
            return wide[:, :, :number].transpose(1, 2)
        return torch.randn(batch, number, length, dim, dtype=dtype)

    return made(heads, target), made(key_heads, source), made(key_heads, source)


def table_of(heads: int) -> Bucketed:
    return Bucketed(torch.randn(16, heads, generator=torch.Generator().manual_seed(heads)))


def learned(name: str = "a chunk of grouped heads") -> Operands:
    query, key, value = operands(name)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


class Subclass(Tensor):
    """Of a class of its own, which may hold its numbers elsewhere."""
