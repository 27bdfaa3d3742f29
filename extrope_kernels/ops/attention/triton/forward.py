"""The forward kernel: one program for each block of queries and head, over every region's keys."""

import triton
import triton.language as tl

from .blocks import (
    RUN_TIME_SCALARS,
    Bounds,
    cut_keys,
    first_key,
    nth_block,
    place_queries,
    seen_keys,
)
from .queries import rotated_rows
from .rows import (
    add_weighted,
    dots,
    frame_of,
    keys_of,
    load_rows,
    row_base,
    rows_of,
    store_rows,
    times,
    zero_rows,
)
from .softmax import bounded, factors_of, finished, lse_of

# Below any logit; finite, so that rows without keys need no care before the end.
NO_LOGIT = tl.constexpr(-1e30)


@triton.jit
def _add_keys(
    state,
    q,
    k,
    v,
    k_base,
    v_base,
    factors,
    cut,
    low,
    high,
    REGION: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Take the masked, or full, blocks of keys into (weighted values, row_max, row_sum).

    In a masked block row i sees only the keys from low[i] to high[i].
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    acc, row_max, row_sum = state
    inner, factor = factors
    _, _, full, masked, _ = cut
    for i in tl.range(masked if MASKED else full):
        start, left = nth_block(i, cut, MASKED, BLOCK_N)
        k_at = k_base + tl.cast(start, tl.int64) * k.seq * TILE.align
        v_at = v_base + tl.cast(start, tl.int64) * v.seq * TILE.align
        k_rows = load_rows(k, k_at, left, BLOCK_N, MASKED, TILE)
        logits = bounded(dots(q, k_rows, TILE), inner, TILE)
        if MASKED:
            seen = seen_keys(start, low, high, REGION, TILE)
            logits = tl.where(seen, logits * factor, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(logits, 1))
            weights = tl.exp2(logits - new_max[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(logits, 1) * factor)
            weights = tl.exp2(logits * factor - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        v_rows = load_rows(v, v_at, left, BLOCK_N, MASKED, VALUES)
        acc = add_weighted(times(acc, rescale), weights, v_rows, VALUES)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def forward_kernel(
    q, k, k_frames, v, out, lse, q_frame, inv_freq, log_decay, cu_seqlens, q_start, k_start,
    query_scale, sinks,
    q_strides, k_strides, k_frame_strides, v_strides, out_strides, q_frame_strides, freq_stride,
    query_scale_stride, start_strides, num_sequences, search_steps, blocks, rows, seqlen_q,
    seqlen_k, start_0, start_1, start_2, granularity, window, softmax_scale, softcap,
    amplitude, per_log_n,
    q0_modulus: tl.float64, q0_factor: tl.float64, q0_offset: tl.float64, q0_cap: tl.float64,
    q1_modulus: tl.float64, q1_factor: tl.float64, q1_offset: tl.float64, q1_cap: tl.float64,
    q2_modulus: tl.float64, q2_factor: tl.float64, q2_offset: tl.float64, q2_cap: tl.float64,
    TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Axis 0: blocks of queries, longest first, then heads, then the batch.

    q_frame: as many rows as q to work in, or None where rows of out have the room.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    CHUNK: tl.constexpr = TILE.rotated
    REGIONS: tl.constexpr = len(TILE.q_maps)
    HEADS: tl.constexpr = TILE.heads_q
    GROUP: tl.constexpr = HEADS // TILE.heads_k
    PAIRED: tl.constexpr = TILE.paired
    q_maps = (
        (q0_modulus, q0_factor, q0_offset, q0_cap),
        (q1_modulus, q1_factor, q1_offset, q1_cap),
        (q2_modulus, q2_factor, q2_offset, q2_cap),
    )
    (
        batch, sequence, head, first_row, row, left, top, bottom, position, seqlen_k, origin,
    ) = place_queries(
        blocks, HEADS, cu_seqlens, q_start, k_start, start_strides, num_sequences, search_steps,
        seqlen_q, seqlen_k, TILE,
    )  # fmt: skip
    bounds = Bounds(start_0, start_1, start_2, granularity, window, seqlen_k, origin)
    inv_freq += tl.cast(sequence, tl.int64) * freq_stride
    if query_scale is not None:
        query_scale += tl.cast(batch, tl.int64) * query_scale_stride + row

    factors = factors_of(softmax_scale, softcap, TILE)
    row_max = tl.full((BLOCK_M,), NO_LOGIT, tl.float32)
    state = (zero_rows(BLOCK_M, VALUES), row_max, tl.zeros((BLOCK_M,), tl.float32))
    q_of = rows_of(q, q_strides, HEADS, TILE)
    if PAIRED:
        q_base = row_base(q_of, batch, row, head, TILE)
        q_rows = rotated_rows(
            q_of, q_base, left, position + origin, inv_freq, log_decay, amplitude, per_log_n,
            query_scale, q_maps[0], 0, BLOCK_M, TILE,
        )  # fmt: skip
    out_of = frame_of(out, out_strides, 0, HEADS, VALUES)
    frame = out_of
    if q_frame is not None:
        frame = frame_of(q_frame, q_frame_strides, 0, HEADS, TILE)
    v_of = rows_of(v, v_strides, TILE.heads_k, VALUES)
    v_base = row_base(v_of, batch, first_row, head // GROUP, VALUES)
    for r in tl.static_range(REGIONS):
        if r > 0 or not PAIRED:
            # Between two loops few registers are free, and rows that are not pairs of parts take
            # many: a few rows at a time go through memory.
            tl.debug_barrier()
            for at in tl.range(0, BLOCK_M, CHUNK):
                q_base = row_base(q_of, batch, row + at, head, TILE)
                few_scales = None
                if query_scale is not None:
                    few_scales = query_scale + at
                few_rows = rotated_rows(
                    q_of, q_base, left - at, top + origin + at + tl.arange(0, CHUNK), inv_freq,
                    log_decay, amplitude, per_log_n, few_scales, q_maps[r], r, CHUNK, TILE,
                )  # fmt: skip
                frame_base = row_base(frame, batch, row + at, head, TILE)
                store_rows(frame, frame_base, few_rows, left - at, CHUNK, TILE)
            tl.debug_barrier()
            frame_base = row_base(frame, batch, row, head, TILE)
            q_rows = load_rows(frame, frame_base, left, BLOCK_M, True, TILE)
        k_of = keys_of(k, k_strides, k_frames, k_frame_strides, r, TILE)
        k_base = row_base(k_of, batch, first_row, head // GROUP, TILE)
        low = first_key(position, bounds, r, TILE)
        high = first_key(position, bounds, r + 1, TILE)
        cut = cut_keys(top, bottom, bounds, r, TILE)
        for masked in tl.static_range(2):
            state = _add_keys(
                state, q_rows, k_of, v_of, k_base, v_base, factors, cut, low, high,
                r, masked == 0, TILE, VALUES,
            )  # fmt: skip

    acc, row_max, row_sum = state
    factor, ended = finished(row_max, row_sum, sinks, head)
    if REGIONS > 1 or not PAIRED:
        tl.debug_barrier()
    out_base = row_base(out_of, batch, row, head, VALUES)
    store_rows(out_of, out_base, times(acc, factor), left, BLOCK_M, VALUES)
    value = lse_of(ended)
    lse += (tl.cast(batch, tl.int64) * HEADS + head) * rows + row
    tl.store(lse + tl.arange(0, BLOCK_M), value, mask=tl.arange(0, BLOCK_M) < left)
