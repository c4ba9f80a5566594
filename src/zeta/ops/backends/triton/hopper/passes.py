"""Forward and backward passes on Hopper: outputs are allocated, kernels launched."""

import torch
import torch.nn.functional as F
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from zeta.ops.backends.triton.arguments import begun, cdiv, launch, rows_operand, spread
from zeta.ops.backends.triton.hopper import fetchable
from zeta.ops.backends.triton.kernels.hopper.backward import inputs_kernel
from zeta.ops.backends.triton.kernels.hopper.forward import forward_kernel
from zeta.ops.backends.triton.kernels.operands import Rows, Score, Sizes, Turns
from zeta.ops.backends.triton.prepared import Backward
from zeta.ops.buffers import empty_rows

KEYS, PART = 128, 64
"""Keys of a program, and of each of its two groups of warps."""
QUERIES = 128
"""Queries of a program in the forward pass."""
ROWS = {64: 128, 128: 64}
"""Query rows of a tile, by the padded width of a head."""
STAGES = 2
FORWARD_TILES = {64: (128, 4), 128: (128, 2)}
"""Keys of a tile, and stages, in the forward pass."""
PROGRAMS = 132
"""About how many programs run at once: the multiprocessors of the device."""

IN_HALF = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
IN_FULL = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
IN_A_ROW = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    results: tuple[Rows, Tensor, Tensor],
    score: Score,
    sizes: Sizes,
) -> None:
    """Writes the output, lse and statistics."""
    width = query.shape[-1]
    padded = _padded(width)
    columns, stages = FORWARD_TILES[padded]
    programs = cdiv(sizes.queries, QUERIES) * sizes.batch * sizes.heads
    dropout = score.dropout
    hashes = None if dropout is None else _numbers(dropout.columns, columns, 0)
    launch(
        forward_kernel, (programs,), _tiles(query, QUERIES, padded),
        _tiles(key, columns, padded), _tiles(value, columns, padded), hashes, *results,
        spread(begun(score), sizes, PART, columns), sizes, WIDTH=width, BLOCK_D=padded,
        BLOCK_N=columns, STAGES=stages, EVEN=sizes.keys % columns == 0, num_warps=4,
    )  # fmt: skip


def inputs_gradient(
    given: Backward, wanted: tuple[bool, bool]
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Gradients of query, key and value, each laid out as what it belongs to; and, where wanted,
    each key's sums ``(B, H, S)`` of dS beyond the reach on the left. Those on the right only a soft
    cap wants.
    """
    sizes, width = given.sizes, given.query.shape[-1]
    padded = _padded(width)
    rows = ROWS[padded]
    dkey, dvalue = (empty_rows(tensor, width) for tensor in (given.key, given.value))
    dquery = empty_rows(given.query, width)
    left_BHS = None
    if wanted[0]:
        # Of keys that are padding nothing is written.
        make = given.delta.new_empty if given.score.padding is None else given.delta.new_zeros
        left_BHS = make((sizes.batch, sizes.heads, sizes.keys))
    num_tiles = cdiv(sizes.keys, KEYS)
    programs = num_tiles * sizes.batch * given.key.shape[1]
    made, turns = _turns(given, programs)
    dropout = given.score.dropout
    hashes = None if dropout is None else _numbers(dropout.rows, rows, 0)
    launch(
        inputs_kernel, (programs,), _tiles(given.query, rows, padded),
        _tiles(given.key, KEYS, padded), _tiles(given.value, KEYS, padded),
        _tiles(fetchable(given.dout), rows, padded), _numbers(given.statistics, rows, float("inf")),
        _numbers(given.delta, rows, 0.0), hashes, rows_operand(dkey), rows_operand(dvalue),
        left_BHS, _sums(made, given.query, rows, padded), turns,
        spread(begun(given.score), sizes, rows, PART, key_major=True), sizes,
        _heads_at_once(sizes.queries, rows), WIDTH=width, BLOCK_D=padded, BLOCK_M=rows,
        STAGES=STAGES, WHOLE=given.score.padding is None and sizes.keys % KEYS == 0, num_warps=4,
    )  # fmt: skip
    # One pass: the product is rounded as it is written.
    sums = made.as_strided(dquery.shape, _dense_strides(dquery))
    torch.mul(sums, given.score.slope / given.keep, out=dquery)
    return (dquery, dkey, dvalue), (left_BHS, None)


def _padded(width: int) -> int:
    return 64 if width <= 64 else 128


def _heads_at_once(queries: int, rows: int) -> int:
    """Of how many heads the programs begin together: with more, fewer of one head wait for each
    other at first; with fewer, more of them read what others have just read.
    """
    of_one_head = min(max(queries // rows // 8, 1), 8)
    return cdiv(PROGRAMS, of_one_head)


def _tiles(tensor: Tensor, rows: int, padded: int) -> TensorDescriptor:
    """A ``(B, H, rows, D)`` tensor as the copy engine reads it, a tile of a head at a time."""
    return TensorDescriptor.from_tensor(tensor, [1, 1, rows, padded], IN_HALF)


def _numbers(tensor: Tensor, rows: int, missing: float) -> TensorDescriptor:
    """A number for each row of each plane, ``(..., T)`` and dense; past the last row, `missing`."""
    beyond = -tensor.shape[-1] % rows
    padded = F.pad(tensor, (0, beyond), value=missing) if beyond else tensor
    length = padded.shape[-1]
    # Of the planes as one dimension: no tensor is made for it.
    shape = [padded.numel() // length, length]
    return TensorDescriptor(padded, shape, [length, 1], [1, rows], IN_A_ROW)


def _turns(given: Backward, programs: int) -> tuple[Tensor, Turns]:
    """Sums of the queries' gradient, and behind them who adds to them when: one tensor of zeros."""
    size = given.query.numel()
    made = given.delta.new_zeros(size + 1 + programs)
    return made, Turns(made[size:].view(torch.int32))


def _sums(made: Tensor, query: Tensor, rows: int, padded: int) -> TensorDescriptor:
    """The sums, as many as queries, to which the copy engine adds tiles of a head."""
    batch, heads, queries, width = query.shape
    shape = [batch * heads, queries, width]
    return TensorDescriptor(made, shape, [queries * width, width, 1], [1, rows, padded], IN_FULL)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    _, heads, length, width = tensor.shape
    return heads * length * width, length * width, width, 1
