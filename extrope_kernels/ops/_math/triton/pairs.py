"""Device functions on rows of head_dim elements in parts: both dims of rotated pairs, and the rest.

TILE has `half` (pairs that rotate), `pairs` (half, rounded up to a power of two), `rotary_offset`
(the first dim of the first pair), `rest` (dims before and after the rotated ones), `rest_dims`
(rest, rounded up; 1 if none) and `interleaved`.
"""

import triton
import triton.language as tl


@triton.jit
def _rest_dims(TILE: tl.constexpr):
    """Return 0, 1, ... and the dims that do not rotate, those before the rotated ones first."""
    ROTARY_DIM: tl.constexpr = 2 * TILE.half
    place = tl.arange(0, TILE.rest_dims)
    dim = place + ROTARY_DIM
    if TILE.rotary_offset > 0:
        dim = tl.where(place < TILE.rotary_offset, place, dim)
        if TILE.rotary_offset % 8 == 0 and ROTARY_DIM % 8 == 0:
            # Runs of eight: the compiler does not see that, and would load one by one.
            dim = tl.max_contiguous(tl.multiple_of(dim, 8), 8)
    return place, dim


@triton.jit
def load_parts(rows, valid, TILE: tl.constexpr):
    """Load first dims and second dims of the pairs in these rows, and the rest; 0 if not valid."""
    ROWS: tl.constexpr = rows.shape[0]
    PAIRS: tl.constexpr = TILE.pairs
    pairs = rows + TILE.rotary_offset
    if TILE.interleaved:
        dim = tl.arange(0, 2 * PAIRS)
        mask = valid[:, None] & (dim < 2 * TILE.half)[None, :]
        both = tl.load(pairs[:, None] + dim[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(both, (ROWS, PAIRS, 2)))
    else:
        dim = tl.arange(0, PAIRS)
        mask = valid[:, None] & (dim < TILE.half)[None, :]
        first = tl.load(pairs[:, None] + dim[None, :], mask=mask, other=0.0)
        second = tl.load(pairs[:, None] + (dim + TILE.half)[None, :], mask=mask, other=0.0)
    rest = first
    if TILE.rest > 0:
        place, dim = _rest_dims(TILE)
        mask = valid[:, None] & (place < TILE.rest)[None, :]
        rest = tl.load(rows[:, None] + dim[None, :], mask=mask, other=0.0)
    return first, second, rest


@triton.jit
def store_parts(rows, parts, valid, TILE: tl.constexpr):
    """Round once and store parts from load_parts."""
    ROWS: tl.constexpr = rows.shape[0]
    PAIRS: tl.constexpr = TILE.pairs
    ELEMENT: tl.constexpr = rows.dtype.element_ty
    pairs = rows + TILE.rotary_offset
    if TILE.interleaved:
        dim = tl.arange(0, 2 * PAIRS)
        mask = valid[:, None] & (dim < 2 * TILE.half)[None, :]
        both = tl.reshape(tl.join(parts[0].to(ELEMENT), parts[1].to(ELEMENT)), (ROWS, 2 * PAIRS))
        tl.store(pairs[:, None] + dim[None, :], both, mask=mask)
    else:
        dim = tl.arange(0, PAIRS)
        mask = valid[:, None] & (dim < TILE.half)[None, :]
        tl.store(pairs[:, None] + dim[None, :], parts[0].to(ELEMENT), mask=mask)
        tl.store(pairs[:, None] + (dim + TILE.half)[None, :], parts[1].to(ELEMENT), mask=mask)
    if TILE.rest > 0:
        place, dim = _rest_dims(TILE)
        mask = valid[:, None] & (place < TILE.rest)[None, :]
        tl.store(rows[:, None] + dim[None, :], parts[2].to(ELEMENT), mask=mask)


@triton.jit
def widened(parts):
    return parts[0].to(tl.float32), parts[1].to(tl.float32), parts[2].to(tl.float32)


@triton.jit
def rotate_parts(parts, cos, sin, scale):
    """Rotate float32 parts; multiply the rest by `scale`, which cos and sin contain."""
    first = parts[0] * cos - parts[1] * sin
    return first, parts[1] * cos + parts[0] * sin, parts[2] * scale


@triton.jit
def of_pairs(values, TILE: tl.constexpr):
    """Load one number per pair: (1, pairs)."""
    pair = tl.arange(0, TILE.pairs)
    return tl.load(values + pair, mask=pair < TILE.half, other=0.0)[None, :]


@triton.jit
def copy_rows(rows, to, valid, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr):
    """Copy rows; DIMS: HEAD_DIM, rounded up to a power of two."""
    dim = tl.arange(0, DIMS)[None, :]
    mask = valid[:, None] & (dim < HEAD_DIM)
    tl.store(to[:, None] + dim, tl.load(rows[:, None] + dim, mask=mask), mask=mask)
