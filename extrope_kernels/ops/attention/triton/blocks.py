"""Device functions that say which blocks there are, and what of them a region holds.

Along a block of queries, a region's first key and the end of its keys both rise. So do, along a
block of keys, the first query that sees a key in a region and the end of these. Either way a range
[low, high) is cut into blocks that every row sees whole, and masked ones before and after.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# What changes from call to call must not make Triton compile again. Each is a parameter of its own,
# since Triton takes no notice of this list for the numbers within a tuple.
RUN_TIME_SCALARS = (
    *("blocks", "rows", "seqlen_q", "seqlen_k"),
    *("num_sequences", "search_steps", "start_0", "start_1", "start_2", "granularity"),
    *("window", "query_scale_stride"),
)


class Bounds(NamedTuple):
    """What decides which keys a query sees; positions are counted from a sequence's first key."""

    start_0: tl.tensor  # the regions' first keys, from a query's block on
    start_1: tl.tensor
    start_2: tl.tensor
    granularity: tl.tensor
    window: tl.tensor  # most keys of a query, if TILE.windowed
    seqlen_k: tl.tensor
    origin: tl.tensor  # the first key's own position: blocks of granularity begin at 0


@triton.jit
def _sequence_of(slot, cu_seqlens, num_sequences, search_steps, SIZE: tl.constexpr):
    """Which sequence a slot for a block belongs to: those of sequence s begin at cu_seqlens[s] //
    SIZE + s, which leaves enough for its blocks, and at least one.
    """
    low = slot * 0
    high = low + num_sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens + middle) // SIZE + middle <= slot
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def place(
    blocks, heads, cu_seqlens, num_sequences, search_steps, seqlen_q, seqlen_k, SIZE: tl.constexpr
):
    """This program's batch, head, block within its sequence, and that sequence's extent.

    Returns (batch, sequence, head, block, blocks of the sequence, first row, seqlen_q, seqlen_k).
    A program without a block gets block 0 of a sequence without rows, and so does nothing.
    """
    slot = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    head = rest % heads
    if cu_seqlens is None:
        return rest // heads, rest // heads, head, slot, blocks, 0, seqlen_q, seqlen_k
    else:
        sequence = _sequence_of(slot, cu_seqlens, num_sequences, search_steps, SIZE)
        first_row = tl.load(cu_seqlens + sequence)
        seqlen = tl.load(cu_seqlens + sequence + 1) - first_row
        block = slot - (first_row // SIZE + sequence)
        count = tl.maximum(seqlen + SIZE - 1, 0) // SIZE
        idle = block >= count
        seqlen = tl.where(idle, 0, seqlen)
        block = tl.where(idle, 0, block)
        count = tl.where(idle, 1, count)
        return rest // heads, sequence, head, block, count, first_row, seqlen, seqlen


@triton.jit
def origin_of(sequence, q_start, k_start, start_strides, seqlen_q, seqlen_k):
    """How far a sequence's first query lies behind its first key, and the position of that key."""
    shift = seqlen_k - seqlen_q
    origin = 0
    if k_start is not None:
        origin = tl.load(k_start + sequence * start_strides[1])
    if q_start is not None:
        shift = tl.load(q_start + sequence * start_strides[0]) - origin
    return shift, origin


@triton.jit
def place_queries(
    blocks, heads, cu_seqlens, q_start, k_start, start_strides, num_sequences, search_steps,
    seqlen_q, seqlen_k, TILE: tl.constexpr,
):  # fmt: skip
    """This program's block of queries, the longest first.

    Returns (batch, sequence, head, the sequence's first row, the block's first row, how many rows
    of it are there, the positions of its first row, of its last one and of all, counted from the
    first key, seqlen_k, the first key's own position).
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    batch, sequence, head, block, count, first_row, seqlen_q, seqlen_k = place(
        blocks, heads, cu_seqlens, num_sequences, search_steps, seqlen_q, seqlen_k, BLOCK_M
    )
    first = (count - 1 - block) * BLOCK_M
    row = first_row + first
    left = seqlen_q - first
    shift, origin = origin_of(sequence, q_start, k_start, start_strides, seqlen_q, seqlen_k)
    top = first + shift
    bottom = tl.minimum(top + BLOCK_M, seqlen_q + shift) - 1
    position = top + tl.arange(0, BLOCK_M)
    return batch, sequence, head, first_row, row, left, top, bottom, position, seqlen_k, origin


@triton.jit
def split(low, all_low, all_high, high, SIZE: tl.constexpr):
    """Cut [low, high), of which every row sees [all_low, all_high), into blocks of SIZE.

    Returns the number of masked blocks before the full ones, of full ones, and of masked ones in
    all. A masked block before the full ones may reach past `high`.
    """
    before = (tl.maximum(all_low - low, 0) + SIZE - 1) // SIZE
    full = tl.maximum(all_high - (low + before * SIZE), 0) // SIZE
    after = tl.maximum(high - (low + (before + full) * SIZE), 0)
    return before, full, before + (after + SIZE - 1) // SIZE


@triton.jit
def nth_block(index, cut, MASKED: tl.constexpr, SIZE: tl.constexpr):
    """Where the index-th masked, or full, block of a range starts, and the rows left from there."""
    low, before, full, _, high = cut
    if MASKED:
        at = low + (index + tl.where(index < before, 0, full)) * SIZE
    else:
        at = low + (before + index) * SIZE
    return at, high - at


@triton.jit
def first_key(position, bounds, REGION: tl.constexpr, TILE: tl.constexpr):
    """First key that queries at `position` see in REGION; for REGION = regions, the end of all."""
    key = tl.minimum(position + 1, bounds.seqlen_k)
    if len(TILE.q_maps) > REGION:
        block = (position + bounds.origin) // bounds.granularity * bounds.granularity
        first = block - bounds.origin + bounds[REGION]
        if TILE.windowed:
            first = tl.maximum(first, position + 1 - bounds.window)
        key = tl.minimum(key, first)
    return tl.maximum(key, 0)


@triton.jit
def cut_keys(top, bottom, bounds, REGION: tl.constexpr, TILE: tl.constexpr):
    """The range of keys that queries at positions `top` to `bottom` see, cut into blocks.

    Returns (first key, a split's numbers, end).
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    low = 0
    all_low = 0
    if REGION > 0 or not TILE.from_first_key:
        low = first_key(top, bounds, REGION, TILE)
        all_low = first_key(bottom, bounds, REGION, TILE)
    all_high = first_key(top, bounds, REGION + 1, TILE)
    high = first_key(bottom, bounds, REGION + 1, TILE)
    before, full, masked = split(low, all_low, all_high, high, BLOCK_N)
    return low, before, full, masked, high


@triton.jit
def seen_keys(start, low, high, REGION: tl.constexpr, TILE: tl.constexpr):
    """(block_m, block_n): does row i see the keys from `start` on? From low[i] to high[i]."""
    BLOCK_N: tl.constexpr = TILE.block_n
    key = (start + tl.arange(0, BLOCK_N))[None, :]
    seen = key < high[:, None]
    if REGION > 0 or not TILE.from_first_key:
        seen = seen & (key >= low[:, None])
    return seen


@triton.jit
def end_query(key, bounds, top, bottom, REGION: tl.constexpr, TILE: tl.constexpr):
    """End of the positions, from `top` to `bottom`, that see `key` in REGION or a later one."""
    end = key
    if len(TILE.q_maps) > REGION:
        granularity = bounds.granularity
        # As floor division, which that of Triton is not where the dividend is negative.
        ahead = tl.maximum(key + bounds.origin - bounds[REGION], -granularity) + granularity
        last = ahead // granularity * granularity - bounds.origin
        if TILE.windowed:
            last = tl.minimum(last, key + bounds.window)
        end = tl.maximum(end, last)
    return tl.minimum(tl.maximum(end, top), bottom)


@triton.jit
def cut_queries(
    first, last, bounds, seqlen_q, shift, REGION: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The range of rows that see keys `first` to `last`, cut into blocks, as that of keys is.

    shift: from a row to its position.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    top = tl.maximum(shift, 0)
    bottom = seqlen_q + shift
    low = end_query(first, bounds, top, bottom, REGION + 1, TILE) - shift
    all_low = end_query(last, bounds, top, bottom, REGION + 1, TILE) - shift
    all_high = end_query(first, bounds, top, bottom, REGION, TILE) - shift
    high = end_query(last, bounds, top, bottom, REGION, TILE) - shift
    before, full, masked = split(low, all_low, all_high, high, BLOCK_M)
    return low, before, full, masked, high
