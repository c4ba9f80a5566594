"""Attention backward on Hopper: the gradients of queries, keys and values in one pass.

A program owns 128 keys. One warp fetches tiles of queries and of the output's gradient by the copy
engine; two groups of warps each take 64 of the keys, and multiply asynchronously. Weights are made
once, where the portable kernels make them twice. What a tile gives to the queries is added to sums
in memory, in a fixed order of the programs: two runs give the same bits.

M: query rows of a tile, N: key columns of a tile, D: padded width. Tiles of scores are [N, M].
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from zeta.ops.backends.triton.kernels.gradients import weights_tile
from zeta.ops.backends.triton.kernels.hopper.clearing import clear_rows, wait_for_clear
from zeta.ops.backends.triton.kernels.hopper.serving import add, fetch
from zeta.ops.backends.triton.kernels.ranges import row_parts
from zeta.ops.backends.triton.kernels.scores import (
    begin_products,
    column_hashes,
    far_bias,
    kept,
    key_exists,
    store_rows,
)


@gluon.jit
def own_part(tile_MD, PART: gl.constexpr, BLOCK_M: gl.constexpr):
    """What a group of warps computes of a tile of the queries' gradient: half of its rows where it
    has 128, or else half of its columns.
    """
    if BLOCK_M == 128:
        return tile_MD.slice(PART * 64, 64, 0)
    else:
        return tile_MD.slice(PART * 64, 64, 1)


@gluon.jit
def wait_for_both(exchanged, step):
    """Until both groups of warps have done a step; none waits for the step before the first."""
    mbarrier.wait(exchanged.index((step + 2) % 2), ((step + 2) // 2 + 1) & 1)


@gluon.jit
def give_to_queries(
    ds_SNM, k_ND, step, PART: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr
):
    """Begins to multiply what both groups have written in a step with all keys. Before the first
    step the product means nothing.
    """
    ds_MN = ds_SNM.index((step + 2) % 2).permute((1, 0))
    zero_MD = gl.zeros([64, 64], gl.float32, layout=LAYOUT)
    if BLOCK_M == 128:
        return warpgroup_mma(
            ds_MN.slice(PART * 64, 64, 0), k_ND, zero_MD, use_acc=False, is_async=True
        )
    else:
        return warpgroup_mma(
            ds_MN, k_ND.slice(PART * 64, 64, 1), zero_MD, use_acc=False, is_async=True
        )


@gluon.jit
def gather(
    dk_ND, dv_ND, left_N, step, tiles, bars, score, sizes, batch, head, column0, start,
    stop, side,
    PART: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    LEFT: gl.constexpr, CLEAN: gl.constexpr, LATE: gl.constexpr, HIDES: gl.constexpr,
    SCORES: gl.constexpr, KEYS: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """Adds what one part of one query head's rows, last first, gives to half a tile of keys.

    LEFT says that sums of dS beyond the reach on the left are wanted; LATE that a clean part lies
    there; HIDES that positions may hide something.
    """
    q_SMD, k_ND, v_ND, dout_SMD, norms_SM, deltas_SM, hashes_SM, ds_SNM, dq_MD = tiles
    _, _, full, empty, exchanged, written, taken = bars
    local_N = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    local_M = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SCORES))
    column = local_N[:, None]
    row = local_M[None, :]
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=KEYS, k_width=2)
    own_k_ND = k_ND.slice(PART * 64, 64, 0)
    own_v_ND = v_ND.slice(PART * 64, 64, 0)
    column_hash_N = column_hashes(score, sizes, batch, column0, local_N)
    zero_NM = gl.zeros([64, BLOCK_M], gl.float32, layout=SCORES)
    BEGUN: gl.constexpr = score.offsets is not None and not CLEAN
    EARLY: gl.constexpr = CLEAN or BEGUN
    shift = sizes.keys - sizes.queries
    num_tiles = gl.cdiv(stop - start, BLOCK_M)
    for index in range(num_tiles):
        row0 = start + (num_tiles - 1 - index) * BLOCK_M
        stage = step % STAGES
        first_NM = zero_NM
        if BEGUN:
            first_NM = begin_products(score, sizes, batch, head, row0, column0, row, column)
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        q_MD = q_SMD.index(stage)
        dout_MD = dout_SMD.index(stage)
        dots = warpgroup_mma(own_k_ND, q_MD.permute((1, 0)), first_NM, use_acc=BEGUN, is_async=True)
        if EARLY:
            dp = warpgroup_mma(
                own_v_ND, dout_MD.permute((1, 0)), zero_NM, use_acc=False, is_async=True
            )
            dots_NM = warpgroup_mma_wait(1, [dots])
        else:
            # The registers of another product are wanted for what is added to the scores.
            dots_NM = warpgroup_mma_wait(0, [dots])
        norm_M = norms_SM.index(stage).load(SCORES)
        p_NM = weights_tile(
            dots_NM, norm_M, norm_M, score, sizes, batch, head, row0, column0, row, column, side,
            not HIDES,
        )[0]  # fmt: skip
        given_NM = p_NM
        if score.dropout is not None:
            # The sign says which are dropped, until it is asked again: it costs no register.
            keep_NM = kept(score, hashes_SM.index(stage).load(SCORES), column_hash_N[:, None])
            given_NM = gl.where(keep_NM, p_NM, 0.0)
            p_NM = gl.where(keep_NM, p_NM, -p_NM)
        given_NM = gl.convert_layout(given_NM.to(q_MD.dtype), operand)
        if not EARLY:
            dp = warpgroup_mma(
                own_v_ND, dout_MD.permute((1, 0)), zero_NM, use_acc=False, is_async=True
            )
        dp_NM = warpgroup_mma_wait(0, [dp])
        dv = warpgroup_mma(given_NM, dout_MD, dv_ND, is_async=True)
        if score.dropout is not None:
            dp_NM = gl.where(p_NM > 0.0, dp_NM, 0.0)
            p_NM = gl.abs(p_NM)
        ds_NM = p_NM * (dp_NM - deltas_SM.index(stage).load(SCORES))
        if LEFT and not CLEAN:
            # Not by the difference of both: the compiler would keep that of every element.
            beyond = row >= column + (column0 - row0 - shift + score.offsets.reach)
            left_N += gl.sum(gl.where(beyond, ds_NM, 0.0), 1)
        elif LEFT and LATE:
            left_N += gl.sum(ds_NM, 1)
        low_NM = ds_NM.to(q_MD.dtype)
        # Both groups have done the step before, and none waits for the other in this one.
        wait_for_both(exchanged, step - 1)
        ds_SNM.index(step % 2).slice(PART * 64, 64, 0).store(low_NM)
        dq = give_to_queries(ds_SNM, k_ND, step - 1, PART, BLOCK_M, QUERIES)
        dk = warpgroup_mma(gl.convert_layout(low_NM, operand), q_MD, dk_ND, is_async=True)
        dv_ND, dk_ND, part_MD = warpgroup_mma_wait(0, [dv, dk, dq])
        if step > 0:
            mbarrier.wait(taken, step & 1)
            own_part(dq_MD, PART, BLOCK_M).store(part_MD)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        mbarrier.arrive(exchanged.index(step % 2), count=1)
        mbarrier.arrive(written, count=1, pred=step > 0)
        step += 1
    return dk_ND, dv_ND, left_N, step


@gluon.jit
def consume(
    tiles, bars, dk, dv, left_sums, score, sizes, batch, key_head, column0, parts,
    PART: gl.constexpr, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """The gradients of 64 keys, and half of what the tile gives to the queries."""
    _, k_ND, v_ND, _, _, _, _, ds_SNM, dq_MD = tiles
    fetched, cleared, _, _, exchanged, written, taken = bars
    low, one, two, three, four, high = parts
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16]
    )
    KEYS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D, 16]
    )
    QUERIES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    column0 += PART * 64
    dk_ND = gl.zeros([64, BLOCK_D], gl.float32, layout=KEYS)
    dv_ND = gl.zeros([64, BLOCK_D], gl.float32, layout=KEYS)
    LEFT: gl.constexpr = left_sums is not None
    banded: gl.constexpr = score.offsets is not None
    windowed: gl.constexpr = score.window is not None
    # Nothing lies right of the band then, and one part is cut where there were two: with a third
    # loop the compiler keeps less of the others in registers.
    merged: gl.constexpr = banded and score.causal
    step = low * 0
    local_N = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    inverse = 1.0
    if score.dropout is not None:
        inverse = 1.0 / score.dropout.keep
    mbarrier.wait(fetched, 0)
    if score.padding is not None:
        # Before anything reads them: else what lies there would reach the queries.
        local = gl.arange(0, 64, layout=gl.SliceLayout(1, KEYS))
        exists_N = key_exists(score, sizes, batch, column0, local)
        clear_rows(k_ND.slice(PART * 64, 64, 0), exists_N, KEYS)
        clear_rows(v_ND.slice(PART * 64, 64, 0), exists_N, KEYS)
        wait_for_clear(cleared, 0)
    for member in range(sizes.group):
        head = key_head * sizes.group + member
        left = far_bias(score, head, False)
        right = far_bias(score, head, True)
        left_N = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, SCORES))
        # From the last rows to the first. Parts that are empty with any mask and bias of this kind
        # are left out.
        if windowed and banded:
            dk_ND, dv_ND, left_N, step = gather(
                dk_ND, dv_ND, left_N, step, tiles, bars, score, sizes, batch, head,
                column0, four, high, 0.0, PART, BLOCK_M, STAGES, LEFT, False, False, True,
                SCORES, KEYS, QUERIES,
            )  # fmt: skip
        if banded:
            dk_ND, dv_ND, left_N, step = gather(
                dk_ND, dv_ND, left_N, step, tiles, bars, score, sizes, batch, head,
                column0, three, four, left, PART, BLOCK_M, STAGES, LEFT, True, True, False,
                SCORES, KEYS, QUERIES,
            )  # fmt: skip
        if (windowed or banded) and not merged:
            dk_ND, dv_ND, left_N, step = gather(
                dk_ND, dv_ND, left_N, step, tiles, bars, score, sizes, batch, head,
                column0, two, three, 0.0, PART, BLOCK_M, STAGES, LEFT, False, False, windowed,
                SCORES, KEYS, QUERIES,
            )  # fmt: skip
        if not merged:
            dk_ND, dv_ND, left_N, step = gather(
                dk_ND, dv_ND, left_N, step, tiles, bars, score, sizes, batch, head,
                column0, one, two, right, PART, BLOCK_M, STAGES, LEFT, True, False, False,
                SCORES, KEYS, QUERIES,
            )  # fmt: skip
        # Columns without a key are all in this part.
        if score.causal or score.prefix is not None or not WHOLE:
            dk_ND, dv_ND, left_N, step = gather(
                dk_ND, dv_ND, left_N, step, tiles, bars, score, sizes, batch, head,
                column0, low, gl.where(merged, three, one), 0.0, PART, BLOCK_M, STAGES, LEFT,
                False, False, True, SCORES, KEYS, QUERIES,
            )  # fmt: skip
        if LEFT:
            exists_N = key_exists(score, sizes, batch, column0, local_N)
            index = (batch * sizes.heads + head) * sizes.keys + column0 + local_N
            gl.store(left_sums + index, left_N * inverse, mask=exists_N)
    wait_for_both(exchanged, step - 1)
    part_MD = warpgroup_mma_wait(
        0, [give_to_queries(ds_SNM, k_ND, step - 1, PART, BLOCK_M, QUERIES)]
    )
    if step > 0:
        mbarrier.wait(taken, step & 1)
        own_part(dq_MD, PART, BLOCK_M).store(part_MD)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(written, count=1)
    outer_N = gl.arange(0, 64, layout=gl.SliceLayout(1, KEYS))
    inner_D = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, KEYS))
    exists = key_exists(score, sizes, batch, column0, outer_N)[:, None]
    dk_ND = gl.where(exists, dk_ND * (score.slope * inverse), 0.0)
    dv_ND = gl.where(exists, dv_ND * inverse, 0.0)
    store_rows(dk, batch, key_head, column0, outer_N, sizes.keys, inner_D, WIDTH, dk_ND)
    store_rows(dv, batch, key_head, column0, outer_N, sizes.keys, inner_D, WIDTH, dv_ND)


@gluon.jit
def inputs_kernel(
    q, k, v, dout, norms, deltas, hashes, dk, dv, left_sums, sums, turns, score, sizes,
    interleaved,
    WIDTH: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over every row of every query head that shares them,
    and what it gives to the queries'; where wanted, each column's sum of dS beyond the reach, left.

    WHOLE: the keys fill whole tiles, and none is padding.
    """
    BLOCK_N: gl.constexpr = 128
    num_tiles = gl.cdiv(sizes.keys, BLOCK_N)
    key_heads = sizes.heads // sizes.group
    # In the order in which programs begin: one whose turn is earlier is never still to come.
    program = gl.atomic_add(turns.counts, 1, sem="relaxed", scope="gpu")
    # Earlier keys are seen by more rows under a causal mask, and come first as they are. Heads are
    # taken some at a time, so that the tiles of one do not all begin, and wait, together.
    first_head = program // (num_tiles * interleaved) * interleaved
    some = gl.minimum(interleaved, sizes.batch * key_heads - first_head)
    rest = program - first_head * num_tiles
    tile = rest // some
    column0 = tile * BLOCK_N
    batch_head = first_head + rest % some
    key_head = batch_head % key_heads
    entry = batch_head // key_heads
    batch = entry.to(gl.int64)
    low, one, two, three, four, high = row_parts(score, sizes, batch, column0, BLOCK_M, BLOCK_N)
    before = row_parts(score, sizes, batch, column0 - BLOCK_N, BLOCK_M, BLOCK_N)
    follows = (tile > 0) & (before[0] < before[5])
    if not WHOLE:
        # A row's gradient is no column's own: here, columns without a key are cut out.
        length = sizes.keys
        if score.padding is not None:
            length = gl.minimum(gl.load(score.padding + batch), length).to(gl.int32)
        partial = column0 + BLOCK_N > length
        one = gl.where(partial, high, one)
        two = gl.where(partial, high, two)
        three = gl.where(partial, high, three)
        four = gl.where(partial, high, four)
    parts = (low, one, two, three, four, high)
    dtype: gl.constexpr = q.dtype
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype)
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    scores: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    added: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], gl.float32)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    q_SMD = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], rows)
    dout_SMD = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], rows)
    k_ND = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_D], keys)
    v_ND = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_D], keys)
    ds_SNM = gl.allocate_shared_memory(dtype, [2, BLOCK_N, BLOCK_M], scores)
    dq_MD = gl.allocate_shared_memory(gl.float32, [BLOCK_M, BLOCK_D], added)
    norms_SM = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], norms.layout)
    deltas_SM = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], deltas.layout)
    hashes_SM = gl.allocate_shared_memory(gl.int32, [STAGES, 1, BLOCK_M], norms.layout)
    tiles = (q_SMD, k_ND, v_ND, dout_SMD, norms_SM, deltas_SM, hashes_SM, ds_SNM, dq_MD)
    fetched = gl.allocate_shared_memory(gl.int64, [1], barriers)
    cleared = gl.allocate_shared_memory(gl.int64, [1], barriers)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    exchanged = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    written = gl.allocate_shared_memory(gl.int64, [1], barriers)
    taken = gl.allocate_shared_memory(gl.int64, [1], barriers)
    bars = (fetched, cleared, full, empty, exchanged, written, taken)
    mbarrier.init(fetched, count=1)
    mbarrier.init(cleared, count=2)
    mbarrier.init(written, count=2)
    mbarrier.init(taken, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for index in gl.static_range(2):
        mbarrier.init(exchanged.index(index), count=2)
    own = turns.counts + 1 + batch_head * num_tiles + tile
    gl.warp_specialize(
        [
            (
                consume,
                (
                    tiles, bars, dk, dv, left_sums, score, sizes, batch, key_head,
                    column0, parts, 0, WIDTH, BLOCK_M, BLOCK_D, STAGES, WHOLE,
                ),
            ),
            (
                consume,
                (
                    tiles, bars, dk, dv, left_sums, score, sizes, batch, key_head,
                    column0, parts, 1, WIDTH, BLOCK_M, BLOCK_D, STAGES, WHOLE,
                ),
            ),
            (
                fetch,
                (
                    q, k, v, dout, norms, deltas, hashes, tiles, bars, sizes, entry, key_head,
                    column0, parts, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
                ),
            ),
            (
                add,
                (
                    sums, tiles, bars, own, follows, sizes, entry, key_head, parts, BLOCK_M,
                    BLOCK_D,
                ),
            ),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
