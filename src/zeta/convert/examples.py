"""The calls of a proof: which inputs and masks a module and its conversion are given.

Shapes: B batch, H heads, T target length, S source length, E embedding.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zeta.convert.forms import Form
from zeta.convert.source import Example, Runner


@dataclass(frozen=True)
class Call:
    """One call, by the same numbers for both.

    Attributes:
        name: For the report.
        example: The inputs.
        is_causal: Zeta is told so, where the other is given the mask.
        split: Of multiway modules.
        seed: Of the cotangent.
    """

    name: str
    example: Example
    is_causal: bool = False
    split: int = -1
    seed: int = 0

    def fresh(self) -> tuple[Example, list[Tensor]]:
        """The example with inputs of its own that get gradients, and these inputs."""
        copies: dict[int, Tensor] = {}
        for tensor in (self.example.query, self.example.key, self.example.value):
            copies.setdefault(id(tensor), tensor.clone().requires_grad_())
        fields = {
            name: copies[id(getattr(self.example, name))] for name in ("query", "key", "value")
        }
        inputs = list(copies.values())
        for name in ("added", "rel_pos"):
            tensor = getattr(self.example, name)
            if tensor is not None:
                fields[name] = tensor.clone().requires_grad_()
                inputs.append(fields[name])
        return dataclasses.replace(self.example, **fields), inputs

    def cotangent(self, like: Tensor) -> Tensor:
        """What the output's gradient is taken to be, the same each time."""
        return torch.randn(like.shape, generator=make_generator(self.seed), dtype=like.dtype)


def make_generator(seed: int) -> torch.Generator:
    """A generator that starts at ``seed``."""
    return torch.Generator().manual_seed(seed)


def calls(
    form: Form,
    runner: Runner,
    batch: int,
    length: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Iterator[Call]:
    """The calls that an attention of this form can be given.

    Args:
        form: Of the source.
        runner: Its own.
        batch: Sequences of each call.
        length: Tokens of the queries, and of keys in self-attention.
        dtype: Of the inputs.
        generator: Of all that is drawn.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    sizes = (form.embed_dim, form.kdim, form.vdim)
    if len(set(sizes)) == 1 and not form.encoder_decoder_attention:
        x = draw(batch, length, form.embed_dim)
        yield from _masked("self", Example(x, x, x), form, runner, generator)
    # A rotation or a window places queries and keys in one sequence.
    if not form.self_attention:
        query, key = draw(batch, length, form.embed_dim), draw(batch, length + 3, form.kdim)
        same = form.kdim == form.vdim and not runner.separate_values
        value = key if same else draw(batch, length + 3, form.vdim)
        yield from _masked("cross", Example(query, key, value), form, runner, generator)


def _masked(
    kind: str, example: Example, form: Form, runner: Runner, generator: torch.Generator
) -> Iterator[Call]:
    """One example without and with each sort of mask."""
    batch, target, source = *example.query.shape[:2], example.key.shape[1]
    offset = torch.arange(target)[:, None] - torch.arange(source)[None]
    causal = offset < 0
    padding = torch.zeros(batch, source, dtype=torch.bool)
    # No query must have all its keys hidden: the first stays, or one of any two in a window.
    if form.window is None:
        padding[-1, max(source - 1 - source // 3, 1) :] = True
    elif form.window > 1:
        padding[-1, 1::3] = True
    hidden = torch.rand(target, source, generator=generator) < 0.4
    hidden[:, 0] = False
    added = torch.randn(target, source, generator=generator, dtype=example.query.dtype)

    def call(name: str, *, is_causal: bool = False, split: int = -1, **changes: Tensor) -> Call:
        changed = dataclasses.replace(example, **changes)
        if form.window is not None:
            # What Zeta's window hides by itself, the other's mask hides.
            outside = causal | (offset >= form.window)
            base = outside if changed.hidden is None else outside | changed.hidden
            changed = dataclasses.replace(changed, hidden=base)
        return Call(f"{kind}, {name}", changed, is_causal, split)

    yield call("no mask")
    if form.window is None:
        yield call("random mask", hidden=hidden)
    yield call("additive mask", added=added)
    yield call("padding", padding=padding)
    if form.add_bias_kv or form.add_zero_attn:
        yield call("every key hidden", hidden=torch.ones_like(hidden))
    if kind == "self":
        yield call("causal", hidden=causal, is_causal=True)
        yield call("causal, padding", hidden=causal, padding=padding, is_causal=True)
    if runner.rel_pos:
        rows = batch * form.num_heads
        rel_pos = torch.randn(rows, target, source, generator=generator, dtype=added.dtype)
        yield call("rel_pos", rel_pos=rel_pos)
    if form.num_ways > 1:
        for split in (0, target // 2):
            yield call(f"split at {split}", split=split)
