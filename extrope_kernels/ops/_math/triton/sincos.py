"""Cosines and sines shared by several ops, and angles in fixed point: device functions.

In fixed point, angles are exact at any position without float64 in a loop: a frequency is an int64
that counts 2**-64 circles per position. Its product with a position wraps modulo one circle, so the
angle is as exact at position a billion as at ten.
"""

import triton
import triton.language as tl


@triton.jit
def cos_sin_polynomials(r):
    """Return cosine and sine of float32 angles up to pi/4, to float32 accuracy."""
    z = r * r
    sin = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    cos = 4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5)
    cos = 1.0 - 0.5 * z + z * z * cos
    return cos, sin


@triton.jit
def cos_sin_polynomials_wide(r):
    """Compute the same in float64, by power series: libdevice has a slow path with local memory."""
    z = r * r
    sin = 1 / 6227020800 + z * (-1 / 1307674368000 + z * (1 / 355687428096000))
    sin = -1 / 5040 + z * (1 / 362880 + z * (-1 / 39916800 + z * sin))
    sin = r + r * z * (-1 / 6 + z * (1 / 120 + z * sin))
    cos = 1 / 479001600 + z * (-1 / 87178291200 + z * (1 / 20922789888000))
    cos = -1 / 720 + z * (1 / 40320 + z * (-1 / 3628800 + z * cos))
    cos = 1.0 + z * (-0.5 + z * (1 / 24 + z * cos))
    return cos, sin


@triton.jit
def add_quarters(cos, sin, quarters):
    """Return cosine and sine after adding `quarters` times pi/2 to the angle."""
    odd = (quarters & 1) != 0
    swapped_cos = tl.where(odd, sin, cos)
    swapped_sin = tl.where(odd, cos, sin)
    swapped_cos = tl.where(((quarters + 1) & 2) != 0, -swapped_cos, swapped_cos)
    swapped_sin = tl.where((quarters & 2) != 0, -swapped_sin, swapped_sin)
    return swapped_cos, swapped_sin


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
