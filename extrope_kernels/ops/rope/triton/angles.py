"""Device functions: from positions to the cosines and sines that a tile of tokens turns by."""

import triton
import triton.language as tl

from ..._shared.triton.sincos import (
    cos_sin_polynomials,
    cos_sin_polynomials_wide,
    turned_by_quarters,
)

# pi/2 = FIRST + SECOND + THIRD. The first two have 24 significant bits, so their products with a
# count of quarter turns below 2**29 are exact in float64, whether contracted into an fma or not.
TWO_OVER_PI = tl.constexpr(0.6366197723675814)
HALF_PI_FIRST = tl.constexpr(1.570796251296997)
HALF_PI_SECOND = tl.constexpr(7.549789415861596e-08)
HALF_PI_THIRD = tl.constexpr(5.390302858158119e-15)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Adding 1.5 * 2**52 rounds a float64 to an integer and leaves that integer in its low bits.
TO_INTEGER = tl.constexpr(6755399441055744.0)


@triton.jit
def sincos(angle, TILE: tl.constexpr):
    """Cosine and sine of float64 angles below 2**29 quarter turns, to float32 or wide accuracy."""
    shifted = angle * TWO_OVER_PI + TO_INTEGER
    quarters = shifted - TO_INTEGER
    rest = (angle - quarters * HALF_PI_FIRST) - quarters * HALF_PI_SECOND
    rest = rest - quarters * HALF_PI_THIRD
    quadrant = shifted.to(tl.int64, bitcast=True).to(tl.int32)
    if TILE.wide:
        cos, sin = cos_sin_polynomials_wide(rest)
    else:
        cos, sin = cos_sin_polynomials(rest.to(tl.float32))
    return turned_by_quarters(cos, sin, quadrant)


@triton.jit
def _exp(x, TILE: tl.constexpr):
    """float64 exp of float64 exponents, to float32 or wide accuracy."""
    if TILE.wide:
        result = tl.exp(x)
    else:
        # float32 has long vanished or overflowed at the ends of this range.
        x = tl.minimum(tl.maximum(x, -600.0), 600.0)
        shifted = x * LOG2_E + TO_INTEGER
        r = (x - (shifted - TO_INTEGER) * LN_2).to(tl.float32)
        series = 1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040)))
        series = 1 + r + r * r * (0.5 + r * (1 / 6 + r * series))
        exponent = shifted.to(tl.int64, bitcast=True).to(tl.int32) + 1023
        result = series.to(tl.float64) * (exponent.to(tl.int64) << 52).to(tl.float64, bitcast=True)
    return result


@triton.jit
def scaled(cos, sin, far, log_decay, decay_sign, amplitude, direction, TILE: tl.constexpr):
    """cos and sin times the amplitude, `far` from its origin; sin also times the direction."""
    scale = tl.full((1, 1), amplitude, tl.float64)
    if log_decay is not None:
        pair = tl.arange(0, TILE.pairs)
        rate = tl.load(log_decay + pair, mask=pair < TILE.half, other=0.0).to(tl.float64)
        # The sign first: products that q and k shared would stay in registers while q is turned.
        scale = scale * _exp(far * decay_sign * rate[None, :], TILE)
    scale = scale.to(cos.dtype)
    return cos * scale, sin * (scale * direction)
