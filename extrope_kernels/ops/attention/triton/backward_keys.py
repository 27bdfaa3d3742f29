"""The backward kernel by block of keys: the gradients of keys and values.

The query heads of a group are summed in one program, without atomics: the same bits in every run.
"""

import triton
import triton.language as tl

from .blocks import (
    RUN_TIME_SCALARS,
    Bounds,
    cut_queries,
    end_query,
    nth_block,
    origin_of,
    place,
)
from .rows import (
    add_weighted,
    dots,
    frame_of,
    keys_of,
    load_rows,
    load_values,
    row_base,
    rows_of,
    store_rows,
    times,
    zero_rows,
)
from .softmax import LOG2_E, before_the_cap, bounded, factors_of


@triton.jit
def _add_dkv(
    dk,
    dv,
    k,
    v,
    q,
    dout,
    q_base,
    dout_base,
    lse,
    delta,
    factors,
    cut,
    low,
    high,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Add to dk, short of softmax_scale, and to dv what the masked, or full, blocks of rows give.

    In a masked block only rows low[j] to high[j] see key j.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    inner, factor = factors
    _, _, full, masked, _ = cut
    for i in tl.range(masked if MASKED else full):
        start, left = nth_block(i, cut, MASKED, BLOCK_M)
        lses = load_values(lse + start, left, BLOCK_M, MASKED) * LOG2_E
        deltas = load_values(delta + start, left, BLOCK_M, MASKED)
        q_at = q_base + tl.cast(start, tl.int64) * q.seq * TILE.align
        dout_at = dout_base + tl.cast(start, tl.int64) * dout.seq * TILE.align
        q_rows = load_rows(q, q_at, left, BLOCK_M, MASKED, TILE)
        logits = bounded(dots(k, q_rows, TILE), inner, TILE)
        weights = tl.exp2(logits * factor - lses[None, :])
        if MASKED:
            row = (start + tl.arange(0, BLOCK_M))[None, :]
            weights = tl.where((row >= low[:, None]) & (row < high[:, None]), weights, 0.0)
        douts = load_rows(dout, dout_at, left, BLOCK_M, MASKED, VALUES)
        dv = add_weighted(dv, weights, douts, VALUES)
        d_logits = weights * (dots(v, douts, VALUES) - deltas[None, :])
        dk = add_weighted(dk, before_the_cap(d_logits, logits, TILE), q_rows, TILE)
    return dk, dv


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def dkv_kernel(
    q_frames, k, k_frames, v, dout, lse, delta, dk_frames, dv, cu_seqlens, q_start, k_start,
    q_frame_strides, k_strides, k_frame_strides, v_strides, dout_strides, dv_strides,
    start_strides, num_sequences, search_steps, blocks, rows, seqlen_q, seqlen_k,
    start_0, start_1, start_2, granularity, window, softmax_scale, softcap,
    TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Axis 0: blocks of keys, longest first, then heads of keys, then the batch.

    dv_strides: None, where dv lies as one frame does.
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    REGIONS: tl.constexpr = len(TILE.q_maps)
    HEADS_Q: tl.constexpr = TILE.heads_q
    HEADS_K: tl.constexpr = TILE.heads_k
    GROUP: tl.constexpr = HEADS_Q // HEADS_K
    batch, sequence, head, block, _, first_row, seqlen_q, seqlen_k = place(
        blocks, HEADS_K, cu_seqlens, num_sequences, search_steps, seqlen_q, seqlen_k,
        BLOCK_N,
    )  # fmt: skip
    first = block * BLOCK_N
    row = first_row + first
    left = seqlen_k - first
    key = first + tl.arange(0, BLOCK_N)
    last = tl.minimum(first + BLOCK_N, seqlen_k) - 1
    shift, origin = origin_of(sequence, q_start, k_start, start_strides, seqlen_q, seqlen_k)
    bounds = Bounds(start_0, start_1, start_2, granularity, window, seqlen_k, origin)
    top = tl.maximum(shift, 0)
    bottom = seqlen_q + shift

    v_of = rows_of(v, v_strides, HEADS_K, VALUES)
    v_base = row_base(v_of, batch, row, head, VALUES)
    v_rows = load_rows(v_of, v_base, left, BLOCK_N, True, VALUES)
    dout_of = rows_of(dout, dout_strides, HEADS_Q, VALUES)
    dv_rows = zero_rows(BLOCK_N, VALUES)
    factors = factors_of(softmax_scale, softcap, TILE)
    scale = tl.full((BLOCK_N,), softmax_scale, tl.float32)
    for r in tl.static_range(REGIONS):
        k_of = keys_of(k, k_strides, k_frames, k_frame_strides, r, TILE)
        k_base = row_base(k_of, batch, row, head, TILE)
        k_rows = load_rows(k_of, k_base, left, BLOCK_N, True, TILE)
        low = end_query(key, bounds, top, bottom, r + 1, TILE) - shift
        high = end_query(key, bounds, top, bottom, r, TILE) - shift
        cut = cut_queries(first, last, bounds, seqlen_q, shift, r, TILE)
        q_of = frame_of(q_frames, q_frame_strides, r, HEADS_Q, TILE)
        dk_rows = zero_rows(BLOCK_N, TILE)
        for head_q in tl.range(head * GROUP, head * GROUP + GROUP):
            q_base = row_base(q_of, batch, first_row, head_q, TILE)
            dout_base = row_base(dout_of, batch, first_row, head_q, VALUES)
            row_of_head = (tl.cast(batch, tl.int64) * HEADS_Q + head_q) * rows + first_row
            lse_base = lse + row_of_head
            delta_base = delta + row_of_head
            for masked in tl.static_range(2):
                dk_rows, dv_rows = _add_dkv(
                    dk_rows, dv_rows, k_rows, v_rows, q_of, dout_of, q_base, dout_base,
                    lse_base, delta_base, factors,
                    cut, low, high, masked == 0, TILE, VALUES,
                )  # fmt: skip
        dk_of = frame_of(dk_frames, k_frame_strides, r, HEADS_K, TILE)
        dk_base = row_base(dk_of, batch, row, head, TILE)
        store_rows(dk_of, dk_base, times(dk_rows, scale), left, BLOCK_N, TILE)
    if dv_strides is None:
        dv_strides = k_frame_strides
    dv_of = frame_of(dv, dv_strides, 0, HEADS_K, VALUES)
    dv_base = row_base(dv_of, batch, row, head, VALUES)
    store_rows(dv_of, dv_base, dv_rows, left, BLOCK_N, VALUES)
