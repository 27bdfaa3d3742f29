"""Device functions on blocks of rows, one row of head_dim elements for each token and head.

A block may come in two parts, of Tile.dims and Tile.more_dims: two products of half the depth take
fewer registers than one, and head_dim 96 is then 64 and 32 dims, not 128. Without more_dims the
second part is never used.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A tensor by batch, seq, head and dim. Strides count groups of Tile.align elements."""

    pointer: Tensor
    batch: int
    seq: int
    head: int


class Tile(NamedTuple):
    """What a kernel is compiled for, beside types and alignment."""

    block_m: int  # rows of queries
    block_n: int  # rows of keys
    head_dim: int
    dims: int  # a power of two
    more_dims: int  # of what head_dim has beyond dims, rounded up to a power of two; or 0
    regions: int
    from_first_key: bool  # region 0 has no lower end
    align: int  # elements; divides all strides
    widen: bool  # operands to float32 before a product: the interpreter has no bfloat16


@triton.jit
def row_base(x, batch, seq, head, TILE: tl.constexpr):
    """Pointer to dim 0 of (batch, seq, head); the factor align shows the compiler alignment."""
    offset = tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head
    return x.pointer + (offset + tl.cast(seq, tl.int64) * x.seq) * TILE.align


@triton.jit
def _pointers(
    x, base, FIRST: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """To dims FIRST to FIRST + DIMS of ROWS rows from `base` on."""
    # int32 suffices within a block: the launcher has made sure.
    row = tl.arange(0, ROWS) * (tl.cast(x.seq, tl.int32) * TILE.align)
    return base + (row[:, None] + (FIRST + tl.arange(0, DIMS))[None, :])


@triton.jit
def _inside(
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
def _load_part(
    x,
    base,
    count,
    FIRST: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    pointers = _pointers(x, base, FIRST, DIMS, ROWS, TILE)
    if MASKED or TILE.head_dim < FIRST + DIMS:
        inside = _inside(count, FIRST, DIMS, ROWS, MASKED, TILE)
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
    pointers = _pointers(x, base, FIRST, DIMS, ROWS, TILE)
    inside = _inside(count, FIRST, DIMS, ROWS, True, TILE)
    tl.store(pointers, part.to(x.pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_rows(x, base, count, ROWS: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr):
    """ROWS rows from `base` on; 0 past head_dim and, if MASKED, past `count` rows."""
    first = _load_part(x, base, count, 0, TILE.dims, ROWS, MASKED, TILE)
    second = first
    if TILE.more_dims > 0:
        second = _load_part(x, base, count, TILE.dims, TILE.more_dims, ROWS, MASKED, TILE)
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
