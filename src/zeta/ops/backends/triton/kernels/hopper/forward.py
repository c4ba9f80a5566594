"""Attention forward on Hopper.

A program owns 128 rows of queries. One warp fetches tiles of keys and of values by the copy engine;
two groups of warps each take 64 of the rows, and multiply asynchronously: while one weighs, the
other multiplies (FlashAttention-3, https://arxiv.org/abs/2407.08608, section 3).

M: query rows of a group, N: key columns of a tile, S: stages, D: padded width.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from zeta.ops.backends.triton.kernels.forward import add_weights, store_statistics
from zeta.ops.backends.triton.kernels.hopper.clearing import clear_rows, meet, wait_for_clear
from zeta.ops.backends.triton.kernels.ranges import column_parts, count_tiles, tile_start
from zeta.ops.backends.triton.kernels.scores import (
    begin_products,
    far_bias,
    kept,
    key_exists,
    row_hashes,
    store_rows,
)


@gluon.jit
def fetch_tiles(
    step, k, v, hashes, tiles, bars, batch, key_head, hash_plane, parts,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CLEAN: gl.constexpr,
):  # fmt: skip
    """Fetches the clean tiles, or the others, as places become free."""
    _, k_SND, v_SND, hashes_SN = tiles
    _, k_full, k_empty, v_full, v_empty, _ = bars
    low, one, two, three, four, high = parts
    tile: gl.constexpr = [1, 1, BLOCK_N, BLOCK_D]
    for index in range(count_tiles(low, one, two, three, four, high, BLOCK_N, CLEAN)):
        column0 = tile_start(index, low, one, two, three, four, BLOCK_N, CLEAN)
        stage = step % STAGES
        phase = ((step // STAGES) & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), phase)
        numbers: gl.constexpr = 0 if hashes is None else BLOCK_N
        mbarrier.expect(k_full.index(stage), BLOCK_N * BLOCK_D * 2 + numbers * 4)
        tma.async_copy_global_to_shared(
            k, [batch, key_head, column0, 0], k_full.index(stage),
            k_SND.index(stage)._reinterpret(k.dtype, tile, k.layout),
        )  # fmt: skip
        if hashes is not None:
            tma.async_copy_global_to_shared(
                hashes, [hash_plane, column0], k_full.index(stage), hashes_SN.index(stage)
            )
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), BLOCK_N * BLOCK_D * 2)
        tma.async_copy_global_to_shared(
            v, [batch, key_head, column0, 0], v_full.index(stage),
            v_SND.index(stage)._reinterpret(v.dtype, tile, v.layout),
        )  # fmt: skip
        step += 1
    return step


@gluon.jit
def fetch(
    q, k, v, hashes, tiles, bars, score, batch, head, key_head, row0, parts,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """Fetches the program's queries, then every tile that they meet."""
    fetched = bars[0]
    mbarrier.expect(fetched, 128 * BLOCK_D * 2)
    tile: gl.constexpr = [1, 1, 128, BLOCK_D]
    tma.async_copy_global_to_shared(
        q, [batch, head, row0, 0], fetched, tiles[0]._reinterpret(q.dtype, tile, q.layout)
    )
    step = parts[0] * 0
    hash_plane = parts[0] * 0
    if score.dropout is not None:
        hash_plane = gl.where(score.dropout.column_batch > 0, batch, 0)
    step = fetch_tiles(
        step, k, v, hashes, tiles, bars, batch, key_head, hash_plane, parts, BLOCK_N, BLOCK_D,
        STAGES, True,
    )  # fmt: skip
    if CUT:
        step = fetch_tiles(
            step, k, v, hashes, tiles, bars, batch, key_head, hash_plane, parts, BLOCK_N, BLOCK_D,
            STAGES, False,
        )  # fmt: skip


@gluon.jit
def add_values(acc_MD, p_MN, v_SND, step, STAGES: gl.constexpr):
    """Begins to add the weighted values of a step. What was there before the first is not added to;
    before it there is nothing to add, and the result means nothing.
    """
    values_ND = v_SND.index(gl.maximum(step, 0) % STAGES)
    return warpgroup_mma(p_MN, values_ND, acc_MD, use_acc=step > 0, is_async=True)


@gluon.jit
def attend(
    acc_MD, p_MN, total_M, peak_M, step, tiles, bars, score, sizes, batch, head, row0, parts,
    PART: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CLEAN: gl.constexpr,
    HIDES: gl.constexpr, SCORES: gl.constexpr, OUTPUTS: gl.constexpr,
):  # fmt: skip
    """Weighs the clean tiles of keys, or the others; and adds the values of each tile's predecessor
    meanwhile.

    HIDES: positions may hide something in tiles that are not clean.
    """
    q_MD, k_SND, v_SND, hashes_SN = tiles
    _, k_full, k_empty, v_full, v_empty, cleared = bars
    low, one, two, three, four, high = parts
    local_M = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    local_N = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
    row = local_M[:, None]
    column = local_N[None, :]
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUTS, k_width=2)
    own_q_MD = q_MD.slice(PART * 64, 64, 0)
    zero_MN = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
    BEGUN: gl.constexpr = score.offsets is not None and not CLEAN
    row_hash_M = row_hashes(score, sizes, batch, head, row0, local_M)
    left = far_bias(score, head, False)
    right = far_bias(score, head, True)
    for index in range(count_tiles(low, one, two, three, four, high, BLOCK_N, CLEAN)):
        column0 = tile_start(index, low, one, two, three, four, BLOCK_N, CLEAN)
        stage = step % STAGES
        first_MN = zero_MN
        if BEGUN:
            first_MN = begin_products(score, sizes, batch, head, row0, column0, row, column)
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        dots = warpgroup_mma(
            own_q_MD, k_SND.index(stage).permute((1, 0)), first_MN, use_acc=BEGUN, is_async=True
        )
        before = gl.maximum(step - 1, 0)
        mbarrier.wait(v_full.index(before % STAGES), (before // STAGES) & 1)
        acc = add_values(acc_MD, p_MN, v_SND, step - 1, STAGES)
        dots_MN = warpgroup_mma_wait(1, [dots])
        side = 0.0
        if CLEAN:
            side = gl.where(column0 < two, left, right)
        weights_MN, decay_M, total_M, peak_M = add_weights(
            dots_MN, total_M, peak_M, score, sizes, batch, head, row0, column0, row, column, side,
            CLEAN or not HIDES,
        )  # fmt: skip
        if score.dropout is not None:
            keep_MN = kept(score, row_hash_M[:, None], hashes_SN.index(stage).load(SCORES))
            weights_MN = gl.where(keep_MN, weights_MN, 0.0)
        acc_MD = warpgroup_mma_wait(0, [acc])
        p_MN = gl.convert_layout(weights_MN.to(q_MD.dtype), operand)
        acc_MD = acc_MD * gl.convert_layout(decay_M, gl.SliceLayout(1, OUTPUTS))[:, None]
        if score.padding is not None and not CLEAN:
            # There is one such tile at most; each group of warps clears half of its values.
            if column0 + BLOCK_N > gl.load(score.padding + batch):
                mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
                if step == 0:
                    # The products that mean nothing have read these values, in both groups.
                    meet(cleared, 0)
                half: gl.constexpr = BLOCK_N // 2
                local = gl.arange(0, half, layout=gl.SliceLayout(1, OUTPUTS))
                exists_N = key_exists(score, sizes, batch, column0 + PART * half, local)
                clear_rows(v_SND.index(stage).slice(PART * half, half, 0), exists_N, OUTPUTS)
                wait_for_clear(cleared, gl.where(step == 0, 1, 0))
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.arrive(v_empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
        step += 1
    return acc_MD, p_MN, total_M, peak_M, step


@gluon.jit
def consume(
    tiles, bars, out, lse, statistics, score, sizes, batch, head, row0, parts,
    PART: gl.constexpr, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, CUT: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """The output and the normalisers of 64 rows."""
    fetched, _, _, v_full, _, _ = bars
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    OUTPUTS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D, 16]
    )
    row0 += PART * 64
    rows: gl.constexpr = gl.SliceLayout(1, SCORES)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUTS, k_width=2)
    acc_MD = gl.zeros([64, BLOCK_D], gl.float32, layout=OUTPUTS)
    p_MN = gl.zeros([64, BLOCK_N], tiles[0].dtype, layout=operand)
    total_M = gl.zeros([64], gl.float32, layout=rows)
    peak_M = gl.full([64], float("-inf"), gl.float32, layout=rows)
    step = parts[0] * 0
    mbarrier.wait(fetched, 0)
    acc_MD, p_MN, total_M, peak_M, step = attend(
        acc_MD, p_MN, total_M, peak_M, step, tiles, bars, score, sizes, batch, head, row0, parts,
        PART, BLOCK_N, STAGES, True, HIDES, SCORES, OUTPUTS,
    )  # fmt: skip
    if CUT:
        acc_MD, p_MN, total_M, peak_M, step = attend(
            acc_MD, p_MN, total_M, peak_M, step, tiles, bars, score, sizes, batch, head, row0,
            parts, PART, BLOCK_N, STAGES, False, HIDES, SCORES, OUTPUTS,
        )  # fmt: skip
    if step > 0:
        mbarrier.wait(v_full.index((step - 1) % STAGES), ((step - 1) // STAGES) & 1)
    acc_MD = warpgroup_mma_wait(0, [add_values(acc_MD, p_MN, tiles[2], step - 1, STAGES)])
    local_M = gl.arange(0, 64, layout=rows)
    index = (batch * sizes.heads + head) * sizes.queries + row0 + local_M
    store_statistics(
        lse, statistics, total_M, peak_M, score, sizes, index, row0 + local_M < sizes.queries
    )
    inverse_M = gl.where(total_M == 0.0, 0.0, 1.0 / gl.where(total_M == 0.0, 1.0, total_M))
    if score.dropout is not None:
        inverse_M = inverse_M / score.dropout.keep
    inverse_M = gl.convert_layout(inverse_M, gl.SliceLayout(1, OUTPUTS))[:, None]
    # Without any tile, the product is of what no one has written.
    acc_MD = gl.where(inverse_M == 0.0, 0.0, acc_MD * inverse_M)
    outer_M = gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUTS))
    inner_D = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, OUTPUTS))
    store_rows(out, batch, head, row0, outer_M, sizes.queries, inner_D, WIDTH, acc_MD)


@gluon.jit
def forward_kernel(
    q, k, v, hashes, out, lse, statistics, score, sizes,
    WIDTH: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    """Writes the output and the normalisers of a tile of rows.

    EVEN: the keys fill whole tiles.
    """
    num_tiles = gl.cdiv(sizes.queries, 128)
    program = gl.program_id(0)
    # Later rows see more keys under a causal mask: begin with them.
    row0 = (num_tiles - 1 - program % num_tiles) * 128
    batch_head = program // num_tiles
    head = batch_head % sizes.heads
    key_head = head // sizes.group
    entry = batch_head // sizes.heads
    batch = entry.to(gl.int64)
    parts = column_parts(score, sizes, batch, row0, 128, BLOCK_N)
    HIDES: gl.constexpr = (
        score.causal or score.window is not None or score.padding is not None
        or score.prefix is not None or not EVEN
    )  # fmt: skip
    CUT: gl.constexpr = HIDES or score.offsets is not None
    dtype: gl.constexpr = q.dtype
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BLOCK_D], dtype)
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    numbers: gl.constexpr = gl.NVMMASharedLayout(0, 32, 2)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    q_MD = gl.allocate_shared_memory(dtype, [128, BLOCK_D], rows)
    k_SND = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], keys)
    v_SND = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], keys)
    hashes_SN = gl.allocate_shared_memory(gl.int32, [STAGES, 1, BLOCK_N], numbers)
    tiles = (q_MD, k_SND, v_SND, hashes_SN)
    fetched = gl.allocate_shared_memory(gl.int64, [1], barriers)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    cleared = gl.allocate_shared_memory(gl.int64, [1], barriers)
    bars = (fetched, k_full, k_empty, v_full, v_empty, cleared)
    mbarrier.init(fetched, count=1)
    mbarrier.init(cleared, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    tiles, bars, out, lse, statistics, score, sizes, batch, head, row0, parts,
                    0, WIDTH, BLOCK_N, BLOCK_D, STAGES, CUT, HIDES,
                ),
            ),
            (
                consume,
                (
                    tiles, bars, out, lse, statistics, score, sizes, batch, head, row0, parts,
                    1, WIDTH, BLOCK_N, BLOCK_D, STAGES, CUT, HIDES,
                ),
            ),
            (
                fetch,
                (
                    q, k, v, hashes, tiles, bars, score, entry, head, key_head, row0, parts,
                    BLOCK_N, BLOCK_D, STAGES, CUT,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
