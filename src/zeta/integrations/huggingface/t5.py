"""T5's relative position bias as its table, in place of the ``(1, heads, T, S)`` tensor of it.

T5's attention makes that tensor in its first layer unless it is given one, and hands it to the
layers after it; cross-attention makes one of zeros. A wrapped ``forward`` gives it a `TableBias`.

Shape suffixes: B batch, H heads, T target length, S source length, D head dimension.
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zeta.biases import Bucketed
from zeta.nn.biases import table_of

CLASSES = {"T5Attention": "transformers.models.t5.modeling_t5"}
CLASSES |= {"MT5Attention": "transformers.models.mt5.modeling_mt5"}


@dataclasses.dataclass(frozen=True, slots=True)
class TableBias:
    """What takes the place of the tensor.

    Attributes:
        value: The bias, or None: there is none.
        past: Tokens before the first query: an int, or a 0-d tensor where a static cache counts.
    """

    value: Bucketed | None
    past: int | Tensor = 0

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "TableBias":
        """On another device; Accelerate asks for it where layers lie on several."""
        value, past = self.value, self.past
        if value is not None:
            table = value.table.to(device, non_blocking=non_blocking)
            value = dataclasses.replace(value, table=table)
        if isinstance(past, Tensor):
            past = past.to(device, non_blocking=non_blocking)
        return TableBias(value, past)

    def query_positions(self, query_BHTD: Tensor, key_BHSD: Tensor) -> Tensor | None:
        """``(T,)`` where the queries are not the last of the keys; otherwise None."""
        target, source = query_BHTD.shape[2], key_BHSD.shape[2]
        if self.value is None:
            return None
        if not isinstance(self.past, Tensor) and self.past + target == source:
            return None
        return torch.arange(target, device=query_BHTD.device) + self.past


def has_no_bias(module: Any) -> bool:
    """Whether the tensor that a module was given is zeros: in T5's cross-attention."""
    return type(module).__name__ in CLASSES and module.is_decoder and not module.is_causal


def wrap(name: str) -> None:
    """Give the attention of T5 its table, in models whose attention implementation is ``name``."""
    for kind in _classes():
        if not hasattr(kind.forward, "without_table"):
            kind.forward = _with_table(kind.forward, name)


def unwrap() -> None:
    """Undo `wrap`."""
    for kind in _classes(imported=True):
        kind.forward = getattr(kind.forward, "without_table", kind.forward)


def _classes(*, imported: bool = False) -> list[Any]:
    """The classes; only those that something has imported, if so asked."""
    return [
        getattr(importlib.import_module(path), name)
        for name, path in CLASSES.items()
        if not imported or path in sys.modules
    ]


def _with_table(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(forward)
    def with_table(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | TableBias | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if position_bias is None and self.config._attn_implementation == name:
            position_bias = _table_bias(self, past_key_values, hidden_states.device)
        return forward(
            self, hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs
        )

    with_table.without_table = forward  # type: ignore[attr-defined]  # how `unwrap` knows it
    return with_table


def _table_bias(module: Any, cache: Any, device: torch.device) -> TableBias:
    if not module.has_relative_attention_bias:
        return TableBias(None)
    past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
    num_buckets = module.relative_attention_num_buckets
    value = Bucketed(
        table_of(module.relative_attention_bias, num_buckets, device),
        bidirectional=not module.is_decoder,
        max_distance=module.relative_attention_max_distance,
    )
    # A static cache adds to its tensor in place.
    return TableBias(value, past.clone() if isinstance(past, Tensor) else past)
