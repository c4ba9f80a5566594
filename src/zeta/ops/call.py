"""`AttentionCall`: one checked, frozen description of a call, handed to every backend.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D head
dimension.
"""

import contextlib
import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from zeta.biases import Bias
from zeta.masks import Mask
from zeta.ops.precision import Precision, check_precision
from zeta.values import (
    ALL,
    Tile,
    check_device,
    check_finite,
    check_floating,
    check_integer,
    check_positions_shape,
    check_probability,
    check_tensor,
    kind,
    python_number,
    wide_dtype,
)

Result = Literal["output", "lse", "weights", "mean_weights"]
"""What is asked for: the output, also its log-sum-exp, weights, or their average over heads."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class BackendUnsupported(RuntimeError):  # noqa: N818 - a public name, fixed by the interface
    """A named backend cannot do a call. The message lists the inputs and every reason."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """Everything a backend needs to know. Made by `checked`.

    Attributes:
        query: ``(B, H, T, D)``.
        key: ``(B, G, S, D)``; query head ``h`` reads key head ``h // (H / G)``.
        value: ``(B, G, S, Dv)``.
        mask, bias: What the scores go through, or None.
        dropout_p: Probability that a weight is dropped.
        scale: Factor of ``query . key``, a number.
        seed: 0-d int64 on the query's device when ``dropout_p > 0``.
        query_positions: ``(1 or B, T)`` int64, or None: the last ``T`` of ``S``.
        key_positions: ``(1 or B, S)`` int64, or None: ``0 .. S - 1``. Negative: an empty slot,
            hidden.
        sinks: ``(H,)``, scores that take their share of the softmax, or None. No backend sees
            them: `zeta.ops.sinks` makes up for them.
        result: What is asked for.
        precision: Of products of float32, or None: what `set_float32_precision` says.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None = None
    bias: Bias | None = None
    dropout_p: float = 0.0
    scale: float = 1.0
    seed: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    sinks: Tensor | None = None
    result: Result = "output"
    precision: Precision | None = None

    @classmethod
    def checked(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = None,
        bias: Bias | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        seed: int | Tensor | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        sinks: Tensor | None = None,
        result: Result = "output",
        precision: Precision | None = None,
    ) -> "AttentionCall":
        """Check the arguments of the public functions against each other, and fill in defaults.

        Under ``torch.autocast`` query, key and value are cast as for torch's own attention.

        Raises:
            ValueError: A shape, a device or a range is wrong.
            TypeError: A type or a dtype is wrong.
        """
        query, key, value = _operands(query, key, value)
        batch, heads, target, head_dim = query.shape
        source = key.shape[2]
        if mask is not None:
            if not isinstance(mask, Mask):
                raise TypeError(
                    f"mask must be a zeta.masks value such as masks.keep(t); got {kind(mask)}"
                )
            mask.check(batch, heads, target, source, query.device)
        if bias is not None:
            if not isinstance(bias, Bias):
                raise TypeError(
                    f"bias must be a zeta.biases value such as biases.Dense(t); got {kind(bias)}"
                )
            bias.check(batch, heads, target, source, query.device)
        if precision is not None:
            check_precision(precision)
        check_probability("dropout_p", dropout_p)
        if scale is not None:
            check_finite("scale", scale)
        if sinks is not None:
            _check_sinks(sinks, heads, query.device)
        return cls(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            dropout_p=python_number(dropout_p),
            scale=1.0 / math.sqrt(head_dim) if scale is None else python_number(scale),
            seed=_seed(seed, query.device) if dropout_p else None,
            query_positions=_positions(
                "query_positions", query_positions, batch, target, query.device
            ),
            key_positions=_positions("key_positions", key_positions, batch, source, query.device),
            sinks=sinks,
            result=result,
            precision=precision,
        )

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @property
    def target(self) -> int:
        return self.query.shape[2]

    @property
    def source(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def has_positions(self) -> bool:
        """Whether positions are given: a query or a key may stand anywhere."""
        return self.query_positions is not None or self.key_positions is not None

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of scores, softmax and sums: float32, or float64 for float64 inputs."""
        return wide_dtype(self.query.dtype)

    def tile(
        self,
        batches: slice | None = None,
        heads: slice | None = None,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> Tile:
        """The coordinates of a block of the scores, of steps of 1 inside them; the whole by
        default.
        """
        # Not as defaults of the arguments: torch 2.11 cannot trace a slice among those.
        batches, heads = batches or ALL, heads or ALL
        rows, columns = rows or ALL, columns or ALL
        device = self.query.device
        queries, keys = self.query_positions, self.key_positions
        if queries is None:
            first, last = _ends(rows, self.target)
            shift = self.source - self.target
            query_position = torch.arange(first + shift, last + shift, device=device).view(
                1, 1, -1, 1
            )
        else:
            query_position = queries[batches if queries.shape[0] > 1 else ALL, None, rows, None]
        if keys is None:
            first, last = _ends(columns, self.source)
            key_position = torch.arange(first, last, device=device).view(1, 1, 1, -1)
        else:
            key_position = keys[batches if keys.shape[0] > 1 else ALL, None, None, columns]
        return Tile(query_position, key_position, batches, heads, rows, columns)

    def visible(self, tile: Tile) -> Tensor | None:
        """Bool, broadcastable to the tile's scores, True: seen; or None, nothing is hidden."""
        seen = None if self.mask is None else self.mask.visible(tile)
        if self.key_positions is None:
            return seen
        filled = tile.key_position >= 0
        return filled if seen is None else seen & filled

    def of_weights(self, *, mean: bool) -> "AttentionCall":
        """The call of its weights before dropout, or of their average over heads.

        Without the values, which nobody reads, and which lazy weights would keep alive.
        """
        result: Result = "mean_weights" if mean else "weights"
        return dataclasses.replace(self, value=self.key, dropout_p=0.0, seed=None, result=result)

    def tensors(self) -> list[Tensor]:
        """Everything it computes with."""
        own = (self.seed, self.query_positions, self.key_positions, self.sinks)
        values = (value for value in (self.bias, self.mask) if value is not None)
        found = [self.query, self.key, self.value, *(t for t in own if t is not None)]
        return found + [tensor for value in values for tensor in value.tensors()]

    def describe(self) -> str:
        """One line for messages."""
        q, k, v = (f"{tuple(t.shape)}" for t in (self.query, self.key, self.value))
        parts = [f"query {q}, key {k}, value {v}", f"{self.query.dtype} on {self.query.device}"]
        if self.mask is not None:
            parts.append(f"mask {_name(self.mask)}")
        if self.bias is not None:
            parts.append(f"bias {_name(self.bias)}")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p}")
        if self.sinks is not None:
            parts.append("sinks")
        if self.result != "output":
            parts.append(f"result {self.result}")
        return ", ".join(parts)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """For the inside of a call, whose precision is settled by its dtype."""
    if _autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _autocasts(device: torch.device) -> bool:
    # `torch.amp.is_autocast_available` would say so too, but torch 2.11 cannot trace it.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, cast as autocast asks and checked against each other."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
    query, key, value = _narrowed(query, key, value)
    _check_operands(query, key, value)
    return query, key, value


def _narrowed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not _autocasts(query.device) or torch.float64 in (query.dtype, key.dtype, value.dtype):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _ends(part: slice, length: int) -> tuple[int, int]:
    # `slice.indices` would bind a compiled function to this length, and torch 2.11 cannot trace it.
    return part.start or 0, length if part.stop is None else part.stop


def _name(value: Mask | Bias) -> str:
    terms = getattr(value, "terms", ())
    inner = ", ".join(_name(term) for term in terms)
    return f"{type(value).__name__}({inner})" if terms else type(value).__name__


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, heads, length, head_dim); got {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must have the query's dtype and device, {query.dtype} on {query.device}; "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if query.dtype not in _DTYPES:
        raise TypeError(f"query must be float16, bfloat16, float32 or float64; got {kind(query)}")
    q, k, v = query.shape, key.shape, value.shape
    if k[0] != q[0] or v[0] != q[0]:
        raise ValueError(
            f"query, key and value must have one batch size; got {q[0]}, {k[0]} and {v[0]}"
        )
    if k[1] != v[1] or k[2] != v[2]:
        raise ValueError(
            f"key and value must have the same heads and length; got {tuple(k)} and {tuple(v)}"
        )
    if k[3] != q[3]:
        raise ValueError(f"query and key must have the same head_dim; got {q[3]} and {k[3]}")
    if k[1] == 0 or q[1] % k[1]:
        raise ValueError(
            f"the query's heads must be a multiple of the key's; got {q[1]} and {k[1]}"
        )
    if 0 in q or 0 in v:
        raise ValueError(f"no dimension may be empty; got query {tuple(q)} and value {tuple(v)}")


def _check_sinks(sinks: Tensor, heads: int, device: torch.device) -> None:
    check_floating("sinks", sinks)
    if sinks.shape != (heads,):
        raise ValueError(
            f"sinks must have shape ({heads},), a score for each head; got {tuple(sinks.shape)}"
        )
    check_device("sinks", sinks, device)


def drawn_seed(device: torch.device) -> Tensor:
    """A fresh one from torch's generator."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return drawn_seed(device)
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise ValueError(
                f"seed must be an int or a 0-d int64 tensor; got {seed.dtype} {tuple(seed.shape)}"
            )
        return seed.to(device)
    check_integer("seed", seed)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be in [-2**63, 2**63), as int64; got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)


def _positions(
    name: str, positions: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor | None:
    if positions is None:
        return None
    check_tensor(name, positions)
    if positions.dtype != torch.int64 or positions.device != device:
        raise ValueError(
            f"{name} must be int64 on {device}; got {positions.dtype} on {positions.device}"
        )
    check_positions_shape(name, positions.shape, batch, length)
    return positions[None] if positions.dim() == 1 else positions
