"""Device functions: what a program found of a block of rows, alone or to be merged with others."""

import triton
import triton.language as tl

from ...._shared.triton.softmax import add_sink, sink_of

NONE = tl.constexpr(-1e30)  # below any logit, and finite: differences of two are not NaN
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def store_result(result, row, acc, row_sum, row_max, valid, TILE: tl.constexpr):
    """result: (out, lse, sinks, sequence, head of k, seqlen_q, heads_q, group, packed), the last of
    packed queries (sequences, first token of this one, tokens of all).
    """
    out, lse, sinks, sequence, head, seqlen_q, heads_q, group, packed = result
    DIMS: tl.constexpr = TILE.dims_v
    HEAD_DIM: tl.constexpr = TILE.head_dim_v
    token, head_q = row // group, head * group + row % group
    if TILE.sinks:
        sink = sink_of(sinks, head_q, valid)
        if TILE.packed:  # what follows the last boundary has none
            sink = tl.where(sequence < packed[0], sink, float("-inf"))
        row_max, row_sum, rescale = add_sink(row_max, row_sum, sink)
        acc *= rescale[:, None]
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    natural = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    if TILE.packed:
        _, first, total = packed
        place = tl.cast(first, tl.int64) + token
        tl.store(lse + head_q.to(tl.int64) * total + place, natural, mask=valid)
        place = place * heads_q + head_q
    else:
        sequence = tl.cast(sequence, tl.int64)
        tl.store(lse + (sequence * heads_q + head_q) * seqlen_q + token, natural, mask=valid)
        place = (sequence * seqlen_q + token) * heads_q + head_q
    dim = tl.arange(0, DIMS)
    mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
    value = (acc / row_sum[:, None]).to(out.dtype.element_ty)
    tl.store(out + place[:, None] * HEAD_DIM + dim[None, :], value, mask=mask)


@triton.jit
def store_partial(partials, row, acc, row_sum, row_max, valid, TILE: tl.constexpr):
    """partials: (out, lse, slot, head of k, heads_k, rows of a head in a slot); out normalised, lse
    base 2, NONE without keys.
    """
    partial_out, partial_lse, slot, head, heads_k, rows = partials
    DIMS: tl.constexpr = TILE.dims_v
    HEAD_DIM: tl.constexpr = TILE.head_dim_v
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    place = (tl.cast(slot, tl.int64) * heads_k + head) * rows + row
    tl.store(partial_lse + place, tl.where(empty, NONE, row_max + tl.log2(row_sum)), mask=valid)
    dim = tl.arange(0, DIMS)
    mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
    pointers = partial_out + place[:, None] * HEAD_DIM + dim[None, :]
    tl.store(pointers, acc / row_sum[:, None], mask=mask)


@triton.jit
def merge(partials, result, first_row, rows, splits, TILE: tl.constexpr):
    """Store what the splits from slot on found, in their order whoever came last.

    Other processors wrote them, so nothing may come from this one's L1.
    """
    partial_out, partial_lse, slot, head, heads_k, rows_of_slot = partials
    ROWS: tl.constexpr = TILE.merge_rows
    SPLITS: tl.constexpr = TILE.merge_splits
    DIMS: tl.constexpr = TILE.dims_v
    HEAD_DIM: tl.constexpr = TILE.head_dim_v
    row = first_row + tl.arange(0, ROWS)
    in_slot = row
    if TILE.packed:
        in_slot = tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    row_max = tl.full((ROWS,), NONE, tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIMS), tl.float32)
    for first in tl.range(0, splits, SPLITS, num_stages=1):
        split = first + tl.arange(0, SPLITS)
        valid = (split < splits)[:, None] & (row < rows)[None, :]
        place = ((slot + split).to(tl.int64) * heads_k + head)[:, None] * rows_of_slot
        place += in_slot[None, :]
        lse = tl.load(partial_lse + place, mask=valid, other=NONE, cache_modifier=".cg")
        mask = valid[:, :, None] & (dim < HEAD_DIM)[None, None, :]
        pointers = partial_out + place[:, :, None] * HEAD_DIM + dim[None, None, :]
        part = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, tl.max(lse, 0))
        # Splits without keys hold zeros, but count: not when there is no key at all.
        weights = tl.where(lse > NONE, tl.exp2(lse - new_max[None, :]), 0.0)
        rescale = tl.exp2(row_max - new_max)
        acc = acc * rescale[:, None] + tl.sum(part * weights[:, :, None], 0)
        row_sum = row_sum * rescale + tl.sum(weights, 0)
        row_max = new_max
    store_result(result, row, acc, row_sum, row_max, row < rows, TILE)


@triton.jit
def counters_of(scratch):
    """The head of `scratch`: how many programs are done, of each block of rows."""
    return scratch.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def finish(state, result, place, scratch, counters, valid, TILE: tl.constexpr):
    """Store what was found of a block of rows, or, if others share its keys, leave it for the last.

    place: (slot, split, splits, slots, block of rows).
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    HEAD_DIM: tl.constexpr = TILE.head_dim_v
    row_max, row_sum, acc = state
    slot, split, splits, slots, block = place
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if TILE.splits:
        if splits == 1:
            store_result(result, row, acc, row_sum, row_max, valid, TILE)
        else:
            _, _, _, sequence, head, seqlen_q, _, group, _ = result
            heads_k, rows = tl.num_programs(1), seqlen_q * group
            rows_of_slot, in_slot = rows, row
            if TILE.packed:
                rows_of_slot, in_slot = BLOCK_M, tl.arange(0, BLOCK_M)
            partial_out = scratch + tl.cast(counters, tl.int64) * 4
            partial_lse = partial_out + tl.cast(slots, tl.int64) * heads_k * rows_of_slot * HEAD_DIM
            mine = (partial_out, partial_lse, slot, head, heads_k, rows_of_slot)
            store_partial(mine, in_slot, acc, row_sum, row_max, valid, TILE)
            # All threads have stored before the one that counts says so to other processors.
            tl.debug_barrier()
            if TILE.packed:
                counter = tl.cast(head, tl.int64) * slots + slot - split
            else:
                row_blocks = tl.cdiv(rows, BLOCK_M)
                counter = (tl.cast(sequence, tl.int64) * heads_k + head) * row_blocks + block
            done = tl.atomic_add(counters_of(scratch) + counter, 1, sem="acq_rel", scope="gpu")
            if done == splits - 1:
                first = (partial_out, partial_lse, slot - split, head, heads_k, rows_of_slot)
                merge(first, result, block * BLOCK_M, rows, splits, TILE)
    else:
        store_result(result, row, acc, row_sum, row_max, valid, TILE)
