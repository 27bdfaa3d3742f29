"""Device functions on blocks of rows, one row of head_dim elements for each token and head.

A block may come in two parts, of Tile.dims and Tile.more_dims: two products of half the depth take
fewer registers than one, and head_dim 96 is then 64 and 32 dims, not 128. Without more_dims the
second part is never used.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """What a kernel is compiled for, beside types and alignment.

    There are two, for rows of q and k and for rows of v and out: they differ in their dims.
    """

    block_m: int  # rows of queries
    block_n: int  # rows of keys
    heads_q: int
    heads_k: int
    head_dim: int
    dims: int  # a power of two
    more_dims: int  # of what head_dim has beyond dims, rounded up to a power of two; or 0
    rotated: int  # rows of queries at a time between two regions; divides block_m
    half: int  # pairs of dims that rotate
    interleaved: bool
    paired: bool  # the two parts of a row are the two dims of its pairs
    q_maps: tuple[int, ...]  # of each region: see _shared/triton/position_maps.py
    k_frame: tuple[int, ...]  # of each region: which of the frames, or -1 for keys as they come
    from_first_key: bool  # region 0 has no lower end
    windowed: bool  # a query sees no key farther than a window
    capped: bool  # logits have a bound
    align: int  # elements; divides all strides
    contiguous: bool  # tokens of the tensors that were given
    widen: bool  # operands to float32 before a product: the interpreter has no bfloat16


class Rows(NamedTuple):
    """A tensor by batch, seq, head and dim. Strides count groups of Tile.align elements."""

    pointer: tl.tensor
    batch: tl.tensor
    seq: tl.tensor
    head: tl.tensor


@triton.jit
def rows_of(pointer, strides, HEADS: tl.constexpr, TILE: tl.constexpr):
    """Strides known to the compiler save the registers of as many addresses."""
    HEAD: tl.constexpr = TILE.head_dim // TILE.align
    SEQ: tl.constexpr = HEADS * HEAD
    if TILE.contiguous:
        given = Rows(pointer, strides[0], SEQ, HEAD)
    else:
        given = Rows(pointer, strides[0], strides[1], strides[2])
    return given


@triton.jit
def frame_of(frames, strides, frame, HEADS: tl.constexpr, TILE: tl.constexpr):
    """One of several frames, each contiguous; strides: from one to the next, and by batch."""
    HEAD: tl.constexpr = TILE.head_dim // TILE.align
    SEQ: tl.constexpr = HEADS * HEAD
    pointer = frames + tl.cast(frame, tl.int64) * strides[0] * TILE.align
    return Rows(pointer, strides[1], SEQ, HEAD)


@triton.jit
def keys_of(k, strides, frames, frame_strides, REGION: tl.constexpr, TILE: tl.constexpr):
    """Keys as a region sees them."""
    FRAME: tl.constexpr = TILE.k_frame[REGION]
    if FRAME < 0:
        keys = rows_of(k, strides, TILE.heads_k, TILE)
    else:
        keys = frame_of(frames, frame_strides, FRAME, TILE.heads_k, TILE)
    return keys


@triton.jit
def row_base(x, batch, seq, head, TILE: tl.constexpr):
    """Pointer to dim 0 of (batch, seq, head); the factor align shows the compiler alignment."""
    offset = tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head
    return x.pointer + (offset + tl.cast(seq, tl.int64) * x.seq) * TILE.align


@triton.jit
def pointers_to(
    x, base, FIRST: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """To dims FIRST to FIRST + DIMS of ROWS rows from `base` on."""
    # int32 suffices within a block: the launcher has made sure.
    row = tl.arange(0, ROWS) * (tl.cast(x.seq, tl.int32) * TILE.align)
    return base + (row[:, None] + (FIRST + tl.arange(0, DIMS))[None, :])


@triton.jit
def inside_of(
    count,
    FIRST: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Which of those lie before head_dim and, if MASKED, before row `count`."""
    row = tl.arange(0, ROWS)[:, None]
    dim = (FIRST + tl.arange(0, DIMS))[None, :]
    if not MASKED:
        inside = dim < TILE.head_dim
    elif TILE.head_dim >= FIRST + DIMS:
        inside = row < count
    else:
        inside = (row < count) & (dim < TILE.head_dim)
    return inside


@triton.jit
def load_part(
    x,
    base,
    count,
    FIRST: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    pointers = pointers_to(x, base, FIRST, DIMS, ROWS, TILE)
    if MASKED or TILE.head_dim < FIRST + DIMS:
        inside = inside_of(count, FIRST, DIMS, ROWS, MASKED, TILE)
        part = tl.load(pointers, mask=inside, other=0.0)
    else:
        part = tl.load(pointers)
    return part.to(tl.float32) if TILE.widen else part


@triton.jit
def _store_part(
    x,
    base,
    part,
    count,
    FIRST: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    pointers = pointers_to(x, base, FIRST, DIMS, ROWS, TILE)
    inside = inside_of(count, FIRST, DIMS, ROWS, True, TILE)
    tl.store(pointers, part.to(x.pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_rows(x, base, count, ROWS: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr):
    """ROWS rows from `base` on; 0 past head_dim and, if MASKED, past `count` rows."""
    first = load_part(x, base, count, 0, TILE.dims, ROWS, MASKED, TILE)
    second = first
    if TILE.more_dims > 0:
        second = load_part(x, base, count, TILE.dims, TILE.more_dims, ROWS, MASKED, TILE)
    return first, second


@triton.jit
def store_rows(x, base, rows, count, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Round once and store the first `count` rows."""
    _store_part(x, base, rows[0], count, 0, TILE.dims, ROWS, TILE)
    if TILE.more_dims > 0:
        _store_part(x, base, rows[1], count, TILE.dims, TILE.more_dims, ROWS, TILE)


@triton.jit
def load_values(pointer, count, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """(SIZE,) from `pointer` on; 0 past `count`, if MASKED."""
    index = tl.arange(0, SIZE)
    if MASKED:
        values = tl.load(pointer + index, mask=index < count, other=0.0)
    else:
        values = tl.load(pointer + index)
    return values


@triton.jit
def zero_rows(ROWS: tl.constexpr, TILE: tl.constexpr):
    DIMS: tl.constexpr = TILE.dims
    MORE: tl.constexpr = TILE.more_dims if TILE.more_dims > 0 else 1
    return tl.zeros((ROWS, DIMS), tl.float32), tl.zeros((ROWS, MORE), tl.float32)


@triton.jit
def times(rows, factor):
    """Each row times its factor."""
    return rows[0] * factor[:, None], rows[1] * factor[:, None]


@triton.jit
def dots(x, y, TILE: tl.constexpr):
    """x @ y.T, in float32 for operands of any type."""
    result = tl.dot(x[0], tl.trans(y[0]), input_precision="ieee")
    if TILE.more_dims > 0:
        result = tl.dot(x[1], tl.trans(y[1]), result, input_precision="ieee")
    return result


@triton.jit
def add_weighted(sums, weights, rows, TILE: tl.constexpr):
    """sums + weights @ rows, in float32 once the weights are rounded to the rows' type."""
    weights = weights.to(rows[0].dtype)
    first = tl.dot(weights, rows[0], sums[0], input_precision="ieee")
    second = sums[1]
    if TILE.more_dims > 0:
        second = tl.dot(weights, rows[1], second, input_precision="ieee")
    return first, second
