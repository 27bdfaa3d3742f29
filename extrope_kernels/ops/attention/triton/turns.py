"""Device functions: angles as fixed-point turns, exact at any position without float64 in a loop.

A frequency is an int64 that counts 2**-64 turns a position. A position times it wraps modulo one
whole turn, so a position's angle is as exact at a billion as it is at ten.
"""

import triton
import triton.language as tl

from ..._shared.triton.sincos import cos_sin_polynomials, turned_by_quarters

_TURNS_PER_RADIAN = tl.constexpr(0.15915494309189535)
_WHOLE = tl.constexpr(18446744073709551616.0)  # 2**64
_RADIANS = tl.constexpr(1.4629180792671596e-09)  # of 2**-32 turns


@triton.jit
def fixed_turns(inv_freq, scale):
    """Radians a position times a float64 scale, as int64 turns."""
    turns = inv_freq.to(tl.float64) * _TURNS_PER_RADIAN * scale
    return ((turns - tl.floor(turns + 0.5)) * _WHOLE).to(tl.int64)


@triton.jit
def cos_sin(turns):
    """Cosine and sine of int64 turns, to float32 accuracy."""
    top = (turns >> 32).to(tl.int32)
    quadrant = (top + 536870912) >> 30  # nearest quarter; the sum may wrap, as it should
    cos, sin = cos_sin_polynomials((top - (quadrant << 30)).to(tl.float32) * _RADIANS)
    return turned_by_quarters(cos, sin, quadrant)


@triton.jit
def turn(row, turns):
    """The pairs of (first lanes, second lanes, rest), float32, turned; the rest as it is."""
    cos, sin = cos_sin(turns)
    return row[0] * cos - row[1] * sin, row[1] * cos + row[0] * sin, row[2]
