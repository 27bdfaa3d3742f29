"""The exponential shared by several ops."""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """Return exp of float64 exponents in float64, to float32 accuracy."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    LN_2: tl.constexpr = 0.6931471805599453
    # Adding 1.5 * 2**52 rounds a float64 to an integer and leaves that integer in its low bits.
    TO_INTEGER: tl.constexpr = 6755399441055744.0
    # float32 underflows or overflows well inside this range.
    x = tl.minimum(tl.maximum(x, -600.0), 600.0)
    shifted = x * LOG2_E + TO_INTEGER
    r = (x - (shifted - TO_INTEGER) * LN_2).to(tl.float32)
    series = 1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040)))
    series = 1 + r + r * r * (0.5 + r * (1 / 6 + r * series))
    exponent = shifted.to(tl.int64, bitcast=True).to(tl.int32) + 1023
    power = (exponent.to(tl.int64) << 52).to(tl.float64, bitcast=True)
    return series.to(tl.float64) * power
