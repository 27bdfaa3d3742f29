"""Device functions that rotate a block of raw queries as it is loaded, dims where they are."""

import triton
import triton.language as tl

from ..._shared.triton.position_maps import CONSTANT, log_n_scale, map_cos_sin
from .rows import inside_of, load_part, load_values


@triton.jit
def _cos_sin(
    pair, position, scale, inv_freq, log_decay, amplitude, numbers,
    REGION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of pairs, with all that a query is multiplied by; past the rotated dims 1 and 0, likewise."""
    MAP: tl.constexpr = TILE.q_maps[REGION]
    rotates = pair < TILE.half
    freq = tl.load(inv_freq + pair, mask=rotates, other=0.0)[None, :]
    decay = None
    if log_decay is not None:
        decay = tl.load(log_decay + pair, mask=rotates, other=0.0).to(tl.float64)[None, :]
    # Raw queries are at position 0, a map without numbers.
    cos, sin = map_cos_sin(position, freq, decay, numbers, numbers, MAP, CONSTANT)
    factor = tl.where(rotates, amplitude, 1.0)[None, :] * scale
    return cos * factor, sin * factor


@triton.jit
def _rounded(part, ELEMENT: tl.constexpr, TILE: tl.constexpr):
    part = part.to(ELEMENT)
    return part.to(tl.float32) if TILE.widen else part


@triton.jit
def _rotate_neighbours(
    q, base, left, position, scale, inv_freq, log_decay, amplitude, numbers,
    REGION: tl.constexpr, FIRST: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Dims FIRST to FIRST + DIMS, where a pair's two dims are next to each other."""
    ELEMENT: tl.constexpr = q.pointer.dtype.element_ty
    pair = FIRST // 2 + tl.arange(0, DIMS // 2)
    cos, sin = _cos_sin(
        pair, position, scale, inv_freq, log_decay, amplitude, numbers, REGION, TILE
    )
    part = load_part(q, base, left, FIRST, DIMS, ROWS, True, TILE).to(tl.float32)
    x, y = tl.split(tl.reshape(part, (ROWS, DIMS // 2, 2)))
    rotated = tl.join(x * cos - y * sin, y * cos + x * sin)
    return _rounded(tl.reshape(rotated, (ROWS, DIMS)), ELEMENT, TILE)


@triton.jit
def _rotate_part(
    q, base, left, position, scale, inv_freq, log_decay, amplitude, numbers,
    REGION: tl.constexpr, FIRST: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Dims FIRST to FIRST + DIMS, the other dim of each pair loaded beside it."""
    HALF: tl.constexpr = TILE.half
    ELEMENT: tl.constexpr = q.pointer.dtype.element_ty
    dim = FIRST + tl.arange(0, DIMS)
    of_second = (dim >= HALF) & (dim < 2 * HALF)
    pair = tl.where(of_second, dim - HALF, dim)
    pair = tl.where(dim < 2 * HALF, pair, HALF)
    other = tl.where(of_second, dim - HALF, tl.where(dim < HALF, dim + HALF, dim))
    if HALF % 8 == 0:  # eight dims stay together, which the compiler does not see
        other = tl.max_contiguous(tl.multiple_of(other, 8), 8)
    cos, sin = _cos_sin(
        pair, position, scale, inv_freq, log_decay, amplitude, numbers, REGION, TILE
    )
    part = load_part(q, base, left, FIRST, DIMS, ROWS, True, TILE).to(tl.float32)
    row = tl.arange(0, ROWS) * (tl.cast(q.seq, tl.int32) * TILE.align)
    inside = inside_of(left, FIRST, DIMS, ROWS, True, TILE)
    others = tl.load(base + (row[:, None] + other[None, :]), mask=inside, other=0.0).to(tl.float32)
    rotated = part * cos + tl.where(of_second[None, :], others, -others) * sin
    return _rounded(rotated, ELEMENT, TILE)


@triton.jit
def rotated_rows(
    q, base, left, position, inv_freq, log_decay, amplitude, per_log_n, query_scale, numbers,
    REGION: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """ROWS raw rows as a region sees them, in parts as of load_rows, rounded once.

    position: absolute; query_scale: None, or a pointer to what the first of them is multiplied by.
    """
    DIMS: tl.constexpr = TILE.dims
    MORE: tl.constexpr = TILE.more_dims
    ELEMENT: tl.constexpr = q.pointer.dtype.element_ty
    scale = log_n_scale(position, per_log_n)
    if query_scale is not None:
        scale *= load_values(query_scale, left, ROWS, True)[:, None]
    if TILE.paired:  # the two parts of a row are the two dims of its pairs
        cos, sin = _cos_sin(
            tl.arange(0, DIMS), position, scale, inv_freq, log_decay, amplitude, numbers,
            REGION, TILE,
        )  # fmt: skip
        x = load_part(q, base, left, 0, DIMS, ROWS, True, TILE).to(tl.float32)
        y = load_part(q, base, left, DIMS, MORE, ROWS, True, TILE).to(tl.float32)
        first = _rounded(x * cos - y * sin, ELEMENT, TILE)
        second = _rounded(y * cos + x * sin, ELEMENT, TILE)
    elif TILE.interleaved:
        first = _rotate_neighbours(
            q, base, left, position, scale, inv_freq, log_decay, amplitude, numbers,
            REGION, 0, DIMS, ROWS, TILE,
        )  # fmt: skip
        second = first
        if MORE > 0:
            second = _rotate_neighbours(
                q, base, left, position, scale, inv_freq, log_decay, amplitude, numbers,
                REGION, DIMS, MORE, ROWS, TILE,
            )  # fmt: skip
    else:
        first = _rotate_part(
            q, base, left, position, scale, inv_freq, log_decay, amplitude, numbers,
            REGION, 0, DIMS, ROWS, TILE,
        )  # fmt: skip
        second = first
        if MORE > 0:
            second = _rotate_part(
                q, base, left, position, scale, inv_freq, log_decay, amplitude, numbers,
                REGION, DIMS, MORE, ROWS, TILE,
            )  # fmt: skip
    return first, second
