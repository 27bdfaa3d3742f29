"""Device functions: from positions to the cosines and sines that a tile of tokens is rotated by."""

import triton
import triton.language as tl

from ..._shared.triton.exp import exp
from ..._shared.triton.sincos import (
    add_quarters,
    cos_sin_polynomials,
    cos_sin_polynomials_wide,
)

# pi/2 = FIRST + SECOND + THIRD. The first two have 24 significant bits, so their products with a
# count of quarter circles below 2**29 are exact in float64, whether contracted into an fma or not.
TWO_OVER_PI = tl.constexpr(0.6366197723675814)
HALF_PI_FIRST = tl.constexpr(1.570796251296997)
HALF_PI_SECOND = tl.constexpr(7.549789415861596e-08)
HALF_PI_THIRD = tl.constexpr(5.390302858158119e-15)
# Adding 1.5 * 2**52 rounds a float64 to an integer and leaves that integer in its low bits.
TO_INTEGER = tl.constexpr(6755399441055744.0)


@triton.jit
def sincos(angle, TILE: tl.constexpr):
    """Cosine and sine of float64 angles below 2**29 * pi/2, to float32 or wide accuracy."""
    shifted = angle * TWO_OVER_PI + TO_INTEGER
    quarters = shifted - TO_INTEGER
    rest = (angle - quarters * HALF_PI_FIRST) - quarters * HALF_PI_SECOND
    rest = rest - quarters * HALF_PI_THIRD
    quadrant = shifted.to(tl.int64, bitcast=True).to(tl.int32)
    if TILE.wide:
        cos, sin = cos_sin_polynomials_wide(rest)
    else:
        cos, sin = cos_sin_polynomials(rest.to(tl.float32))
    return add_quarters(cos, sin, quadrant)


@triton.jit
def scaled(cos, sin, far, log_decay, decay_sign, amplitude, direction, TILE: tl.constexpr):
    """cos and sin times the amplitude, `far` from its origin; sin also times the direction."""
    scale = tl.full((1, 1), amplitude, tl.float64)
    if log_decay is not None:
        pair = tl.arange(0, TILE.pairs)
        rate = tl.load(log_decay + pair, mask=pair < TILE.half, other=0.0).to(tl.float64)
        # The sign first: products that q and k shared would stay in registers while q is rotated.
        exponent = far * decay_sign * rate[None, :]
        scale = scale * (tl.exp(exponent) if TILE.wide else exp(exponent))
    scale = scale.to(cos.dtype)
    return cos * scale, sin * (scale * direction)
