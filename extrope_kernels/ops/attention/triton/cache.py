"""Device functions on rows of queries, keys and values by the slots of a key/value cache."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .turns import fixed_turns


class Plane(NamedTuple):
    """A tensor by block, slot and head. Strides count groups of CacheTile.align elements."""

    pointer: Tensor
    block: int  # steps over sequences, or over the pages of a paged cache
    slot: int
    head: int


class Cache(NamedTuple):
    """Where the slots of every sequence lie, and what turns they take."""

    k: Plane
    v: Plane
    seqlens: Tensor
    leftpad: Tensor | None
    block_table: Tensor | None
    table_batch: int
    page_size: int
    capacity: int
    inv_freq: Tensor
    freq_batch: int


class CacheTile(NamedTuple):
    """What a kernel is compiled for, beside types and alignment."""

    rows: int  # of queries
    keys: int
    head_dim: int
    lanes: int  # head_dim, rounded up to a power of two
    half: int  # pairs of lanes that rotate
    pairs: int  # half, rounded up likewise
    rest: int  # lanes after the rotated ones
    rest_lanes: int  # rest, rounded up; 1 if none
    align: int  # elements; divides all strides
    interleaved: bool
    frame: str  # of stored keys: "raw", "slow" (position / factor), "grouped" (floored), "plain"
    several_tokens: bool  # of queries
    widen: bool  # operands to float32 before a product: the interpreter has no bfloat16


@triton.jit
def slot_rows(plane, cache, batch, head, slot, live, TILE: tl.constexpr):
    """Pointers to lane 0 of these int32 slots of a sequence; in 64 bits, a GPU calls a function for
    every division.
    """
    if cache.block_table is None:
        block = tl.cast(batch, tl.int64)
        offset = slot.to(tl.int64) * plane.slot
    else:
        page = cache.block_table + tl.cast(batch, tl.int64) * cache.table_batch
        block = tl.load(page + slot // cache.page_size, mask=live, other=0).to(tl.int64)
        offset = (slot % cache.page_size).to(tl.int64) * plane.slot
    offset += block * plane.block + tl.cast(head, tl.int64) * plane.head
    return plane.pointer + offset * TILE.align


@triton.jit
def load_row_parts(rows, live, TILE: tl.constexpr):
    """(first lanes, second lanes) of the pairs in these rows, and the rest; 0 where not live."""
    ROWS: tl.constexpr = rows.shape[0]
    PAIRS: tl.constexpr = TILE.pairs
    if TILE.interleaved:
        lane = tl.arange(0, 2 * PAIRS)
        mask = live[:, None] & (lane < 2 * TILE.half)[None, :]
        both = tl.load(rows[:, None] + lane[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(both, (ROWS, PAIRS, 2)))
    else:
        lane = tl.arange(0, PAIRS)
        mask = live[:, None] & (lane < TILE.half)[None, :]
        first = tl.load(rows[:, None] + lane[None, :], mask=mask, other=0.0)
        second = tl.load(rows[:, None] + (lane + TILE.half)[None, :], mask=mask, other=0.0)
    rest = first
    if TILE.rest > 0:
        lane = tl.arange(0, TILE.rest_lanes)
        mask = live[:, None] & (lane < TILE.rest)[None, :]
        rest = tl.load(rows[:, None] + (lane + 2 * TILE.half)[None, :], mask=mask, other=0.0)
    return first, second, rest


@triton.jit
def widened(row):
    return row[0].to(tl.float32), row[1].to(tl.float32), row[2].to(tl.float32)


@triton.jit
def length_of(cache, batch, appended):
    """(slot of position 0, number of keys) of a sequence, whatever the tensors hold."""
    end = tl.load(cache.seqlens + batch) + appended
    end = tl.minimum(tl.maximum(end, 0), cache.capacity)
    pad = end * 0
    if cache.leftpad is not None:
        pad = tl.maximum(tl.load(cache.leftpad + batch), 0)
    return pad, tl.maximum(end - pad, 0)


@triton.jit
def frequencies(cache, batch, slowness, TILE: tl.constexpr):
    """(1, pairs) int64 turns a position: at full speed, and at a float64 slowness, 0 if raw."""
    pair = tl.arange(0, TILE.pairs)
    row = cache.inv_freq + tl.cast(batch, tl.int64) * cache.freq_batch
    freq = tl.load(row + pair, mask=pair < TILE.half, other=0.0)[None, :]
    return fixed_turns(freq, 1.0), fixed_turns(freq, slowness)


@triton.jit
def far_turns(position, fast, slow, window, group, TILE: tl.constexpr):
    """What queries at (rows, 1) int32 positions are turned by for far keys."""
    if TILE.frame == "plain":
        turns = position.to(tl.int64) * fast
    elif TILE.frame == "grouped":
        turns = ((position // group).to(tl.int64) + (window - window // group)) * fast
    else:
        turns = window * fast + (position.to(tl.int64) - window) * slow
    return turns


@triton.jit
def stored_turns(position, fast, slow, group, TILE: tl.constexpr):
    """What keys at (keys, 1) int32 positions are turned by in the cache."""
    if TILE.frame == "plain":
        turns = position.to(tl.int64) * fast
    elif TILE.frame == "grouped":
        turns = (position // group).to(tl.int64) * fast
    else:
        turns = position.to(tl.int64) * slow
    return turns


@triton.jit
def near_turns(position, fast, slow, group, TILE: tl.constexpr):
    """What stored keys still lack to their own position."""
    if TILE.frame == "grouped":
        turns = (position - position // group).to(tl.int64) * fast
    else:
        turns = position.to(tl.int64) * (fast - slow)
    return turns
