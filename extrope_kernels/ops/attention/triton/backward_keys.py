"""The backward kernel by key tile: the gradients of keys and values.

The query heads of a group are summed in one program, without atomics: the same bits in every run.
"""

import triton
import triton.language as tl

from .rows import add_weighted, dots, load_rows, load_values, row_base, store_rows, times, zero_rows
from .tiles import LOG2_E, RUN_TIME_SCALARS, end_query, nth_tile, place, split_queries


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
    row_scale,
    softmax_scale,
    span,
    low,
    high,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add to dk, short of softmax_scale, and to dv what the masked, or full, tiles of rows give.

    In a masked tile only rows low[j] to high[j] see key j.
    """
    QUERIES: tl.constexpr = TILE.queries
    _, _, full, masked, _ = span
    for i in tl.range(masked if MASKED else full):
        start, left = nth_tile(i, span, MASKED, QUERIES)
        factor = tl.full((QUERIES,), softmax_scale * LOG2_E, tl.float32)
        if row_scale is not None:
            scale = load_values(row_scale + start, left, QUERIES, MASKED)
            factor *= scale
        sums = load_values(lse + start, left, QUERIES, MASKED) * LOG2_E
        deltas = load_values(delta + start, left, QUERIES, MASKED)
        q_at = q_base + tl.cast(start, tl.int64) * q.seq * TILE.align
        dout_at = dout_base + tl.cast(start, tl.int64) * dout.seq * TILE.align
        q_rows = load_rows(q, q_at, left, QUERIES, MASKED, TILE)
        weights = tl.exp2(dots(k, q_rows, TILE) * factor[None, :] - sums[None, :])
        if MASKED:
            row = (start + tl.arange(0, QUERIES))[None, :]
            weights = tl.where((row >= low[:, None]) & (row < high[:, None]), weights, 0.0)
        douts = load_rows(dout, dout_at, left, QUERIES, MASKED, TILE)
        dv = add_weighted(dv, weights, douts, TILE)
        d_logits = weights * (dots(v, douts, TILE) - deltas[None, :])
        if row_scale is not None:
            d_logits *= scale[None, :]
        dk = add_weighted(dk, d_logits, q_rows, TILE)
    return dk, dv


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def dkv_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    row_scale,
    cu_seqlens,
    tile_starts,
    num_sequences,
    search_steps,
    tiles,
    heads_q,
    group,
    rows,
    seqlen_q,
    seqlen_k,
    start_0,
    start_1,
    start_2,
    granularity,
    softmax_scale,
    TILE: tl.constexpr,
):
    """Axis 0: key tiles, longest first, then heads of keys, then the batch."""
    KEYS: tl.constexpr = TILE.keys
    starts = (start_0, start_1, start_2)
    batch, head, tile, _, first_row, seqlen_q, seqlen_k = place(
        tiles,
        heads_q // group,
        cu_seqlens,
        tile_starts,
        num_sequences,
        search_steps,
        seqlen_q,
        seqlen_k,
    )
    first = tile * KEYS
    row = first_row + first
    live = seqlen_k - first
    key = first + tl.arange(0, KEYS)
    last = tl.minimum(first + KEYS, seqlen_k) - 1
    shift = seqlen_k - seqlen_q  # from a row to its position
    top = tl.maximum(shift, 0)

    v_base = row_base(v, batch, row, head, TILE)
    v_rows = load_rows(v, v_base, live, KEYS, True, TILE)
    dv_rows = zero_rows(KEYS, TILE)
    scale = tl.full((KEYS,), softmax_scale, tl.float32)
    for r in tl.static_range(TILE.regions):
        k_base = row_base(k[r], batch, row, head, TILE)
        k_rows = load_rows(k[r], k_base, live, KEYS, True, TILE)
        low = end_query(key, starts, granularity, top, seqlen_k, r + 1, TILE) - shift
        high = end_query(key, starts, granularity, top, seqlen_k, r, TILE) - shift
        span = split_queries(first, last, starts, granularity, seqlen_q, seqlen_k, r, TILE)
        dk_rows = zero_rows(KEYS, TILE)
        for head_q in tl.range(head * group, head * group + group):
            q_base = row_base(q[r], batch, first_row, head_q, TILE)
            dout_base = row_base(dout, batch, first_row, head_q, TILE)
            row_of_head = (tl.cast(batch, tl.int64) * heads_q + head_q) * rows + first_row
            lse_base = lse + row_of_head
            delta_base = delta + row_of_head
            scale_base = row_scale
            if row_scale is not None:
                scale_base += first_row
            for masked in tl.static_range(2):
                dk_rows, dv_rows = _add_dkv(
                    dk_rows, dv_rows, k_rows, v_rows, q[r], dout, q_base, dout_base,
                    lse_base, delta_base, scale_base, softmax_scale,
                    span, low, high, masked == 0, TILE,
                )  # fmt: skip
        dk_base = row_base(dk[r], batch, row, head, TILE)
        store_rows(dk[r], dk_base, times(dk_rows, scale), live, KEYS, TILE)
    store_rows(dv, row_base(dv, batch, row, head, TILE), dv_rows, live, KEYS, TILE)
