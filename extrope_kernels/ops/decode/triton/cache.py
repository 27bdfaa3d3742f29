"""Device functions on rows of queries, keys and values by the slots of a key/value cache."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Plane(NamedTuple):
    """A tensor by block, slot and head. Strides count groups of CacheTile.align elements."""

    pointer: Tensor
    block: int  # from one sequence, or one page of a paged cache, to the next
    slot: int
    head: int


class Cache(NamedTuple):
    """Where the slots of every sequence lie."""

    k: Plane
    v: Plane
    seqlens: Tensor
    leftpad: Tensor | None
    block_table: Tensor | None


class CacheTile(NamedTuple):
    """What a kernel is compiled for, beside types and alignment."""

    block_m: int  # rows of queries
    block_n: int  # rows of keys
    head_dim: int
    dims: int  # head_dim, rounded up to a power of two
    half: int  # pairs of dims that rotate
    pairs: int  # half, rounded up likewise
    rest: int  # dims after the rotated ones
    rest_dims: int  # rest, rounded up; 1 if none
    align: int  # elements; divides all strides
    interleaved: bool
    q_maps: tuple[int, ...]  # of each region: see _shared/triton/position_maps.py
    k_maps: tuple[int, ...]
    stored: int  # of keys in the cache
    raw: int  # of queries and new keys
    rotates_keys: tuple[bool, ...]  # from where they are stored, by region
    from_first_key: bool  # region 0 has no lower end
    several_tokens: bool  # of queries
    widen: bool  # operands to float32 before a product: the interpreter has no bfloat16


@triton.jit
def slot_rows(plane, cache, batch, head, slot, valid, table_batch, page_size, TILE: tl.constexpr):
    """Pointers to dim 0 of these int32 slots of a sequence; in 64 bits, a GPU calls a function for
    every division.
    """
    if cache.block_table is None:
        block = tl.cast(batch, tl.int64)
        offset = slot.to(tl.int64) * plane.slot
    else:
        page = cache.block_table + tl.cast(batch, tl.int64) * table_batch
        block = tl.load(page + slot // page_size, mask=valid, other=0).to(tl.int64)
        offset = (slot % page_size).to(tl.int64) * plane.slot
    offset += block * plane.block + tl.cast(head, tl.int64) * plane.head
    return plane.pointer + offset * TILE.align


@triton.jit
def length_of(cache, batch, appended, capacity):
    """(slot of position 0, number of keys) of a sequence, whatever the tensors hold."""
    end = tl.load(cache.seqlens + batch) + appended
    end = tl.minimum(tl.maximum(end, 0), capacity)
    pad = end * 0
    if cache.leftpad is not None:
        pad = tl.maximum(tl.load(cache.leftpad + batch), 0)
    return pad, tl.maximum(end - pad, 0)
