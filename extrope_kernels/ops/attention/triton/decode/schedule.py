"""Device functions: which keys of which sequence a program works on.

Lengths are known on the device alone. So the grid has a fixed number of slots, and sequences take
as many of them as their share of all keys is worth: every program counts for itself. Of packed
queries, blocks of rows are shared out likewise, since nobody knows whose they are.
"""

import triton
import triton.language as tl

from .cache import first_key, length_of, tokens_of

LENGTHS = tl.constexpr(128)  # sequences at once
_MARGIN = tl.constexpr(1.0001)  # more than a float32 sum can be off
_MOST = tl.constexpr(1e9)  # blocks of keys, far past any cache


@triton.jit
def _blocks(sequence, lengths, queries, bounds, TILE: tl.constexpr):
    """How many blocks of keys the queries of these sequences see."""
    batch, seqlens, leftpad, appended, capacity = lengths
    _, seqlen_q, _ = queries
    BLOCK_N: tl.constexpr = TILE.block_n
    valid = sequence < batch
    if TILE.packed:
        _, seqlen_q = tokens_of(sequence, batch, queries)
        appended = appended * seqlen_q
    _, keys = length_of(sequence, valid, seqlens, leftpad, appended, capacity, TILE)
    if not TILE.from_first_key:
        keys -= first_key(keys - seqlen_q, bounds, 0, TILE)
    return tl.where(valid, tl.cdiv(tl.maximum(keys, 0), BLOCK_N), 0)


@triton.jit
def _row_blocks(sequence, batch, queries, TILE: tl.constexpr):
    """How many blocks of rows packed sequences have."""
    BLOCK_M: tl.constexpr = TILE.block_m
    _, seqlen_q = tokens_of(sequence, batch, queries)
    _, _, group = queries
    return tl.cdiv(seqlen_q * group, BLOCK_M)


@triton.jit
def _blocks_of_split(slots, lengths, queries, bounds, TILE: tl.constexpr):
    """How many blocks of keys each split is to have, at least, for all of them to have a slot."""
    batch = lengths[0]
    total = 0
    if TILE.packed:
        # Rows times keys: past what 32 bits hold, and in 64 a GPU calls a function to divide.
        total, row_blocks = 0.0, 0
        for first in tl.range(0, batch + 1, LENGTHS):
            sequence = first + tl.arange(0, LENGTHS)
            rows = _row_blocks(sequence, batch, queries, TILE)
            row_blocks += tl.sum(rows)
            blocks = _blocks(sequence, lengths, queries, bounds, TILE)
            total += tl.sum(rows.to(tl.float32) * blocks.to(tl.float32))
        each = total * _MARGIN / tl.maximum(slots - row_blocks, 1).to(tl.float32)
        each = tl.minimum(each, _MOST).to(tl.int32) + 1
    else:
        for first in tl.range(0, batch, LENGTHS):
            sequence = first + tl.arange(0, LENGTHS)
            total += tl.sum(_blocks(sequence, lengths, queries, bounds, TILE))
        each = tl.cdiv(total, tl.maximum(slots - batch, 1))
    return each


@triton.jit
def share_of(slot, slots, least_blocks, lengths, queries, bounds, TILE: tl.constexpr):
    """(sequence, split, splits) of a slot; where there is nothing to do sequence is `batch`, or
    past it. Of packed queries split counts the splits of all blocks of rows.

    A split has at least least_blocks blocks of keys, and more where all together, one to each
    sequence even if empty, or to each block of rows, would need more than `slots`.
    """
    batch = lengths[0]
    each = tl.maximum(_blocks_of_split(slots, lengths, queries, bounds, TILE), least_blocks)
    sequence, begin, before = 0, 0, 0
    sequences = batch
    if TILE.packed:
        sequences = batch + 1
    for first in tl.range(0, sequences, LENGTHS):
        n = first + tl.arange(0, LENGTHS)
        splits = tl.maximum(tl.cdiv(_blocks(n, lengths, queries, bounds, TILE), each), 1)
        if TILE.packed:
            splits *= _row_blocks(n, batch, queries, TILE)
        splits = tl.where(n < sequences, splits, 0)
        passed = (before + tl.cumsum(splits, 0) <= slot) & (n < sequences)
        sequence += tl.sum(passed.to(tl.int32))
        begin += tl.sum(tl.where(passed, splits, 0))
        before += tl.sum(splits)
    splits = tl.maximum(tl.cdiv(_blocks(sequence, lengths, queries, bounds, TILE), each), 1)
    return sequence, slot - begin, splits


@triton.jit
def place_of(slots, least_blocks, lengths, queries, bounds, TILE: tl.constexpr):
    """(slot, block of rows, (sequence, split, splits)) of this program."""
    slot = tl.program_id(0) % slots
    block = tl.program_id(0) // slots
    sequence, split, splits = slot, 0, 1
    if TILE.splits:
        sequence, split, splits = share_of(
            slot, slots, least_blocks, lengths, queries, bounds, TILE
        )
    if TILE.packed:
        block, split = split // splits, split % splits
    return slot, block, (sequence, split, splits)
