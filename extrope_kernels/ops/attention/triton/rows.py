"""Rows, the head_dim elements of a token and head, in one or two tiles: device functions.

Two products of half the depth take fewer registers than one, and head_dim 96 becomes 64 and 32
dims, not 128. So rows come as a tuple of one or two tiles, (ROWS, D0) and (ROWS, D1); D1 is 0 if
there is one. MODEL, BLOCKS: ModelConstants and Blocks of device.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..._math.triton.launch import INTERPRETED


class Rows(NamedTuple):
    """The rows of a (batch, seqlen, heads, dims) tensor; strides in elements."""

    ptr: tl.tensor
    stride_batch: tl.tensor
    stride_seq: tl.tensor
    stride_head: tl.tensor


@triton.jit
def strided_rows(
    ptr, stride_batch, stride_seq, stride_head, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return Rows of a tensor whose strides come divided by BLOCKS.align.

    This product shows the compiler that rows begin at multiples of `align` elements, so loads take
    16 bytes whatever the length. Strides of contiguous tokens are constants: they need no register.
    """
    stride_batch = tl.cast(stride_batch, tl.int64) * BLOCKS.align
    if BLOCKS.contiguous:
        return Rows(ptr, stride_batch, HEADS * HEAD_DIM, HEAD_DIM)
    else:
        stride_seq = tl.cast(stride_seq, tl.int64) * BLOCKS.align
        return Rows(ptr, stride_batch, stride_seq, tl.cast(stride_head, tl.int64) * BLOCKS.align)


@triton.jit
def nth_copy(
    ptr, n, seqlen, COPIES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Return Rows of copy n of a contiguous (batch, seqlen, COPIES, HEADS, HEAD_DIM) tensor."""
    STRIDE_SEQ: tl.constexpr = COPIES * HEADS * HEAD_DIM
    stride_batch = tl.cast(seqlen, tl.int64) * STRIDE_SEQ
    return Rows(ptr + n * HEADS * HEAD_DIM, stride_batch, STRIDE_SEQ, HEAD_DIM)


@triton.jit
def keys_of_region(k, k_rotated, seqlen_k, REGION: tl.constexpr, MODEL: tl.constexpr):
    """Return REGION's keys: k itself, if it is as the region needs it, or its rotated copy."""
    if MODEL.sees_given_k[REGION]:
        return k
    else:
        n = MODEL.k_copy[REGION]
        return nth_copy(k_rotated, n, seqlen_k, MODEL.k_copies, MODEL.heads_k, MODEL.head_dim)


@triton.jit
def row_of(x, batch, token, head):
    """Return the Rows of x from this row on: a pointer to its dim 0, and its stride_seq."""
    offset = (
        batch * x.stride_batch
        + tl.cast(token, tl.int64) * x.stride_seq
        + tl.cast(head, tl.int64) * x.stride_head
    )
    return Rows(x.ptr + offset, x.stride_batch, x.stride_seq, x.stride_head)


@triton.jit
def load_tile(
    row_0, stride_seq, rows, ROWS: tl.constexpr, DIMS: tl.constexpr, HEAD_DIM: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Load ROWS rows, the first from row_0 on: (ROWS, DIMS).

    It is 0 from dim HEAD_DIM on, and with MASK_ROWS from row number `rows` on. Without MASK_ROWS
    all ROWS rows must exist.
    """
    row = tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    # int32 offsets take half the registers; the launcher checks that rows of a block fit.
    tile_ptr = row_0 + (row * tl.cast(stride_seq, tl.int32) + dim)
    if MASK_ROWS:
        mask = row < rows if DIMS <= HEAD_DIM else (row < rows) & (dim < HEAD_DIM)
        tile = tl.load(tile_ptr, mask=mask, other=0.0)
    elif DIMS <= HEAD_DIM:
        tile = tl.load(tile_ptr)
    else:
        tile = tl.load(tile_ptr, mask=dim < HEAD_DIM, other=0.0)
    return as_operand(tile)


@triton.jit
def load_rows(
    x, first, rows, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Load ROWS rows of x, a Rows, from row `first` on: (ROWS, D0) and, unless D1 is 0, (ROWS, D1).

    They are 0 from dim HEAD_DIM on, and with MASK_ROWS from row number `rows` on. Without MASK_ROWS
    all ROWS rows must exist.
    """
    row_0 = x.ptr + tl.cast(first, tl.int64) * x.stride_seq
    tile = load_tile(row_0, x.stride_seq, rows, ROWS, D0, HEAD_DIM, MASK_ROWS)
    if D1 > 0:
        second = load_tile(row_0 + D0, x.stride_seq, rows, ROWS, D1, HEAD_DIM - D0, MASK_ROWS)
        return tile, second
    else:
        return (tile,)


@triton.jit
def store_tile(
    row_0, stride_seq, tile, rows, ROWS: tl.constexpr, DIMS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Round a (ROWS, DIMS) tile once; store its first `rows` rows, and dims before HEAD_DIM."""
    row = tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    tile_ptr = row_0 + (row * tl.cast(stride_seq, tl.int32) + dim)
    mask = row < rows if DIMS <= HEAD_DIM else (row < rows) & (dim < HEAD_DIM)
    tl.store(tile_ptr, tile.to(row_0.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(
    x, tiles, rows, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Round ROWS rows in tiles once; store them from the first of x on, a Rows.

    Rows from number `rows` on, and dims from HEAD_DIM on, are left out.
    """
    store_tile(x.ptr, x.stride_seq, tiles[0], rows, ROWS, D0, HEAD_DIM)
    if D1 > 0:
        store_tile(x.ptr + D0, x.stride_seq, tiles[1], rows, ROWS, D1, HEAD_DIM - D0)


@triton.jit
def zero_rows(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Return float32 zeros in the tiles of ROWS rows."""
    if D1 > 0:
        return tl.zeros((ROWS, D0), tl.float32), tl.zeros((ROWS, D1), tl.float32)
    else:
        return (tl.zeros((ROWS, D0), tl.float32),)


@triton.jit
def dot_rows(a, b):
    """Return a @ b.T of rows in tiles: (rows of a, rows of b) float32."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision="ieee")
    return product


@triton.jit
def add_dot(acc, weights, x):
    """Return acc + weights @ x, both in tiles; weights: rounded to the dtype of x."""
    tiles = ()
    for i in tl.static_range(len(x)):
        tile = tl.dot(weights.to(x[i].dtype), x[i], acc[i], input_precision="ieee")
        tiles = tiles + (tile,)  # noqa: RUF005
    return tiles


@triton.jit
def scale_rows(x, factor):
    """Return rows in tiles, times factor: (rows, 1)."""
    tiles = ()
    for i in tl.static_range(len(x)):
        tiles = tiles + (x[i] * factor,)  # noqa: RUF005
    return tiles


@triton.constexpr_function
def _interpreted():
    return INTERPRETED


@triton.jit
def as_operand(tile):
    """Return the tile as tl.dot takes it: the interpreter multiplies no bfloat16."""
    if _interpreted():  # noqa: SIM102
        if tile.dtype == tl.bfloat16:
            tile = tile.to(tl.float32)
    return tile
