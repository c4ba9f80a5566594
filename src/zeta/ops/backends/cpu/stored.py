"""A step of decoding over keys and values as a cache stores them: in pages, or in codes of 8 bits.

Each is read once, where it lies; nothing as large as they are is made.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D head
dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zeta.ops.backends import cpu
from zeta.ops.backends.cpu import library
from zeta.ops.backends.cpu.description import Filled, Fixed, describe, describe_scores
from zeta.ops.backends.cpu.layout import Part
from zeta.ops.buffers import empty_rows, rows
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import Lowered, lower
from zeta.ops.reading import NO_STORE, lower_pages, reasons_of_tensors, store_of
from zeta.stored import Codes, Pages, StoredTensor

_SOURCE = Part("source")
_PAGES = Part("page_table", "pages_per_row")
_FACTORS = Part("key_factor", "factor_head")
_OUT = Part("out", "lse")

MAX_QUERIES = 16
"""Of a key head. Of more it was not measured."""


def unreadable(call: AttentionCall) -> list[str]:
    """Why the keys and values of a call cannot be read from their store; empty if they can."""
    store = store_of(call)
    if store is None:
        return [NO_STORE]
    reasons = cpu.unsupported(call) + reasons_of_tensors(call, store, MAX_QUERIES)
    if isinstance(store, Codes) and (
        store.key_steps.stride() != store.value_steps.stride() or store.key_steps.stride(2) != 1
    ):
        reasons.append("the steps of its keys and values lie differently")
    return reasons


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention ``(B, H, T, Dv)`` and its log-sum-exp ``(B, H, T)`` in float32.

    `unreadable` must be empty.

    Raises:
        RuntimeError: What is stored was written over.
    """
    assert isinstance(call.key, StoredTensor)
    store, first = call.key.store, call.key.first
    call.key.check()
    if isinstance(store, Pages):
        found = _over_pages(call, store, first)
    else:
        keys = slice(first, first + call.source)
        found = _over_codes(call, Codes(*(part[:, :, keys] for part in store)))
    call.key.check()
    return found


def _over_pages(call: AttentionCall, store: Pages, first: int) -> tuple[Tensor, Tensor]:
    lowered = lower_pages(call, store)
    page_size = store.key.shape[2]
    page, before = divmod(first, page_size)
    if before:
        lowered = _after_others(lowered, call, before)
    query, fixed = rows(call.query), _fixed(lowered)
    record = describe(query, store.key, store.value, fixed)
    _SOURCE.write(record, before + call.source)
    table = store.table.data_ptr() + page * store.table.itemsize
    _PAGES.write(record, table, page_size, store.table.shape[1])
    return _decoded(record, query, store.value.shape[3], lowered, fixed)


def _after_others(lowered: Lowered, call: AttentionCall, before: int) -> Lowered:
    """The same where the first page begins with other tokens, which count as empty slots."""
    queries, keys = lowered.query_positions, lowered.key_positions
    if queries is None or keys is None:
        first = call.source - call.target
        device = call.query.device
        queries = torch.arange(first, call.source, dtype=torch.int32, device=device)[None]
        keys = torch.arange(call.source, dtype=torch.int32, device=device)[None]
    return lowered._replace(
        query_positions=queries,
        key_positions=F.pad(keys, (before, 0), value=-1),
        document_columns_BS=_padded(lowered.document_columns_BS, before),
        keep=_padded(lowered.keep, before),
        dense=_padded(lowered.dense, before),
    )


def _padded(tensor: Tensor | None, before: int) -> Tensor | None:
    """With so many columns more in front, unless it is the same for all."""
    return tensor if tensor is None or tensor.shape[-1] == 1 else F.pad(tensor, (before, 0))


def _over_codes(call: AttentionCall, store: Codes) -> tuple[Tensor, Tensor]:
    """A product with ``step * (codes + middle)`` is one with codes and digits, times the step."""
    digits = store.key.shape[3] - call.head_dim
    wide = call.query.float()
    powers = wide.new_tensor([256.0**place for place in range(digits)])
    query = torch.cat((wide, wide.sum(-1, keepdim=True) * powers), dim=-1)
    lowered = lower(call)
    fixed = _fixed(lowered)
    record = describe(query, store.key, store.value, fixed)
    steps = store.key_steps, store.value_steps
    _FACTORS.write(record, *(step.data_ptr() for step in steps), *store.key_steps.stride()[:2])
    out, lse = _decoded(record, query, store.value.shape[3], lowered, fixed)
    codes, middle = out.split((store.value.shape[3] - digits, digits), dim=-1)
    return (codes + (middle * powers).sum(-1, keepdim=True)).to(call.query.dtype), lse


def _fixed(lowered: Lowered) -> Fixed:
    return Fixed(*lowered.fixed(), False)


def _decoded(
    record: Filled, query: Tensor, width: int, lowered: Lowered, fixed: Fixed
) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, T, width)`` and log-sum-exp of a record that has its operands."""
    kept = describe_scores(record, lowered.offsets, lowered.dense, fixed)
    out = empty_rows(query, width)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    _OUT.write(record, out.data_ptr(), *out.stride()[:3], lse.data_ptr())
    answer = library.load().decode(record)
    del kept
    library.check(answer)
    return out, lse
