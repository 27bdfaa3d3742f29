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

The mask: a query's own key is the last one that it sees, key i + shift for row i of a sequence. In
region r, the query whose own key is i sees the keys j with begin(r) <= j < begin(r + 1), where
begin(r) = block(i) + starts[r], but not below i + 1 - window, and begin(regions) = i + 1; all are
clamped to the keys that exist. block() rounds down to a multiple of granularity, counted by
position: queries of a dual_chunk chunk share starts. starts are at most 0, and rise. mask.py
has these as region_begin, inverted as queries_end, with a picture.

Names are those of the list at the top of forward.py, and

queries_that_see    the Seen of a block of keys: row i of Seen is key i here
find_block          a program's Block of keys: its `index` in its sequence, and the sequence
softcap_backward    d_logits times the cap's derivative, 1 - tanh**2
lse_2, log2_e       of base 2; weights are exp2(logits * MODEL.logit_unit - lse_2)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._math.triton.launch import Launch, strides_by_name
from ..call import AttentionCall
from . import configs
from .device import (
    constants_of,
    log2_e,
    programs_of,
    sequence_numbers,
    softcap,
    softcap_backward,
    with_contiguous_rows,
)
from .mask import Sequences, block_of_queries, block_start, find_block, keys_seen, queries_that_see
from .rotate import (
    RotateLaunch,
    gradients_of_copies,
    rotate,
    rotate_back,
    rotation_of_both,
    rotation_of_gradients,
)
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

# -------------------------------------------------------------------------------------------------
# By block of queries: delta, then the gradients of queries


@triton.jit
def _add_dq(
    dq,  # (M, D) float32: d_logits @ k so far
    q, dout,  # (M, D), (M, DV); q: rotated to this region
    lse_2, delta,  # (M,) float32; lse_2 has base 2
    k, v,  # Rows from key 0 of the sequence and head on
    seen,  # the keys of this region that the rows see
    MASKED: tl.constexpr,  # add the masked blocks, before and after the full ones; else the full
    FROM_KEY_0: tl.constexpr,  # seen.row_begin is 0 for every row
    MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add the terms of a region's masked, or its full, blocks of keys to dq, without the scale."""
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    for i in tl.range(seen.num_masked if MASKED else seen.num_full):
        start = block_start(i, seen, BLOCK_N, MASKED)
        # A full block lies inside [begin, end), so it is loaded without a mask of rows. If
        # num_full is 0, the last one before it may reach past `end`: `row_end` hides keys loaded as
        # 0. No key outside [begin, end) is loaded: a rotated copy may be infinite outside of its
        # region.
        keys = seen.end - start

        # weights = exp2(q @ k.T - lse): (M, N)
        k_rows = load_rows(
            k, start, keys, BLOCK_N, BLOCKS.d0, BLOCKS.d1, MODEL.head_dim, MASKED
        )  # (N, D)
        logits = softcap(dot_rows(q, k_rows), MODEL.softmax_scale, MODEL.softcap)
        # In units of the cap, or the scale; times MODEL.logit_unit they have base 2.
        weights = tl.exp2(logits * MODEL.logit_unit - lse_2[:, None])
        if MASKED:
            key = (start + tl.arange(0, BLOCK_N))[None, :]
            sees = key < seen.row_end[:, None]
            if not FROM_KEY_0:
                sees = sees & (key >= seen.row_begin[:, None])
            weights = tl.where(sees, weights, 0.0)
            # By xPos, logits that the mask hides may overflow: no NaN in the cap's derivative.
            logits = tl.where(sees, logits, 0.0)

        # d_logits = weights * (dout @ v.T - delta): (M, N)
        v_rows = load_rows(
            v, start, keys, BLOCK_N, BLOCKS.dv0, BLOCKS.dv1, MODEL.head_dim_v, MASKED
        )  # (N, DV)
        d_logits = weights * (dot_rows(dout, v_rows) - delta[:, None])

        # dq += d_logits @ k
        dq = add_dot(dq, softcap_backward(d_logits, logits, MODEL.softcap), k_rows)
    return dq


@triton.jit
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
    D0: tl.constexpr = BLOCKS.d0
    D1: tl.constexpr = BLOCKS.d1
    DV0: tl.constexpr = BLOCKS.dv0
    DV1: tl.constexpr = BLOCKS.dv1
    HEADS_Q: tl.constexpr = MODEL.heads_q
    HEADS_K: tl.constexpr = MODEL.heads_k
    HEAD_DIM: tl.constexpr = MODEL.head_dim
    HEAD_DIM_V: tl.constexpr = MODEL.head_dim_v
    REGIONS: tl.constexpr = len(MODEL.starts)
    k = strided_rows(k, k_stride_batch, k_stride_seq, k_stride_head, HEADS_K, HEAD_DIM, BLOCKS)
    v = strided_rows(v, v_stride_batch, v_stride_seq, v_stride_head, HEADS_K, HEAD_DIM_V, BLOCKS)
    out = strided_rows(
        out, out_stride_batch, out_stride_seq, out_stride_head, HEADS_Q, HEAD_DIM_V, BLOCKS
    )
    dout = strided_rows(
        dout, dout_stride_batch, dout_stride_seq, dout_stride_head, HEADS_Q, HEAD_DIM_V, BLOCKS
    )

    # This program's `rows` queries of one head, from `token` on, and first_row, the first token of
    # their sequence in k. A program without a block has 0 rows and no keys.
    sequences = Sequences(
        seqlen_q, seqlen_k, cu_seqlens, num_sequences, search_steps, q_start, q_start_stride,
        k_start, k_start_stride,
    )  # fmt: skip
    queries = block_of_queries(blocks, sequences, MODEL, BLOCKS)
    batch, head, head_k, token = queries.batch, queries.head, queries.head_k, queries.token
    rows, first_row = queries.rows, queries.first_row

    # delta = sum(dout * out) - dlse, (M,): 0 for a row that sees no key, whose lse is -inf.
    row = tl.arange(0, BLOCK_M)
    lse_index = (batch * HEADS_Q + head) * seqlen_q + token
    lses = tl.load(lse + lse_index + row, mask=row < rows, other=0.0)  # (M,)
    dout_row, out_row = row_of(dout, batch, token, head), row_of(out, batch, token, head)
    dout_rows = load_rows(dout_row, 0, rows, BLOCK_M, DV0, DV1, HEAD_DIM_V, True)  # (M, DV)
    out_rows = load_rows(out_row, 0, rows, BLOCK_M, DV0, DV1, HEAD_DIM_V, True)
    deltas = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(len(out_rows)):
        deltas += tl.sum(out_rows[i].to(tl.float32) * dout_rows[i].to(tl.float32), 1)
    if dlse is not None:
        deltas -= tl.load(dlse + lse_index + row, mask=row < rows, other=0.0)
    deltas = tl.where(lses == float("-inf"), 0.0, deltas)
    tl.store(delta + lse_index + row, deltas, mask=row < rows)

    v_row = row_of(v, batch, first_row, head_k)
    for r in tl.static_range(REGIONS):
        # The queries, rotated to this region: (M, D). Its keys.
        q_copy = nth_copy(q_rotated, r, seqlen_q, REGIONS, HEADS_Q, HEAD_DIM)
        q_row = row_of(q_copy, batch, token, head)
        q_rows = load_rows(q_row, 0, rows, BLOCK_M, D0, D1, HEAD_DIM, True)
        k_row = row_of(keys_of_region(k, k_rotated, seqlen_k, r, MODEL), batch, first_row, head_k)
        seen = keys_seen(queries, r, BLOCKS.block_n, MODEL)
        dq = zero_rows(BLOCK_M, D0, D1)
        for full in tl.static_range(2):  # the masked blocks, then the full ones; the order is free
            dq = _add_dq(
                dq, q_rows, dout_rows, lses * log2_e(), deltas, k_row, v_row, seen,
                full == 0, r == 0 and MODEL.from_key_0, MODEL, BLOCKS,
            )  # fmt: skip
        dq_copy = nth_copy(dq_rotated, r, seqlen_q, REGIONS, HEADS_Q, HEAD_DIM)
        dq = scale_rows(dq, MODEL.softmax_scale)
        store_rows(row_of(dq_copy, batch, token, head), dq, rows, BLOCK_M, D0, D1, HEAD_DIM)


# -------------------------------------------------------------------------------------------------
# By block of keys: the gradients of keys and values


@triton.jit
def _add_dkv(
    dk, dv,  # (N, D), (N, DV) float32: d_logits.T @ q and weights.T @ dout so far
    k, v,  # (N, D), (N, DV); k: rotated to this region
    q, dout,  # Rows from row 0 of the sequence and head on
    lse, delta,  # pointers to row 0 of the sequence and head
    seen,  # the rows that see the keys in this region; seen.row_begin: (N,)
    MASKED: tl.constexpr,  # add the masked blocks, before and after the full ones; else the full
    MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add the terms of masked, or full, blocks of rows to dk, without the scale, and to dv."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    for i in tl.range(seen.num_masked if MASKED else seen.num_full):
        start = block_start(i, seen, BLOCK_M, MASKED)
        rows = seen.end - start  # a full block lies inside the sequence: no mask of rows
        row = tl.arange(0, BLOCK_M)
        if MASKED:
            lses = tl.load(lse + start + row, mask=row < rows, other=0.0) * log2_e()  # (M,)
            deltas = tl.load(delta + start + row, mask=row < rows, other=0.0)  # (M,)
        else:
            lses = tl.load(lse + start + row) * log2_e()
            deltas = tl.load(delta + start + row)

        # weights = exp2(k @ q.T - lse): (N, M), the transpose of the forward's
        q_rows = load_rows(
            q, start, rows, BLOCK_M, BLOCKS.d0, BLOCKS.d1, MODEL.head_dim, MASKED
        )  # (M, D)
        logits = softcap(dot_rows(k, q_rows), MODEL.softmax_scale, MODEL.softcap)
        # In units of the cap, or the scale; times MODEL.logit_unit they have base 2.
        weights = tl.exp2(logits * MODEL.logit_unit - lses[None, :])
        if MASKED:
            query = (start + row)[None, :]  # (1, M): rows of the sequence
            sees = (query >= seen.row_begin[:, None]) & (query < seen.row_end[:, None])
            weights = tl.where(sees, weights, 0.0)
            logits = tl.where(sees, logits, 0.0)  # see _add_dq

        # dv += weights.T @ dout
        dout_rows = load_rows(
            dout, start, rows, BLOCK_M, BLOCKS.dv0, BLOCKS.dv1, MODEL.head_dim_v, MASKED
        )  # (M, DV)
        dv = add_dot(dv, weights, dout_rows)

        # d_logits = weights * (v @ dout.T - delta): (N, M)
        d_logits = weights * (dot_rows(v, dout_rows) - deltas[None, :])

        # dk += d_logits @ q
        dk = add_dot(dk, softcap_backward(d_logits, logits, MODEL.softcap), q_rows)
    return dk, dv


@triton.jit
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
    k = strided_rows(k, k_stride_batch, k_stride_seq, k_stride_head, HEADS_K, HEAD_DIM, BLOCKS)
    v = strided_rows(v, v_stride_batch, v_stride_seq, v_stride_head, HEADS_K, HEAD_DIM_V, BLOCKS)
    dout = strided_rows(
        dout, dout_stride_batch, dout_stride_seq, dout_stride_head, HEADS_Q, HEAD_DIM_V, BLOCKS
    )

    # This program's head of k, the first token of its sequence in q and in k (`first_row`, 0 if not
    # packed), and the `index` of its block of keys. A program without a block has a sequence of
    # length 0.
    sequences = Sequences(
        seqlen_q, seqlen_k, cu_seqlens, num_sequences, search_steps, q_start, q_start_stride,
        k_start, k_start_stride,
    )  # fmt: skip
    this = find_block(blocks, HEADS_K, sequences, BLOCK_N)
    batch, head_k, first_row = this.batch, this.head, this.first_row
    first = this.index * BLOCK_N  # within the sequence, as all keys and rows below
    last = tl.minimum(first + BLOCK_N, this.seqlen_k) - 1
    key = first + tl.arange(0, BLOCK_N)  # (N,)
    rows = this.seqlen_k - first  # keys of the sequence from there on; may exceed BLOCK_N
    token = first_row + first  # the block's first token in k

    v_row = row_of(v, batch, token, head_k)
    v_rows = load_rows(v_row, 0, rows, BLOCK_N, DV0, DV1, HEAD_DIM_V, True)  # (N, DV)
    dv_rows = zero_rows(BLOCK_N, DV0, DV1)
    for r in tl.static_range(REGIONS):
        # The region's keys: (N, D). The queries that see them.
        k_row = row_of(keys_of_region(k, k_rotated, seqlen_k, r, MODEL), batch, token, head_k)
        k_rows = load_rows(k_row, 0, rows, BLOCK_N, D0, D1, HEAD_DIM, True)
        seen = queries_that_see(key, first, last, this, r, BLOCKS.block_m, MODEL)
        dk_rows = zero_rows(BLOCK_N, D0, D1)
        for head_q in tl.range(head_k * GROUP, head_k * GROUP + GROUP):
            # Row 0 of the sequence, in the queries rotated to this region and in dout.
            q_copy = nth_copy(q_rotated, r, seqlen_q, REGIONS, HEADS_Q, HEAD_DIM)
            q_row = row_of(q_copy, batch, first_row, head_q)
            dout_row = row_of(dout, batch, first_row, head_q)
            lse_index = (batch * HEADS_Q + head_q) * seqlen_q + first_row
            for full in tl.static_range(2):  # 0: the masked blocks, 1: the full
                dk_rows, dv_rows = _add_dkv(
                    dk_rows, dv_rows, k_rows, v_rows, q_row, dout_row, lse + lse_index,
                    delta + lse_index, seen, full == 0, MODEL, BLOCKS,
                )  # fmt: skip
        dk_copy = nth_copy(dk_rotated, r, seqlen_k, REGIONS, HEADS_K, HEAD_DIM)
        dk_rows = scale_rows(dk_rows, MODEL.softmax_scale)
        store_rows(row_of(dk_copy, batch, token, head_k), dk_rows, rows, BLOCK_N, D0, D1, HEAD_DIM)
    dv_row = row_of(nth_copy(dv, 0, seqlen_k, 1, HEADS_K, HEAD_DIM_V), batch, token, head_k)
    store_rows(dv_row, dv_rows, rows, BLOCK_N, DV0, DV1, HEAD_DIM_V)


# -------------------------------------------------------------------------------------------------
# The launches


class BackwardLaunches(NamedTuple):
    """The four launches of a call."""

    rotate: RotateLaunch
    by_queries: Launch
    by_keys: Launch
    rotate_back: RotateLaunch


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
    launches: BackwardLaunches,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of raw q and k, and of v, in their dtypes or float32; four launches.

    dout: like out, contiguous in the last dimension. dlse: like lse, or None. The other arguments
    are those of `forward`, launches from `backward_launches`. The gradient of sinks needs no
    kernel: op.py has it. Packed tokens past the last boundary, which no valid call has, get no
    gradients: memory as it was.
    """
    # Kernels read the call's small tensors without strides.
    call, lse = with_contiguous_rows(call), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = (x.new_empty(x.shape, dtype=call.results_dtype(x.dtype)) for x in (q, k, v))
    delta = lse.new_empty(lse.shape)
    q_rotated, k_rotated = rotate(launches.rotate, q, k, call)
    dq_rotated, dk_rotated = gradients_of_copies(launches.rotate_back, q, k)
    launches.by_queries.run(
        q_rotated=q_rotated, k=k, v=v, k_rotated=k_rotated, out=out, dout=dout, lse=lse,
        dlse=dlse, delta=delta, dq_rotated=dq_rotated, cu_seqlens=call.cu_seqlens,
        q_start=call.q_start, k_start=call.k_start,
    )  # fmt: skip
    launches.by_keys.run(
        q_rotated=q_rotated, k=k, v=v, k_rotated=k_rotated, dout=dout, lse=lse, delta=delta,
        dk_rotated=dk_rotated, dv=dv, cu_seqlens=call.cu_seqlens, q_start=call.q_start,
        k_start=call.k_start,
    )  # fmt: skip
    rotate_back(launches.rotate_back, dq, dk, dq_rotated, dk_rotated, call)
    return dq, dk, dv


def backward_launches(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
) -> BackwardLaunches:
    """Build the launches for tensors of these layouts."""
    call = with_contiguous_rows(call)

    def launch(name: str, kernel: Any, blocks_of: Tensor, strided: dict[str, Tensor]) -> Launch:
        """Build a launch; its programs take blocks of a tensor, and have strides of some."""
        config = configs.config_of(name, q, v)  # sizes of blocks, warps and stages
        model, blocks = constants_of(config, q, k, v, call, dout, out)
        size = blocks.block_m if name == "dq" else blocks.block_n
        programs, blocks_of_head = programs_of(blocks_of, size, call)
        numbers = {"blocks": blocks_of_head, **sequence_numbers(q, k, call)}
        for each, x in strided.items():
            numbers |= strides_by_name(each, x, blocks.align)
        constants = {"MODEL": model, "BLOCKS": blocks}
        return Launch(
            kernel, (programs,), numbers=numbers, constants=constants, options=config.options
        )

    # Gradients do not exist yet: contiguous tensors without memory tell their shapes and strides.
    dq, dk = (
        torch.empty(x.shape, dtype=call.results_dtype(x.dtype), device="meta") for x in (q, k)
    )
    return BackwardLaunches(
        # q for each region; k for each map of keys that it does not have already
        rotation_of_both(q, k, call),
        launch("dq", dq_kernel, q, {"k": k, "v": v, "out": out, "dout": dout}),
        launch("dkv", dkv_kernel, k, {"k": k, "v": v, "dout": dout}),
        rotation_of_gradients(dq, dk, call),  # both for each region
    )
