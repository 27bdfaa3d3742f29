"""The backward kernel by block of queries: delta, then the gradients of queries.

Every frame has a gradient of its own, in float32. No atomics: the same bits in every run.
"""

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
from .rows import (
    add_weighted,
    dots,
    frame_of,
    inside_of,
    keys_of,
    load_rows,
    load_values,
    pointers_to,
    row_base,
    rows_of,
    times,
    zero_rows,
)
from .softmax import LOG2_E, before_the_cap, bounded, factors_of


@triton.jit
def _add_dq(
    dq,
    q,
    dout,
    k,
    v,
    k_base,
    v_base,
    factors,
    lse,
    delta,
    cut,
    low,
    high,
    REGION: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Add to dq, short of the scale, what the masked, or full, blocks of keys give.

    In a masked block row i sees only the keys from low[i] to high[i].
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    inner, factor = factors
    _, _, full, masked, _ = cut
    for i in tl.range(masked if MASKED else full):
        start, left = nth_block(i, cut, MASKED, BLOCK_N)
        k_at = k_base + tl.cast(start, tl.int64) * k.seq * TILE.align
        v_at = v_base + tl.cast(start, tl.int64) * v.seq * TILE.align
        k_rows = load_rows(k, k_at, left, BLOCK_N, MASKED, TILE)
        logits = bounded(dots(q, k_rows, TILE), inner, TILE)
        weights = tl.exp2(logits * factor - lse[:, None])
        if MASKED:
            weights = tl.where(seen_keys(start, low, high, REGION, TILE), weights, 0.0)
        v_rows = load_rows(v, v_at, left, BLOCK_N, MASKED, VALUES)
        d_logits = weights * (dots(dout, v_rows, VALUES) - delta[:, None])
        dq = add_weighted(dq, before_the_cap(d_logits, logits, TILE), k_rows, TILE)
    return dq


@triton.jit
def _find_delta(
    out, out_base, douts, dlse, delta, lse, row_of_head, left,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """delta = sum(dout * out) - dlse of every row, 0 where it sees no key; kept for dk and dv."""
    outs = load_rows(out, out_base, left, ROWS, True, TILE)
    deltas = tl.sum(outs[0].to(tl.float32) * douts[0].to(tl.float32), 1)
    if TILE.more_dims > 0:
        deltas += tl.sum(outs[1].to(tl.float32) * douts[1].to(tl.float32), 1)
    if dlse is not None:
        deltas -= load_values(dlse + row_of_head, left, ROWS, True)
    deltas = tl.where(lse == float("-inf"), 0.0, deltas)
    row = tl.arange(0, ROWS)
    tl.store(delta + row_of_head + row, deltas, mask=row < left)
    return deltas


@triton.jit
def _store_dq(x, base, rows, count, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Store the first `count` rows, both parts of one by the same registers with addresses: those
    of all rows are held while sums still are."""
    MORE: tl.constexpr = TILE.more_dims
    inside = inside_of(count, 0, TILE.dims, ROWS, True, TILE)
    tl.store(pointers_to(x, base, 0, TILE.dims, ROWS, TILE), rows[0], mask=inside)
    if MORE > 0:
        inside = inside_of(count, TILE.dims, MORE, ROWS, True, TILE)
        to = pointers_to(x, base + TILE.dims, 0, MORE, ROWS, TILE)
        tl.store(to, rows[1], mask=inside)


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def dq_kernel(
    q_frames, k, k_frames, v, out, dout, dlse, lse, delta, dq_frames, cu_seqlens, q_start, k_start,
    q_frame_strides, k_strides, k_frame_strides, v_strides, out_strides, dout_strides,
    start_strides, num_sequences, search_steps, blocks, rows, seqlen_q, seqlen_k,
    start_0, start_1, start_2, granularity, window, softmax_scale, softcap,
    TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Axis 0: blocks of queries, longest first, then heads, then the batch."""
    BLOCK_M: tl.constexpr = TILE.block_m
    REGIONS: tl.constexpr = len(TILE.q_maps)
    HEADS: tl.constexpr = TILE.heads_q
    GROUP: tl.constexpr = HEADS // TILE.heads_k
    (
        batch, _, head, first_row, row, left, top, bottom, position, seqlen_k, origin,
    ) = place_queries(
        blocks, HEADS, cu_seqlens, q_start, k_start, start_strides, num_sequences, search_steps,
        seqlen_q, seqlen_k, TILE,
    )  # fmt: skip
    bounds = Bounds(start_0, start_1, start_2, granularity, window, seqlen_k, origin)

    scale = tl.full((BLOCK_M,), softmax_scale, tl.float32)
    row_of_head = (tl.cast(batch, tl.int64) * HEADS + head) * rows + row
    lses = load_values(lse + row_of_head, left, BLOCK_M, True)
    factors = factors_of(softmax_scale, softcap, TILE)
    dout_of = rows_of(dout, dout_strides, HEADS, VALUES)
    dout_base = row_base(dout_of, batch, row, head, VALUES)
    douts = load_rows(dout_of, dout_base, left, BLOCK_M, True, VALUES)
    out_of = rows_of(out, out_strides, HEADS, VALUES)
    out_base = row_base(out_of, batch, row, head, VALUES)
    deltas = _find_delta(
        out_of, out_base, douts, dlse, delta, lses, row_of_head, left, BLOCK_M, VALUES
    )
    v_of = rows_of(v, v_strides, TILE.heads_k, VALUES)
    v_base = row_base(v_of, batch, first_row, head // GROUP, VALUES)
    for r in tl.static_range(REGIONS):
        q_of = frame_of(q_frames, q_frame_strides, r, HEADS, TILE)
        q_base = row_base(q_of, batch, row, head, TILE)
        q_rows = load_rows(q_of, q_base, left, BLOCK_M, True, TILE)
        k_of = keys_of(k, k_strides, k_frames, k_frame_strides, r, TILE)
        k_base = row_base(k_of, batch, first_row, head // GROUP, TILE)
        low = first_key(position, bounds, r, TILE)
        high = first_key(position, bounds, r + 1, TILE)
        cut = cut_keys(top, bottom, bounds, r, TILE)
        grad = zero_rows(BLOCK_M, TILE)
        for masked in tl.static_range(2):
            grad = _add_dq(
                grad, q_rows, douts, k_of, v_of, k_base, v_base, factors,
                lses * LOG2_E, deltas, cut, low, high, r, masked == 0, TILE, VALUES,
            )  # fmt: skip
        dq_of = frame_of(dq_frames, q_frame_strides, r, HEADS, TILE)
        dq_base = row_base(dq_of, batch, row, head, TILE)
        _store_dq(dq_of, dq_base, times(grad, scale), left, BLOCK_M, TILE)
