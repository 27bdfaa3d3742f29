"""Device functions for angles in fixed point, exact at any position without float64 in a loop.

A frequency is an int64 that counts 2**-64 circles per position. Its product with a position wraps
modulo one circle: the angle is as exact at position a billion as at ten.
"""

import triton
import triton.language as tl

from .sincos import add_quarters, cos_sin_polynomials


@triton.jit
def fixed_angle(inv_freq, position):
    """Return the int64 angle of a float64 position; position 1 gives the frequency."""
    TURNS_PER_RADIAN: tl.constexpr = 0.15915494309189535
    WHOLE: tl.constexpr = 18446744073709551616.0  # 2**64
    turns = inv_freq.to(tl.float64) * TURNS_PER_RADIAN * position
    return ((turns - tl.floor(turns + 0.5)) * WHOLE).to(tl.int64)


@triton.jit
def cos_sin(angle):
    """Return cosine and sine of int64 angles, to float32 accuracy."""
    RADIANS: tl.constexpr = 1.4629180792671596e-09  # radians in 2**-32 circles
    top = (angle >> 32).to(tl.int32)
    quadrant = (top + 536870912) >> 30  # nearest quarter; the sum may wrap, as it should
    cos, sin = cos_sin_polynomials((top - (quadrant << 30)).to(tl.float32) * RADIANS)
    return add_quarters(cos, sin, quadrant)
