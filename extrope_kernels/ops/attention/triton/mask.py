"""The mask, and the block of queries or of keys that a program has: device functions.

Regions cut the keys that a query sees, far ones first; a score method rotates each region in its
own way. A query's own key is the last one that it sees. In region r, the query whose own key is i
sees the keys j with begin(r) <= j < begin(r + 1), where

    begin(r) = max(block(i) + starts[r], i + 1 - window)        begin(regions) = i + 1

clamped to what comes after, and to the keys that exist. block() rounds down to a multiple of
MODEL.granularity, counted by position: queries of a dual_chunk chunk share starts. Without a
sliding window, the second term is absent. starts are at most 0, and rise.

MODEL is the ModelConstants of device.py; region_begin also takes that of decode.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# The mask
#
#     key      0          region_begin(1)      region_begin(2)     q_key
#     keys of  | region 0        | region 1           | region 2      | none: they come later
#
# All regions' starts are counted from the query, or from the first query of its block of
# `granularity` positions. So along a block of queries every border stays or moves right:
#
#                     begin     every_begin     every_end     end
#     first query       [=============================)
#     last query                     [=========================)
#     blocks of keys    | masked     | full  | full  | masked  |
#
# Every query of the block sees [every_begin, every_end), so full blocks of keys lie within it, and
# need no mask. The same holds for a block of keys and the queries that see it.


@triton.jit
def region_begin(q_key, seqlen_k, key_0_pos, REGION: tl.constexpr, MODEL: tl.constexpr):
    """Return the first key of REGION that a query sees; REGION = regions: the end of its keys.

    q_key: the query's own key, and the last one it sees, counted from the sequence's first key.
    key_0_pos: the position of that first key.
    """
    key = tl.minimum(q_key + 1, seqlen_k)
    if len(MODEL.starts) > REGION:
        # A negative position is rounded toward zero, but the query then lies before all keys.
        block_pos = (q_key + key_0_pos) // MODEL.granularity * MODEL.granularity
        first = block_pos - key_0_pos + MODEL.starts[REGION]
        if MODEL.window > 0:
            first = tl.maximum(first, q_key + 1 - MODEL.window)
        key = tl.minimum(key, first)
    return tl.maximum(key, 0)


@triton.jit
def queries_end(
    key, seqlen_q, shift, key_0_pos, REGION: tl.constexpr, MODEL: tl.constexpr
):  # fmt: skip
    """Return the end of the rows that see `key` in REGION or a later one: `region_begin` inverted.

    It is the number of rows i of the sequence with region_begin(i + shift, REGION) <= key. So in
    REGION, the rows from queries_end(j, REGION + 1) to queries_end(j, REGION) see key j.

    shift: the own key of row 0.
    """
    # region_begin(q_key) <= key, if q_key < key, or if q_key < key + window and, with positions,
    # block(q_key + key_0_pos) <= reach. The latter says q_key + key_0_pos < block(reach) +
    # granularity, as block() rounds down to a multiple of it.
    end = key  # an own key, as all numbers here
    if len(MODEL.starts) > REGION:
        # Positions are not negative, so nothing before -granularity makes a difference. From there
        # on the dividend is not negative: there Triton's division rounds down.
        reach = tl.maximum(key + key_0_pos - MODEL.starts[REGION], -MODEL.granularity)
        block_end = (reach + MODEL.granularity) // MODEL.granularity * MODEL.granularity - key_0_pos
        if MODEL.window > 0:  # the sliding window
            block_end = tl.minimum(block_end, key + MODEL.window)
        end = tl.maximum(end, block_end)
    # Rows with a negative own key see no key. They count in every end, so they cancel.
    return tl.minimum(tl.maximum(end, tl.maximum(shift, 0)), seqlen_q + shift) - shift


class Seen(NamedTuple):
    """The keys of a region that a block of queries sees, or the queries that see a block of keys.

    Blocks from `begin` on: num_before masked ones, num_full ones that all rows see, then masked
    ones up to `end`.
    """

    begin: tl.tensor  # any row sees some of [begin, end)
    end: tl.tensor
    num_before: tl.tensor
    num_full: tl.tensor
    num_masked: tl.tensor  # before and after the full ones
    row_begin: tl.tensor  # (rows,): row i sees [row_begin[i], row_end[i]); it rises with i
    row_end: tl.tensor


@triton.jit
def _seen(begin, every_begin, every_end, end, row_begin, row_end, SIZE: tl.constexpr):
    """Cut [begin, end) into blocks of SIZE; full ones lie in [every_begin, every_end)."""
    num_before = (tl.maximum(every_begin - begin, 0) + SIZE - 1) // SIZE
    num_full = tl.maximum(every_end - (begin + num_before * SIZE), 0) // SIZE
    after = tl.maximum(end - (begin + (num_before + num_full) * SIZE), 0)
    num_masked = num_before + (after + SIZE - 1) // SIZE
    return Seen(begin, end, num_before, num_full, num_masked, row_begin, row_end)


@triton.jit
def keys_seen(queries, REGION: tl.constexpr, BLOCK_N: tl.constexpr, MODEL: tl.constexpr):
    """Return the keys of REGION that a block of queries sees: Seen of the QueryBlock."""
    seqlen_k, key_0_pos = queries.seqlen_k, queries.key_0_pos
    # A region ends where the next one begins.
    row_begin = region_begin(queries.q_key, seqlen_k, key_0_pos, REGION, MODEL)  # (M,)
    row_end = region_begin(queries.q_key, seqlen_k, key_0_pos, REGION + 1, MODEL)
    begin = 0
    every_begin = 0
    if not (REGION == 0 and MODEL.from_key_0):
        begin = region_begin(queries.first_q_key, seqlen_k, key_0_pos, REGION, MODEL)
        every_begin = region_begin(queries.last_q_key, seqlen_k, key_0_pos, REGION, MODEL)
    every_end = region_begin(queries.first_q_key, seqlen_k, key_0_pos, REGION + 1, MODEL)
    end = region_begin(queries.last_q_key, seqlen_k, key_0_pos, REGION + 1, MODEL)
    return _seen(begin, every_begin, every_end, end, row_begin, row_end, BLOCK_N)


@triton.jit
def queries_that_see(
    key, first, last, this, REGION: tl.constexpr, BLOCK_M: tl.constexpr, MODEL: tl.constexpr
):  # fmt: skip
    """Return the rows of a sequence that see keys (N,), of [first, last], in REGION; this: a Block.

    Row i of Seen is key i here.
    """
    seqlen_q, shift, key_0_pos = this.seqlen_q, this.shift, this.key_0_pos
    row_begin = queries_end(key, seqlen_q, shift, key_0_pos, REGION + 1, MODEL)  # (N,)
    row_end = queries_end(key, seqlen_q, shift, key_0_pos, REGION, MODEL)
    begin = queries_end(first, seqlen_q, shift, key_0_pos, REGION + 1, MODEL)
    every_begin = queries_end(last, seqlen_q, shift, key_0_pos, REGION + 1, MODEL)
    every_end = queries_end(first, seqlen_q, shift, key_0_pos, REGION, MODEL)
    end = queries_end(last, seqlen_q, shift, key_0_pos, REGION, MODEL)
    return _seen(begin, every_begin, every_end, end, row_begin, row_end, BLOCK_M)


@triton.jit
def block_start(i, seen, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Return where the i-th masked block begins, or unless MASKED the i-th full one."""
    block = i + tl.where(i < seen.num_before, 0, seen.num_full) if MASKED else seen.num_before + i
    return seen.begin + block * SIZE


# -------------------------------------------------------------------------------------------------
# The block of queries or keys of a program


class Sequences(NamedTuple):
    """Where the tokens of q and k are."""

    seqlen_q: tl.tensor  # the totals if packed
    seqlen_k: tl.tensor
    cu_seqlens: tl.tensor  # (num_sequences + 1,) int32, or None
    num_sequences: tl.tensor
    search_steps: tl.tensor  # of a binary search for a sequence
    q_start: tl.tensor  # (sequences or 1,) int32, or None
    q_start_stride: tl.tensor  # between sequences; 0: they share one
    k_start: tl.tensor
    k_start_stride: tl.tensor


class Block(NamedTuple):
    """A program's block within its sequence, and the sequence's place in the tensors."""

    batch: tl.tensor  # int64; 0 for packed sequences
    sequence: tl.tensor
    head: tl.tensor
    index: tl.tensor  # of this block in its sequence
    num_blocks: tl.tensor  # in its sequence
    first_row: tl.tensor  # the sequence's first token in q and in k; 0 if not packed
    seqlen_q: tl.tensor  # of the sequence
    seqlen_k: tl.tensor
    shift: tl.tensor  # the own key of row 0: row i sees keys up to i + shift
    key_0_pos: tl.tensor  # the absolute position of key 0


@triton.jit
def _sequence_of(slot, cu_seqlens, num_sequences, search_steps, SIZE: tl.constexpr):
    """Return the sequence of a slot for a block.

    The slots of sequence s begin at cu_seqlens[s] // SIZE + s. This leaves enough slots for its
    blocks, and at least one.
    """
    low = slot * 0  # of slot's type, as `middle` below: a loop keeps a type
    high = low + num_sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens + middle) // SIZE + middle <= slot
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def find_block(blocks, heads, sequences, SIZE: tl.constexpr):
    """Find this program's block of SIZE tokens. Axis 0: blocks, then heads, then the batch.

    Packed sequences may have fewer blocks than the grid: a program without one gets block 0 of a
    sequence of length 0, and so does nothing.
    """
    slot = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    head = rest % heads
    batch = rest // heads
    sequence, index, num_blocks, first_row = batch, slot, blocks, 0
    seqlen_q, seqlen_k = sequences.seqlen_q, sequences.seqlen_k
    if sequences.cu_seqlens is not None:
        sequence = _sequence_of(
            slot, sequences.cu_seqlens, sequences.num_sequences, sequences.search_steps, SIZE
        )
        first_row = tl.load(sequences.cu_seqlens + sequence)
        seqlen = tl.load(sequences.cu_seqlens + sequence + 1) - first_row
        index = slot - (first_row // SIZE + sequence)
        num_blocks = tl.maximum(seqlen + SIZE - 1, 0) // SIZE
        idle = index >= num_blocks
        seqlen_q = tl.where(idle, 0, seqlen)
        seqlen_k = seqlen_q
        index = tl.where(idle, 0, index)
        num_blocks = tl.where(idle, 1, num_blocks)
    # Keys count from the sequence's first one. key_0_pos is its absolute position: rotations, and
    # regions' blocks of granularity, depend on it.
    key_0_pos = 0
    if sequences.k_start is not None:
        key_0_pos = tl.load(sequences.k_start + sequence * sequences.k_start_stride)
    shift = seqlen_k - seqlen_q  # both sides end together,
    if sequences.q_start is not None:  # unless positions say where they begin
        shift = tl.load(sequences.q_start + sequence * sequences.q_start_stride) - key_0_pos
    return Block(
        tl.cast(batch, tl.int64), sequence, head, index, num_blocks, first_row, seqlen_q, seqlen_k,
        shift, key_0_pos,
    )  # fmt: skip


class QueryBlock(NamedTuple):
    """A program's block of queries."""

    batch: tl.tensor  # int64; 0 for packed sequences
    sequence: tl.tensor
    head: tl.tensor  # of q
    head_k: tl.tensor
    first_row: tl.tensor  # the sequence's first token in q and in k; 0 if not packed
    token: tl.tensor  # the block's first token in q
    rows: tl.tensor  # of the sequence from there on; may exceed BLOCK_M; 0 if there is no block
    seqlen_k: tl.tensor  # of the sequence
    key_0_pos: tl.tensor  # the absolute position of key 0
    q_key: tl.tensor  # (M,): the own key of each row, the last one that it sees
    first_q_key: tl.tensor  # of the first row
    last_q_key: tl.tensor  # of the last row that exists


@triton.jit
def block_of_queries(blocks, sequences, MODEL: tl.constexpr, BLOCKS: tl.constexpr):
    """Find this program's QueryBlock. Axis 0: blocks of queries, then heads, then the batch."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    this = find_block(blocks, MODEL.heads_q, sequences, BLOCK_M)
    # The last block of a sequence sees the most keys, so it starts first: short ones fill the gaps.
    first = (this.num_blocks - 1 - this.index) * BLOCK_M  # within the sequence
    first_q_key = first + this.shift
    last_q_key = tl.minimum(first_q_key + BLOCK_M, this.seqlen_q + this.shift) - 1
    return QueryBlock(
        this.batch, this.sequence, this.head, this.head // (MODEL.heads_q // MODEL.heads_k),
        this.first_row, this.first_row + first, this.seqlen_q - first, this.seqlen_k,
        this.key_0_pos, first_q_key + tl.arange(0, BLOCK_M), first_q_key, last_q_key,
    )  # fmt: skip
