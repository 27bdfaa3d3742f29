"""Attention over a key/value cache: write new keys and values into it, then attend.

There are two launches. The first writes k and v; it rotates keys to the positions at which the
score method stores them. The second attends. If a region sees keys at other positions, it rotates
them while it loads them.

Only the device knows lengths. So the grid has a fixed number of slots, and sequences get slots by
their share of all keys: every program computes its own sequence and split of keys. Blocks of rows
of packed queries get slots in the same way, since the host does not know their sequences. Of the
programs that share a sequence, the last to finish merges the results.

A row is a token and one of the `group` heads of q that share a head of k. Shapes in comments: M is
BLOCK_M, rows; N is BLOCK_N, keys; P is pairs of dims, D the dims of v.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....scores import UNROTATED
from ....scores.base import FIRST_KEY
from ..._shared.dtypes import FP8, as_bits
from ..._shared.layouts import cached_by_layout, layout_key
from ..._shared.triton.fp8 import kind_of_cache, widened_codes
from ..._shared.triton.launch import (
    VECTOR_BYTES,
    chip_of,
    processors_of,
    strides_of,
)
from ..._shared.triton.pairs import load_parts, of_pairs, rotate, widened
from ...rope.append_checks import Append
from ...rope.triton.append import Slots, build_append, rope_append_kernel
from ...rope.triton.device import Launch as AppendLaunch
from ...rope.triton.device import Rope, launch
from ..call import AttentionCall, KVCache, lse_shape
from . import configs
from .device import (
    FARTHEST,
    Launch,
    add_sink,
    capped,
    first_key,
    freqs_of,
    ln_2,
    log2_e,
    log_n_scale,
    map_cos_sin,
    map_of,
    no_logit,
    nth_cos_sin,
    rope_heads_of,
    sequence_stride,
    with_contiguous_rows,
)

LEAST_DIMS = 16  # least dims, and rows, of a product
COUNTERS = 4  # counters come in fours, so that the partial results after them are aligned
MERGED = 4096  # numbers that a program merges at a time: 16 to 32 registers per thread


class CacheTile(NamedTuple):
    """The constants of both compiled kernels: a model's settings and the sizes of blocks."""

    block_m: int  # rows of queries
    block_n: int  # rows of keys
    group: int  # heads of q that share one of k
    head_dim: int  # dims of queries and keys
    dims: int  # head_dim, rounded up to a power of two
    head_dim_v: int
    dims_v: int  # head_dim_v, rounded up to a power of two
    half: int  # pairs of dims that rotate
    rope_heads: tuple[int, int]  # see `rope_heads_of`
    pairs: int  # half, rounded up to a power of two
    rest: int  # dims after the rotated ones
    rest_dims: int  # rest, rounded up; 1 if none
    align: int  # elements; divides all strides
    interleaved: bool
    starts: tuple[int, ...]  # start of each region, counted from the query's block
    granularity: int
    window: int  # most keys that a query sees, or 0: all
    from_first_key: bool  # region 0 has no lower end
    q_maps: tuple[tuple, ...]  # one per region: see `map_of`
    k_maps: tuple[tuple, ...]
    rotates_keys: tuple[bool, ...]  # by region: True if it sees keys at other positions than stored
    stored: tuple | None  # the map of keys in the cache; None: raw
    q_scale: float  # softmax_scale, for logits of base 2
    amplitude: float
    per_log_n: float  # 1 / ln(log_n), or 0: none
    softcap: float  # for logits of base 2, or 0: none
    paged: bool
    padded: bool
    packed: bool  # the tokens of all sequences follow one another
    codes: int  # how to read a cache in fp8: see _shared/triton/fp8.py
    several_tokens: bool  # queries have more than one token
    splits: bool  # several programs may share a sequence
    merge_rows: int  # rows of queries that are merged at a time,
    merge_splits: int  # and splits of each
    widen: bool  # widen operands to float32 for products: the interpreter has no bfloat16


# -------------------------------------------------------------------------------------------------
# Slots of a cache and lengths of its sequences, safe for any content of the tensors


@triton.jit
def _page_of(table, sequence, slot, valid):
    """Return the pages that hold these slots; table: as in _slot_rows."""
    block_table, table_batch, page_size = table
    pages = block_table + tl.cast(sequence, tl.int64) * table_batch
    return tl.load(pages + slot // page_size, mask=valid, other=0)


@triton.jit
def _slot_rows(plane, table, sequence, head, slot, valid, TILE: tl.constexpr):
    """Return pointers to dim 0 of these slots of a sequence, (N,).

    Slots are int32: in 64 bits, a GPU calls a function for every division.

    plane: (pointer, strides of blocks, slots and heads in groups of TILE.align elements); a block
    is a sequence or a page. table: (block_table, its stride, slots of a page).
    """
    pointer, block_stride, slot_stride, head_stride = plane
    if TILE.paged:
        block = _page_of(table, sequence, slot, valid).to(tl.int64)
        offset = (slot % table[2]).to(tl.int64) * slot_stride
    else:
        block = tl.cast(sequence, tl.int64)
        offset = slot.to(tl.int64) * slot_stride
    offset += block * block_stride + tl.cast(head, tl.int64) * head_stride
    return pointer + offset * TILE.align


@triton.jit
def _rows_of_tokens(x, batch, token, head, batch_stride, token_stride, head_stride, ALIGN):
    """Return pointers to dim 0 of these tokens and heads."""
    offset = tl.cast(batch, tl.int64) * batch_stride + token.to(tl.int64) * token_stride
    return x + (offset + tl.cast(head, tl.int64) * head_stride) * ALIGN


@triton.jit
def _length_of(sequence, valid, lengths, appended, TILE: tl.constexpr):
    """Return (slot of position 0, number of keys) of these sequences."""
    _, seqlens, leftpad, _, capacity = lengths
    end = tl.load(seqlens + sequence, mask=valid, other=0) + appended
    end = tl.minimum(tl.maximum(end, 0), capacity)
    pad = end * 0
    if TILE.padded:
        pad = tl.maximum(tl.load(leftpad + sequence, mask=valid, other=0), 0)
    return pad, tl.maximum(end - pad, 0)


@triton.jit
def _tokens_of(sequence, batch, queries):
    """Return (first token, number of tokens) of these packed sequences.

    Tokens after the last boundary count as sequence number `batch`, which has no keys.

    queries: (cu_seqlens, number of all tokens).
    """
    cu_seqlens, total = queries
    begin = tl.load(cu_seqlens + sequence, mask=sequence <= batch, other=total)
    end = tl.load(cu_seqlens + sequence + 1, mask=sequence < batch, other=total)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    return begin, tl.minimum(tl.maximum(end, begin), total) - begin


# -------------------------------------------------------------------------------------------------
# The schedule: slots go to sequences, splits and blocks of rows


@triton.jit
def _key_blocks(sequence, lengths, queries, TILE: tl.constexpr):
    """Return the number of blocks of keys that the queries of these sequences see."""
    batch, _, _, appended, _ = lengths
    _, seqlen_q = queries
    valid = sequence < batch
    if TILE.packed:
        _, seqlen_q = _tokens_of(sequence, batch, queries)
        appended = appended * seqlen_q
    _, keys = _length_of(sequence, valid, lengths, appended, TILE)
    if not TILE.from_first_key:
        keys -= first_key(keys - seqlen_q, keys, 0, 0, TILE)
    return tl.where(valid, tl.cdiv(tl.maximum(keys, 0), TILE.block_n), 0)


@triton.jit
def _row_blocks(sequence, batch, queries, TILE: tl.constexpr):
    """Return the number of blocks of rows in each packed sequence."""
    _, seqlen_q = _tokens_of(sequence, batch, queries)
    return tl.cdiv(seqlen_q * TILE.group, TILE.block_m)


@triton.jit
def _blocks_of_split(slots, lengths, queries, TILE: tl.constexpr):
    """Return how many blocks of keys a split needs at least, so that all splits get a slot."""
    LENGTHS: tl.constexpr = 128  # sequences at a time
    MARGIN: tl.constexpr = 1.0001  # above the error of a float32 sum
    MOST: tl.constexpr = 1e9  # blocks of keys, more than any cache has
    batch = lengths[0]
    total = 0
    if TILE.packed:
        # Rows times keys in float32: 32 bits overflow, and in 64 a GPU calls a function to divide.
        total, row_blocks = 0.0, 0
        for first in tl.range(0, batch + 1, LENGTHS):
            sequence = first + tl.arange(0, LENGTHS)
            rows = _row_blocks(sequence, batch, queries, TILE)
            row_blocks += tl.sum(rows)
            blocks = _key_blocks(sequence, lengths, queries, TILE)
            total += tl.sum(rows.to(tl.float32) * blocks.to(tl.float32))
        each = total * MARGIN / tl.maximum(slots - row_blocks, 1).to(tl.float32)
        each = tl.minimum(each, MOST).to(tl.int32) + 1
    else:
        for first in tl.range(0, batch, LENGTHS):
            sequence = first + tl.arange(0, LENGTHS)
            total += tl.sum(_key_blocks(sequence, lengths, queries, TILE))
        each = tl.cdiv(total, tl.maximum(slots - batch, 1))
    return each


@triton.jit
def share_of(slot, slots, least_blocks, lengths, queries, TILE: tl.constexpr):
    """Return (sequence, split, splits) of a slot; sequence >= batch if there is nothing to do.

    For packed queries, split counts the splits of all blocks of rows.

    A split has at least least_blocks blocks of keys, and more if all splits would need more than
    `slots`. Every sequence, or block of rows, gets at least one split, even if empty.

    lengths: (batch, seqlens, leftpad, appended, capacity). queries: as in _tokens_of.
    """
    LENGTHS: tl.constexpr = 128  # sequences at a time
    batch = lengths[0]
    each = tl.maximum(_blocks_of_split(slots, lengths, queries, TILE), least_blocks)
    sequence, begin, before = 0, 0, 0
    sequences = batch
    if TILE.packed:
        sequences = batch + 1
    for first in tl.range(0, sequences, LENGTHS):
        n = first + tl.arange(0, LENGTHS)
        splits = tl.maximum(tl.cdiv(_key_blocks(n, lengths, queries, TILE), each), 1)
        if TILE.packed:
            splits *= _row_blocks(n, batch, queries, TILE)
        splits = tl.where(n < sequences, splits, 0)
        passed = (before + tl.cumsum(splits, 0) <= slot) & (n < sequences)
        sequence += tl.sum(passed.to(tl.int32))
        begin += tl.sum(tl.where(passed, splits, 0))
        before += tl.sum(splits)
    splits = tl.maximum(tl.cdiv(_key_blocks(sequence, lengths, queries, TILE), each), 1)
    return sequence, slot - begin, splits


# -------------------------------------------------------------------------------------------------
# The end: a program's results for a block of rows, alone or merged with others


class Found(NamedTuple):
    """The destination of the results of this program's rows."""

    out: tl.tensor
    lse: tl.tensor
    sinks: tl.tensor
    scratch: tl.tensor  # counters, then partial results by (slot, head of k, row), then their lse
    counters: tl.tensor  # in fours
    batch: tl.tensor
    sequence: tl.tensor
    head: tl.tensor  # head of k
    heads_k: tl.tensor
    first_token: tl.tensor  # of the sequence in packed queries
    total: tl.tensor  # number of all packed tokens
    seqlen_q: tl.tensor
    block: tl.tensor  # block of rows
    slot: tl.tensor
    slots: tl.tensor
    split: tl.tensor
    splits: tl.tensor


@triton.jit
def _store_result(to, row, acc, row_sum, row_max, valid, TILE: tl.constexpr):
    token, head_q = row // TILE.group, to.head * TILE.group + row % TILE.group
    if to.sinks is not None:
        sink = tl.load(to.sinks + head_q, mask=valid, other=float("-inf")) * log2_e()
        if TILE.packed:  # tokens after the last boundary have none
            sink = tl.where(to.sequence < to.batch, sink, float("-inf"))
        row_max, row_sum, rescale = add_sink(row_max, row_sum, sink)
        acc *= rescale[:, None]
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    natural = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * ln_2())
    heads_q = to.heads_k * TILE.group
    if TILE.packed:
        place = tl.cast(to.first_token, tl.int64) + token
        tl.store(to.lse + head_q.to(tl.int64) * to.total + place, natural, mask=valid)
    else:
        sequence = tl.cast(to.sequence, tl.int64)
        at = (sequence * heads_q + head_q) * to.seqlen_q + token
        tl.store(to.lse + at, natural, mask=valid)
        place = sequence * to.seqlen_q + token
    dim = tl.arange(0, TILE.dims_v)
    mask = valid[:, None] & (dim < TILE.head_dim_v)[None, :]
    value = (acc / row_sum[:, None]).to(to.out.dtype.element_ty)
    at = (place * heads_q + head_q)[:, None] * TILE.head_dim_v + dim[None, :]
    tl.store(to.out + at, value, mask=mask)


@triton.jit
def _partials_of(to, TILE: tl.constexpr):
    """Return (out, lse, rows of a head in a slot) of partial results."""
    rows = to.seqlen_q * TILE.group
    if TILE.packed:
        rows = TILE.block_m
    out = to.scratch + tl.cast(to.counters, tl.int64) * 4
    lse = out + tl.cast(to.slots, tl.int64) * to.heads_k * rows * TILE.head_dim_v
    return out, lse, rows


@triton.jit
def _store_partial(to, in_slot, acc, row_sum, row_max, valid, TILE: tl.constexpr):
    """Store one split's result: out normalised, lse of base 2, no_logit() without keys."""
    out, lse, rows = _partials_of(to, TILE)
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    place = (tl.cast(to.slot, tl.int64) * to.heads_k + to.head) * rows + in_slot
    tl.store(lse + place, tl.where(empty, no_logit(), row_max + tl.log2(row_sum)), mask=valid)
    dim = tl.arange(0, TILE.dims_v)
    mask = valid[:, None] & (dim < TILE.head_dim_v)[None, :]
    at = out + place[:, None] * TILE.head_dim_v + dim[None, :]
    tl.store(at, acc / row_sum[:, None], mask=mask)


@triton.jit
def _merge_splits(to, TILE: tl.constexpr):
    """Merge the results of all splits of these rows and store them.

    The order is always that of the splits. Loads bypass L1, since other processors wrote them.
    """
    ROWS: tl.constexpr = TILE.merge_rows
    SPLITS: tl.constexpr = TILE.merge_splits
    DIMS: tl.constexpr = TILE.dims_v
    out, lse, rows_of_slot = _partials_of(to, TILE)
    rows = to.seqlen_q * TILE.group
    row = to.block * TILE.block_m + tl.arange(0, ROWS)
    in_slot = row
    if TILE.packed:
        in_slot = tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    row_max = tl.full((ROWS,), no_logit(), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIMS), tl.float32)
    for first in tl.range(0, to.splits, SPLITS, num_stages=1):
        split = first + tl.arange(0, SPLITS)
        valid = (split < to.splits)[:, None] & (row < rows)[None, :]
        slot = to.slot - to.split + split
        place = (slot.to(tl.int64) * to.heads_k + to.head)[:, None] * rows_of_slot
        place += in_slot[None, :]
        found = tl.load(lse + place, mask=valid, other=no_logit(), cache_modifier=".cg")
        mask = valid[:, :, None] & (dim < TILE.head_dim_v)[None, None, :]
        at = out + place[:, :, None] * TILE.head_dim_v + dim[None, None, :]
        part = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, tl.max(found, 0))
        # Splits without keys hold zeros with no_logit(): their weights are 0 even if none has keys.
        # A split's NaN goes on.
        weights = tl.where(found != no_logit(), tl.exp2(found - new_max[None, :]), 0.0)
        rescale = tl.exp2(row_max - new_max)
        acc = acc * rescale[:, None] + tl.sum(part * weights[:, :, None], 0)
        row_sum = row_sum * rescale + tl.sum(weights, 0)
        row_max = new_max
    _store_result(to, row, acc, row_sum, row_max, row < rows, TILE)


@triton.jit
def _finish(state, to, valid, TILE: tl.constexpr):
    """Store the results of a block of rows.

    If several programs share its keys, each stores a partial result, and the last merges them.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    row_max, row_sum, acc = state
    row = to.block * BLOCK_M + tl.arange(0, BLOCK_M)
    if TILE.splits:
        if to.splits == 1:
            _store_result(to, row, acc, row_sum, row_max, valid, TILE)
        else:
            in_slot = row
            if TILE.packed:
                in_slot = tl.arange(0, BLOCK_M)
            _store_partial(to, in_slot, acc, row_sum, row_max, valid, TILE)
            # All threads must store before one of them counts, which other processors see.
            tl.debug_barrier()
            if TILE.packed:
                counter = tl.cast(to.head, tl.int64) * to.slots + to.slot - to.split
            else:
                row_blocks = tl.cdiv(to.seqlen_q * TILE.group, BLOCK_M)
                counter = tl.cast(to.sequence, tl.int64) * to.heads_k + to.head
                counter = counter * row_blocks + to.block
            counters = to.scratch.to(tl.pointer_type(tl.int32), bitcast=True)
            done = tl.atomic_add(counters + counter, 1, sem="acq_rel", scope="gpu")
            if done == to.splits - 1:
                _merge_splits(to, TILE)
    else:
        _store_result(to, row, acc, row_sum, row_max, valid, TILE)


# -------------------------------------------------------------------------------------------------
# The second launch: attend


@triton.jit
def _as_operand(parts, like):
    """Convert float32 parts to the operand type of products."""
    return parts[0].to(like), parts[1].to(like), parts[2].to(like)


@triton.jit
def _widened_codes(parts, like, TILE: tl.constexpr):
    """Widen parts of keys in fp8, without their scale."""
    first = widened_codes(parts[0], like, TILE.codes)
    second = widened_codes(parts[1], like, TILE.codes)
    rest = first
    if TILE.rest > 0:
        rest = widened_codes(parts[2], like, TILE.codes)
    return first, second, rest


@triton.jit
def _dots(q, k, TILE: tl.constexpr):
    result = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    result = tl.dot(q[1], tl.trans(k[1]), result, input_precision="ieee")
    if TILE.rest > 0:
        result = tl.dot(q[2], tl.trans(k[2]), result, input_precision="ieee")
    return result


@triton.jit
def _attend(
    state, q, k_plane, v_plane, table, sequence, head, pad, begin, end, low, high, freq, decay,
    maps, k_scale, REGION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the keys [begin, end) of one region to (row_max, row_sum, weighted values).

    With several tokens, row i sees only the keys from low[i] to high[i].
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    ROTATES: tl.constexpr = TILE.rotates_keys[REGION]
    MAP: tl.constexpr = TILE.k_maps[REGION]
    STORED: tl.constexpr = TILE.stored
    OPERAND: tl.constexpr = q[0].dtype
    row_max, row_sum, acc = state
    for first in tl.range(begin, end, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        valid = j < end
        slot = pad + j
        rows = _slot_rows(k_plane, table, sequence, head, slot, valid, TILE)
        k = load_parts(rows, valid, TILE)  # (N, P) twice, and the rest
        if TILE.codes:
            k = _widened_codes(k, tl.float32 if ROTATES else OPERAND, TILE)
        if ROTATES:
            cos, sin = map_cos_sin(j, freq, decay, maps, MAP, STORED, TILE)
            k = rotate(widened(k), cos, sin, 1.0)
        logits = _dots(q, _as_operand(k, OPERAND), TILE)  # (M, N), base 2
        if TILE.codes:  # not into q: float16 lacks small numbers
            logits *= k_scale
        if TILE.softcap > 0:
            logits = capped(logits, TILE.softcap)
        seen = valid[None, :]
        if TILE.several_tokens:
            seen = seen & (j[None, :] < high[:, None])
            if not (REGION == 0 and TILE.from_first_key):
                seen = seen & (j[None, :] >= low[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))  # (M,)
        weights = tl.exp2(logits - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        dim = tl.arange(0, TILE.dims_v)
        rows = _slot_rows(v_plane, table, sequence, head, slot, valid, TILE)
        mask = valid[:, None] & (dim < TILE.head_dim_v)[None, :]
        v = tl.load(rows[:, None] + dim[None, :], mask=mask, other=0.0)  # (N, D)
        if TILE.codes:
            v = widened_codes(v, OPERAND, TILE.codes)
        v = v.to(OPERAND)
        acc = tl.dot(weights.to(OPERAND), v, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit(
    do_not_specialize=[
        *("q_batch", "q_token", "q_head", "k_block", "k_slot", "k_row", "v_block", "v_slot"),
        *("v_row", "table_batch", "page_size", "capacity", "freq_batch", "scale_batch", "batch"),
        *("slots", "least_blocks", "counters", "seqlen_q", "appended"),
    ]
)
def decode_kernel(
    q, k_cache, v_cache, inv_freq, seqlens, block_table, leftpad, log_decay, pair_maps, cu_seqlens,
    query_scale, sinks, k_scale, v_scale, out, lse, scratch,
    q_batch, q_token, q_head, k_block, k_slot, k_row, v_block, v_slot, v_row,
    table_batch, page_size, capacity, freq_batch, scale_batch, batch, slots, least_blocks,
    counters, seqlen_q, appended, TILE: tl.constexpr,
):  # fmt: skip
    """Attend. Axis 0: slots of the schedule, then blocks of a head's query rows; 1: heads of k.

    scratch: int32 counters, (batch, heads_k, blocks of rows), all 0, padded to 4 * counters; then
    float32 (slots, heads_k, rows, head_dim_v) and (slots, heads_k, rows).

    For packed queries, seqlen_q is the number of all tokens, appended is 1 if all are written, a
    slot has one block of rows, and the counters are (heads_k, slots).
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    GROUP: tl.constexpr = TILE.group
    REGIONS: tl.constexpr = len(TILE.starts)
    OPERAND: tl.constexpr = tl.float32 if TILE.widen else q.dtype.element_ty
    DIMS_V: tl.constexpr = TILE.dims_v
    Q_MAPS: tl.constexpr = TILE.q_maps
    # This program's sequence, block of rows and split of the keys.
    queries, lengths = (cu_seqlens, seqlen_q), (batch, seqlens, leftpad, appended, capacity)
    slot, block = tl.program_id(0) % slots, tl.program_id(0) // slots
    sequence, split, splits = slot, 0, 1
    if TILE.splits:
        sequence, split, splits = share_of(slot, slots, least_blocks, lengths, queries, TILE)
    first_token, total = 0, seqlen_q
    exists = sequence < batch
    if TILE.packed:
        block, split = split // splits, split % splits
        first_token, seqlen_q = _tokens_of(sequence, batch, queries)
        appended *= seqlen_q
    head = tl.program_id(1)
    pad, length = _length_of(sequence, exists, lengths, appended, TILE)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = seqlen_q * GROUP
    if not TILE.packed:
        rows = tl.where(exists, rows, 0)
    valid = row < rows
    token = row // GROUP
    position = length - seqlen_q + token
    top = length - seqlen_q + block * BLOCK_M // GROUP
    last_row = tl.minimum(block * BLOCK_M + BLOCK_M, seqlen_q * GROUP) - 1
    bottom = length - seqlen_q + last_row // GROUP
    least = first_key(top, length, 0, 0, TILE)
    keys = tl.where(exists, tl.maximum(bottom + 1 - least, 0), 0)
    each = tl.cdiv(tl.cdiv(keys, splits), BLOCK_N) * BLOCK_N
    begin = least + split * each
    end = tl.minimum(begin + each, least + keys)

    inv_freq = freqs_of(inv_freq, head, TILE)
    maps = (pair_maps, tl.arange(0, TILE.pairs), head)
    freq = of_pairs(inv_freq + tl.minimum(sequence, batch - 1).to(tl.int64) * freq_batch, TILE)
    decay = None
    minus_decay = None
    if log_decay is not None:
        decay = of_pairs(log_decay, TILE).to(tl.float64)
        minus_decay = -decay
    head_q = head * GROUP + row % GROUP
    q_rows = _rows_of_tokens(
        q, sequence, first_token + token, head_q, q_batch, q_token, q_head, TILE.align
    )
    scale = log_n_scale(position, TILE.per_log_n) * TILE.q_scale
    if query_scale is not None:
        at = tl.cast(sequence, tl.int64) * scale_batch + (first_token + token).to(tl.int64)
        scale *= tl.load(query_scale + at, mask=valid, other=1.0)[:, None]
    k_plane = (k_cache, k_block, k_slot, k_row)
    v_plane = (v_cache, v_block, v_slot, v_row)
    table = (block_table, table_batch, page_size)
    of_k = None
    if TILE.codes:
        of_k = tl.load(k_scale + head)
    state = (
        tl.full((BLOCK_M,), no_logit(), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, DIMS_V), tl.float32),
    )
    # Near keys first: their cosines and sines then leave the registers before far keys are added.
    for r in tl.static_range(REGIONS - 1, -1, -1):
        if r + 1 < REGIONS:
            # Without it, q would be loaded once, and hold registers through all regions.
            tl.debug_barrier()
        cos, sin = nth_cos_sin(position, freq, decay, maps, r, Q_MAPS, None, TILE)
        raw = widened(load_parts(q_rows, valid, TILE))
        factor = TILE.amplitude * scale
        q_of = _as_operand(rotate(raw, cos * factor, sin * factor, scale), OPERAND)
        low = first_key(position, length, 0, r, TILE)
        high = first_key(position, length, 0, r + 1, TILE)
        from_key, to_key = begin, end
        if r > 0:
            from_key = tl.maximum(begin, first_key(top, length, 0, r, TILE))
        if r + 1 < REGIONS:
            to_key = tl.minimum(end, first_key(bottom, length, 0, r + 1, TILE))
        state = _attend(
            state, q_of, k_plane, v_plane, table, sequence, head, pad, from_key, to_key, low, high,
            freq, minus_decay, maps, of_k, r, TILE,
        )  # fmt: skip
    if TILE.codes:
        state = (state[0], state[1], state[2] * tl.load(v_scale + head))
    to = Found(
        out, lse, sinks, scratch, counters, batch, sequence, head, tl.num_programs(1),
        first_token, total, seqlen_q, block, slot, slots, split, splits,
    )  # fmt: skip
    _finish(state, to, valid, TILE)


# -------------------------------------------------------------------------------------------------
# The launches

LEAST_KEYS = 256  # in a split; with fewer, its start and merge cost visible time
MOST_SPLITS = 128  # in a sequence: one program merges them
# Programs per multiprocessor: enough loads in flight, and an even last wave.
WAVES = 2


class Grid(NamedTuple):
    """The programs for each head of k, and the sizes of their partial results."""

    slots: int  # slots of the schedule
    row_blocks: int  # every slot has a program for each
    rows: int  # rows of partial results in a slot
    counters: int  # per sequence; for packed queries in all
    splits: bool  # several programs may share a sequence
    least_blocks: int  # least blocks of keys in a split


class Launches(NamedTuple):
    """Both launches, and the sizes of their shared scratch."""

    append: AppendLaunch | None  # None: there is nothing to write
    attend: Launch
    rotates_keys: bool  # the first launch rotates the keys that it writes
    num_counters: int  # numbers at the head of scratch that must be 0
    scratch: int  # float32 numbers, with the counters; 0 if no programs share a sequence


def decode(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Append and attend; arguments and results as in `reference`; float32, bfloat16 and float16.

    Keys and values that do not fit into the cache are not written.
    """
    out = q.new_empty((*q.shape[:-1], cache.v.shape[3]))
    lse = q.new_empty(lse_shape(q), dtype=torch.float32)
    call = with_contiguous_rows(call)
    if call.cu_seqlens is not None:  # as one sequence; only the device knows the boundaries
        q = q[None]
    layouts = layout_key(q, k, v, cache.k, cache.v, *cache.tensors, *call.tensors)
    key = (layouts, call.fixed, cache.appended)
    launches = cached_by_layout(_build_launches, key, q, k, v, cache, call)
    k_cache, v_cache = (as_bits(x) if x.dtype == FP8 else x for x in (cache.k, cache.v))
    scratch = q.new_empty(launches.scratch, dtype=torch.float32) if launches.scratch else None
    small = (call.inv_freq, *cache.tensors[:3], call.log_decay, call.pair_maps, call.cu_seqlens)
    with torch.cuda.device_of(q):
        if launches.append is not None:
            heads = (None, k, None, v, k_cache, v_cache)
            slots = Slots(cache.seqlens, cache.block_table, None, cache.leftpad, *cache.scales)
            positions = cache.seqlens if launches.rotates_keys else None
            rope = Rope(call.inv_freq, positions, call.cu_seqlens, call.log_decay)
            others = (None, None, slots, rope, call.pair_maps, scratch)
            launch(rope_append_kernel, launches.append, heads, *others)
        elif scratch is not None:
            scratch[: launches.num_counters].zero_()
        attend = launches.attend
        if q.numel() > 0:
            decode_kernel[attend.grid](
                q, k_cache, v_cache, *small, call.query_scale, call.sinks, *cache.scales,
                out, lse, scratch, *attend.sizes, **attend.options,
            )  # fmt: skip
    return out, lse


def _build_launches(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> Launches:
    """Build both launches; q: (batch, seqlen_q, heads_q, head_dim), batch 1 if packed."""
    setting = _config(q, cache, call)
    grid = grid_of(q, cache, call, setting.block_m, setting.block_n)
    tile = tile_of(q, cache, call, setting, grid.splits and q.numel() > 0)
    heads_k, counters, scratch = cache.k.shape[2], 0, 0
    if tile.splits:
        counters = triton.cdiv(q.shape[0] * heads_k * grid.counters, COUNTERS) * COUNTERS
        scratch = counters + grid.slots * heads_k * grid.rows * (tile.head_dim_v + 1)
    align, stages = _align(q, cache, q), setting.stages
    if tile.paged:  # a page's number needs as many stages before its keys as keys before their use
        stages = 2 * stages - 1
    sizes = (
        *_strides(q, align), *_strides(cache.k, align), *_strides(cache.v, align),
        *_sizes(cache, call), sequence_stride(call.query_scale, 2), len(cache.seqlens),
        grid.slots, grid.least_blocks, counters // COUNTERS, q.shape[1],
        cache.appended if call.cu_seqlens is None else int(k is not None),
    )  # fmt: skip
    options = {"TILE": tile._replace(align=align), **setting._replace(stages=stages).options}
    attend = Launch((grid.slots * grid.row_blocks, heads_k), sizes, options)
    append, rotates = None, call.stored != UNROTATED
    if k is not None:
        new = Append(
            q=None, k=k, v=v, k_cache=cache.k, v_cache=cache.v,
            q_norm_weight=None, k_norm_weight=None,
            inv_freq=call.inv_freq if rotates else None,
            cache_seqlens=cache.seqlens, block_table=cache.block_table,
            cu_seqlens=call.cu_seqlens, cache_leftpad=cache.leftpad,
            log_decay=call.log_decay if rotates else None,
            k_scale=cache.scales.k, v_scale=cache.scales.v,
            stored=call.stored.numbers() if rotates else (),
            interleaved=call.interleaved,
        )  # fmt: skip
        append = build_append(new, call.pair_maps, counters)
    return Launches(append, attend, rotates, counters, scratch)


def _config(q: Tensor, cache: KVCache, call: AttentionCall) -> configs.Config:
    """Choose settings by the rows that share a head of k; for packed queries, by their average."""
    tokens = q.shape[1]
    if call.cu_seqlens is not None:
        tokens = triton.cdiv(tokens, max(len(cache.seqlens), 1))
    rows = tokens * q.shape[2] // cache.k.shape[2]
    suffix = "_fp8" if cache.k.dtype == FP8 else ""
    setting = configs.config_of("one_token" + suffix, q, cache.v)
    return setting if rows <= setting.block_m else configs.config_of("chunk" + suffix, q, cache.v)


def grid_of(q: Tensor, cache: KVCache, call: AttentionCall, block_m: int, block_n: int) -> Grid:
    """Choose the grid from shapes, never from lengths.

    q: (batch, seqlen_q, heads_q, head_dim), batch 1 for packed queries.
    """
    batch, heads_k = cache.seqlens.shape[0], cache.k.shape[2]
    group, seqlen_q = q.shape[2] // heads_k, q.shape[1]
    rows = group * seqlen_q
    row_blocks, most_keys = triton.cdiv(rows, block_m), cache.capacity
    if call.sliding_window is not None:
        most_keys = min(most_keys, call.sliding_window + seqlen_q - 1)
    splits = most_keys // LEAST_KEYS  # most splits of a sequence
    least = triton.cdiv(LEAST_KEYS, block_n)
    if call.cu_seqlens is None:
        slots = batch + _more_slots(q, heads_k * row_blocks, batch * splits)
        return Grid(slots, row_blocks, rows, row_blocks, splits > 1, least)
    # The last block of each sequence, and of the padding, may have only one row. But there are no
    # more blocks than if every token had its own.
    blocks = min(row_blocks + batch + 1, seqlen_q * triton.cdiv(group, block_m))
    slots = blocks + _more_slots(q, heads_k, blocks * splits)
    return Grid(slots, 1, block_m, slots, True, least)


def _more_slots(q: Tensor, programs: int, useful: int) -> int:
    """Return the number of slots beyond one for each sequence.

    programs: programs of a slot. useful: the most splits that there can be.
    """
    wanted = triton.cdiv(WAVES * processors_of(q), max(programs, 1))
    more = min(wanted, useful, MOST_SPLITS)
    return more if more > 1 else 0


def tile_of(
    q: Tensor, cache: KVCache, call: AttentionCall, setting: configs.Config, splits: bool
) -> CacheTile:
    """Return the constants of the second launch."""
    head_dim, head_dim_v, half = cache.k.shape[3], cache.v.shape[3], call.inv_freq.shape[-1]
    regions, window, group = call.regions, call.sliding_window, q.shape[2] // cache.k.shape[2]
    packed, rest = call.cu_seqlens is not None, head_dim - 2 * half
    several = q.shape[1] > 1 or packed
    # Another number of tokens compiles nothing again; another number of heads may.
    rows = setting.block_m if several else min(setting.block_m, triton.next_power_of_2(group))
    return CacheTile(
        block_m=setting.block_m,
        block_n=setting.block_n,
        group=group,
        head_dim=head_dim,
        dims=_power_of_two(head_dim),
        head_dim_v=head_dim_v,
        dims_v=_power_of_two(head_dim_v),
        half=half,
        rope_heads=rope_heads_of(call),
        pairs=_power_of_two(half),
        rest=rest,
        rest_dims=_power_of_two(rest) if rest else 1,
        align=1,
        interleaved=call.interleaved,
        starts=tuple(max(-FARTHEST, min(start, FARTHEST)) for start in call.starts),
        granularity=min(call.granularity, FARTHEST),
        window=0 if window is None else min(window, FARTHEST),
        from_first_key=call.starts[0] == FIRST_KEY and window is None,
        q_maps=tuple(map_of(region.q_map) for region in regions),
        k_maps=tuple(map_of(region.k_map) for region in regions),
        rotates_keys=tuple(region.k_map != call.stored for region in regions),
        stored=None if call.stored == UNROTATED else map_of(call.stored),
        q_scale=call.scale(head_dim) * log2_e(),
        amplitude=float(call.attention_factor) ** 2,
        per_log_n=0.0 if call.log_n is None else 1 / math.log(call.log_n),
        softcap=call.softcap * log2_e(),
        paged=cache.block_table is not None,
        padded=cache.leftpad is not None,
        packed=packed,
        codes=kind_of_cache(cache.k.dtype == FP8, chip_of(q)),
        several_tokens=several,
        splits=splits,
        merge_rows=rows if splits else 0,
        merge_splits=max(1, MERGED // (rows * _power_of_two(head_dim_v))) if splits else 0,
        widen=chip_of(q) is None,
    )


def _align(x: Tensor, cache: KVCache, *rows: Tensor) -> int:
    """Return how many elements, up to 16 bytes, divide all strides of these rows and the cache."""
    strides = (n for x in (cache.k, cache.v, *rows) for n in strides_of(x)[:3])
    return math.gcd(VECTOR_BYTES // min(x.itemsize, cache.k.itemsize), *strides)


def _strides(x: Tensor, align: int) -> tuple[int, ...]:
    """Return the first three strides in groups of `align` elements."""
    return tuple(n // align for n in strides_of(x)[:3])


def _sizes(cache: KVCache, call: AttentionCall) -> tuple[int, ...]:
    """Return both kernels' integers about the cache and the frequencies of its sequences."""
    table = cache.block_table
    of_table = 0 if table is None else table.stride(0)
    return of_table, cache.k.shape[1], cache.capacity, sequence_stride(call.inv_freq, 2)


def _power_of_two(n: int) -> int:
    return max(LEAST_DIMS, triton.next_power_of_2(n))
