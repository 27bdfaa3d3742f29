"""Attention over regions of keys, forward: raw q, k and v to out and the log-sum-exp.

k is raw too, or comes rotated by one map already (`call.stored`), as from a cache.

Every region rotates queries and keys to its own positions. A query then sees a key at the
difference of the two: in ReRoPE, near keys at their distance and all far keys at its window. For
one block of queries the kernel goes through the regions, far keys first. It rotates its queries to
the region's positions and runs over the region's keys like flash-attention. The next region goes on
with the same row_max, row_sum and acc. So near and far keys share one softmax, and regions differ
only in their rotated q and k.

An earlier launch rotates keys once (rotate.py): this loop would rotate each key again for every
block of queries.

The mask: in region r, query i sees the keys from region_begin(i, r) to region_begin(i, r + 1), and
region_begin(i, regions) is the end of its keys. device.py defines it, with a picture.

Names: M is BLOCK_M, rows of queries; N is BLOCK_N, rows of keys. A row of q or k comes in two tiles
of D0 and D1 dims, a row of v or out in tiles of DV0 and DV1: see Blocks in device.py. If D1 is 0,
the second tile is never used. MODEL is a ModelConstants of device.py.

load_tile(row_0, stride, rows, ROWS, DIMS, HEAD_DIM, MASK_ROWS) loads a (ROWS, DIMS) tile from the
pointer row_0 on: 0 past HEAD_DIM dims, and if MASK_ROWS past `rows` rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._shared.triton.launch import Launch
from ..call import AttentionCall, lse_shape
from . import configs
from .device import (
    add_sink,
    as_operand,
    constants_of,
    cos_sin_of_map,
    count_blocks,
    find_block,
    launch_for,
    ln_2,
    load_tile,
    log2_e,
    nth_map,
    programs_of,
    region_begin,
    sequence_stride,
    sequences_of,
    softcap,
    store_tile,
    strides_in_elements,
    strides_in_groups,
    with_contiguous_rows,
)
from .rotate import Rotation, build_rotation, rotate

# -------------------------------------------------------------------------------------------------
# Raw queries, rotated while they are loaded; dims keep their places


@triton.jit
def _query_cos_sin(
    pair, q_pos, scale, inv_freq, log_decay, pair_maps, head_k, MAP: tl.constexpr,
    MODEL: tl.constexpr,
):  # fmt: skip
    """Return the cosine and sine of these pairs, times all factors of a query: (ROWS, pairs).

    pair: (pairs,). From HALF on pairs do not rotate: 1 and 0, times `scale`: (ROWS, 1), or 1.
    """
    HALF: tl.constexpr = MODEL.half
    rotates = pair < HALF
    freq = tl.load(inv_freq + pair, mask=rotates, other=0.0)[None, :]  # (1, pairs)
    decay = None
    if log_decay is not None:
        decay = tl.load(log_decay + pair, mask=rotates, other=0.0).to(tl.float64)[None, :]
    cos, sin = cos_sin_of_map(
        q_pos, freq, decay, pair_maps, pair, head_k, MAP, None, HALF, MODEL.map_heads
    )  # None: queries come rotated by no map
    # Keys are rotated without the attention factor: the query carries it for both.
    factor = tl.where(rotates, MODEL.attention_factor_sq, 1.0)[None, :] * scale
    return cos * factor, sin * factor


@triton.jit
def _rotate_tile(
    q_row, q_stride_seq, rows, q_pos, scale, inv_freq, log_decay, pair_maps, head_k,
    MAP: tl.constexpr, FIRST: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr,
    MODEL: tl.constexpr,
):  # fmt: skip
    """Load dims FIRST to FIRST + DIMS of ROWS rows and rotate them: (ROWS, DIMS) float32."""
    HALF: tl.constexpr = MODEL.half
    OFFSET: tl.constexpr = MODEL.rotary_offset  # even
    DIMS_LEFT: tl.constexpr = MODEL.head_dim - FIRST  # of a row, from FIRST on
    x = load_tile(q_row + FIRST, q_stride_seq, rows, ROWS, DIMS, DIMS_LEFT, True).to(tl.float32)
    if MODEL.interleaved:  # rotated dims 2 i and 2 i + 1 are pair i
        pair = (FIRST - OFFSET) // 2 + tl.arange(0, DIMS // 2)
        if OFFSET > 0:
            pair = tl.where(pair >= 0, pair, HALF)  # no pair: cosine 1, sine 0
        cos, sin = _query_cos_sin(
            pair, q_pos, scale, inv_freq, log_decay, pair_maps, head_k, MAP, MODEL
        )
        a, b = tl.split(tl.reshape(x, (ROWS, DIMS // 2, 2)))
        rotated = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, DIMS))
    else:  # rotated dims i and HALF + i are pair i: the other dim of each is loaded beside it
        dim = FIRST + tl.arange(0, DIMS)
        rotated_dim = dim - OFFSET
        is_first = rotated_dim < HALF
        rotates = rotated_dim < 2 * HALF
        if OFFSET > 0:
            is_first = is_first & (rotated_dim >= 0)
            rotates = rotates & (rotated_dim >= 0)
        is_second = (rotated_dim >= HALF) & rotates
        pair = tl.where(is_second, rotated_dim - HALF, rotated_dim)
        pair = tl.where(rotates, pair, HALF)  # no pair: cosine 1, sine 0
        other_dim = tl.where(is_second, dim - HALF, tl.where(is_first, dim + HALF, dim))
        if HALF % 8 == 0 and OFFSET % 8 == 0:
            # The borders at OFFSET, HALF and 2 HALF further, where other_dim jumps, are multiples
            # of 8. So it runs on in groups of eight dims. The compiler does not see that, and would
            # load one by one.
            other_dim = tl.max_contiguous(tl.multiple_of(other_dim, 8), 8)
        cos, sin = _query_cos_sin(
            pair, q_pos, scale, inv_freq, log_decay, pair_maps, head_k, MAP, MODEL
        )
        row = tl.arange(0, ROWS)[:, None]
        mask = row < rows if DIMS <= DIMS_LEFT else (row < rows) & (dim < MODEL.head_dim)[None, :]
        other_ptr = q_row + (row * tl.cast(q_stride_seq, tl.int32) + other_dim[None, :])
        other = tl.load(other_ptr, mask=mask, other=0.0).to(tl.float32)  # (ROWS, DIMS)
        rotated = x * cos + tl.where(is_second[None, :], other, -other) * sin
    return rotated


@triton.jit
def _rotate_queries(
    q_row, q_stride_seq, rows, q_pos, query_scale, inv_freq, log_decay, pair_maps, head_k,
    MAP: tl.constexpr, ROWS: tl.constexpr, MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Load ROWS queries and rotate them by MAP: (ROWS, D0) and (ROWS, D1), rounded once.

    q_row: dim 0 of the first row. rows: how many exist. q_pos: their absolute positions, (ROWS,).
    query_scale: None, or a pointer to the factor of the first row.
    """
    D0: tl.constexpr = BLOCKS.d0
    D1: tl.constexpr = BLOCKS.d1
    scale = 1.0
    if query_scale is not None:
        row = tl.arange(0, ROWS)
        scale = tl.load(query_scale + row, mask=row < rows, other=0.0)[:, None]  # (ROWS, 1)
    if BLOCKS.tiles_are_pairs:
        cos, sin = _query_cos_sin(
            tl.arange(0, D0), q_pos, scale, inv_freq, log_decay, pair_maps, head_k, MAP, MODEL
        )  # (ROWS, D0)
        a = load_tile(q_row, q_stride_seq, rows, ROWS, D0, D0, True).to(tl.float32)
        b = load_tile(q_row + D0, q_stride_seq, rows, ROWS, D1, D1, True).to(tl.float32)
        q0 = a * cos - b * sin
        q1 = b * cos + a * sin
    else:
        q0 = _rotate_tile(
            q_row, q_stride_seq, rows, q_pos, scale, inv_freq, log_decay, pair_maps, head_k,
            MAP, 0, D0, ROWS, MODEL,
        )  # fmt: skip
        q1 = q0
        if D1 > 0:
            q1 = _rotate_tile(
                q_row, q_stride_seq, rows, q_pos, scale, inv_freq, log_decay, pair_maps, head_k,
                MAP, D0, D1, ROWS, MODEL,
            )  # fmt: skip
    return q0.to(q_row.dtype.element_ty), q1.to(q_row.dtype.element_ty)


# -------------------------------------------------------------------------------------------------
# The kernel


@triton.jit
def _attend_keys(
    acc0, acc1,  # (M, DV0), (M, DV1) float32: weights @ v so far
    row_max, row_sum,  # (M,) float32, base 2; row_max >= -1e30 is finite: exp2 never gets inf - inf
    q0, q1,  # (M, D0), (M, D1), rotated to this region's positions
    k_row, k_stride_seq, v_row, v_stride_seq,  # key 0 of the sequence and head; elements
    begin, end,  # the keys that any of the rows sees in this region
    num_before, num_full, num_masked,  # blocks of keys from `begin` on; num_before of num_masked
    row_begin, row_end,  # (M,): row i sees keys [row_begin[i], row_end[i]); read if MASKED
    MASKED: tl.constexpr,  # add the masked blocks, before and after the full ones; else the full
    FROM_KEY_0: tl.constexpr,  # row_begin is 0 for every row
    MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add a region's masked, or its full, blocks of keys to the softmax."""
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    D0: tl.constexpr = BLOCKS.d0
    D1: tl.constexpr = BLOCKS.d1
    DV0: tl.constexpr = BLOCKS.dv0
    DV1: tl.constexpr = BLOCKS.dv1
    HEAD_DIM: tl.constexpr = MODEL.head_dim
    HEAD_DIM_V: tl.constexpr = MODEL.head_dim_v
    for i in tl.range(num_masked if MASKED else num_full):
        # Full blocks lie between the masked ones, which step over them.
        block = i + tl.where(i < num_before, 0, num_full) if MASKED else num_before + i
        start = begin + block * BLOCK_N
        # A full block lies inside [begin, end), so it is loaded without a mask of rows. If
        # num_full is 0, the last of num_before may reach past `end`: `row_end` hides keys loaded as
        # 0. No key outside [begin, end) is loaded: a rotated copy may be infinite outside of its
        # region, and is not written before all windows.
        rows = end - start
        k_block = k_row + tl.cast(start, tl.int64) * k_stride_seq
        v_block = v_row + tl.cast(start, tl.int64) * v_stride_seq

        # logits = q @ k.T, with a cap its tanh: (M, N). Times MODEL.logit_unit they have base 2.
        # Both tiles are loaded first: after a float32 product, the second would spill.
        k0 = load_tile(k_block, k_stride_seq, rows, BLOCK_N, D0, HEAD_DIM, MASKED)  # (N, D0)
        k1 = k0
        if D1 > 0:
            k1 = load_tile(k_block + D0, k_stride_seq, rows, BLOCK_N, D1, HEAD_DIM - D0, MASKED)
        logits = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            logits = tl.dot(q1, tl.trans(k1), logits, input_precision="ieee")
        logits = softcap(logits, MODEL.softmax_scale, MODEL.softcap)

        # weights = exp2(logits - new_max): (M, N)
        if MASKED:
            key = (start + tl.arange(0, BLOCK_N))[None, :]
            seen = key < row_end[:, None]
            if not FROM_KEY_0:
                seen = seen & (key >= row_begin[:, None])
            logits = tl.where(seen, logits * MODEL.logit_unit, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(logits, 1))  # (M,)
            weights = tl.exp2(logits - new_max[:, None])
        else:
            # The unit is positive: it may follow the maximum, and multiply-add joins it to exp2.
            new_max = tl.maximum(row_max, tl.max(logits, 1) * MODEL.logit_unit)
            weights = tl.exp2(logits * MODEL.logit_unit - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)  # (M,)

        # acc = acc * rescale + weights @ v
        v0 = load_tile(v_block, v_stride_seq, rows, BLOCK_N, DV0, HEAD_DIM_V, MASKED)  # (N, DV0)
        v1 = v0
        if DV1 > 0:
            v1 = load_tile(
                v_block + DV0, v_stride_seq, rows, BLOCK_N, DV1, HEAD_DIM_V - DV0, MASKED
            )
        weights_v = weights.to(v0.dtype)
        acc0 = tl.dot(weights_v, v0, acc0 * rescale[:, None], input_precision="ieee")
        if DV1 > 0:
            acc1 = tl.dot(weights_v, v1, acc1 * rescale[:, None], input_precision="ieee")
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
    return acc0, acc1, row_max, row_sum


@triton.jit(
    do_not_specialize=[
        *("q_stride_batch", "q_stride_seq", "q_stride_head"),
        *("k_stride_batch", "k_stride_seq", "k_stride_head"),
        *("v_stride_batch", "v_stride_seq", "v_stride_head"),
        *("freq_stride", "scale_stride", "q_start_stride", "k_start_stride"),
        *("num_sequences", "search_steps", "blocks", "seqlen_q", "seqlen_k"),
    ]
)
def forward_kernel(
    q, k, v,  # (batch, seqlen, heads, dims), or (1, total, heads, dims) if packed
    k_rotated,  # (batch, seqlen_k, copies, heads_k, head_dim), contiguous; None: no region needs it
    out, lse,  # (batch, seqlen_q, heads_q, head_dim_v); (batch, heads_q, seqlen_q): contiguous
    scratch,  # like q, contiguous; None: rows of out hold rotated queries meanwhile
    inv_freq, log_decay,  # (sequences or 1, freq_heads, half) float; (half,) or None: xPos
    pair_maps,  # (rows, 2: divisors and offsets, map_heads, half) float64, or None
    cu_seqlens, q_start, k_start,  # (sequences + 1,), (sequences or 1,), ... int32, or None
    query_scale, sinks,  # (batch or 1, seqlen_q) float32; (heads_q,) float32 logits; or None
    q_stride_batch, q_stride_seq, q_stride_head,  # divided by BLOCKS.align
    k_stride_batch, k_stride_seq, k_stride_head,
    v_stride_batch, v_stride_seq, v_stride_head,
    freq_stride, scale_stride, q_start_stride, k_start_stride,  # between sequences; 0: they share
    num_sequences, search_steps,  # packed sequences, and steps of a binary search for one
    blocks,  # blocks of queries for each head: at least as many as there are
    seqlen_q, seqlen_k,  # the totals if packed
    MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Attend for a block of queries.

    Axis 0: blocks of queries, a head's longest first; then heads, then the batch.
    """
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    CHUNK_M: tl.constexpr = BLOCKS.chunk_m  # divides BLOCK_M
    D0: tl.constexpr = BLOCKS.d0
    D1: tl.constexpr = BLOCKS.d1
    DV0: tl.constexpr = BLOCKS.dv0
    DV1: tl.constexpr = BLOCKS.dv1
    HEADS_Q: tl.constexpr = MODEL.heads_q
    HEADS_K: tl.constexpr = MODEL.heads_k
    HEAD_DIM: tl.constexpr = MODEL.head_dim
    HEAD_DIM_V: tl.constexpr = MODEL.head_dim_v
    # Far keys first. A start counts from the first position of the query's block of `granularity`.
    REGIONS: tl.constexpr = len(MODEL.starts)

    # Strides in elements from here on. They come divided by BLOCKS.align: the product shows the
    # compiler that it may load 16 bytes at a time. BLOCKS.contiguous: constants take their place.
    q_stride_batch, q_stride_seq, q_stride_head = strides_in_elements(
        q_stride_batch, q_stride_seq, q_stride_head, HEADS_Q, HEAD_DIM, BLOCKS
    )
    k_stride_batch, k_stride_seq, k_stride_head = strides_in_elements(
        k_stride_batch, k_stride_seq, k_stride_head, HEADS_K, HEAD_DIM, BLOCKS
    )
    v_stride_batch, v_stride_seq, v_stride_head = strides_in_elements(
        v_stride_batch, v_stride_seq, v_stride_head, HEADS_K, HEAD_DIM_V, BLOCKS
    )

    # This program's batch (0 if packed), head and sequence; the sequence's first token in q and k
    # (`first_row`, 0 if not packed) and its lengths; `index`, of num_blocks, is its block of
    # queries. A program without a block is block 0 of 1 of a sequence of length 0: it has neither
    # rows nor keys.
    this = find_block(
        blocks, HEADS_Q, cu_seqlens, num_sequences, search_steps, seqlen_q, seqlen_k, BLOCK_M
    )
    head_k = this.head // (HEADS_Q // HEADS_K)
    batch = tl.cast(this.batch, tl.int64)
    # The last block of a sequence sees the most keys, so it starts first: short ones fill the gaps.
    q_first = (this.num_blocks - 1 - this.index) * BLOCK_M  # within the sequence
    rows = this.seqlen_q - q_first  # rows of the sequence from there on; may exceed BLOCK_M
    q_index = this.first_row + q_first  # the block's first token in q, and in out

    # A query's own key, and the last one it sees, is counted from the sequence's first key.
    # Positions are absolute: rotations and regions' blocks of granularity depend on them.
    key_0_pos = 0
    if k_start is not None:
        key_0_pos = tl.load(k_start + this.sequence * k_start_stride)
    shift = this.seqlen_k - this.seqlen_q  # query 0's own key: both sides end together,
    if q_start is not None:  # unless positions say where they begin
        shift = tl.load(q_start + this.sequence * q_start_stride) - key_0_pos
    first_q_key = q_first + shift
    last_q_key = tl.minimum(first_q_key + BLOCK_M, this.seqlen_q + shift) - 1
    q_key = first_q_key + tl.arange(0, BLOCK_M)  # (M,)

    # Pointers to the first row: of this block in q, out and scratch, of the sequence in k and v,
    # which packed sequences begin at the same token as q.
    q_row = q + (
        batch * q_stride_batch
        + tl.cast(q_index, tl.int64) * q_stride_seq
        + tl.cast(this.head, tl.int64) * q_stride_head
    )
    v_row = v + (
        batch * v_stride_batch
        + tl.cast(this.first_row, tl.int64) * v_stride_seq
        + tl.cast(head_k, tl.int64) * v_stride_head
    )
    out_index = (batch * seqlen_q + q_index) * HEADS_Q + this.head
    out_row = out + out_index * HEAD_DIM_V
    chunk_row = out_row  # where chunks of rotated queries go; without scratch both dims are equal
    if scratch is not None:
        chunk_row = scratch + out_index * HEAD_DIM
    inv_freq += tl.cast(this.sequence, tl.int64) * freq_stride
    if MODEL.freq_heads > 1:
        inv_freq += head_k * MODEL.half
    if query_scale is not None:
        query_scale += batch * scale_stride + q_index

    acc0 = tl.zeros((BLOCK_M, DV0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, DV1 if DV1 > 0 else 1), tl.float32)
    # Below any logit, but finite: a row that has seen no key has exp2(-inf - -1e30) = 0, not NaN.
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for r in tl.static_range(REGIONS):
        # Rotate the queries for this region: q0 (M, D0), q1 (M, D1).
        if r == 0 and BLOCKS.tiles_are_pairs:
            q0, q1 = _rotate_queries(
                q_row, q_stride_seq, rows, q_key + key_0_pos, query_scale, inv_freq, log_decay,
                pair_maps, head_k, nth_map(MODEL.q_maps, r), BLOCK_M, MODEL, BLOCKS,
            )  # fmt: skip
            q0 = as_operand(q0)  # float32 in the interpreter, which multiplies no bfloat16
            q1 = as_operand(q1)
        else:
            # Few registers are free between two loops, and rows whose tiles are not the two dims of
            # pairs need many. So CHUNK_M rows at a time go through memory, rows of this block only.
            tl.debug_barrier()  # all threads have loaded the last region's q from there
            for chunk in tl.range(0, BLOCK_M, CHUNK_M):
                chunk_offset = tl.cast(chunk, tl.int64)
                chunk_scale = None
                if query_scale is not None:
                    chunk_scale = query_scale + chunk
                chunk0, chunk1 = _rotate_queries(
                    q_row + chunk_offset * q_stride_seq, q_stride_seq, rows - chunk,
                    first_q_key + key_0_pos + chunk + tl.arange(0, CHUNK_M), chunk_scale, inv_freq,
                    log_decay, pair_maps, head_k, nth_map(MODEL.q_maps, r), CHUNK_M, MODEL, BLOCKS,
                )  # fmt: skip
                to_row = chunk_row + chunk_offset * (HEADS_Q * HEAD_DIM)
                store_tile(to_row, HEADS_Q * HEAD_DIM, chunk0, rows - chunk, CHUNK_M, D0, HEAD_DIM)
                if D1 > 0:
                    store_tile(
                        to_row + D0, HEADS_Q * HEAD_DIM, chunk1, rows - chunk, CHUNK_M, D1,
                        HEAD_DIM - D0,
                    )  # fmt: skip
            tl.debug_barrier()  # all rows are stored
            q0 = load_tile(chunk_row, HEADS_Q * HEAD_DIM, rows, BLOCK_M, D0, HEAD_DIM, True)
            q1 = q0
            if D1 > 0:
                q1 = load_tile(
                    chunk_row + D0, HEADS_Q * HEAD_DIM, rows, BLOCK_M, D1, HEAD_DIM - D0, True
                )

        # The region's keys: k itself, or a rotated copy.
        if MODEL.sees_given_k[r]:
            k_row = k + (
                batch * k_stride_batch
                + tl.cast(this.first_row, tl.int64) * k_stride_seq
                + tl.cast(head_k, tl.int64) * k_stride_head
            )
            k_row_stride = k_stride_seq
        else:
            k_index = batch * seqlen_k + this.first_row
            k_index = (k_index * MODEL.k_copies + MODEL.k_copy[r]) * HEADS_K + head_k
            k_row = k_rotated + k_index * HEAD_DIM
            k_row_stride = MODEL.k_copies * HEADS_K * HEAD_DIM

        # Row i sees the keys [row_begin[i], row_end[i]): the next region begins where this one
        # ends. Both rise with i. So the rows together see [begin, end), and every row sees
        # [every_begin, every_end). Blocks of N keys from `begin` on: num_before masked ones,
        # num_full inside what every row sees, then masked ones up to `end`, num_masked in all.
        row_begin = region_begin(q_key, this.seqlen_k, key_0_pos, r, MODEL)  # (M,)
        row_end = region_begin(q_key, this.seqlen_k, key_0_pos, r + 1, MODEL)
        begin = 0
        every_begin = 0
        if not (r == 0 and MODEL.from_key_0):
            begin = region_begin(first_q_key, this.seqlen_k, key_0_pos, r, MODEL)
            every_begin = region_begin(last_q_key, this.seqlen_k, key_0_pos, r, MODEL)
        every_end = region_begin(first_q_key, this.seqlen_k, key_0_pos, r + 1, MODEL)
        end = region_begin(last_q_key, this.seqlen_k, key_0_pos, r + 1, MODEL)
        num_before, num_full, num_masked = count_blocks(begin, every_begin, every_end, end, BLOCK_N)
        for full in tl.static_range(2):  # 0: the masked blocks, 1: the full; the order is free
            acc0, acc1, row_max, row_sum = _attend_keys(
                acc0, acc1, row_max, row_sum, q0, q1, k_row, k_row_stride, v_row, v_stride_seq,
                begin, end, num_before, num_full, num_masked, row_begin, row_end,
                full == 0, r == 0 and MODEL.from_key_0, MODEL, BLOCKS,
            )  # fmt: skip

    # Divide by the sum. A row that sees no key, or none but a sink of -inf, has out 0.
    sees_no_key = row_sum == 0.0  # (M,)
    if sinks is None:
        row_sum = tl.where(sees_no_key, 1.0, row_sum)
        factor = 1.0 / row_sum
        lse_without_keys = float("-inf")
    else:
        lse_without_keys = tl.load(sinks + this.head)  # the sink's own bits
        # A sink is a logit without a value: it joins row_max and row_sum, and rescales acc.
        row_max, row_sum, rescale = add_sink(row_max, row_sum, lse_without_keys * log2_e())
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        factor = rescale / row_sum
    if REGIONS > 1 or not BLOCKS.tiles_are_pairs:
        tl.debug_barrier()  # all threads have loaded q from out's rows
    factor = factor[:, None]
    store_tile(out_row, HEADS_Q * HEAD_DIM_V, acc0 * factor, rows, BLOCK_M, DV0, HEAD_DIM_V)
    if DV1 > 0:
        store_tile(
            out_row + DV0, HEADS_Q * HEAD_DIM_V, acc1 * factor, rows, BLOCK_M, DV1, HEAD_DIM_V - DV0
        )
    row = tl.arange(0, BLOCK_M)
    lse_row = lse + (batch * HEADS_Q + this.head) * seqlen_q + q_index
    natural_lse = tl.where(sees_no_key, lse_without_keys, row_max * ln_2() + tl.log(row_sum))
    tl.store(lse_row + row, natural_lse, mask=row < rows)


# -------------------------------------------------------------------------------------------------
# The launches


class Launches(NamedTuple):
    """Both launches of a call."""

    rotate_keys: Rotation
    attend: Launch
    needs_scratch: bool  # rotated queries go through memory, and rows of out cannot hold them


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attend by one softmax over the keys of every region, in two launches.

    q: raw, (batch, seqlen_q, heads_q, head_dim). k: rotated by call.stored, or raw, (batch,
    seqlen_k, heads_k, head_dim). With call.cu_seqlens both are (total, heads, head_dim). v: like k,
    with any head_dim. All are contiguous in the last dimension.

    Returns out, like q with v's head_dim, and the natural log of the sum of exponentials, float32
    (batch, heads_q, seqlen_q) or (heads_q, total).
    """
    call = with_contiguous_rows(call)
    rotate_keys, attend, needs_scratch = launch_for(_build_launches, (q, k, v), call)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=call.results_dtype(q.dtype))
    lse = q.new_empty(lse_shape(q), dtype=torch.float32)
    scratch = q.new_empty(q.shape) if needs_scratch else None
    _, k_rotated = rotate(rotate_keys, q, k, call)
    attend((
        q, k, v, k_rotated, out, lse, scratch, call.inv_freq, call.log_decay, call.pair_maps,
        call.cu_seqlens, call.q_start, call.k_start, call.query_scale, call.sinks,
    ))  # fmt: skip
    return out, lse


def _build_launches(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Launches:
    """Build both launches; sizes are the kernel's integers from q_stride_batch to seqlen_k."""
    config = configs.config_of("forward", q, v)
    model, blocks = constants_of(config, q, k, v, call)
    programs, blocks_of_head = programs_of(q, config.block_m, call)
    strides = (n for x in (q, k, v) for n in strides_in_groups(x, blocks.align))
    sizes = (
        *strides, sequence_stride(call.inv_freq, 2), sequence_stride(call.query_scale, 2),
        sequence_stride(call.q_start, 1), sequence_stride(call.k_start, 1), *sequences_of(call),
        blocks_of_head, q.shape[-3], k.shape[-3],
    )  # fmt: skip
    options = {"MODEL": model, "BLOCKS": blocks, **config.options}
    attend = Launch(forward_kernel, (programs,), sizes, options)
    through_memory = len(model.starts) > 1 or not blocks.tiles_are_pairs
    out_fits = model.head_dim_v == model.head_dim and call.results_dtype(q.dtype) == q.dtype
    return Launches(build_rotation(q, k, call, "keys"), attend, through_memory and not out_fits)
