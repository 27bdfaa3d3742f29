"""Attention over regions of keys, backward: the gradients of raw q and k, and of v.

There are four launches:
1. rotate raw q and k to the positions of every region;
2. by block of queries, compute delta and the gradients of rotated queries;
3. by block of keys, compute the gradients of rotated keys and of values;
4. rotate gradients back and sum them over regions.

Every region has its own gradients, in float32, so no sum is ever rotated. Kernels 2 and 3 use the
log-sum-exp over all regions, so a merge of regions needs no backward. Without atomics, every run
gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import AttentionCall
from . import configs
from .device import (
    Launch,
    add_weighted,
    before_the_cap,
    bounded,
    copy_of,
    cut_keys,
    dots,
    first_key,
    groups_of,
    inside_of,
    keys_of,
    launch_for,
    load_rows,
    load_values,
    log2_e,
    nth_block,
    origin_of,
    place,
    place_queries,
    pointers_to,
    programs_of,
    row_base,
    rows_of,
    seen_keys,
    sequence_stride,
    sequences_of,
    split,
    store_rows,
    tiles_of,
    times,
    with_contiguous_rows,
    zero_rows,
)
from .rotate import gradients_of_copies, rotate_back, rotated

# -------------------------------------------------------------------------------------------------
# By block of queries: delta, then the gradients of queries


@triton.jit
def _find_delta(
    out, out_base, douts, dlse, delta, lse, row_of_head, left,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return and store delta = sum(dout * out) - dlse, (M,): 0 for a row that sees no key."""
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
def _add_dq(
    dq, q, dout, k, v, k_base, v_base, lse, delta, cut, low, high, REGION: tl.constexpr,
    MASKED: tl.constexpr, TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Add the terms of the masked, or full, blocks of keys to dq, without the scale.

    In a masked block, row i sees only the keys from low[i] to high[i].
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    _, _, full, masked, _ = cut
    for i in tl.range(masked if MASKED else full):
        start, left = nth_block(i, cut, MASKED, BLOCK_N)
        k_at = k_base + tl.cast(start, tl.int64) * k.seq * TILE.align
        v_at = v_base + tl.cast(start, tl.int64) * v.seq * TILE.align
        k_rows = load_rows(k, k_at, left, BLOCK_N, MASKED, TILE)  # (N, D) twice
        logits = bounded(dots(q, k_rows, TILE), TILE)  # (M, N)
        weights = tl.exp2(logits * TILE.factor - lse[:, None])
        if MASKED:
            weights = tl.where(seen_keys(start, low, high, REGION, TILE), weights, 0.0)
        v_rows = load_rows(v, v_at, left, BLOCK_N, MASKED, VALUES)
        d_logits = weights * (dots(dout, v_rows, VALUES) - delta[:, None])
        dq = add_weighted(dq, before_the_cap(d_logits, logits, TILE), k_rows, TILE)  # (M, D) twice
    return dq


@triton.jit
def _store_dq(x, base, rows, count, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Store the first `count` rows.

    Both parts share registers for addresses, since these are live together with the sums.
    """
    MORE: tl.constexpr = TILE.more_dims
    inside = inside_of(count, 0, TILE.dims, ROWS, True, TILE)
    tl.store(pointers_to(x, base, 0, TILE.dims, ROWS, TILE), rows[0], mask=inside)
    if MORE > 0:
        inside = inside_of(count, TILE.dims, MORE, ROWS, True, TILE)
        to = pointers_to(x, base + TILE.dims, 0, MORE, ROWS, TILE)
        tl.store(to, rows[1], mask=inside)


@triton.jit(
    do_not_specialize=[
        *("k_batch", "k_seq", "k_head", "v_batch", "v_seq", "v_head"),
        *("out_batch", "out_seq", "out_head", "dout_batch", "dout_seq", "dout_head"),
        *("q_start_stride", "k_start_stride", "num_sequences", "search_steps", "blocks"),
        *("seqlen_q", "seqlen_k"),
    ]
)
def dq_kernel(
    q_rotated, k, k_rotated, v, out, dout, dlse, lse, delta, dq_rotated, cu_seqlens, q_start,
    k_start, k_batch, k_seq, k_head, v_batch, v_seq, v_head, out_batch, out_seq, out_head,
    dout_batch, dout_seq, dout_head, q_start_stride, k_start_stride, num_sequences, search_steps,
    blocks, seqlen_q, seqlen_k, TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Compute delta and dq. Axis 0: blocks of queries, longest first, then heads, then batch."""
    BLOCK_M: tl.constexpr = TILE.block_m
    REGIONS: tl.constexpr = len(TILE.q_maps)
    HEADS: tl.constexpr = TILE.heads_q
    HEADS_K: tl.constexpr = TILE.heads_k
    at = place_queries(
        blocks, cu_seqlens, num_sequences, search_steps, q_start, k_start, q_start_stride,
        k_start_stride, seqlen_q, seqlen_k, TILE,
    )  # fmt: skip
    batch, head, row, left = at.batch, at.head, at.row, at.left
    head_k = head // (HEADS // HEADS_K)
    position = at.top + tl.arange(0, BLOCK_M)

    scale = tl.full((BLOCK_M,), TILE.softmax_scale, tl.float32)
    row_of_head = (tl.cast(batch, tl.int64) * HEADS + head) * seqlen_q + row
    lses = load_values(lse + row_of_head, left, BLOCK_M, True)
    dout_of = rows_of(dout, dout_batch, dout_seq, dout_head, HEADS, VALUES)
    dout_base = row_base(dout_of, batch, row, head, VALUES)
    douts = load_rows(dout_of, dout_base, left, BLOCK_M, True, VALUES)
    out_of = rows_of(out, out_batch, out_seq, out_head, HEADS, VALUES)
    out_base = row_base(out_of, batch, row, head, VALUES)
    deltas = _find_delta(
        out_of, out_base, douts, dlse, delta, lses, row_of_head, left, BLOCK_M, VALUES
    )
    v_of = rows_of(v, v_batch, v_seq, v_head, HEADS_K, VALUES)
    v_base = row_base(v_of, batch, at.first_row, head_k, VALUES)
    for r in tl.static_range(REGIONS):
        q_of = copy_of(q_rotated, seqlen_q, r, REGIONS, HEADS, TILE)
        q_base = row_base(q_of, batch, row, head, TILE)
        q_rows = load_rows(q_of, q_base, left, BLOCK_M, True, TILE)
        k_of = keys_of(k, k_batch, k_seq, k_head, k_rotated, seqlen_k, r, TILE)
        k_base = row_base(k_of, batch, at.first_row, head_k, TILE)
        low = first_key(position, at.seqlen_k, at.origin, r, TILE)
        high = first_key(position, at.seqlen_k, at.origin, r + 1, TILE)
        cut = cut_keys(at, r, TILE)
        grad = zero_rows(BLOCK_M, TILE)
        for masked in tl.static_range(2):
            grad = _add_dq(
                grad, q_rows, douts, k_of, v_of, k_base, v_base, lses * log2_e(), deltas, cut,
                low, high, r, masked == 0, TILE, VALUES,
            )  # fmt: skip
        dq_of = copy_of(dq_rotated, seqlen_q, r, REGIONS, HEADS, TILE)
        dq_base = row_base(dq_of, batch, row, head, TILE)
        _store_dq(dq_of, dq_base, times(grad, scale), left, BLOCK_M, TILE)


# -------------------------------------------------------------------------------------------------
# By block of keys: the gradients of keys and values


@triton.jit
def _end_query(key, at, REGION: tl.constexpr, TILE: tl.constexpr):
    """Return the end of the rows that see `key` in REGION or a later one; at: as in dkv_kernel."""
    seqlen_q, shift, origin = at
    end = key
    if len(TILE.starts) > REGION:
        # Floor division: Triton's rounds toward zero if the dividend is negative.
        ahead = tl.maximum(key + origin - TILE.starts[REGION], -TILE.granularity)
        last = (ahead + TILE.granularity) // TILE.granularity * TILE.granularity - origin
        if TILE.window > 0:
            last = tl.minimum(last, key + TILE.window)
        end = tl.maximum(end, last)
    return tl.minimum(tl.maximum(end, tl.maximum(shift, 0)), seqlen_q + shift) - shift


@triton.jit
def _cut_queries(first, last, at, REGION: tl.constexpr, TILE: tl.constexpr):
    """Cut the range of rows that see keys `first` to `last` into blocks, like `cut_keys`."""
    low = _end_query(first, at, REGION + 1, TILE)
    all_low = _end_query(last, at, REGION + 1, TILE)
    all_high = _end_query(first, at, REGION, TILE)
    high = _end_query(last, at, REGION, TILE)
    before, full, masked = split(low, all_low, all_high, high, TILE.block_m)
    return low, before, full, masked, high


@triton.jit
def _add_dkv(
    dk, dv, k, v, q, dout, q_base, dout_base, lse, delta, cut, low, high, MASKED: tl.constexpr,
    TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Add the terms of the masked, or full, blocks of rows to dk, without the scale, and to dv.

    In a masked block, only rows low[j] to high[j] see key j.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    _, _, full, masked, _ = cut
    for i in tl.range(masked if MASKED else full):
        start, left = nth_block(i, cut, MASKED, BLOCK_M)
        lses = load_values(lse + start, left, BLOCK_M, MASKED) * log2_e()
        deltas = load_values(delta + start, left, BLOCK_M, MASKED)
        q_at = q_base + tl.cast(start, tl.int64) * q.seq * TILE.align
        dout_at = dout_base + tl.cast(start, tl.int64) * dout.seq * TILE.align
        q_rows = load_rows(q, q_at, left, BLOCK_M, MASKED, TILE)  # (M, D) twice
        logits = bounded(dots(k, q_rows, TILE), TILE)  # (N, M)
        weights = tl.exp2(logits * TILE.factor - lses[None, :])
        if MASKED:
            row = (start + tl.arange(0, BLOCK_M))[None, :]
            weights = tl.where((row >= low[:, None]) & (row < high[:, None]), weights, 0.0)
        douts = load_rows(dout, dout_at, left, BLOCK_M, MASKED, VALUES)
        dv = add_weighted(dv, weights, douts, VALUES)  # (N, D) twice
        d_logits = weights * (dots(v, douts, VALUES) - deltas[None, :])
        dk = add_weighted(dk, before_the_cap(d_logits, logits, TILE), q_rows, TILE)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        *("k_batch", "k_seq", "k_head", "v_batch", "v_seq", "v_head"),
        *("dout_batch", "dout_seq", "dout_head", "q_start_stride", "k_start_stride"),
        *("num_sequences", "search_steps", "blocks", "seqlen_q", "seqlen_k"),
    ]
)
def dkv_kernel(
    q_rotated, k, k_rotated, v, dout, lse, delta, dk_rotated, dv, cu_seqlens, q_start, k_start,
    k_batch, k_seq, k_head, v_batch, v_seq, v_head, dout_batch, dout_seq, dout_head,
    q_start_stride, k_start_stride, num_sequences, search_steps, blocks, seqlen_q, seqlen_k,
    TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv. Axis 0: blocks of keys, longest first, then heads of k, then the batch.

    One program sums over the query heads of a group.
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    REGIONS: tl.constexpr = len(TILE.q_maps)
    HEADS: tl.constexpr = TILE.heads_q
    HEADS_K: tl.constexpr = TILE.heads_k
    GROUP: tl.constexpr = HEADS // HEADS_K
    batch, sequence, head, block, _, first_row, rows_q, rows_k = place(
        blocks, HEADS_K, cu_seqlens, num_sequences, search_steps, seqlen_q, seqlen_k, BLOCK_N
    )
    first = block * BLOCK_N
    row = first_row + first
    left = rows_k - first
    key = first + tl.arange(0, BLOCK_N)
    last = tl.minimum(first + BLOCK_N, rows_k) - 1
    shift, origin = origin_of(
        sequence, q_start, k_start, q_start_stride, k_start_stride, rows_q, rows_k
    )
    at = (rows_q, shift, origin)

    v_of = rows_of(v, v_batch, v_seq, v_head, HEADS_K, VALUES)
    v_base = row_base(v_of, batch, row, head, VALUES)
    v_rows = load_rows(v_of, v_base, left, BLOCK_N, True, VALUES)
    dout_of = rows_of(dout, dout_batch, dout_seq, dout_head, HEADS, VALUES)
    dv_rows = zero_rows(BLOCK_N, VALUES)
    scale = tl.full((BLOCK_N,), TILE.softmax_scale, tl.float32)
    for r in tl.static_range(REGIONS):
        k_of = keys_of(k, k_batch, k_seq, k_head, k_rotated, seqlen_k, r, TILE)
        k_base = row_base(k_of, batch, row, head, TILE)
        k_rows = load_rows(k_of, k_base, left, BLOCK_N, True, TILE)
        low = _end_query(key, at, r + 1, TILE)
        high = _end_query(key, at, r, TILE)
        cut = _cut_queries(first, last, at, r, TILE)
        q_of = copy_of(q_rotated, seqlen_q, r, REGIONS, HEADS, TILE)
        dk_rows = zero_rows(BLOCK_N, TILE)
        for head_q in tl.range(head * GROUP, head * GROUP + GROUP):
            q_base = row_base(q_of, batch, first_row, head_q, TILE)
            dout_base = row_base(dout_of, batch, first_row, head_q, VALUES)
            row_of_head = (tl.cast(batch, tl.int64) * HEADS + head_q) * seqlen_q + first_row
            for masked in tl.static_range(2):
                dk_rows, dv_rows = _add_dkv(
                    dk_rows, dv_rows, k_rows, v_rows, q_of, dout_of, q_base, dout_base,
                    lse + row_of_head, delta + row_of_head, cut, low, high, masked == 0,
                    TILE, VALUES,
                )  # fmt: skip
        dk_of = copy_of(dk_rotated, seqlen_k, r, REGIONS, HEADS_K, TILE)
        dk_base = row_base(dk_of, batch, row, head, TILE)
        store_rows(dk_of, dk_base, times(dk_rows, scale), left, BLOCK_N, TILE)
    dv_of = copy_of(dv, seqlen_k, 0, 1, HEADS_K, VALUES)
    dv_base = row_base(dv_of, batch, row, head, VALUES)
    store_rows(dv_of, dv_base, dv_rows, left, BLOCK_N, VALUES)


# -------------------------------------------------------------------------------------------------
# The launches


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of raw q and k, and of v, in their dtypes or float32; four launches.

    dout: like out, contiguous in the last dimension. dlse: like lse, or None. The other arguments
    are those of `forward`.
    """
    call, lse = with_contiguous_rows(call), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    by_queries, by_keys = launch_for(_build_launch, (q, k, v, out, dout), call)
    dq, dk, dv = (x.new_empty(x.shape, dtype=call.results_dtype(x.dtype)) for x in (q, k, v))
    delta = lse.new_empty(lse.shape)
    starts = (call.cu_seqlens, call.q_start, call.k_start)
    with torch.cuda.device_of(q):
        q_rotated, k_rotated = rotated(q, k, call)
        dq_rotated, dk_rotated = gradients_of_copies(q, k, call)
        if by_queries.grid[0] > 0:
            dq_kernel[by_queries.grid](
                q_rotated, k, k_rotated, v, out, dout, dlse, lse, delta, dq_rotated, *starts,
                *by_queries.sizes, **by_queries.options,
            )  # fmt: skip
        if by_keys.grid[0] > 0:
            dkv_kernel[by_keys.grid](
                q_rotated, k, k_rotated, v, dout, lse, delta, dk_rotated, dv, *starts,
                *by_keys.sizes, **by_keys.options,
            )  # fmt: skip
        rotate_back(dq, dk, dq_rotated, dk_rotated, call)
    return dq, dk, dv


def _build_launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, call: AttentionCall
) -> tuple[Launch, Launch]:
    """Build two launches: by block of queries, and by block of keys."""
    launches, counts = [], sequences_of(call)
    start_strides = (sequence_stride(call.q_start, 1), sequence_stride(call.k_start, 1))
    for name, blocks_of, strided in (("dq", q, (k, v, out, dout)), ("dkv", k, (k, v, dout))):
        setting = configs.config_of(name, q, v)
        tile, values = tiles_of(setting, q, k, v, call, dout, out)
        size = setting.block_m if name == "dq" else setting.block_n
        programs, blocks = programs_of(blocks_of, size, call)
        strides = (n for x in strided for n in groups_of(x, tile.align))
        sizes = (*strides, *start_strides, *counts, blocks, q.shape[-3], k.shape[-3])
        options = {"TILE": tile, "VALUES": values, **setting.options}
        launches.append(Launch((programs,), sizes, options))
    return launches[0], launches[1]
