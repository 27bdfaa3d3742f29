"""Attention over regions of keys, forward: raw q, k and v to out and the log-sum-exp.

k is raw too, or comes rotated by one map already (`call.stored`), as from a cache.

Every region rotates queries and keys to its own positions. A query then sees a key at the
difference of the two: in ReRoPE, near keys at their distance and all far keys at its window. For
one block of queries the kernel goes through the regions, far keys first. It rotates its queries to
the region's positions (queries.py) and runs over the region's keys like flash-attention. The next
region goes on with the same row_max, row_sum and acc. So near and far keys share one softmax, and
regions differ only in their rotated q and k.

An earlier launch rotates keys once (rotate.py): this loop would rotate each key again for every
block of queries.

The mask: a query's own key is the last one that it sees. In region r, the query whose own key is i
sees the keys j with begin(r) <= j < begin(r + 1), where begin(r) = block(i) + starts[r], but with a
sliding window not below i + 1 - window, and begin(regions) = i + 1; all are clamped to the keys
that exist. block() rounds down to a multiple of granularity, counted by position: queries of a
dual_chunk chunk share starts; in ReRoPE granularity is 1. starts are at most 0, and rise. mask.py
has these as region_begin, with a picture.

A program has no shared memory of its own in Triton: so its queries, rotated to a later region, go
through rows of out in global memory. Loads are by pointers: tensor descriptors (TMA) take strides
of whole 16 bytes alone, from sm_90 on. Neither they nor warp_specialize have been timed here.

Names:

M, N                M is BLOCK_M, rows of queries; N is BLOCK_N, rows of keys
MODEL, BLOCKS       ModelConstants and Blocks of device.py
D, DV               dims of a row of q or k, and of v or out. Rows come as a tuple of one or two
                    tiles, of D0 and D1 dims (D1 is 0: one), or DV0 and DV1: see Blocks
block_of_queries    a program's QueryBlock: `rows` of one head from `token` on, their own keys, and
                    first_row, the first token of their sequence in k
keys_seen           a region's Seen: row i sees keys [row_begin[i], row_end[i]), any row some of
                    [begin, end), in num_full blocks that all rows see and num_masked others
block_start         where the i-th of these blocks begins
Rows                a tensor with its strides
strided_rows        Rows by strides that come divided by BLOCKS.align, elements that divide all of
                    them: so loads are aligned
nth_copy            Rows of copy n of a contiguous (batch, seqlen, COPIES, HEADS, HEAD_DIM) tensor
keys_of_region      Rows of k, or of a copy of k_rotated
row_of              Rows from one row on: of a batch, token and head
rotated_queries     the block's queries in a region: raw, then rotated and scaled (queries.py)
load_rows           load ROWS rows from row `first` on: 0 past HEAD_DIM dims, and if MASK_ROWS past
                    `rows` rows
store_rows          round rows to the pointer's dtype, and store them without those dims and rows
dot_rows            a @ b.T
add_dot             acc + weights @ x, with weights rounded to x's dtype
scale_rows          x * factor
softcap             tanh(qk * SCALE / SOFTCAP), or qk without a cap: logits in units of their cap,
                    or of the scale; MODEL.logit_unit is that unit times log2(e)
weights_of_block    row_max with a block's logits, their weights exp2(UNIT * logits - row_max), and
                    what to multiply earlier sums by
add_sink            row_max and row_sum with a logit without a value, and what to multiply acc by
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._math.triton.launch import Launch, strides_by_name
from ..call import AttentionCall, lse_shape
from . import configs
from .device import (
    add_sink,
    constants_of,
    ln_2,
    log2_e,
    programs_of,
    sequence_numbers,
    sequence_stride,
    softcap,
    weights_of_block,
    with_contiguous_rows,
)
from .mask import Sequences, block_of_queries, block_start, keys_seen
from .queries import QueryRope, rotated_queries
from .rotate import RotateLaunch, rotate, rotation_of_keys
from .rows import (
    add_dot,
    dot_rows,
    keys_of_region,
    load_rows,
    nth_copy,
    row_of,
    scale_rows,
    store_rows,
    strided_rows,
    zero_rows,
)


@triton.jit
def _attend_keys(
    acc,  # (M, DV) float32: weights @ v so far
    row_max, row_sum,  # (M,) float32, base 2; row_max >= -1e30 is finite: exp2 never gets inf - inf
    q,  # (M, D), rotated to this region's positions
    k, v,  # Rows from key 0 of the sequence and head on
    seen,  # the keys of this region that the rows see
    MASKED: tl.constexpr,  # add the masked blocks, before and after the full ones; else the full
    FROM_KEY_0: tl.constexpr,  # seen.row_begin is 0 for every row
    MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add a region's masked, or its full, blocks of keys to the softmax."""
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    for i in tl.range(seen.num_masked if MASKED else seen.num_full):
        start = block_start(i, seen, BLOCK_N, MASKED)
        # A full block lies inside [begin, end), so it is loaded without a mask of rows. If
        # num_full is 0, the last one before it may reach past `end`: `row_end` hides keys loaded as
        # 0. No key outside [begin, end) is loaded: a rotated copy may be infinite outside of its
        # region, and is not written where it lies before every query's sliding window.
        keys = seen.end - start

        # logits = q @ k.T, with a cap its tanh: (M, N). Times MODEL.logit_unit they have base 2.
        k_rows = load_rows(
            k, start, keys, BLOCK_N, BLOCKS.d0, BLOCKS.d1, MODEL.head_dim, MASKED
        )  # (N, D)
        logits = softcap(dot_rows(q, k_rows), MODEL.softmax_scale, MODEL.softcap)

        # weights = exp2(logits - row_max): (M, N)
        if MASKED:
            key = (start + tl.arange(0, BLOCK_N))[None, :]
            sees = key < seen.row_end[:, None]
            if not FROM_KEY_0:
                sees = sees & (key >= seen.row_begin[:, None])
            logits = tl.where(sees, logits * MODEL.logit_unit, float("-inf"))
            row_max, weights, rescale = weights_of_block(row_max, logits, 1.0)
        else:
            row_max, weights, rescale = weights_of_block(row_max, logits, MODEL.logit_unit)

        # acc = acc * rescale + weights @ v
        v_rows = load_rows(
            v, start, keys, BLOCK_N, BLOCKS.dv0, BLOCKS.dv1, MODEL.head_dim_v, MASKED
        )  # (N, DV)
        acc = add_dot(scale_rows(acc, rescale[:, None]), weights, v_rows)
        # After the product: before it, this sum costs 43 more registers on an H100.
        row_sum = row_sum * rescale + tl.sum(weights, 1)
    return acc, row_max, row_sum


@triton.jit
def forward_kernel(
    q, k, v,  # (batch, seqlen, heads, dims), or (1, total, heads, dims) if packed
    k_rotated,  # (batch, seqlen_k, copies, heads_k, head_dim), contiguous; None: no region needs it
    out, lse,  # (batch, seqlen_q, heads_q, head_dim_v); (batch, heads_q, seqlen_q): contiguous
    scratch,  # like q, contiguous; None: rows of out hold rotated queries meanwhile
    inv_freq, log_decay,  # (sequences or 1, freq_heads, half) float; (half,) or None: xPos
    pair_maps,  # (maps, 2: divisors and offsets of their pairs, half) float64, or None
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
    DV0: tl.constexpr = BLOCKS.dv0
    DV1: tl.constexpr = BLOCKS.dv1
    HEADS_Q: tl.constexpr = MODEL.heads_q
    HEADS_K: tl.constexpr = MODEL.heads_k
    HEAD_DIM: tl.constexpr = MODEL.head_dim
    HEAD_DIM_V: tl.constexpr = MODEL.head_dim_v
    REGIONS: tl.constexpr = len(MODEL.starts)  # far keys first
    q = strided_rows(q, q_stride_batch, q_stride_seq, q_stride_head, HEADS_Q, HEAD_DIM, BLOCKS)
    k = strided_rows(k, k_stride_batch, k_stride_seq, k_stride_head, HEADS_K, HEAD_DIM, BLOCKS)
    v = strided_rows(v, v_stride_batch, v_stride_seq, v_stride_head, HEADS_K, HEAD_DIM_V, BLOCKS)

    # This program's queries. A program without a block has neither rows nor keys.
    sequences = Sequences(
        seqlen_q, seqlen_k, cu_seqlens, num_sequences, search_steps, q_start, q_start_stride,
        k_start, k_start_stride,
    )  # fmt: skip
    queries = block_of_queries(blocks, sequences, MODEL, BLOCKS)
    batch, head, head_k, token = queries.batch, queries.head, queries.head_k, queries.token
    rows, first_row = queries.rows, queries.first_row

    # Rows of this block in q and out, of the sequence in v.
    q_row = row_of(q, batch, token, head)
    v_row = row_of(v, batch, first_row, head_k)
    out_row = row_of(nth_copy(out, 0, seqlen_q, 1, HEADS_Q, HEAD_DIM_V), batch, token, head)
    memory = out_row  # where rotated queries go; without scratch both have the same dims
    if scratch is not None:
        memory = row_of(nth_copy(scratch, 0, seqlen_q, 1, HEADS_Q, HEAD_DIM), batch, token, head)
    inv_freq += tl.cast(queries.sequence, tl.int64) * freq_stride
    if MODEL.freq_heads > 1:
        inv_freq += head_k * MODEL.half
    if query_scale is not None:
        query_scale += batch * scale_stride + token
    rope = QueryRope(inv_freq, log_decay, pair_maps, query_scale)

    acc = zero_rows(BLOCK_M, DV0, DV1)
    # Below any logit, but finite: a row that has seen no key has exp2(-inf - -1e30) = 0, not NaN.
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for r in tl.static_range(REGIONS):
        q_rows = rotated_queries(q_row, memory, queries, rope, r, MODEL, BLOCKS)  # (M, D)
        k_row = row_of(keys_of_region(k, k_rotated, seqlen_k, r, MODEL), batch, first_row, head_k)
        seen = keys_seen(queries, r, BLOCKS.block_n, MODEL)
        # The masked blocks, then the full ones; the order is free. A loop over both would test the
        # mask in every block.
        for full in tl.static_range(2):
            acc, row_max, row_sum = _attend_keys(
                acc, row_max, row_sum, q_rows, k_row, v_row, seen,
                full == 0, r == 0 and MODEL.from_key_0, MODEL, BLOCKS,
            )  # fmt: skip

    # Divide by the sum. A row that sees no key, or none but a sink of -inf, has out 0.
    sees_no_key = row_sum == 0.0  # (M,)
    if sinks is None:
        row_sum = tl.where(sees_no_key, 1.0, row_sum)
        factor = 1.0 / row_sum
        lse_without_keys = float("-inf")
    else:
        lse_without_keys = tl.load(sinks + head)  # the sink's own bits
        # A sink is a logit without a value: it joins row_max and row_sum, and rescales acc.
        row_max, row_sum, rescale = add_sink(row_max, row_sum, lse_without_keys * log2_e())
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        factor = rescale / row_sum
    # If tiles are pairs (dim i of both is one pair), the first region's queries need no memory.
    if REGIONS > 1 or not BLOCKS.tiles_are_pairs:
        tl.debug_barrier()  # all threads have loaded q from out's rows
    store_rows(out_row, scale_rows(acc, factor[:, None]), rows, BLOCK_M, DV0, DV1, HEAD_DIM_V)
    row = tl.arange(0, BLOCK_M)
    lse_row = lse + (batch * HEADS_Q + head) * seqlen_q + token
    natural_lse = tl.where(sees_no_key, lse_without_keys, row_max * ln_2() + tl.log(row_sum))
    tl.store(lse_row + row, natural_lse, mask=row < rows)


# -------------------------------------------------------------------------------------------------
# The launches


class ForwardLaunches(NamedTuple):
    """Both launches of a call."""

    rotate_keys: RotateLaunch
    attend: Launch
    needs_scratch: bool  # rotated queries go through memory, and rows of out cannot hold them


def forward(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, launches: ForwardLaunches
) -> tuple[Tensor, Tensor]:
    """Attend by one softmax over the keys of every region, in two launches.

    q: raw, (batch, seqlen_q, heads_q, head_dim). k: rotated by call.stored, or raw, (batch,
    seqlen_k, heads_k, head_dim). With call.cu_seqlens both are (total, heads, head_dim). v: like k,
    with any head_dim. All are contiguous in the last dimension. launches: `forward_launches` of
    tensors with these layouts.

    Returns out, like q with v's head_dim, of q's dtype or wider, and the natural log of the sum of
    exponentials, float32 (batch, heads_q, seqlen_q) or (heads_q, total).
    """
    call = with_contiguous_rows(call)
    rotate_keys, attend, needs_scratch = launches
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=call.results_dtype(q.dtype))
    lse = q.new_empty(lse_shape(q), dtype=torch.float32)
    scratch = q.new_empty(q.shape) if needs_scratch else None
    _, k_rotated = rotate(rotate_keys, q, k, call)
    attend.run(
        q=q, k=k, v=v, k_rotated=k_rotated, out=out, lse=lse, scratch=scratch,
        inv_freq=call.inv_freq, log_decay=call.log_decay, pair_maps=call.pair_maps,
        cu_seqlens=call.cu_seqlens, q_start=call.q_start, k_start=call.k_start,
        query_scale=call.query_scale, sinks=call.sinks,
    )  # fmt: skip
    return out, lse


def forward_launches(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> ForwardLaunches:
    """Build both launches."""
    call = with_contiguous_rows(call)
    config = configs.config_of("forward", q, v)  # sizes of blocks, warps and stages
    model, blocks = constants_of(config, q, k, v, call)
    programs, blocks_of_head = programs_of(q, config.block_m, call)
    attend = Launch(
        forward_kernel,
        (programs,),
        numbers={
            **strides_by_name("q", q, blocks.align),
            **strides_by_name("k", k, blocks.align),
            **strides_by_name("v", v, blocks.align),
            "freq_stride": sequence_stride(call.inv_freq, dims=2),
            "scale_stride": sequence_stride(call.query_scale, dims=2),
            "blocks": blocks_of_head,
            **sequence_numbers(q, k, call),
        },
        constants={"MODEL": model, "BLOCKS": blocks},
        options=config.options,
    )
    through_memory = len(model.starts) > 1 or not blocks.tiles_are_pairs
    out_fits = model.head_dim_v == model.head_dim and call.results_dtype(q.dtype) == q.dtype
    return ForwardLaunches(rotation_of_keys(q, k, call), attend, through_memory and not out_fits)
