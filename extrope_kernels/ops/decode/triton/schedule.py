"""Device functions: which keys of which sequence a program works on.

Lengths are known on the device alone. So the grid has a fixed number of slots, and sequences take
as many of them as their share of all keys is worth: every program counts for itself.
"""

import triton
import triton.language as tl

from .cache import first_key, length_of

LENGTHS = tl.constexpr(128)  # sequences at once


@triton.jit
def _blocks(sequence, lengths, rows, TILE: tl.constexpr):
    """How many blocks of keys the queries of these sequences see."""
    batch, seqlens, leftpad, appended, capacity = lengths
    seqlen_q, starts, granularity = rows
    BLOCK_N: tl.constexpr = TILE.block_n
    REGIONS: tl.constexpr = len(TILE.q_maps)
    valid = sequence < batch
    _, keys = length_of(sequence, valid, seqlens, leftpad, appended, capacity, TILE)
    if not TILE.from_first_key:
        keys -= first_key(keys - seqlen_q, starts, granularity, 0, REGIONS)
    return tl.where(valid, tl.cdiv(tl.maximum(keys, 0), BLOCK_N), 0)


@triton.jit
def share_of(slot, slots, least_blocks, lengths, rows, TILE: tl.constexpr):
    """(sequence, split, splits) of a slot; sequence is `batch` where there is nothing to do.

    A split has at least least_blocks blocks of keys, and more where all together, one to each
    sequence even if empty, would need more than `slots`.
    """
    batch = lengths[0]
    total = 0
    for first in tl.range(0, batch, LENGTHS):
        total += tl.sum(_blocks(first + tl.arange(0, LENGTHS), lengths, rows, TILE))
    each = tl.maximum(tl.cdiv(total, tl.maximum(slots - batch, 1)), least_blocks)
    sequence, begin, before = 0, 0, 0
    for first in tl.range(0, batch, LENGTHS):
        n = first + tl.arange(0, LENGTHS)
        splits = tl.maximum(tl.cdiv(_blocks(n, lengths, rows, TILE), each), 1)
        splits = tl.where(n < batch, splits, 0)
        passed = (before + tl.cumsum(splits, 0) <= slot) & (n < batch)
        sequence += tl.sum(passed.to(tl.int32))
        begin += tl.sum(tl.where(passed, splits, 0))
        before += tl.sum(splits)
    splits = tl.maximum(tl.cdiv(_blocks(sequence, lengths, rows, TILE), each), 1)
    return sequence, slot - begin, splits
