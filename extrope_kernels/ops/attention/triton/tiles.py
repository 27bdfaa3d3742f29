"""Device functions that say which tiles there are, and what of them a region holds.

Along a tile of queries, a region's first key and the end of its keys both rise. So do, along a tile
of keys, the first query that sees a key in a region and the end of these. Either way a range
[low, high) is cut into tiles that every row sees whole, and masked ones before and after.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# What changes from call to call must not make Triton compile again. Each is a parameter of its own,
# since Triton takes no notice of this list for the numbers within a tuple.
RUN_TIME_SCALARS = (
    *("tiles", "heads_q", "group", "rows", "seqlen_q", "seqlen_k"),
    *("num_sequences", "search_steps", "start_0", "start_1", "start_2", "granularity"),
)


@triton.jit
def place(tiles, heads, cu_seqlens, tile_starts, num_sequences, search_steps, seqlen_q, seqlen_k):
    """This program's batch, head, tile within its sequence, and that sequence's extent.

    Returns (batch, head, tile, tiles of the sequence, first row, seqlen_q, seqlen_k). A program
    beyond the last tile gets tile 0 of a sequence without rows, and so does nothing.
    """
    slot = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    head = rest % heads
    if cu_seqlens is None:
        return rest // heads, head, slot, tiles, 0, seqlen_q, seqlen_k
    else:
        low = slot * 0
        high = low + num_sequences
        for _ in range(search_steps):
            middle = (low + high) // 2
            started = tl.load(tile_starts + middle) <= slot
            low = tl.where(started, middle, low)
            high = tl.where(started, high, middle)
        first_row = tl.load(cu_seqlens + low)
        first_tile = tl.load(tile_starts + low)
        end_tile = tl.load(tile_starts + low + 1)
        idle = slot >= end_tile
        seqlen = tl.where(idle, 0, tl.load(cu_seqlens + low + 1) - first_row)
        tile = tl.where(idle, 0, slot - first_tile)
        count = tl.where(idle, 1, end_tile - first_tile)
        return rest // heads, head, tile, count, first_row, seqlen, seqlen


@triton.jit
def place_queries(
    tiles, heads, cu_seqlens, tile_starts, num_sequences, search_steps, seqlen_q, seqlen_k,
    TILE: tl.constexpr,
):  # fmt: skip
    """This program's tile of queries, the longest first.

    Returns (batch, head, the sequence's first row, the tile's first row, how many rows of it are
    there, the positions of its first row, of its last one and of all, seqlen_k).
    """
    QUERIES: tl.constexpr = TILE.queries
    batch, head, tile, count, first_row, seqlen_q, seqlen_k = place(
        tiles, heads, cu_seqlens, tile_starts, num_sequences, search_steps, seqlen_q, seqlen_k
    )
    first = (count - 1 - tile) * QUERIES
    row = first_row + first
    live = seqlen_q - first
    top = first + seqlen_k - seqlen_q
    bottom = tl.minimum(top + QUERIES, seqlen_k) - 1
    position = top + tl.arange(0, QUERIES)
    return batch, head, first_row, row, live, top, bottom, position, seqlen_k


@triton.jit
def split(low, all_low, all_high, high, SIZE: tl.constexpr):
    """Cut [low, high), of which every row sees [all_low, all_high), into tiles of SIZE.

    Returns the number of masked tiles before the full ones, of full ones, and of masked ones in
    all. A masked tile before the full ones may reach past `high`.
    """
    before = (tl.maximum(all_low - low, 0) + SIZE - 1) // SIZE
    full = tl.maximum(all_high - (low + before * SIZE), 0) // SIZE
    after = tl.maximum(high - (low + (before + full) * SIZE), 0)
    return before, full, before + (after + SIZE - 1) // SIZE


@triton.jit
def nth_tile(index, span, MASKED: tl.constexpr, SIZE: tl.constexpr):
    """Where the index-th masked, or full, tile of a span starts, and the rows left from there."""
    low, before, full, _, high = span
    if MASKED:
        at = low + (index + tl.where(index < before, 0, full)) * SIZE
    else:
        at = low + (before + index) * SIZE
    return at, high - at


@triton.jit
def first_key(position, starts, granularity, seqlen_k, REGION: tl.constexpr, TILE: tl.constexpr):
    """First key that queries at `position` see in REGION; for REGION = regions, the end of all."""
    key = tl.minimum(position + 1, seqlen_k)
    if TILE.regions > REGION:
        key = tl.minimum(key, position // granularity * granularity + starts[REGION])
    return tl.maximum(key, 0)


@triton.jit
def split_keys(
    top, bottom, starts, granularity, seqlen_k, REGION: tl.constexpr, TILE: tl.constexpr
):
    """The span of keys that queries at positions `top` to `bottom` see, like that of rows below."""
    low = 0
    all_low = 0
    if REGION > 0 or not TILE.from_first_key:
        low = first_key(top, starts, granularity, seqlen_k, REGION, TILE)
        all_low = first_key(bottom, starts, granularity, seqlen_k, REGION, TILE)
    all_high = first_key(top, starts, granularity, seqlen_k, REGION + 1, TILE)
    high = first_key(bottom, starts, granularity, seqlen_k, REGION + 1, TILE)
    before, full, masked = split(low, all_low, all_high, high, TILE.keys)
    return low, before, full, masked, high


@triton.jit
def seen_keys(start, low, high, REGION: tl.constexpr, TILE: tl.constexpr):
    """(queries, keys): does row i see the keys from `start` on? It does from low[i] to high[i]."""
    KEYS: tl.constexpr = TILE.keys
    key = (start + tl.arange(0, KEYS))[None, :]
    seen = key < high[:, None]
    if REGION > 0 or not TILE.from_first_key:
        seen = seen & (key >= low[:, None])
    return seen


@triton.jit
def end_query(key, starts, granularity, first, seqlen_k, REGION: tl.constexpr, TILE: tl.constexpr):
    """End of the positions, from `first` to seqlen_k, that see `key` in REGION or a later one."""
    end = key
    if TILE.regions > REGION:
        # As floor division, which that of Triton is not where the dividend is negative.
        ahead = tl.maximum(key - starts[REGION], -granularity) + granularity
        end = tl.maximum(end, ahead // granularity * granularity)
    return tl.minimum(tl.maximum(end, first), seqlen_k)


@triton.jit
def split_queries(
    first, last, starts, granularity, seqlen_q, seqlen_k, REGION: tl.constexpr, TILE: tl.constexpr
):
    """The span of rows that see keys `first` to `last`: (first row, a split's numbers, end)."""
    shift = seqlen_k - seqlen_q  # from a row to its position
    top = tl.maximum(shift, 0)
    low = end_query(first, starts, granularity, top, seqlen_k, REGION + 1, TILE) - shift
    all_low = end_query(last, starts, granularity, top, seqlen_k, REGION + 1, TILE) - shift
    all_high = end_query(first, starts, granularity, top, seqlen_k, REGION, TILE) - shift
    high = end_query(last, starts, granularity, top, seqlen_k, REGION, TILE) - shift
    before, full, masked = split(low, all_low, all_high, high, TILE.queries)
    return low, before, full, masked, high
