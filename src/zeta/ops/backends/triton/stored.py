"""A step of decoding over keys and values as a cache stores them: in pages.

Each is read once, where it lies; nothing as large as they are is made.
"""

import triton.language as tl
from torch import Tensor

from zeta.ops.backends.triton import passes
from zeta.ops.backends.triton.arguments import Fixed
from zeta.ops.backends.triton.kernels.operands import PageTable
from zeta.ops.call import AttentionCall
from zeta.ops.reading import lower_pages
from zeta.stored import Pages, StoredTensor


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention ``(B, H, T, Dv)`` and its log-sum-exp ``(B, H, T)`` in float32.

    Raises:
        RuntimeError: What is stored was written over.
    """
    assert isinstance(call.key, StoredTensor)
    store, first = call.key.store, call.key.first
    assert isinstance(store, Pages)
    call.key.check()
    lowered = lower_pages(call, store)
    table = PageTable(store.table, store.table.stride(0), first, tl.constexpr(store.key.shape[2]))
    found = passes.over_pages(
        call.query, call.key, (store.key, store.value), table, lowered.offsets, lowered.dense,
        Fixed(*lowered.fixed()),
    )  # fmt: skip
    call.key.check()
    return found
