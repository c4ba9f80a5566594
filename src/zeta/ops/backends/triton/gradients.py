"""Backward passes: outputs are allocated, kernels launched.

Shape suffixes: B batch, H query heads, T target length, S source length.
"""

import torch
from torch import Tensor

from zeta.ops.backends.triton import hopper
from zeta.ops.backends.triton.arguments import (
    Fixed,
    begun,
    can_begin,
    cdiv,
    given_rows,
    is_exact,
    launch,
    plane_operand,
    power_of_two,
    rows_operand,
    score_operand,
    sizes_of,
    spread,
    spread_from,
)
from zeta.ops.backends.triton.kernels.backward import keys_kernel, queries_kernel
from zeta.ops.backends.triton.kernels.bias_gradient import (
    band_kernel,
    dense_kernel,
    diagonals_kernel,
    ends_kernel,
)
from zeta.ops.backends.triton.kernels.gradients import delta_kernel, row_sums_kernel
from zeta.ops.backends.triton.kernels.operands import Score, Sizes
from zeta.ops.backends.triton.prepared import Backward
from zeta.ops.buffers import empty_rows, rows

BAND_PROGRAMS = 528
"""About how many programs share the band: a constant, so that the order of a sum is one too."""
DELTA_ROWS = 64
DIAGONAL_BLOCK, ENDS_BLOCK = 32, 1024


def of_output(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    offsets: Tensor | None,
    dense: Tensor | None,
    fixed: Fixed,
) -> Backward:
    """Prepares that of `passes.forward`; ``inputs`` are query, key, value, out, statistics."""
    query, key, value, out, dout = (rows(tensor) for tensor in (*inputs[:4], dout))
    statistics = inputs[4].contiguous()  # Who saved it may have packed it otherwise.
    sizes = sizes_of(query, key)
    score = score_operand(query, key, offsets, dense, fixed)
    delta = statistics.new_empty(statistics.shape[1:])
    given = Backward(query, key, value, dout, None, statistics, delta, score, sizes, fixed)
    if dlse is not None:
        dlse = torch.where(statistics[0] == float("inf"), 0.0, dlse).contiguous()
        given.total_H = dlse.sum((0, 2))
    if is_exact(query) or _reaches_all(score, sizes):
        _row_sums(given, dlse)
        return given
    width = value.shape[-1]
    launch(
        delta_kernel, (cdiv(sizes.queries, DELTA_ROWS) * sizes.batch * sizes.heads,),
        given_rows(out), given_rows(dout), dlse, delta, sizes, given.keep,
        VALUE_WIDTH=width, BLOCK_E=power_of_two(width), BLOCK_M=DELTA_ROWS,
    )  # fmt: skip
    return given


def _reaches_all(score: Score, sizes: Sizes) -> bool:
    """Whether there is a bias of all offsets, as learned slopes make one: its gradient goes into
    sums with distances for factors, which make larger what a rounded output does to delta.
    """
    return score.offsets is not None and score.offsets.reach + 1 >= max(sizes.queries, sizes.keys)


def of_weights(
    dweights: Tensor,
    query: Tensor,
    key: Tensor,
    statistics: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    fixed: Fixed,
) -> Backward:
    """Prepares that of `passes.weights`."""
    query, key, statistics = rows(query), rows(key), statistics.contiguous()
    sizes = sizes_of(query, key)
    if dweights.dim() == 3:
        dweights = (dweights.float() / sizes.heads).unsqueeze(1)
    score = score_operand(query, key, offsets, dense, fixed)
    delta = statistics.new_empty(statistics.shape[1:])
    given = Backward(query, key, key, query, dweights, statistics, delta, score, sizes, fixed)
    _row_sums(given, None)
    return given


def _row_sums(given: Backward, dlse: Tensor | None) -> None:
    """Writes delta from the weights and their gradient."""
    sizes, constants = given.sizes, given.constants("queries")
    *operands, delta = given.operands()
    launch(
        row_sums_kernel,
        (cdiv(sizes.queries, constants["BLOCK_M"]) * sizes.batch * sizes.heads,),
        *operands, dlse, delta,
        spread(given.score, sizes, constants["BLOCK_M"], constants["BLOCK_N"]), sizes,
        **constants,
    )  # fmt: skip


def keys_gradient(given: Backward) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values, each laid out as what it belongs to; of weights, the first."""
    sizes, constants = given.sizes, given.constants("keys")
    dkey = empty_rows(given.key, given.key.shape[-1])
    dvalue = dkey
    if given.dweights is None:
        dvalue = empty_rows(given.value, given.value.shape[-1])
    grid = (cdiv(sizes.keys, constants["BLOCK_N"]) * sizes.batch * given.key.shape[1],)
    launch(
        keys_kernel, grid, *given.operands(), rows_operand(dkey), rows_operand(dvalue),
        spread(given.score, sizes, constants["BLOCK_M"], constants["BLOCK_N"], key_major=True),
        sizes, EVEN=sizes.queries % constants["BLOCK_M"] == 0, **constants,
    )  # fmt: skip
    return dkey, dvalue


def queries_gradient(
    given: Backward, wanted: tuple[bool, bool]
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Gradient of queries; where wanted, each row's sums ``(B, H, T)`` of dS beyond the reach on
    each side.
    """
    sizes, constants = given.sizes, given.constants("queries")
    dquery = empty_rows(given.query, given.query.shape[-1])
    sums = [torch.empty_like(given.delta) if each else None for each in wanted]
    grid = (cdiv(sizes.queries, constants["BLOCK_M"]) * sizes.batch * sizes.heads,)
    launch(
        queries_kernel, grid, *given.operands(), rows_operand(dquery), *sums,
        spread(given.score, sizes, constants["BLOCK_M"], constants["BLOCK_N"]), sizes,
        EVEN=sizes.keys % constants["BLOCK_N"] == 0, **constants,
    )  # fmt: skip
    return dquery, (sums[0], sums[1])


def _far_sides(given: Backward) -> tuple[bool, bool]:
    """Whether there are offsets at or beyond the reach, left and right of the diagonal."""
    reach = given.score.offsets.reach
    return reach < given.sizes.keys, reach < given.sizes.queries and not given.fixed.causal


def _sums_are_known(given: Backward) -> bool:
    """Rows of dS sum to the gradient of lse, unless a soft cap stands between bias and softmax."""
    return given.fixed.softcap == 0.0 or given.fixed.softcap_first


def wanted_sums(given: Backward, needs_offsets: bool) -> tuple[bool, bool]:
    """Which far sums must be taken from dS itself: all but one, or all where rows' sums are
    unknown.
    """
    if not needs_offsets:
        return False, False
    left, right = _far_sides(given)
    if _sums_are_known(given):
        return left and right, False
    return left, right


def gradients(
    given: Backward, dense: Tensor | None, needs_offsets: bool, needs_dense: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of query, key, value, offset vector and dense bias; the last two where needed."""
    wanted = wanted_sums(given, needs_offsets)
    if given.dweights is None and hopper.takes(given.score, given.query, given.key, given.value):
        # Gluon is imported only where it serves.
        from zeta.ops.backends.triton.hopper import passes as on_hopper

        (dquery, dkey, dvalue), far = on_hopper.inputs_gradient(given, wanted)
    else:
        dkey, dvalue = keys_gradient(given)
        dquery, far = queries_gradient(given, wanted)
    doffsets = offsets_gradient(given, far) if needs_offsets else None
    ddense = dense_gradient(given, dense) if needs_dense and dense is not None else None
    return dquery, dkey, dvalue, doffsets, ddense


def offsets_gradient(given: Backward, far: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Gradient ``(H, 2 * reach + 1)`` of an offset vector, given the sums ``(B, H, length)`` beyond
    the reach, left and right.
    """
    sizes, constants = given.sizes, given.constants("band")
    reach = given.score.offsets.reach
    rows_, columns = constants["BLOCK_M"], constants["BLOCK_N"]
    # The offsets that the first diagonal of tiles begins with, and the last one ends with.
    last = 0 if given.fixed.causal else reach - 1
    num_diagonals = cdiv(last + reach - 1 + rows_, columns)
    work = cdiv(sizes.queries, rows_) * sizes.batch
    num_splits = max(1, min(work, cdiv(BAND_PROGRAMS, sizes.heads * num_diagonals)))
    tiles = given.delta.new_empty((sizes.heads, num_diagonals, num_splits, rows_, columns))
    score = begun(given.score) if can_begin(given.score) else given.score
    score = spread_from(score, sizes, (rows_, columns), 1 - reach, columns, num_diagonals)
    launch(
        band_kernel, (sizes.heads * num_diagonals * num_splits,), *given.operands(), tiles, score,
        sizes, num_diagonals, num_splits, **constants,
    )  # fmt: skip
    gradient = given.delta.new_empty((sizes.heads, 2 * reach + 1))
    launch(
        diagonals_kernel, (cdiv(2 * reach + 1, DIAGONAL_BLOCK), sizes.heads), tiles,
        gradient, reach, num_diagonals, num_splits, given.keep, BLOCK_M=rows_, BLOCK_N=columns,
        BLOCK=DIAGONAL_BLOCK,
    )  # fmt: skip
    left, right = _ends(given, far)
    summed = far[0] if far[1] is None else far[1]
    launch(
        ends_kernel, (sizes.heads,), gradient, *far, given.total_H, reach, sizes.batch,
        0 if summed is None else summed.shape[2], LEFT=left, RIGHT=right, BLOCK=ENDS_BLOCK,
    )  # fmt: skip
    return gradient


def _ends(given: Backward, far: tuple[Tensor | None, Tensor | None]) -> tuple[str, str]:
    """How `ends_kernel` finds the sum of each side: where all sums are known, one is the rest."""
    ends = ["none" if sums is None else "sums" for sums in far]
    if _sums_are_known(given):
        for side in (1, 0):
            if _far_sides(given)[side] and ends[side] == "none":
                ends[side] = "rest"
                break
    return ends[0], ends[1]


def dense_gradient(given: Backward, dense: Tensor) -> Tensor:
    """Gradient of a dense bias in its own shape."""
    sizes, constants = given.sizes, given.constants("dense")
    gradient = torch.empty_like(dense, memory_format=torch.contiguous_format)
    batch, heads, num_rows, num_columns = dense.shape
    programs = batch * heads
    if num_rows > 1:
        programs *= cdiv(sizes.queries, constants["BLOCK_M"])
    if num_columns > 1:
        programs *= cdiv(sizes.keys, constants["BLOCK_N"])
    launch(
        dense_kernel, (programs,), *given.operands(), plane_operand(gradient), given.score, sizes,
        heads, batch, SUM_ROWS=num_rows == 1, SUM_COLUMNS=num_columns == 1, **constants,
    )  # fmt: skip
    return gradient
