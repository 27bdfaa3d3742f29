"""The end of a decode program: it stores the results of its rows, or merges several splits of them.

A split is a part of the keys that a block of rows sees (schedule.py). Each split stores its result,
normalised, and its log-sum-exp. Then it counts itself; the last one to do so merges all of them,
always in their order: every run gives the same bits.

Names:

row                 a token and one of the `group` heads of q that share a head of k
M, V                rows of a block; the dims of v, rounded up to a power of two: MODEL.dims_v
row_max, row_sum    of the softmax of a row's keys so far; acc is its weighted values. They have
                    base 2: logits are multiplied by log2(e)
item                a split of the keys of a sequence; packed, of a block of rows (schedule.py)
MODEL, BLOCKS       DecodeModel and DecodeBlocks of decode.py
add_sink            row_max and row_sum with a logit without a value, and what to multiply acc by
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ...attention.triton.device import add_sink, ln_2, log2_e


class OutputTarget(NamedTuple):
    """The destination of the results of this program's rows."""

    out: tl.tensor  # (batch, num_tokens, heads_q, head_dim_v); packed: batch is 1
    lse: tl.tensor  # (batch, heads_q, num_tokens) float32, natural
    sinks: tl.tensor  # (heads_q,) natural logits without a value, or None
    has_sequence: tl.tensor  # False for tokens after the last boundary, which have no sink
    batch: tl.tensor  # int64
    first_token: tl.tensor  # of this sequence
    num_tokens: tl.tensor
    head: tl.tensor  # of k
    heads_k: tl.tensor


@triton.jit
def store_results(target, row, valid, row_max, row_sum, acc, MODEL: tl.constexpr):
    """Add the sinks, normalise, and store out and lse.

    row, valid, row_max, row_sum: (M,); acc: (M, V). M is any number of rows here.
    """
    token = target.first_token + row // MODEL.group  # (M,)
    head_q = target.head * MODEL.group + row % MODEL.group  # (M,)
    heads_q = target.heads_k * MODEL.group
    if target.sinks is not None:
        sink = tl.load(target.sinks + head_q, mask=valid, other=float("-inf")) * log2_e()
        if MODEL.packed:
            sink = tl.where(target.has_sequence, sink, float("-inf"))
        row_max, row_sum, rescale = add_sink(row_max, row_sum, sink)
        acc *= rescale[:, None]
    empty = row_sum == 0.0  # no keys, and no sink
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * ln_2())
    lse_ptr = target.lse + (target.batch * heads_q + head_q) * target.num_tokens + token
    tl.store(lse_ptr, lse, mask=valid)
    out_index = (target.batch * target.num_tokens + token) * heads_q + head_q  # (M,)
    dim = tl.arange(0, MODEL.dims_v)
    mask = valid[:, None] & (dim < MODEL.head_dim_v)[None, :]
    out = (acc / row_sum[:, None]).to(target.out.dtype.element_ty)  # (M, V)
    out_row = target.out + out_index * MODEL.head_dim_v
    tl.store(out_row[:, None] + dim[None, :], out, mask=mask)


@triton.jit
def _merge_splits(
    target, partial_out, partial_lse, first_partial, split_stride, splits, row_block, num_rows,
    MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of a block of rows, always in their order, and store the result.

    partial_out: (partials, head_dim_v) float32, normalised; partial_lse: (partials,) float32 of
    base 2, -inf without keys. Row i of split s is partial first_partial + s * split_stride + i.
    """
    ROWS: tl.constexpr = BLOCKS.merge_rows  # as many as a block can have, at most BLOCK_M
    SPLITS: tl.constexpr = BLOCKS.merge_splits  # at a time
    DIMS_V: tl.constexpr = MODEL.dims_v
    row = row_block * BLOCKS.block_m + tl.arange(0, ROWS)  # (ROWS,)
    dim = tl.arange(0, DIMS_V)
    # Below any logit, but finite: exp2(-inf - -1e30) is 0, not NaN. A split's NaN goes on.
    row_max = tl.full((ROWS,), -1e30, tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIMS_V), tl.float32)
    for first_split in tl.range(0, splits, SPLITS, num_stages=1):
        split = first_split + tl.arange(0, SPLITS)
        valid = (split < splits)[:, None] & (row < num_rows)[None, :]  # (SPLITS, ROWS)
        partial = first_partial + split.to(tl.int64)[:, None] * split_stride + row[None, :]
        # Past L1 (.cg): other processors wrote these numbers.
        lse_ptr = partial_lse + partial  # (SPLITS, ROWS)
        lse = tl.load(lse_ptr, mask=valid, other=float("-inf"), cache_modifier=".cg")
        mask = valid[:, :, None] & (dim < MODEL.head_dim_v)[None, None, :]
        out_ptr = partial_out + partial[:, :, None] * MODEL.head_dim_v + dim[None, None, :]
        out = tl.load(out_ptr, mask=mask, other=0.0, cache_modifier=".cg")  # (SPLITS, ROWS, V)
        new_max = tl.maximum(row_max, tl.max(lse, 0))
        weights = tl.exp2(lse - new_max[None, :])  # (SPLITS, ROWS)
        rescale = tl.exp2(row_max - new_max)  # (ROWS,)
        acc = acc * rescale[:, None] + tl.sum(out * weights[:, :, None], 0)
        row_sum = row_sum * rescale + tl.sum(weights, 0)
        row_max = new_max
    store_results(target, row, row < num_rows, row_max, row_sum, acc, MODEL)


@triton.jit
def store_split(
    target, scratch, num_counters, item, num_items, split, splits, row_block, num_rows, row, valid,
    row_max, row_sum, acc, MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Store a block of rows, seen by one split of its keys; the last split to come merges all.

    scratch: num_counters int32 counters, all 0 at first, one for each block of rows and head of k;
    then partial results, float32: partial_out (item, head of k, row of the item, head_dim_v), and
    partial_lse without the last dim, see `_merge_splits`. An item has the rows of all tokens of its
    sequence; packed, those of its block. row, valid, row_max, row_sum: (M,); acc: (M, V).

    Of the items of a block of rows, `splits` come here, as work_of_program gives all of them the
    same number: else the counter would not reach it. Items with nothing to do do not come: they
    have one split.
    """
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    head, heads_k = target.head, target.heads_k
    first_item = item - split  # that of the first split: the items of a block follow one another
    if MODEL.packed:
        item_rows, first_row = BLOCK_M, row_block * BLOCK_M
        counter = tl.cast(head, tl.int64) * num_items + first_item
    else:
        item_rows, first_row = target.num_tokens * MODEL.group, 0
        counter = (target.batch * heads_k + head) * tl.cdiv(num_rows, BLOCK_M) + row_block
    # Counters come in fours: so the compiler knows that partial_out is aligned.
    partial_out = scratch + tl.cast(num_counters // 4, tl.int64) * 4
    partials = tl.cast(num_items, tl.int64) * heads_k * item_rows
    partial_lse = partial_out + partials * MODEL.head_dim_v
    first_partial = (tl.cast(first_item, tl.int64) * heads_k + head) * item_rows - first_row
    split_stride = heads_k * item_rows  # from an item to the next

    partial = first_partial + tl.cast(split, tl.int64) * split_stride + row  # (M,)
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("-inf"), row_max + tl.log2(row_sum))
    tl.store(partial_lse + partial, lse, mask=valid)
    dim = tl.arange(0, MODEL.dims_v)
    mask = valid[:, None] & (dim < MODEL.head_dim_v)[None, :]
    out_ptr = partial_out + partial[:, None] * MODEL.head_dim_v + dim[None, :]
    tl.store(out_ptr, acc / row_sum[:, None], mask=mask)  # (M, V)
    # All threads must store before one of them counts, which other processors see.
    tl.debug_barrier()
    counters = scratch.to(tl.pointer_type(tl.int32), bitcast=True)
    done = tl.atomic_add(counters + counter, 1, sem="acq_rel", scope="gpu")
    if done == splits - 1:
        _merge_splits(
            target, partial_out, partial_lse, first_partial, split_stride, splits, row_block,
            num_rows, MODEL, BLOCKS,
        )  # fmt: skip
