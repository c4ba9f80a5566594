"""Random histories of a cache, and the full forward that each of their steps must equal.

`Ledger` keeps every token of every sequence in the plainest way; a `History` does all operations on
a cache and on a ledger side by side, attends after each update, and compares with attention over
the whole ledger, on the reference in float64.

Shapes: B batch, H heads, G key heads, N new tokens, L tokens so far, D head dimension.
"""

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

import zeta
from zeta import biases, masks
from zeta.caches import Cached, CacheFullError, DecodingCache
from zeta.positions import rotary_tables, rotate, xpos_scale

TOLERANCE = 1e-9
HEAD_DIM, VALUE_DIM = 6, 5
OPERATIONS = ("one", "one", "one", "chunk", "chunk", "long", "reorder", "select", "crop")
OPERATIONS += ("fork", "fork", "commit", "rollback", "rollback", "reload", "reset")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a history is made with."""

    batch: int
    heads: int
    key_heads: int
    mask: str
    bias: str
    rotation: str
    padding: str
    seed: int


def settings(*, padding: tuple[str, ...] = ("none", "left", "inside", "right", "float")) -> Any:
    """A strategy for settings."""
    return st.builds(
        lambda batch, heads, mask, bias, rotation, padding, seed: Setting(
            batch, heads[0], heads[1], mask, bias, rotation, padding, seed
        ),
        st.integers(1, 3),
        st.sampled_from([(2, 2), (4, 2), (3, 1)]),
        st.sampled_from(["causal", "none", "window"]),
        st.sampled_from(["none", "t5", "t5 both ways", "alibi", "softcap"]),
        st.sampled_from(["none", "rope", "rope in halves", "xpos"]),
        st.sampled_from(padding),
        st.integers(0, 2**31),
    )


HISTORIES = st.lists(st.sampled_from(OPERATIONS), min_size=4, max_size=14)


@dataclasses.dataclass
class Row:
    """All tokens of one sequence, as they are before any rotation."""

    query: Tensor
    key: Tensor
    value: Tensor
    padding: Tensor

    @property
    def length(self) -> int:
        return self.key.shape[1]

    def cut(self, length: int) -> "Row":
        parts = (self.query[:, :length], self.key[:, :length], self.value[:, :length])
        return Row(*parts, self.padding[:length])

    def extended(self, new: "Row") -> "Row":
        parts = [
            torch.cat(pair, dim=1)
            for pair in (
                (self.query, new.query),
                (self.key, new.key),
                (self.value, new.value),
            )
        ]
        return Row(*parts, torch.cat((self.padding, new.padding)))


Ledger = list[Row]


class History:
    """One cache, one ledger, and the attention that is done with both."""

    def __init__(
        self,
        setting: Setting,
        make: Callable[[], DecodingCache],
        *,
        mask: masks.Mask | None = None,
        keep: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        drops_trailing_padding: bool = False,
    ) -> None:
        """
        Args:
            setting: Of the attention.
            make: Makes an empty cache.
            mask: What the cache itself hides.
            keep: What becomes of a key or a value in the cache.
            drops_trailing_padding: Whether the cache takes no slots for it.
        """
        self.setting, self.make, self.kept_mask, self.keep = setting, make, mask, keep
        self.drops = drops_trailing_padding
        self.cache = make()
        self.ledger: Ledger = []
        self.forks: list[Ledger] = []
        self.random = random.Random(setting.seed)
        self.generator = torch.Generator().manual_seed(setting.seed)
        self.table = self.normal(8, setting.heads)
        self.steps = 0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    @property
    def length(self) -> int:
        return max((row.length for row in self.ledger), default=0)

    def bias(self) -> biases.Bias | None:
        kind = self.setting.bias
        if kind == "alibi":
            return biases.Alibi(self.table[0].abs())
        if kind == "softcap":
            return biases.Softcap(2.0)
        if kind == "none":
            return None
        return biases.Bucketed(self.table, bidirectional=kind.endswith("ways"), max_distance=7)

    def rotated(self, x: Tensor, positions: Tensor, *, sign: int) -> Tensor:
        """Queries (sign 1) or keys (sign -1) ``(B, H, N, D)`` at positions ``(1 or B, N)``."""
        kind = self.setting.rotation
        if kind == "none":
            return x
        at = positions[:, None]
        cos, sin = rotary_tables(at, HEAD_DIM, dtype=torch.float64)
        if kind == "xpos":
            scale = xpos_scale(at * sign, HEAD_DIM, scale_base=16, dtype=torch.float64)
            return rotate(x, cos * scale, sin * scale)
        return rotate(x, cos, sin, interleaved=kind == "rope")

    def new_padding(self, batch: int, added: int) -> Tensor | None:
        kind = self.setting.padding
        if kind == "none" or (kind == "left" and self.length):
            return None
        padding = torch.zeros(batch, added, dtype=torch.bool)
        for row in padding:
            count = self.random.randint(0, added)
            if kind == "right":
                row[added - count :] = True
            elif kind == "left":
                row[:count] = True
            else:
                row[self.random.sample(range(added), count)] = True
        if kind == "float":
            return torch.where(padding, self.normal(batch, added), 0.0)
        return padding

    def update(self, added: int) -> None:
        setting = self.setting
        batch = len(self.ledger) or setting.batch
        query = self.normal(batch, setting.heads, added, HEAD_DIM)
        key = self.normal(batch, setting.key_heads, added, HEAD_DIM)
        value = self.normal(batch, setting.key_heads, added, VALUE_DIM)
        padding = self.new_padding(batch, added)
        positions = self.cache.next_positions(added, query.device)
        rotated = self.rotated(key, positions, sign=-1)
        before = snapshot(self.cache)
        try:
            cached = self.cache.update(rotated, value, padding)
        except CacheFullError:
            assert same(before, snapshot(self.cache))
            return
        self.ledger = self.ledger or [
            Row(query[b, :, :0], key[b, :, :0], value[b, :, :0], key.new_zeros(0, dtype=torch.bool))
            for b in range(batch)
        ]
        marks = torch.zeros(batch, added, dtype=torch.bool) if padding is None else padding
        counts = [added] * batch
        if self.drops and padding is not None:
            counts = [int((~row).nonzero().max()) + 1 if (~row).any() else 0 for row in marks]
        for b, count in enumerate(counts):
            new = Row(query[b], key[b], value[b], marks[b]).cut(count)
            self.ledger[b] = self.ledger[b].extended(new)
        out = self.attend(self.rotated(query, positions, sign=1), cached)
        for b, (row, count) in enumerate(zip(self.ledger, counts, strict=True)):
            if count:
                expected = self.full(row)[:, row.length - count :]
                self.compare(out[b, :, :count], expected, query, cached)
        self.steps += 1

    def attend(self, query: Tensor, cached: Cached) -> Tensor:
        mask, bias = self.mask_and_bias(cached.padding)
        if cached.mask is not None:
            mask = cached.mask if mask is None else mask & cached.mask
        return zeta.attention(
            query,
            cached.key,
            cached.value,
            mask=mask,
            bias=bias,
            backend="reference",
            query_positions=cached.query_positions,
            key_positions=cached.positions,
        )

    def mask_and_bias(self, padding: Tensor | None) -> tuple[masks.Mask | None, biases.Bias | None]:
        kind = {"causal": masks.Causal(), "window": masks.SlidingWindow(3), "none": None}
        mask: masks.Mask | None = kind[self.setting.mask]
        bias = self.bias()
        if padding is not None and padding.dtype == torch.bool:
            hidden = masks.drop(padding[:, None, None])
            mask = hidden if mask is None else mask & hidden
        elif padding is not None:
            added = biases.Dense(padding[:, None, None])
            bias = added if bias is None else bias + added
        return mask, bias

    def full(self, row: Row) -> Tensor:
        """The whole sequence at once: ``(H, L, Dv)``."""
        positions = torch.arange(row.length)[None]
        mask, bias = self.mask_and_bias(row.padding[None])
        if self.kept_mask is not None:
            mask = self.kept_mask if mask is None else mask & self.kept_mask
        return zeta.attention(
            self.rotated(row.query[None], positions, sign=1),
            self.keep(self.rotated(row.key[None], positions, sign=-1)),
            self.keep(row.value[None]),
            mask=mask,
            bias=bias,
            backend="reference",
        )[0]

    def compare(self, found: Tensor, expected: Tensor, query: Tensor, cached: Cached) -> None:
        error = (found - expected).abs().max()
        assert error <= TOLERANCE, f"step {self.steps}: off by {error:.1e}"

    def rows(self, count: int) -> Tensor:
        batch = len(self.ledger)
        return torch.tensor([self.random.randrange(batch) for _ in range(count)])

    def perform(self, operation: str) -> None:
        """Do one operation, or see it refused."""
        cache = self.cache
        if operation in ("one", "chunk", "long"):
            self.update({"one": 1, "chunk": self.random.randint(2, 5), "long": 11}[operation])
        elif operation in ("reorder", "select") and self.ledger:
            count = len(self.ledger) if operation == "reorder" else self.random.randint(1, 4)
            index = self.rows(count)
            getattr(cache, operation)(index)
            self.ledger = [self.ledger[b] for b in index.tolist()]
        elif operation == "crop":
            self.crop(self.random.randint(0, self.length))
        elif operation == "fork":
            cache.fork()
            self.forks.append(list(self.ledger))
        elif operation in ("commit", "rollback"):
            self.close(operation)
        elif operation == "reload":
            self.reload()
        elif operation == "reset":
            cache.reset()
            self.ledger, self.forks = [], []
        assert self.cache.length == self.length

    def reload(self) -> None:
        new, state = self.make(), copy.deepcopy(self.cache.state_dict())
        try:
            new.load_state_dict(state)
        except CacheFullError:
            assert new.length == 0
            return
        assert same(state, new.state_dict())
        self.cache.reset()
        self.cache, self.forks = new, []

    def crop(self, length: int) -> None:
        before = snapshot(self.cache)
        words = refusal(lambda: self.cache.crop(length))
        if words:
            assert "not there any more" in words
            assert same(before, snapshot(self.cache))
        else:
            self.ledger = [row.cut(length) for row in self.ledger]

    def close(self, operation: str) -> None:
        words = refusal(getattr(self.cache, operation))
        if not self.forks:
            assert "needs an open fork" in words
            return
        assert not words
        kept = self.forks.pop()
        if operation == "rollback":
            self.ledger = kept


def refusal(act: Callable[[], object]) -> str:
    """The words of the ValueError that it raises; none if it does not."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def snapshot(cache: DecodingCache) -> dict[str, Any]:
    return cache.state_dict()


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two state dicts hold the same."""
    if first.keys() != second.keys():
        return False
    for name, one in first.items():
        other = second[name]
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.dtype != other.dtype or not torch.equal(one, other):
                return False
        elif isinstance(one, Tensor) or isinstance(other, Tensor) or one != other:
            return False
    return True
