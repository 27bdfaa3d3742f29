"""Attention over regions of keys, backward: the gradients of raw q and k, and of v.

There are four launches:
1. rotate raw q and k to the positions of every region; q also gets its factors of the logits,
   query_scale and the attention factors of both sides, so that only softmax_scale is left;
2. by block of queries, compute delta and the gradients of rotated queries;
3. by block of keys, compute the gradients of rotated keys and of values;
4. rotate gradients back, times the factors of step 1, and sum them over regions.

Every region has its own gradients, in float32, so no sum is ever rotated. Kernels 2 and 3 use the
log-sum-exp over all regions, so a merge of regions needs no backward. Without atomics, every run
gives the same bits.

With logits = scale * q @ k.T of rotated q and k, after the cap, the gradients are those of
flash-attention; scale is softmax_scale:

    weights   = exp(logits - lse)                       delta = sum(dout * out) - dlse
    dv        = weights.T @ dout                        d_logits = weights * (dout @ v.T - delta)
    dq        = scale * d_logits @ k                    dk = scale * d_logits.T @ q

where d_logits passes the cap's derivative on the way to dq and dk.

softcap(qk, SCALE, CAP) returns tanh(qk * SCALE / CAP), or qk without a cap: logits in units of
their cap, or of the scale. softcap_backward multiplies by 1 - tanh**2. MODEL.logit_unit is that
unit times log2(e).

The mask: in region r, the query whose own key is i sees the keys from region_begin(i, r) to
region_begin(i, r + 1), and region_begin(i, regions) is i + 1, the end of its keys; all are clamped
to the keys that exist. device.py defines it, with a picture. Its other arguments are seqlen_k and
the position of key 0.

Names: M is BLOCK_M, rows of queries; N is BLOCK_N, rows of keys. A row of q or k comes in two tiles
of D0 and D1 dims, a row of v, out or dout in tiles of DV0 and DV1: see Blocks in device.py. If D1
is 0, the second tile is never used. MODEL is a ModelConstants of device.py.

load_tile(row_0, stride, rows, ROWS, DIMS, HEAD_DIM, MASK_ROWS) loads a (ROWS, DIMS) tile from the
pointer row_0 on: 0 past HEAD_DIM dims, and if MASK_ROWS past `rows` rows. store_tile rounds a tile
to the pointer's dtype, and leaves these out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._shared.triton.launch import Launch
from ..call import AttentionCall
from . import configs
from .device import (
    constants_of,
    count_blocks,
    find_block,
    launch_for,
    load_tile,
    log2_e,
    programs_of,
    region_begin,
    sequence_stride,
    sequences_of,
    softcap,
    softcap_backward,
    store_tile,
    strides_in_elements,
    strides_in_groups,
    with_contiguous_rows,
)
from .rotate import Rotation, build_rotation, gradients_of_copies, rotate, rotate_back

# -------------------------------------------------------------------------------------------------
# By block of queries: delta, then the gradients of queries


@triton.jit
def _add_dq(
    dq0, dq1,  # (M, D0), (M, D1) float32: d_logits @ k so far
    q0, q1, dout0, dout1,  # (M, D0), (M, D1), (M, DV0), (M, DV1); q: rotated to this region
    lse_2, delta,  # (M,) float32; lse_2 has base 2
    k_row, k_stride_seq, v_row, v_stride_seq,  # key 0 of the sequence and head; elements
    begin, end,  # the keys that any of the rows sees in this region
    num_before, num_full, num_masked,  # blocks of keys from `begin` on; num_before of num_masked
    row_begin, row_end,  # (M,): row i sees keys [row_begin[i], row_end[i]); read if MASKED
    MASKED: tl.constexpr,  # add the masked blocks, before and after the full ones; else the full
    FROM_KEY_0: tl.constexpr,  # row_begin is 0 for every row
    MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add the terms of a region's masked, or its full, blocks of keys to dq, without the scale."""
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
        # region.
        rows = end - start
        k_block = k_row + tl.cast(start, tl.int64) * k_stride_seq
        v_block = v_row + tl.cast(start, tl.int64) * v_stride_seq

        # weights = exp2(q @ k.T - lse): (M, N). Both tiles are loaded first, here and below: after
        # a float32 product, the second would spill.
        k0 = load_tile(k_block, k_stride_seq, rows, BLOCK_N, D0, HEAD_DIM, MASKED)  # (N, D0)
        k1 = k0
        if D1 > 0:
            k1 = load_tile(k_block + D0, k_stride_seq, rows, BLOCK_N, D1, HEAD_DIM - D0, MASKED)
        logits = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            logits = tl.dot(q1, tl.trans(k1), logits, input_precision="ieee")
        # In units of the cap, or the scale; times MODEL.logit_unit they have base 2.
        logits = softcap(logits, MODEL.softmax_scale, MODEL.softcap)
        weights = tl.exp2(logits * MODEL.logit_unit - lse_2[:, None])
        if MASKED:
            key = (start + tl.arange(0, BLOCK_N))[None, :]
            seen = key < row_end[:, None]
            if not FROM_KEY_0:
                seen = seen & (key >= row_begin[:, None])
            weights = tl.where(seen, weights, 0.0)

        # d_logits = weights * (dout @ v.T - delta): (M, N)
        v0 = load_tile(v_block, v_stride_seq, rows, BLOCK_N, DV0, HEAD_DIM_V, MASKED)  # (N, DV0)
        v1 = v0
        if DV1 > 0:
            v1 = load_tile(
                v_block + DV0, v_stride_seq, rows, BLOCK_N, DV1, HEAD_DIM_V - DV0, MASKED
            )
        d_weights = tl.dot(dout0, tl.trans(v0), input_precision="ieee")
        if DV1 > 0:
            d_weights = tl.dot(dout1, tl.trans(v1), d_weights, input_precision="ieee")
        d_logits = weights * (d_weights - delta[:, None])

        # dq += d_logits @ k
        d_logits = softcap_backward(d_logits, logits, MODEL.softcap).to(k0.dtype)
        dq0 = tl.dot(d_logits, k0, dq0, input_precision="ieee")
        if D1 > 0:
            dq1 = tl.dot(d_logits, k1, dq1, input_precision="ieee")
    return dq0, dq1


@triton.jit(
    do_not_specialize=[
        *("k_stride_batch", "k_stride_seq", "k_stride_head"),
        *("v_stride_batch", "v_stride_seq", "v_stride_head"),
        *("out_stride_batch", "out_stride_seq", "out_stride_head"),
        *("dout_stride_batch", "dout_stride_seq", "dout_stride_head"),
        *("q_start_stride", "k_start_stride", "num_sequences", "search_steps", "blocks"),
        *("seqlen_q", "seqlen_k"),
    ]
)
def dq_kernel(
    q_rotated,  # (batch, seqlen_q, regions, heads_q, head_dim), contiguous
    k, v,  # (batch, seqlen_k, heads_k, dims), or (1, total, heads_k, dims) if packed
    k_rotated,  # (batch, seqlen_k, copies, heads_k, head_dim), contiguous; None: no region needs it
    out, dout,  # (batch, seqlen_q, heads_q, head_dim_v)
    lse, dlse, delta,  # (batch, heads_q, seqlen_q) float32, contiguous; dlse may be None
    dq_rotated,  # like q_rotated, float32: to write
    cu_seqlens, q_start, k_start,  # (sequences + 1,), (sequences or 1,), ... int32, or None
    k_stride_batch, k_stride_seq, k_stride_head,  # divided by BLOCKS.align
    v_stride_batch, v_stride_seq, v_stride_head,
    out_stride_batch, out_stride_seq, out_stride_head,
    dout_stride_batch, dout_stride_seq, dout_stride_head,
    q_start_stride, k_start_stride,  # between sequences; 0: they share one
    num_sequences, search_steps,  # packed sequences, and steps of a binary search for one
    blocks,  # blocks of queries for each head: at least as many as there are
    seqlen_q, seqlen_k,  # the totals if packed
    MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Compute delta and dq. Axis 0: blocks of queries, longest first, then heads, then batch."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    D0: tl.constexpr = BLOCKS.d0
    D1: tl.constexpr = BLOCKS.d1
    DV0: tl.constexpr = BLOCKS.dv0
    DV1: tl.constexpr = BLOCKS.dv1
    HEADS_Q: tl.constexpr = MODEL.heads_q
    HEADS_K: tl.constexpr = MODEL.heads_k
    HEAD_DIM: tl.constexpr = MODEL.head_dim
    HEAD_DIM_V: tl.constexpr = MODEL.head_dim_v
    REGIONS: tl.constexpr = len(MODEL.starts)

    # Strides in elements from here on. They come divided by BLOCKS.align: the product shows the
    # compiler that it may load 16 bytes at a time. BLOCKS.contiguous: constants take their place.
    k_stride_batch, k_stride_seq, k_stride_head = strides_in_elements(
        k_stride_batch, k_stride_seq, k_stride_head, HEADS_K, HEAD_DIM, BLOCKS
    )
    v_stride_batch, v_stride_seq, v_stride_head = strides_in_elements(
        v_stride_batch, v_stride_seq, v_stride_head, HEADS_K, HEAD_DIM_V, BLOCKS
    )
    out_stride_batch, out_stride_seq, out_stride_head = strides_in_elements(
        out_stride_batch, out_stride_seq, out_stride_head, HEADS_Q, HEAD_DIM_V, BLOCKS
    )
    dout_stride_batch, dout_stride_seq, dout_stride_head = strides_in_elements(
        dout_stride_batch, dout_stride_seq, dout_stride_head, HEADS_Q, HEAD_DIM_V, BLOCKS
    )

    # This program's batch (0 if packed), head and sequence; the sequence's first token in q and k
    # (`first_row`, 0 if not packed) and its lengths; `index`, of num_blocks, is its block of
    # queries. A program without a block has a sequence of length 0: rows <= 0, and no keys.
    this = find_block(
        blocks, HEADS_Q, cu_seqlens, num_sequences, search_steps, seqlen_q, seqlen_k, BLOCK_M
    )
    head_k = this.head // (HEADS_Q // HEADS_K)
    batch = tl.cast(this.batch, tl.int64)
    # The last block of a sequence sees the most keys, so it starts first: short ones fill the gaps.
    q_first = (this.num_blocks - 1 - this.index) * BLOCK_M  # within the sequence
    rows = this.seqlen_q - q_first  # rows of the sequence from there on; may exceed BLOCK_M
    q_index = this.first_row + q_first  # the block's first token in q

    # A query's own key, and the last one it sees, is counted from the sequence's first key.
    # key_0_pos is that key's absolute position: blocks of granularity count from position 0.
    key_0_pos = 0
    if k_start is not None:
        key_0_pos = tl.load(k_start + this.sequence * k_start_stride)
    shift = this.seqlen_k - this.seqlen_q  # query 0's own key: both sides end together,
    if q_start is not None:  # unless positions say where they begin
        shift = tl.load(q_start + this.sequence * q_start_stride) - key_0_pos
    first_q_key = q_first + shift
    last_q_key = tl.minimum(first_q_key + BLOCK_M, this.seqlen_q + shift) - 1
    q_key = first_q_key + tl.arange(0, BLOCK_M)  # (M,)

    # delta = sum(dout * out) - dlse, (M,): 0 for a row that sees no key, whose lse is -inf.
    row = tl.arange(0, BLOCK_M)
    lse_index = (batch * HEADS_Q + this.head) * seqlen_q + q_index
    lses = tl.load(lse + lse_index + row, mask=row < rows, other=0.0)  # (M,)
    dout_row = dout + (
        batch * dout_stride_batch
        + tl.cast(q_index, tl.int64) * dout_stride_seq
        + tl.cast(this.head, tl.int64) * dout_stride_head
    )
    out_row = out + (
        batch * out_stride_batch
        + tl.cast(q_index, tl.int64) * out_stride_seq
        + tl.cast(this.head, tl.int64) * out_stride_head
    )
    dout0 = load_tile(dout_row, dout_stride_seq, rows, BLOCK_M, DV0, HEAD_DIM_V, True)  # (M, DV0)
    dout1 = dout0
    out0 = load_tile(out_row, out_stride_seq, rows, BLOCK_M, DV0, HEAD_DIM_V, True)
    deltas = tl.sum(out0.to(tl.float32) * dout0.to(tl.float32), 1)
    if DV1 > 0:
        dout1 = load_tile(
            dout_row + DV0, dout_stride_seq, rows, BLOCK_M, DV1, HEAD_DIM_V - DV0, True
        )
        out1 = load_tile(out_row + DV0, out_stride_seq, rows, BLOCK_M, DV1, HEAD_DIM_V - DV0, True)
        deltas += tl.sum(out1.to(tl.float32) * dout1.to(tl.float32), 1)
    if dlse is not None:
        deltas -= tl.load(dlse + lse_index + row, mask=row < rows, other=0.0)
    deltas = tl.where(lses == float("-inf"), 0.0, deltas)
    tl.store(delta + lse_index + row, deltas, mask=row < rows)

    v_row = v + (
        batch * v_stride_batch
        + tl.cast(this.first_row, tl.int64) * v_stride_seq
        + tl.cast(head_k, tl.int64) * v_stride_head
    )
    for r in tl.static_range(REGIONS):
        # The queries, rotated to this region: q0 (M, D0), q1 (M, D1).
        q_offset = (((batch * seqlen_q + q_index) * REGIONS + r) * HEADS_Q + this.head) * HEAD_DIM
        q_row_stride = REGIONS * HEADS_Q * HEAD_DIM
        q_row = q_rotated + q_offset
        q0 = load_tile(q_row, q_row_stride, rows, BLOCK_M, D0, HEAD_DIM, True)
        q1 = q0
        if D1 > 0:
            q1 = load_tile(q_row + D0, q_row_stride, rows, BLOCK_M, D1, HEAD_DIM - D0, True)

        # The region's keys: k itself, if it is as this region needs it, or rotated copy k_copy[r].
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
        dq0 = tl.zeros((BLOCK_M, D0), tl.float32)
        dq1 = tl.zeros((BLOCK_M, D1 if D1 > 0 else 1), tl.float32)
        for full in tl.static_range(2):  # the masked blocks, then the full ones; the order is free
            dq0, dq1 = _add_dq(
                dq0, dq1, q0, q1, dout0, dout1, lses * log2_e(), deltas,
                k_row, k_row_stride, v_row, v_stride_seq,
                begin, end, num_before, num_full, num_masked, row_begin, row_end,
                full == 0, r == 0 and MODEL.from_key_0, MODEL, BLOCKS,
            )  # fmt: skip

        dq_row = dq_rotated + q_offset
        scale = tl.full((BLOCK_M, 1), MODEL.softmax_scale, tl.float32)
        store_tile(dq_row, q_row_stride, dq0 * scale, rows, BLOCK_M, D0, HEAD_DIM)
        if D1 > 0:
            store_tile(dq_row + D0, q_row_stride, dq1 * scale, rows, BLOCK_M, D1, HEAD_DIM - D0)


# -------------------------------------------------------------------------------------------------
# By block of keys: the gradients of keys and values


@triton.jit
def _queries_end(
    key, seqlen_q, shift, key_0_pos, REGION: tl.constexpr, MODEL: tl.constexpr
):  # fmt: skip
    """Return the end of the rows that see `key` in REGION or a later one: `region_begin` inverted.

    It is the number of rows i of the sequence with region_begin(i + shift, REGION) <= key. So in
    REGION, the rows from _queries_end(j, REGION + 1) to _queries_end(j, REGION) see key j.

    shift: the own key of row 0.
    """
    end = key  # an own key, as all numbers here: rows before `key` do not see it
    if len(MODEL.starts) > REGION:
        # A key is seen from blocks of granularity that begin at `reach` at most: their queries end
        # where the next block begins. From -granularity on, the dividend is not negative: there
        # Triton's division rounds down.
        reach = tl.maximum(key + key_0_pos - MODEL.starts[REGION], -MODEL.granularity)
        block_end = (reach + MODEL.granularity) // MODEL.granularity * MODEL.granularity - key_0_pos
        if MODEL.window > 0:  # the sliding window
            block_end = tl.minimum(block_end, key + MODEL.window)
        end = tl.maximum(end, block_end)
    # Rows with a negative own key see no key. They count in every end, so they cancel.
    return tl.minimum(tl.maximum(end, tl.maximum(shift, 0)), seqlen_q + shift) - shift


@triton.jit
def _add_dkv(
    dk0, dk1, dv0, dv1,  # (N, D0), (N, D1), (N, DV0), (N, DV1) float32
    k0, k1, v0, v1,  # (N, D0), (N, D1), (N, DV0), (N, DV1); k: rotated to this region
    q_row, q_stride_seq, dout_row, dout_stride_seq,  # row 0 of the sequence and head; elements
    lse, delta,  # pointers to row 0 of the sequence and head
    begin, end,  # the rows that see any of the keys in this region
    num_before, num_full, num_masked,  # blocks of rows from `begin` on; num_before of num_masked
    query_begin, query_end,  # (N,): rows [query_begin[j], query_end[j]) see key j; read if MASKED
    MASKED: tl.constexpr,  # add the masked blocks, before and after the full ones; else the full
    MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add the terms of masked, or full, blocks of rows to dk, without the scale, and to dv."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    D0: tl.constexpr = BLOCKS.d0
    D1: tl.constexpr = BLOCKS.d1
    DV0: tl.constexpr = BLOCKS.dv0
    DV1: tl.constexpr = BLOCKS.dv1
    HEAD_DIM: tl.constexpr = MODEL.head_dim
    HEAD_DIM_V: tl.constexpr = MODEL.head_dim_v
    for i in tl.range(num_masked if MASKED else num_full):
        # Full blocks lie between the masked ones, which step over them.
        block = i + tl.where(i < num_before, 0, num_full) if MASKED else num_before + i
        start = begin + block * BLOCK_M
        rows = end - start  # a full block lies inside the sequence: no mask of rows
        q_block = q_row + tl.cast(start, tl.int64) * q_stride_seq
        dout_block = dout_row + tl.cast(start, tl.int64) * dout_stride_seq
        row = tl.arange(0, BLOCK_M)
        if MASKED:
            lses = tl.load(lse + start + row, mask=row < rows, other=0.0) * log2_e()  # (M,)
            deltas = tl.load(delta + start + row, mask=row < rows, other=0.0)  # (M,)
        else:
            lses = tl.load(lse + start + row) * log2_e()
            deltas = tl.load(delta + start + row)

        # weights = exp2(k @ q.T - lse): (N, M), the transpose of the forward's
        q0 = load_tile(q_block, q_stride_seq, rows, BLOCK_M, D0, HEAD_DIM, MASKED)  # (M, D0)
        q1 = q0
        if D1 > 0:
            q1 = load_tile(q_block + D0, q_stride_seq, rows, BLOCK_M, D1, HEAD_DIM - D0, MASKED)
        logits = tl.dot(k0, tl.trans(q0), input_precision="ieee")
        if D1 > 0:
            logits = tl.dot(k1, tl.trans(q1), logits, input_precision="ieee")
        # In units of the cap, or the scale; times MODEL.logit_unit they have base 2.
        logits = softcap(logits, MODEL.softmax_scale, MODEL.softcap)
        weights = tl.exp2(logits * MODEL.logit_unit - lses[None, :])
        if MASKED:
            query = (start + row)[None, :]  # (1, M): rows of the sequence
            seen = (query >= query_begin[:, None]) & (query < query_end[:, None])
            weights = tl.where(seen, weights, 0.0)

        # dv += weights.T @ dout
        dout0 = load_tile(dout_block, dout_stride_seq, rows, BLOCK_M, DV0, HEAD_DIM_V, MASKED)
        dout1 = dout0
        if DV1 > 0:
            dout1 = load_tile(
                dout_block + DV0, dout_stride_seq, rows, BLOCK_M, DV1, HEAD_DIM_V - DV0, MASKED
            )
        weights_v = weights.to(dout0.dtype)
        dv0 = tl.dot(weights_v, dout0, dv0, input_precision="ieee")
        if DV1 > 0:
            dv1 = tl.dot(weights_v, dout1, dv1, input_precision="ieee")

        # d_logits = weights * (v @ dout.T - delta): (N, M)
        d_weights = tl.dot(v0, tl.trans(dout0), input_precision="ieee")
        if DV1 > 0:
            d_weights = tl.dot(v1, tl.trans(dout1), d_weights, input_precision="ieee")
        d_logits = weights * (d_weights - deltas[None, :])

        # dk += d_logits @ q
        d_logits = softcap_backward(d_logits, logits, MODEL.softcap).to(q0.dtype)
        dk0 = tl.dot(d_logits, q0, dk0, input_precision="ieee")
        if D1 > 0:
            dk1 = tl.dot(d_logits, q1, dk1, input_precision="ieee")
    return dk0, dk1, dv0, dv1


@triton.jit(
    do_not_specialize=[
        *("k_stride_batch", "k_stride_seq", "k_stride_head"),
        *("v_stride_batch", "v_stride_seq", "v_stride_head"),
        *("dout_stride_batch", "dout_stride_seq", "dout_stride_head"),
        *("q_start_stride", "k_start_stride", "num_sequences", "search_steps", "blocks"),
        *("seqlen_q", "seqlen_k"),
    ]
)
def dkv_kernel(
    q_rotated,  # (batch, seqlen_q, regions, heads_q, head_dim), contiguous
    k, v,  # (batch, seqlen_k, heads_k, dims), or (1, total, heads_k, dims) if packed
    k_rotated,  # (batch, seqlen_k, copies, heads_k, head_dim), contiguous; None: no region needs it
    dout,  # (batch, seqlen_q, heads_q, head_dim_v)
    lse, delta,  # (batch, heads_q, seqlen_q) float32, contiguous
    dk_rotated,  # (batch, seqlen_k, regions, heads_k, head_dim) float32, contiguous: to write
    dv,  # (batch, seqlen_k, heads_k, head_dim_v), contiguous: to write
    cu_seqlens, q_start, k_start,  # (sequences + 1,), (sequences or 1,), ... int32, or None
    k_stride_batch, k_stride_seq, k_stride_head,  # divided by BLOCKS.align
    v_stride_batch, v_stride_seq, v_stride_head,
    dout_stride_batch, dout_stride_seq, dout_stride_head,
    q_start_stride, k_start_stride,  # between sequences; 0: they share one
    num_sequences, search_steps,  # packed sequences, and steps of a binary search for one
    blocks,  # blocks of keys for each head of k: at least as many as there are
    seqlen_q, seqlen_k,  # the totals if packed
    MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv. Axis 0: blocks of keys, longest first, then heads of k, then the batch.

    One program sums over the query heads of a group. The first keys are seen by the most queries.
    """
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    D0: tl.constexpr = BLOCKS.d0
    D1: tl.constexpr = BLOCKS.d1
    DV0: tl.constexpr = BLOCKS.dv0
    DV1: tl.constexpr = BLOCKS.dv1
    HEADS_Q: tl.constexpr = MODEL.heads_q
    HEADS_K: tl.constexpr = MODEL.heads_k
    GROUP: tl.constexpr = HEADS_Q // HEADS_K  # heads of q that share one of k
    HEAD_DIM: tl.constexpr = MODEL.head_dim
    HEAD_DIM_V: tl.constexpr = MODEL.head_dim_v
    REGIONS: tl.constexpr = len(MODEL.starts)

    # Strides in elements from here on. They come divided by BLOCKS.align: the product shows the
    # compiler that it may load 16 bytes at a time. BLOCKS.contiguous: constants take their place.
    k_stride_batch, k_stride_seq, k_stride_head = strides_in_elements(
        k_stride_batch, k_stride_seq, k_stride_head, HEADS_K, HEAD_DIM, BLOCKS
    )
    v_stride_batch, v_stride_seq, v_stride_head = strides_in_elements(
        v_stride_batch, v_stride_seq, v_stride_head, HEADS_K, HEAD_DIM_V, BLOCKS
    )
    dout_stride_batch, dout_stride_seq, dout_stride_head = strides_in_elements(
        dout_stride_batch, dout_stride_seq, dout_stride_head, HEADS_Q, HEAD_DIM_V, BLOCKS
    )

    # This program's batch (0 if packed), head of k and sequence; the sequence's first token in q
    # and in k (`first_row`, 0 if not packed), its lengths, and the `index` of its block of keys.
    # A program without a block has a sequence of length 0: rows <= 0, and no queries.
    this = find_block(
        blocks, HEADS_K, cu_seqlens, num_sequences, search_steps, seqlen_q, seqlen_k, BLOCK_N
    )
    batch = tl.cast(this.batch, tl.int64)
    first = this.index * BLOCK_N  # within the sequence, as all keys and rows below
    last = tl.minimum(first + BLOCK_N, this.seqlen_k) - 1
    key = first + tl.arange(0, BLOCK_N)  # (N,)
    rows = this.seqlen_k - first  # keys of the sequence from there on; may exceed BLOCK_N
    k_index = this.first_row + first  # the block's first token in k

    # shift is the own key of the sequence's row 0; key_0_pos the absolute position of key 0.
    key_0_pos = 0
    if k_start is not None:
        key_0_pos = tl.load(k_start + this.sequence * k_start_stride)
    shift = this.seqlen_k - this.seqlen_q  # both sides end together,
    if q_start is not None:  # unless positions say where they begin
        shift = tl.load(q_start + this.sequence * q_start_stride) - key_0_pos

    v_row = v + (
        batch * v_stride_batch
        + tl.cast(k_index, tl.int64) * v_stride_seq
        + tl.cast(this.head, tl.int64) * v_stride_head
    )
    v0 = load_tile(v_row, v_stride_seq, rows, BLOCK_N, DV0, HEAD_DIM_V, True)  # (N, DV0)
    v1 = v0
    if DV1 > 0:
        v1 = load_tile(v_row + DV0, v_stride_seq, rows, BLOCK_N, DV1, HEAD_DIM_V - DV0, True)
    dv0 = tl.zeros((BLOCK_N, DV0), tl.float32)
    dv1 = tl.zeros((BLOCK_N, DV1 if DV1 > 0 else 1), tl.float32)
    for r in tl.static_range(REGIONS):
        # The region's keys, k0 (N, D0) and k1 (N, D1): of k itself, or of a rotated copy.
        if MODEL.sees_given_k[r]:
            k_row = k + (
                batch * k_stride_batch
                + tl.cast(k_index, tl.int64) * k_stride_seq
                + tl.cast(this.head, tl.int64) * k_stride_head
            )
            k_row_stride = k_stride_seq
        else:
            copy_index = (batch * seqlen_k + k_index) * MODEL.k_copies + MODEL.k_copy[r]
            k_row = k_rotated + (copy_index * HEADS_K + this.head) * HEAD_DIM
            k_row_stride = MODEL.k_copies * HEADS_K * HEAD_DIM
        k0 = load_tile(k_row, k_row_stride, rows, BLOCK_N, D0, HEAD_DIM, True)
        k1 = k0
        if D1 > 0:
            k1 = load_tile(k_row + D0, k_row_stride, rows, BLOCK_N, D1, HEAD_DIM - D0, True)

        # Rows [query_begin[j], query_end[j]) of the sequence see key j, and both rise with j. So
        # rows [begin, end) see some key of the block, and rows [every_begin, every_end) all of
        # them. Blocks of M rows from `begin` on: num_before masked ones, num_full, then masked ones
        # up to `end`, num_masked in all.
        query_begin = _queries_end(key, this.seqlen_q, shift, key_0_pos, r + 1, MODEL)  # (N,)
        query_end = _queries_end(key, this.seqlen_q, shift, key_0_pos, r, MODEL)
        begin = _queries_end(first, this.seqlen_q, shift, key_0_pos, r + 1, MODEL)
        every_begin = _queries_end(last, this.seqlen_q, shift, key_0_pos, r + 1, MODEL)
        every_end = _queries_end(first, this.seqlen_q, shift, key_0_pos, r, MODEL)
        end = _queries_end(last, this.seqlen_q, shift, key_0_pos, r, MODEL)
        num_before, num_full, num_masked = count_blocks(begin, every_begin, every_end, end, BLOCK_M)
        dk0 = tl.zeros((BLOCK_N, D0), tl.float32)
        dk1 = tl.zeros((BLOCK_N, D1 if D1 > 0 else 1), tl.float32)
        for head_q in tl.range(this.head * GROUP, this.head * GROUP + GROUP):
            # Row 0 of the sequence, in the queries rotated to this region and in dout.
            q_index = (batch * seqlen_q + this.first_row) * REGIONS + r
            q_row = q_rotated + (q_index * HEADS_Q + head_q) * HEAD_DIM
            dout_row = dout + (
                batch * dout_stride_batch
                + tl.cast(this.first_row, tl.int64) * dout_stride_seq
                + tl.cast(head_q, tl.int64) * dout_stride_head
            )
            lse_index = (batch * HEADS_Q + head_q) * seqlen_q + this.first_row
            for full in tl.static_range(2):  # 0: the masked blocks, 1: the full
                dk0, dk1, dv0, dv1 = _add_dkv(
                    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_row, REGIONS * HEADS_Q * HEAD_DIM,
                    dout_row, dout_stride_seq, lse + lse_index, delta + lse_index,
                    begin, end, num_before, num_full, num_masked, query_begin, query_end,
                    full == 0, MODEL, BLOCKS,
                )  # fmt: skip

        dk_index = ((batch * seqlen_k + k_index) * REGIONS + r) * HEADS_K + this.head
        dk_row = dk_rotated + dk_index * HEAD_DIM
        dk_stride = REGIONS * HEADS_K * HEAD_DIM
        scale = tl.full((BLOCK_N, 1), MODEL.softmax_scale, tl.float32)
        store_tile(dk_row, dk_stride, dk0 * scale, rows, BLOCK_N, D0, HEAD_DIM)
        if D1 > 0:
            store_tile(dk_row + D0, dk_stride, dk1 * scale, rows, BLOCK_N, D1, HEAD_DIM - D0)
    dv_row = dv + ((batch * seqlen_k + k_index) * HEADS_K + this.head) * HEAD_DIM_V
    store_tile(dv_row, HEADS_K * HEAD_DIM_V, dv0, rows, BLOCK_N, DV0, HEAD_DIM_V)
    if DV1 > 0:
        store_tile(dv_row + DV0, HEADS_K * HEAD_DIM_V, dv1, rows, BLOCK_N, DV1, HEAD_DIM_V - DV0)


# -------------------------------------------------------------------------------------------------
# The launches


class Launches(NamedTuple):
    """The four launches of a call."""

    rotate: Rotation
    by_queries: Launch
    by_keys: Launch
    rotate_back: Rotation


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
    are those of `forward`. The gradient of sinks needs no kernel: op.py has it.
    """
    # Kernels read the call's small tensors without strides.
    call, lse = with_contiguous_rows(call), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    # _build_launches(q, ..., call), once for the layouts of these tensors
    launches = launch_for(_build_launches, (q, k, v, out, dout), call)
    dq, dk, dv = (x.new_empty(x.shape, dtype=call.results_dtype(x.dtype)) for x in (q, k, v))
    delta = lse.new_empty(lse.shape)
    places = (call.cu_seqlens, call.q_start, call.k_start)
    q_rotated, k_rotated = rotate(launches.rotate, q, k, call)
    dq_rotated, dk_rotated = gradients_of_copies(launches.rotate_back, q, k)
    launches.by_queries((
        q_rotated, k, v, k_rotated, out, dout, lse, dlse, delta, dq_rotated, *places,
    ))  # fmt: skip
    launches.by_keys((q_rotated, k, v, k_rotated, dout, lse, delta, dk_rotated, dv, *places))
    rotate_back(launches.rotate_back, dq, dk, dq_rotated, dk_rotated, call)
    return dq, dk, dv


def _build_launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, call: AttentionCall
) -> Launches:
    by_queries_and_keys = []
    start_strides = (sequence_stride(call.q_start, 1), sequence_stride(call.k_start, 1))
    # The kernel, the tensor whose blocks its programs take, and those whose strides it is given.
    for name, kernel, blocks_of, strided in (
        ("dq", dq_kernel, q, (k, v, out, dout)),
        ("dkv", dkv_kernel, k, (k, v, dout)),
    ):
        config = configs.config_of(name, q, v)
        model, blocks = constants_of(config, q, k, v, call, dout, out)
        size = blocks.block_m if name == "dq" else blocks.block_n
        programs, blocks_of_head = programs_of(blocks_of, size, call)
        strides = (n for x in strided for n in strides_in_groups(x, blocks.align))
        # In the kernel's order; sequences_of: num_sequences and search_steps, 0 if not packed.
        sizes = (
            *strides, *start_strides, *sequences_of(call), blocks_of_head, q.shape[-3], k.shape[-3],
        )  # fmt: skip
        options = {"MODEL": model, "BLOCKS": blocks, **config.options}
        by_queries_and_keys.append(Launch(kernel, (programs,), sizes, options))
    # Gradients do not exist yet: contiguous tensors without memory tell their shapes and strides.
    dq, dk = (
        torch.empty(x.shape, dtype=call.results_dtype(x.dtype), device="meta") for x in (q, k)
    )
    return Launches(
        build_rotation(q, k, call, "both"),  # q for each region; k for each map it lacks
        *by_queries_and_keys,
        build_rotation(dq, dk, call, "gradients"),  # both for each region
    )
