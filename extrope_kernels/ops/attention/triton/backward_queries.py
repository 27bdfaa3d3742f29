"""The backward kernels by query tile: row sums, then the gradients of queries.

Every frame has a gradient of its own, in float32. No atomics: the same bits in every run.
"""

import triton
import triton.language as tl

from .rows import add_weighted, dots, load_rows, load_values, row_base, store_rows, times, zero_rows
from .tiles import (
    LOG2_E,
    RUN_TIME_SCALARS,
    first_key,
    nth_tile,
    place_queries,
    seen_keys,
    split_keys,
)


@triton.jit(do_not_specialize=("tiles", "heads_q", "rows"))
def delta_kernel(out, dout, dlse, lse, delta, tiles, heads_q, rows, TILE: tl.constexpr):
    """delta = sum(dout * out) - dlse of every row, 0 where it sees no key."""
    QUERIES: tl.constexpr = TILE.queries
    first = tl.program_id(0) % tiles * QUERIES
    rest = tl.program_id(0) // tiles
    head = rest % heads_q
    batch = rest // heads_q
    live = rows - first
    out_base = row_base(out, batch, first, head, TILE)
    outs = load_rows(out, out_base, live, QUERIES, True, TILE)
    dout_base = row_base(dout, batch, first, head, TILE)
    douts = load_rows(dout, dout_base, live, QUERIES, True, TILE)
    sums = tl.sum(outs[0].to(tl.float32) * douts[0].to(tl.float32), 1)
    if TILE.more_lanes > 0:
        sums += tl.sum(outs[1].to(tl.float32) * douts[1].to(tl.float32), 1)
    row = (tl.cast(batch, tl.int64) * heads_q + head) * rows + first
    if dlse is not None:
        sums -= load_values(dlse + row, live, QUERIES, True)
    empty = load_values(lse + row, live, QUERIES, True) == float("-inf")
    sums = tl.where(empty, 0.0, sums)
    tl.store(delta + row + tl.arange(0, QUERIES), sums, mask=tl.arange(0, QUERIES) < live)


@triton.jit
def _add_dq(
    dq,
    q,
    dout,
    k,
    v,
    k_base,
    v_base,
    factor,
    lse,
    delta,
    span,
    low,
    high,
    REGION: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add to dq, short of the scale, what the masked, or full, tiles of keys give.

    In a masked tile row i sees only the keys from low[i] to high[i].
    """
    KEYS: tl.constexpr = TILE.keys
    _, _, full, masked, _ = span
    for i in tl.range(masked if MASKED else full):
        start, left = nth_tile(i, span, MASKED, KEYS)
        k_at = k_base + tl.cast(start, tl.int64) * k.seq * TILE.align
        v_at = v_base + tl.cast(start, tl.int64) * v.seq * TILE.align
        k_rows = load_rows(k, k_at, left, KEYS, MASKED, TILE)
        weights = tl.exp2(dots(q, k_rows, TILE) * factor[:, None] - lse[:, None])
        if MASKED:
            weights = tl.where(seen_keys(start, low, high, REGION, TILE), weights, 0.0)
        v_rows = load_rows(v, v_at, left, KEYS, MASKED, TILE)
        d_logits = weights * (dots(dout, v_rows, TILE) - delta[:, None])
        dq = add_weighted(dq, d_logits, k_rows, TILE)
    return dq


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def dq_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
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

    scale = tl.full((QUERIES,), softmax_scale, tl.float32)
    if row_scale is not None:
        scale *= load_values(row_scale + row, live, QUERIES, True)
    factor = scale * LOG2_E
    row_of_head = (tl.cast(batch, tl.int64) * heads_q + head) * rows + row
    sums = load_values(lse + row_of_head, live, QUERIES, True) * LOG2_E
    deltas = load_values(delta + row_of_head, live, QUERIES, True)
    dout_base = row_base(dout, batch, row, head, TILE)
    douts = load_rows(dout, dout_base, live, QUERIES, True, TILE)
    v_base = row_base(v, batch, first_row, head // group, TILE)
    for r in tl.static_range(TILE.regions):
        q_base = row_base(q[r], batch, row, head, TILE)
        q_rows = load_rows(q[r], q_base, live, QUERIES, True, TILE)
        k_base = row_base(k[r], batch, first_row, head // group, TILE)
        low = first_key(position, starts, granularity, seqlen_k, r, TILE)
        high = first_key(position, starts, granularity, seqlen_k, r + 1, TILE)
        span = split_keys(top, bottom, starts, granularity, seqlen_k, r, TILE)
        grad = zero_rows(QUERIES, TILE)
        for masked in tl.static_range(2):
            grad = _add_dq(
                grad, q_rows, douts, k[r], v, k_base, v_base, factor, sums, deltas,
                span, low, high, r, masked == 0, TILE,
            )  # fmt: skip
        dq_base = row_base(dq[r], batch, row, head, TILE)
        store_rows(dq[r], dq_base, times(grad, scale), live, QUERIES, TILE)
