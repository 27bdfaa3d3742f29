"""Attention over regions of keys, forward: raw q, k and v to out and the log-sum-exp.

Every region rotates queries and keys to its own positions. A query then sees a key at the
difference of the two: in ReRoPE, near keys at their distance and all far keys at the window. For
one block of queries the kernel goes through the regions, far keys first. It rotates its queries to
the region's positions and runs over the region's keys like flash-attention. The next region goes on
with the same running maximum, running sum and weighted values. So near and far keys share one
softmax, and regions differ only in their rotated q and k.

An earlier launch rotates keys once (rotate.py): this loop would rotate each key again for every
block of queries. A block of keys that all rows of the block see whole needs no mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import AttentionCall, lse_shape
from . import configs
from .device import (
    Launch,
    add_weighted,
    bounded,
    copy_of,
    cut_keys,
    dots,
    finish_softmax,
    first_key,
    freqs_of,
    groups_of,
    inside_of,
    keys_of,
    launch_for,
    load_part,
    load_rows,
    load_values,
    log_n_scale,
    lse_of,
    map_cos_sin,
    no_logit,
    nth_block,
    place_queries,
    programs_of,
    row_base,
    rows_of,
    seen_keys,
    sequence_stride,
    sequences_of,
    store_rows,
    tiles_of,
    times,
    with_contiguous_rows,
    zero_rows,
)
from .rotate import rotated_keys

# -------------------------------------------------------------------------------------------------
# A block of raw queries, rotated while it is loaded; dims keep their places


@triton.jit
def _cos_sin(pair, position, scale, rope, REGION: tl.constexpr, TILE: tl.constexpr):
    """Return cosine and sine of pairs, times a query's factors; 1 and 0 past the rotated dims."""
    inv_freq, log_decay, pair_maps, head_k = rope
    MAP: tl.constexpr = TILE.q_maps[REGION]
    rotates = pair < TILE.half
    freq = tl.load(inv_freq + pair, mask=rotates, other=0.0)[None, :]
    decay = None
    if log_decay is not None:
        decay = tl.load(log_decay + pair, mask=rotates, other=0.0).to(tl.float64)[None, :]
    cos, sin = map_cos_sin(position, freq, decay, (pair_maps, pair, head_k), MAP, None, TILE)
    factor = tl.where(rotates, TILE.amplitude, 1.0)[None, :] * scale
    return cos * factor, sin * factor


@triton.jit
def _rounded(part, ELEMENT: tl.constexpr, TILE: tl.constexpr):
    """Round to the operand type of products."""
    part = part.to(ELEMENT)
    return part.to(tl.float32) if TILE.widen else part


@triton.jit
def _rotated_part(
    q, base, left, position, scale, rope, REGION: tl.constexpr, FIRST: tl.constexpr,
    DIMS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the rotated dims FIRST to FIRST + DIMS: (ROWS, DIMS)."""
    HALF: tl.constexpr = TILE.half
    part = load_part(q, base, left, FIRST, DIMS, ROWS, True, TILE).to(tl.float32)
    if TILE.interleaved:  # a pair's two dims are next to each other
        pair = FIRST // 2 + tl.arange(0, DIMS // 2)
        cos, sin = _cos_sin(pair, position, scale, rope, REGION, TILE)
        x, y = tl.split(tl.reshape(part, (ROWS, DIMS // 2, 2)))
        rotated = tl.reshape(tl.join(x * cos - y * sin, y * cos + x * sin), (ROWS, DIMS))
    else:  # the other dim of each pair is loaded beside it
        dim = FIRST + tl.arange(0, DIMS)
        of_second = (dim >= HALF) & (dim < 2 * HALF)
        pair = tl.where(of_second, dim - HALF, dim)
        pair = tl.where(dim < 2 * HALF, pair, HALF)
        other = tl.where(of_second, dim - HALF, tl.where(dim < HALF, dim + HALF, dim))
        if HALF % 8 == 0:  # eight dims stay together; the compiler does not see that
            other = tl.max_contiguous(tl.multiple_of(other, 8), 8)
        cos, sin = _cos_sin(pair, position, scale, rope, REGION, TILE)
        row = tl.arange(0, ROWS) * (tl.cast(q.seq, tl.int32) * TILE.align)
        inside = inside_of(left, FIRST, DIMS, ROWS, True, TILE)
        others = tl.load(base + (row[:, None] + other[None, :]), mask=inside, other=0.0)
        others = others.to(tl.float32)
        rotated = part * cos + tl.where(of_second[None, :], others, -others) * sin
    return _rounded(rotated, q.pointer.dtype.element_ty, TILE)


@triton.jit
def rotated_rows(
    q, base, left, position, rope, query_scale, REGION: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Return ROWS raw rows rotated for a region, in parts like those of load_rows, rounded once.

    position: absolute. query_scale: None, or a pointer to the factor of the first row.
    """
    DIMS: tl.constexpr = TILE.dims
    MORE: tl.constexpr = TILE.more_dims
    ELEMENT: tl.constexpr = q.pointer.dtype.element_ty
    scale = log_n_scale(position, TILE.per_log_n)
    if query_scale is not None:
        scale *= load_values(query_scale, left, ROWS, True)[:, None]
    if TILE.paired:
        cos, sin = _cos_sin(tl.arange(0, DIMS), position, scale, rope, REGION, TILE)
        x = load_part(q, base, left, 0, DIMS, ROWS, True, TILE).to(tl.float32)
        y = load_part(q, base, left, DIMS, MORE, ROWS, True, TILE).to(tl.float32)
        first = _rounded(x * cos - y * sin, ELEMENT, TILE)
        second = _rounded(y * cos + x * sin, ELEMENT, TILE)
    else:
        first = _rotated_part(q, base, left, position, scale, rope, REGION, 0, DIMS, ROWS, TILE)
        second = first
        if MORE > 0:
            second = _rotated_part(
                q, base, left, position, scale, rope, REGION, DIMS, MORE, ROWS, TILE
            )
    return first, second


# -------------------------------------------------------------------------------------------------
# The kernel


@triton.jit
def _add_keys(
    state, q, k, v, k_base, v_base, cut, low, high, REGION: tl.constexpr, MASKED: tl.constexpr,
    TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Add the masked, or full, blocks of keys to (weighted values, row_max, row_sum).

    In a masked block, row i sees only the keys from low[i] to high[i].
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    acc, row_max, row_sum = state
    _, _, full, masked, _ = cut
    for i in tl.range(masked if MASKED else full):
        start, left = nth_block(i, cut, MASKED, BLOCK_N)
        k_at = k_base + tl.cast(start, tl.int64) * k.seq * TILE.align
        v_at = v_base + tl.cast(start, tl.int64) * v.seq * TILE.align
        k_rows = load_rows(k, k_at, left, BLOCK_N, MASKED, TILE)  # (N, D) twice
        logits = bounded(dots(q, k_rows, TILE), TILE)  # (M, N)
        if MASKED:
            seen = seen_keys(start, low, high, REGION, TILE)
            logits = tl.where(seen, logits * TILE.factor, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(logits, 1))  # (M,)
            weights = tl.exp2(logits - new_max[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(logits, 1) * TILE.factor)
            weights = tl.exp2(logits * TILE.factor - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        v_rows = load_rows(v, v_at, left, BLOCK_N, MASKED, VALUES)
        acc = add_weighted(times(acc, rescale), weights, v_rows, VALUES)  # (M, D) twice
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(
    do_not_specialize=[
        *("q_batch", "q_seq", "q_head", "k_batch", "k_seq", "k_head", "v_batch", "v_seq", "v_head"),
        *("freq_batch", "scale_batch", "q_start_stride", "k_start_stride", "num_sequences"),
        *("search_steps", "blocks", "seqlen_q", "seqlen_k"),
    ]
)
def forward_kernel(
    q, k, k_rotated, v, out, lse, scratch, inv_freq, log_decay, pair_maps, cu_seqlens, q_start,
    k_start, query_scale, sinks,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head,
    freq_batch, scale_batch, q_start_stride, k_start_stride, num_sequences, search_steps, blocks,
    seqlen_q, seqlen_k, TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Attend for a block of queries. Axis 0: blocks, longest first, then heads, then the batch.

    scratch: room for as many rows as q has, or None if rows of out have enough.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    CHUNK: tl.constexpr = TILE.rotated
    REGIONS: tl.constexpr = len(TILE.q_maps)
    HEADS: tl.constexpr = TILE.heads_q
    HEADS_K: tl.constexpr = TILE.heads_k
    PAIRED: tl.constexpr = TILE.paired
    at = place_queries(
        blocks, cu_seqlens, num_sequences, search_steps, q_start, k_start, q_start_stride,
        k_start_stride, seqlen_q, seqlen_k, TILE,
    )  # fmt: skip
    batch, head, row, left = at.batch, at.head, at.row, at.left
    head_k = head // (HEADS // HEADS_K)
    position = at.top + tl.arange(0, BLOCK_M)
    inv_freq = freqs_of(inv_freq, head_k, TILE) + tl.cast(at.sequence, tl.int64) * freq_batch
    rope = (inv_freq, log_decay, pair_maps, head_k)
    if query_scale is not None:
        query_scale += tl.cast(batch, tl.int64) * scale_batch + row
    q_of = rows_of(q, q_batch, q_seq, q_head, HEADS, TILE)
    v_of = rows_of(v, v_batch, v_seq, v_head, HEADS_K, VALUES)
    v_base = row_base(v_of, batch, at.first_row, head_k, VALUES)
    out_of = copy_of(out, seqlen_q, 0, 1, HEADS, VALUES)
    room = out_of
    if scratch is not None:
        room = copy_of(scratch, seqlen_q, 0, 1, HEADS, TILE)

    row_max = tl.full((BLOCK_M,), no_logit(), tl.float32)
    state = (zero_rows(BLOCK_M, VALUES), row_max, tl.zeros((BLOCK_M,), tl.float32))
    for r in tl.static_range(REGIONS):
        # Rotate the queries for this region.
        if r == 0 and PAIRED:
            q_base = row_base(q_of, batch, row, head, TILE)
            q_rows = rotated_rows(
                q_of, q_base, left, position + at.origin, rope, query_scale, 0, BLOCK_M, TILE
            )
        else:
            # Few registers are free between two loops, and rows whose parts are not the two dims
            # of pairs need many. So a few rows at a time go through memory.
            tl.debug_barrier()
            for few in tl.range(0, BLOCK_M, CHUNK):
                q_base = row_base(q_of, batch, row + few, head, TILE)
                few_scales = None
                if query_scale is not None:
                    few_scales = query_scale + few
                few_positions = at.top + at.origin + few + tl.arange(0, CHUNK)
                few_rows = rotated_rows(
                    q_of, q_base, left - few, few_positions, rope, few_scales, r, CHUNK, TILE
                )
                room_base = row_base(room, batch, row + few, head, TILE)
                store_rows(room, room_base, few_rows, left - few, CHUNK, TILE)
            tl.debug_barrier()
            room_base = row_base(room, batch, row, head, TILE)
            q_rows = load_rows(room, room_base, left, BLOCK_M, True, TILE)
        # The region's keys; blocks that all rows see need no mask.
        k_of = keys_of(k, k_batch, k_seq, k_head, k_rotated, seqlen_k, r, TILE)
        k_base = row_base(k_of, batch, at.first_row, head_k, TILE)
        low = first_key(position, at.seqlen_k, at.origin, r, TILE)
        high = first_key(position, at.seqlen_k, at.origin, r + 1, TILE)
        cut = cut_keys(at, r, TILE)
        for masked in tl.static_range(2):
            state = _add_keys(
                state, q_rows, k_of, v_of, k_base, v_base, cut, low, high, r, masked == 0,
                TILE, VALUES,
            )  # fmt: skip

    acc, row_max, row_sum = state
    factor, ended = finish_softmax(row_max, row_sum, sinks, head)
    if REGIONS > 1 or not PAIRED:
        tl.debug_barrier()
    out_base = row_base(out_of, batch, row, head, VALUES)
    store_rows(out_of, out_base, times(acc, factor), left, BLOCK_M, VALUES)
    lse += (tl.cast(batch, tl.int64) * HEADS + head) * seqlen_q + row
    tl.store(lse + tl.arange(0, BLOCK_M), lse_of(ended), mask=tl.arange(0, BLOCK_M) < left)


# -------------------------------------------------------------------------------------------------
# The launch


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attend by one softmax over the keys of every region, in two launches.

    q, k: raw, (batch, seqlen_q, heads_q, head_dim) and (batch, seqlen_k, heads_k, head_dim), or
    (total, heads, head_dim) with call.cu_seqlens. v: like k, with any head_dim. All are contiguous
    in the last dimension.

    Returns out, like q with v's head_dim, and the natural log of the sum of exponentials, float32
    (batch, heads_q, seqlen_q) or (heads_q, total).
    """
    call = with_contiguous_rows(call)
    launch = launch_for(_build_launch, (q, k, v), call)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=call.results_dtype(q.dtype))
    lse = q.new_empty(lse_shape(q), dtype=torch.float32)
    fits = v.shape[-1] == q.shape[-1] and out.dtype == q.dtype
    scratch = None if fits else q.new_empty(q.shape)
    with torch.cuda.device_of(q):
        k_rotated = rotated_keys(q, k, call)
        if launch.grid[0] > 0:
            forward_kernel[launch.grid](
                q, k, k_rotated, v, out, lse, scratch, call.inv_freq, call.log_decay,
                call.pair_maps, call.cu_seqlens, call.q_start, call.k_start, call.query_scale,
                call.sinks, *launch.sizes, **launch.options,
            )  # fmt: skip
    return out, lse


def _build_launch(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Launch:
    setting = configs.config_of("forward", q, v)
    tile, values = tiles_of(setting, q, k, v, call)
    programs, blocks = programs_of(q, setting.block_m, call)
    sizes = (
        *groups_of(q, tile.align), *groups_of(k, tile.align), *groups_of(v, tile.align),
        sequence_stride(call.inv_freq, 2), sequence_stride(call.query_scale, 2),
        sequence_stride(call.q_start, 1), sequence_stride(call.k_start, 1), *sequences_of(call),
        blocks, q.shape[-3], k.shape[-3],
    )  # fmt: skip
    return Launch((programs,), sizes, {"TILE": tile, "VALUES": values, **setting.options})
