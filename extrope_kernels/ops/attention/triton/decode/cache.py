"""Device functions on rows of queries, keys and values by the slots of a key/value cache."""

from typing import NamedTuple

import triton
import triton.language as tl


class CacheTile(NamedTuple):
    """What a kernel is compiled for, beside types and alignment."""

    block_m: int  # rows of queries
    block_n: int  # rows of keys
    head_dim: int  # of queries and keys
    dims: int  # head_dim, rounded up to a power of two
    head_dim_v: int
    dims_v: int  # head_dim_v, rounded up likewise
    half: int  # pairs of dims that rotate
    pairs: int  # half, rounded up likewise
    rest: int  # dims after the rotated ones
    rest_dims: int  # rest, rounded up; 1 if none
    align: int  # elements; divides all strides
    interleaved: bool
    stored: int  # the kind of map of keys in the cache: see _shared/triton/position_maps.py
    raw: int  # of queries and new keys
    paged: bool
    padded: bool
    packed: bool  # tokens of all sequences one behind the other
    codes: int = 0  # how a cache in fp8 is read: see _shared/triton/fp8.py
    freq_of_token: bool = False  # packed tokens have the frequencies of their sequences
    q_maps: tuple[int, ...] = ()  # of each region
    k_maps: tuple[int, ...] = ()
    rotates_keys: tuple[bool, ...] = ()  # from where they are stored, by region
    from_first_key: bool = False  # region 0 has no lower end
    several_tokens: bool = False  # of queries
    splits: bool = False  # sequences may be shared by several programs
    merge_rows: int = 0  # what is merged at once: rows of queries,
    merge_splits: int = 0  # and splits of each
    sinks: bool = False
    softcap: bool = False
    sliding_window: bool = False
    query_scale: bool = False
    widen: bool = False  # operands to float32 before a product: the interpreter has no bfloat16


@triton.jit
def page_of(table, sequence, slot, valid):
    """The pages that hold these slots, whatever the table holds; as `table` in slot_rows."""
    block_table, table_batch, page_size = table
    pages = block_table + tl.cast(sequence, tl.int64) * table_batch
    return tl.load(pages + slot // page_size, mask=valid, other=0)


@triton.jit
def slot_rows(plane, table, sequence, head, slot, valid, TILE: tl.constexpr):
    """Pointers to dim 0 of these int32 slots of a sequence; in 64 bits, a GPU calls a function for
    every division.

    plane: (pointer, strides of blocks, slots and heads in groups of TILE.align elements), where a
    block is a sequence, or a page; table: (block_table, its stride, slots of a page).
    """
    pointer, block_stride, slot_stride, head_stride = plane
    if TILE.paged:
        block = page_of(table, sequence, slot, valid).to(tl.int64)
        offset = (slot % table[2]).to(tl.int64) * slot_stride
    else:
        block = tl.cast(sequence, tl.int64)
        offset = slot.to(tl.int64) * slot_stride
    offset += block * block_stride + tl.cast(head, tl.int64) * head_stride
    return pointer + offset * TILE.align


@triton.jit
def length_of(sequence, valid, seqlens, leftpad, appended, capacity, TILE: tl.constexpr):
    """(slot of position 0, number of keys) of these sequences, whatever the tensors hold."""
    end = tl.load(seqlens + sequence, mask=valid, other=0) + appended
    end = tl.minimum(tl.maximum(end, 0), capacity)
    pad = end * 0
    if TILE.padded:
        pad = tl.maximum(tl.load(leftpad + sequence, mask=valid, other=0), 0)
    return pad, tl.maximum(end - pad, 0)


@triton.jit
def tokens_of(sequence, batch, queries):
    """(first token, number of tokens) of these sequences of packed ones, whatever cu_seqlens holds.

    What follows the last boundary counts as sequence number `batch`, one without keys.
    queries: (cu_seqlens, tokens of all, heads that share a head of k).
    """
    cu_seqlens, total, _ = queries
    begin = tl.load(cu_seqlens + sequence, mask=sequence <= batch, other=total)
    end = tl.load(cu_seqlens + sequence + 1, mask=sequence < batch, other=total)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    return begin, tl.minimum(tl.maximum(end, begin), total) - begin


@triton.jit
def first_key(position, bounds, REGION: tl.constexpr, TILE: tl.constexpr):
    """First key that queries at `position` see in REGION; for the one after the last, the end.

    bounds: (starts of the regions, granularity, sliding_window).
    """
    REGIONS: tl.constexpr = len(TILE.q_maps)
    starts, granularity, sliding_window = bounds
    key = position + 1
    if REGION < REGIONS:
        start = position // granularity * granularity + starts[REGION]
        if TILE.sliding_window:
            start = tl.maximum(start, key - sliding_window)
        key = tl.minimum(key, start)
    return tl.maximum(key, 0)
