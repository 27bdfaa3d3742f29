"""The forward kernel: one program for each query tile and head, over the keys of every region."""

import triton
import triton.language as tl

from .rows import add_weighted, dots, load_rows, load_values, row_base, store_rows, times, zero_rows
from .tiles import (
    LN_2,
    LOG2_E,
    RUN_TIME_SCALARS,
    first_key,
    nth_tile,
    place_queries,
    seen_keys,
    split_keys,
)

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
    factor,
    span,
    low,
    high,
    REGION: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Take the masked, or full, tiles of keys into (weighted values, maximum, sum of weights).

    In a masked tile row i sees only the keys from low[i] to high[i].
    """
    KEYS: tl.constexpr = TILE.keys
    acc, peak, total = state
    _, _, full, masked, _ = span
    for i in tl.range(masked if MASKED else full):
        start, left = nth_tile(i, span, MASKED, KEYS)
        k_at = k_base + tl.cast(start, tl.int64) * k.seq * TILE.align
        v_at = v_base + tl.cast(start, tl.int64) * v.seq * TILE.align
        k_rows = load_rows(k, k_at, left, KEYS, MASKED, TILE)
        logits = dots(q, k_rows, TILE)
        if MASKED:
            seen = seen_keys(start, low, high, REGION, TILE)
            logits = tl.where(seen, logits * factor[:, None], float("-inf"))
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            weights = tl.exp2(logits - new_peak[:, None])
        else:
            new_peak = tl.maximum(peak, tl.max(logits, 1) * factor)
            weights = tl.exp2(logits * factor[:, None] - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        v_rows = load_rows(v, v_at, left, KEYS, MASKED, TILE)
        acc = add_weighted(times(acc, shrink), weights, v_rows, TILE)
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
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
    """Axis 0: query tiles, longest first, then heads, then the batch."""
    QUERIES: tl.constexpr = TILE.queries
    starts = (start_0, start_1, start_2)
    batch, head, first_row, row, live, top, bottom, position, seqlen_k = place_queries(
        tiles, heads_q, cu_seqlens, tile_starts, num_sequences, search_steps, seqlen_q, seqlen_k,
        TILE,
    )  # fmt: skip

    factor = tl.full((QUERIES,), softmax_scale * LOG2_E, tl.float32)
    if row_scale is not None:
        factor *= load_values(row_scale + row, live, QUERIES, True)
    peak = tl.full((QUERIES,), NO_LOGIT, tl.float32)
    state = (zero_rows(QUERIES, TILE), peak, tl.zeros((QUERIES,), tl.float32))
    v_base = row_base(v, batch, first_row, head // group, TILE)
    for r in tl.static_range(TILE.regions):
        q_base = row_base(q[r], batch, row, head, TILE)
        q_rows = load_rows(q[r], q_base, live, QUERIES, True, TILE)
        k_base = row_base(k[r], batch, first_row, head // group, TILE)
        low = first_key(position, starts, granularity, seqlen_k, r, TILE)
        high = first_key(position, starts, granularity, seqlen_k, r + 1, TILE)
        span = split_keys(top, bottom, starts, granularity, seqlen_k, r, TILE)
        for masked in tl.static_range(2):
            state = _add_keys(
                state, q_rows, k[r], v, k_base, v_base, factor, span, low, high,
                r, masked == 0, TILE,
            )  # fmt: skip

    acc, peak, total = state
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out_base = row_base(out, batch, row, head, TILE)
    store_rows(out, out_base, times(acc, 1.0 / total), live, QUERIES, TILE)
    value = tl.where(empty, float("-inf"), peak * LN_2 + tl.log(total))
    lse += (tl.cast(batch, tl.int64) * heads_q + head) * rows + row
    tl.store(lse + tl.arange(0, QUERIES), value, mask=tl.arange(0, QUERIES) < live)
