"""Queries that the forward loads, rotated to a region's positions: device functions.

Rotated copies of q, which an earlier launch could write as it does for keys (rotate.py), would move
0.27 GB more at 8,192 tokens, 32 heads of 128 dims and two regions. And nothing is done twice here:
a query is read by one program only, while keys are read by each block of queries.

rows.py has Rows, load_tile and tiles; maps.py cos_sin_of_map. MODEL, BLOCKS: ModelConstants and
Blocks of device.py. REGION is a region's number.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .maps import (
    cos_sin_of_map,
    named_map,
    not_finite,
    nth_map,
)
from .rows import as_operand, load_rows, load_tile, row_of, store_rows


class QueryRope(NamedTuple):
    """What rotates and scales the queries of one sequence and head."""

    inv_freq: tl.tensor  # pointer to their frequencies, (half,)
    log_decay: tl.tensor  # (half,), or None: xPos
    pair_maps: tl.tensor  # (rows, 2: divisors and offsets, half) float64, or None
    scale: tl.tensor  # pointer to the factor of the block's first query, or None


@triton.jit
def _cos_sin(pair, q_pos, scale, rope, REGION: tl.constexpr, MODEL: tl.constexpr):
    """Return the cosine and sine of these pairs, times all factors of a query: (ROWS, pairs).

    pair: (pairs,). From HALF on pairs do not rotate: 1 and 0, times `scale`: (ROWS, 1), or 1.
    """
    HALF: tl.constexpr = MODEL.half
    rotates = pair < HALF
    freq = tl.load(rope.inv_freq + pair, mask=rotates, other=0.0)[None, :]  # (1, pairs)
    decay = None
    if rope.log_decay is not None:
        decay = tl.load(rope.log_decay + pair, mask=rotates, other=0.0).to(tl.float64)[None, :]
    FROM: tl.constexpr = named_map(MODEL.q_stored)
    TO: tl.constexpr = nth_map(MODEL.q_maps, REGION)
    cos, sin = cos_sin_of_map(q_pos, freq, decay, rope.pair_maps, pair, TO, FROM, HALF)
    # Keys are rotated without the attention factor: the query carries it for both.
    factor = tl.where(rotates, MODEL.attention_factor_sq, 1.0)[None, :]
    if MODEL.sees_given_k[REGION]:  # else the rotated copies of keys have the NaN
        factor += not_finite(freq)
    factor *= scale
    return cos * factor, sin * factor


@triton.jit
def _rotate_tile(
    q, rows, q_pos, scale, rope, REGION: tl.constexpr, FIRST: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Load dims FIRST to FIRST + DIMS of ROWS rows and rotate them: (ROWS, DIMS) float32."""
    HALF: tl.constexpr = MODEL.half
    OFFSET: tl.constexpr = MODEL.rotary_offset  # even
    DIMS_LEFT: tl.constexpr = MODEL.head_dim - FIRST  # of a row, from FIRST on
    x = load_tile(q.ptr + FIRST, q.stride_seq, rows, ROWS, DIMS, DIMS_LEFT, True).to(tl.float32)
    if MODEL.interleaved:  # rotated dims 2 i and 2 i + 1 are pair i
        pair = (FIRST - OFFSET) // 2 + tl.arange(0, DIMS // 2)
        if OFFSET > 0:
            pair = tl.where(pair >= 0, pair, HALF)  # no pair: cosine 1, sine 0
        cos, sin = _cos_sin(pair, q_pos, scale, rope, REGION, MODEL)
        a, b = tl.split(tl.reshape(x, (ROWS, DIMS // 2, 2)))
        rotated = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, DIMS))
    else:  # rotated dims i and HALF + i are pair i: the other dim of each is loaded beside it
        #     dim 0   OFFSET        OFFSET + HALF   OFFSET + 2 HALF   head_dim
        #     | rest  | first dims  | second dims   | rest            |
        #     is_first:      other_dim is dim + HALF
        #     is_second:                    other_dim is dim - HALF
        dim = FIRST + tl.arange(0, DIMS)
        rotated_dim = dim - OFFSET
        is_first = rotated_dim < HALF
        rotates = rotated_dim < 2 * HALF
        if OFFSET > 0:
            is_first = is_first & (rotated_dim >= 0)
            rotates = rotates & (rotated_dim >= 0)
        is_second = (rotated_dim >= HALF) & rotates
        pair = tl.where(is_second, rotated_dim - HALF, rotated_dim)
        pair = tl.where(rotates, pair, HALF)  # no pair: cosine 1, sine 0
        other_dim = tl.where(is_second, dim - HALF, tl.where(is_first, dim + HALF, dim))
        if HALF % 8 == 0 and OFFSET % 8 == 0:
            # The borders at OFFSET, HALF and 2 HALF further, where other_dim jumps, are multiples
            # of 8. So it runs on in groups of eight dims. The compiler does not see that, and would
            # load one by one.
            other_dim = tl.max_contiguous(tl.multiple_of(other_dim, 8), 8)
        cos, sin = _cos_sin(pair, q_pos, scale, rope, REGION, MODEL)
        row = tl.arange(0, ROWS)[:, None]
        mask = row < rows if DIMS <= DIMS_LEFT else (row < rows) & (dim < MODEL.head_dim)[None, :]
        other_ptr = q.ptr + (row * tl.cast(q.stride_seq, tl.int32) + other_dim[None, :])
        other = tl.load(other_ptr, mask=mask, other=0.0).to(tl.float32)  # (ROWS, DIMS)
        rotated = x * cos + tl.where(is_second[None, :], other, -other) * sin
    return rotated.to(q.ptr.dtype.element_ty)


@triton.jit
def _load_rotated(
    q, rows, q_pos, rope, REGION: tl.constexpr, ROWS: tl.constexpr, MODEL: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Load ROWS queries and rotate them for REGION: (ROWS, D0) and (ROWS, D1), rounded once.

    q: Rows from the first on. rows: how many exist. q_pos: their absolute positions, (ROWS,).
    """
    D0: tl.constexpr = BLOCKS.d0
    D1: tl.constexpr = BLOCKS.d1
    scale = 1.0
    if rope.scale is not None:
        row = tl.arange(0, ROWS)
        scale = tl.load(rope.scale + row, mask=row < rows, other=0.0)[:, None]  # (ROWS, 1)
    if BLOCKS.tiles_are_pairs:  # dim i of the first tile and dim i of the second are a pair
        cos, sin = _cos_sin(tl.arange(0, D0), q_pos, scale, rope, REGION, MODEL)  # (ROWS, D0)
        a, b = load_rows(q, 0, rows, ROWS, D0, D1, D0 + D1, True)
        a, b = a.to(tl.float32), b.to(tl.float32)
        dtype: tl.constexpr = q.ptr.dtype.element_ty
        return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    elif D1 > 0:
        first = _rotate_tile(q, rows, q_pos, scale, rope, REGION, 0, D0, ROWS, MODEL)
        second = _rotate_tile(q, rows, q_pos, scale, rope, REGION, D0, D1, ROWS, MODEL)
        return first, second
    else:
        return (_rotate_tile(q, rows, q_pos, scale, rope, REGION, 0, D0, ROWS, MODEL),)


@triton.jit
def rotated_queries(
    q, memory, queries, rope, REGION: tl.constexpr, MODEL: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Load the block's queries, rotated to REGION's positions: a tuple of (M, D0) and (M, D1).

    q: Rows from the block's first query on. memory: Rows like them, of this program alone.
    queries: a QueryBlock of mask.py.
    """
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    CHUNK_M: tl.constexpr = BLOCKS.chunk_m  # divides BLOCK_M
    D0: tl.constexpr = BLOCKS.d0
    D1: tl.constexpr = BLOCKS.d1
    HEAD_DIM: tl.constexpr = MODEL.head_dim
    rows, first_pos = queries.rows, queries.first_q_key + queries.key_0_pos
    if REGION == 0 and BLOCKS.tiles_are_pairs:
        q0, q1 = _load_rotated(
            q, rows, first_pos + tl.arange(0, BLOCK_M), rope, REGION, BLOCK_M, MODEL, BLOCKS,
        )  # fmt: skip
        return as_operand(q0), as_operand(q1)
    else:
        # Few registers are free between two loops, and rows whose tiles are not the two dims of
        # pairs need many. So CHUNK_M rows at a time go through memory, rows of this block only.
        tl.debug_barrier()  # all threads have loaded the last region's queries from there
        for chunk in tl.range(0, BLOCK_M, CHUNK_M):
            chunk_rope = rope
            if rope.scale is not None:
                chunk_rope = QueryRope(
                    rope.inv_freq, rope.log_decay, rope.pair_maps, rope.scale + chunk
                )
            tiles = _load_rotated(
                row_of(q, 0, chunk, 0), rows - chunk, first_pos + chunk + tl.arange(0, CHUNK_M),
                chunk_rope, REGION, CHUNK_M, MODEL, BLOCKS,
            )  # fmt: skip
            to = row_of(memory, 0, chunk, 0)
            store_rows(to, tiles, rows - chunk, CHUNK_M, D0, D1, HEAD_DIM)
        tl.debug_barrier()  # all rows are stored
        return load_rows(memory, 0, rows, BLOCK_M, D0, D1, HEAD_DIM, True)
