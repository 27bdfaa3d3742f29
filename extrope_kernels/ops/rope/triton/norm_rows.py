"""Device functions of the kernels that norm and rotate: heads, their weights, their angles."""

import triton
import triton.language as tl

from ..._shared.triton.pairs import load_parts
from .angles import scaled, sincos


@triton.jit
def load_head(row, valid, TILE: tl.constexpr):
    """Parts of a head, widened: the pairs' dims, and the rest, which is 0 where there is none."""
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    a, b, rest = load_parts(row, valid, TILE)
    return a.to(WIDE), b.to(WIDE), rest.to(WIDE)


@triton.jit
def row_sum(a, b, rest, TILE: tl.constexpr):
    """Over the dims of a head: (tokens, 1)."""
    total = tl.sum(a + b, 1)
    if TILE.rest > 0:
        total += tl.sum(rest, 1)
    return total[:, None]


@triton.jit
def load_weights(weight, head, TOGETHER: tl.constexpr, TILE: tl.constexpr):
    """(1, dims) parts of the weights of a head."""
    if TOGETHER:
        weight += head * (2 * TILE.half + TILE.rest)
    one = tl.arange(0, 1)
    return load_head(weight + one, one == 0, TILE)


@triton.jit
def _add_rows(to, x, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Store the sum over the rows of x in `COUNT` elements from `FIRST` on."""
    DIMS: tl.constexpr = x.shape[1]
    dim = tl.arange(0, DIMS)
    tl.store(to + FIRST + STEP * dim, tl.sum(x, 0), mask=dim < COUNT)


@triton.jit
def store_sums(to, a, b, rest, TILE: tl.constexpr):
    STEP: tl.constexpr = 2 if TILE.interleaved else 1
    SECOND: tl.constexpr = 1 if TILE.interleaved else TILE.half
    _add_rows(to, a, 0, STEP, TILE.half)
    _add_rows(to, b, SECOND, STEP, TILE.half)
    if TILE.rest > 0:
        _add_rows(to, rest, 2 * TILE.half, 1, TILE.rest)


@triton.jit
def head_angles(by, head, sign, valid, TILE: tl.constexpr):
    """cos and sin of a head, or of all heads.

    by: (frequencies, their stride of heads, position, far, log_decay, amplitude, direction).
    """
    freqs, freq_head, position, far, log_decay, amplitude, direction = by
    mask = valid[:, None] & (tl.arange(0, TILE.pairs) < TILE.half)[None, :]
    freq = tl.load(freqs + head * freq_head, mask=mask, other=0.0).to(tl.float64)
    cos, sin = sincos(position * freq, TILE)
    return scaled(cos, sin, far, log_decay, sign, amplitude, direction, TILE)
