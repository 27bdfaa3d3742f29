"""Compute what PTX does and numpy has no function for, on arrays over lanes or scalars."""

from __future__ import annotations

import functools

import numpy as np

f32, f64, u16, u32, u64, i32, i64 = (
    np.float32,
    np.float64,
    np.uint16,
    np.uint32,
    np.uint64,
    np.int32,
    np.int64,
)
TINY = f32(2.0**-126)


def fma32(a, b, c, out, where=True):
    """Multiply exactly in float64, then add; that rounds twice, which one tie in 2**29 shows."""
    np.add(np.multiply(a, b, dtype=f64), c, out=out, where=where, casting="same_kind")


def pairs(x, n):
    """View registers of 64 bits as two float32 each: .f32x2."""
    return np.ascontiguousarray(np.broadcast_to(x, n)).view(f32)


def fma64(a, b, c):
    """Multiply as Dekker and add as Knuth: right but for ties of the last addition."""
    a, b = np.asarray(a, f64), np.asarray(b, f64)
    p = a * b
    t = a * 134217729.0
    ah = t - (t - a)
    t = b * 134217729.0
    bh = t - (t - b)
    al, bl = a - ah, b - bh
    low = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    z = s - p
    low = low + ((p - (s - z)) + (c - z))
    exact = s + low
    return np.where(np.isfinite(exact), exact, s)


def flush(x):
    """Make subnormal float32 a zero of the same sign: .ftz."""
    x = np.asarray(x, f32)
    return np.where(np.abs(x) < TINY, np.copysign(f32(0), x), x)


def approx(function, x, ftz):
    """Round correctly what the hardware approximates within 2 units."""
    x = flush(x) if ftz else np.asarray(x, f32)
    y = function(x.astype(f64)).astype(f32)
    return flush(y) if ftz else y


def rcp(x):
    return 1.0 / x


def rsqrt(x):
    return 1.0 / np.sqrt(x)


def to_bf16(x):
    """Round to bits of bfloat16, ties to even; NaN is 0x7fff, as on the GPU."""
    bits = np.ascontiguousarray(x, f32).view(u32)
    rounded = ((bits + u32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(u16)
    return np.where(np.isnan(x), u16(0x7FFF), rounded)


def from_bf16(bits):
    return (np.asarray(bits).astype(u32) << 16).view(f32)


def half(pair, upper, brain):
    """Take one of two numbers of 16 bits, bfloat16 or float16, as float32."""
    bits = (np.asarray(pair).astype(u32) >> u32(16 if upper else 0)).astype(u16)
    return from_bf16(bits) if brain else bits.view(np.float16).astype(f32)


def to_f16(x):
    bits = np.asarray(x).astype(np.float16).view(u16)
    return np.where(np.isnan(x), u16(0x7FFF), bits)


def to_tf32(x):
    """Round to 10 bits, ties away from zero: cvt.rna.tf32."""
    bits = np.ascontiguousarray(x, f32).view(u32)
    return np.where(np.isfinite(x), (bits + u32(0x1000)) & u32(0xFFFFE000), bits)


def to_int(x, kind, rounding):
    """Saturate to an integer; NaN gives 0 in 32 bits, the lowest s64, the highest u64: cvt."""
    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](
        np.asarray(x, f64)
    )
    info = np.iinfo(kind)
    high = float(info.max) if info.bits < 64 else np.nextafter(float(info.max), 0)
    inside = np.where(np.isnan(x), 0.0, np.clip(x, float(info.min), high)).astype(kind)
    inside = np.where(x > high, kind(info.max), inside)
    nan = 0 if info.bits < 64 else info.min if info.min < 0 else info.max
    return np.where(np.isnan(x), kind(nan), inside)


def _divide(a, b, kind):
    """Divide towards zero. A divisor of 0 has no meaning in PTX: all ones here."""
    a, b = np.broadcast_arrays(np.asarray(a).astype(kind), np.asarray(b).astype(kind))
    zero = b == 0
    safe = np.where(zero, kind(1), b)
    quotient = a // safe
    if kind(0) - kind(1) < 0:  # signed: numpy floors
        quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(kind)
    return np.where(zero, ~kind(0), quotient), np.where(zero, a, a - quotient * safe)


def div(a, b, kind):
    return _divide(a, b, kind)[0]


def rem(a, b, kind):
    return _divide(a, b, kind)[1]


def mul_hi(a, b, kind):
    if kind in (i32, u32):
        wide = i64 if kind is i32 else u64
        return (np.multiply(a, b, dtype=wide) >> 32).astype(kind)
    a, b = np.asarray(a).astype(kind), np.asarray(b).astype(kind)
    ua, ub = a.view(u64), b.view(u64)
    a0, a1, b0, b1 = ua & u64(0xFFFFFFFF), ua >> u64(32), ub & u64(0xFFFFFFFF), ub >> u64(32)
    middle = a1 * b0 + ((a0 * b0) >> u64(32))
    cross = a0 * b1 + (middle & u64(0xFFFFFFFF))
    high = a1 * b1 + (middle >> u64(32)) + (cross >> u64(32))
    if kind is i64:
        high = high - np.where(a < 0, ub, u64(0)) - np.where(b < 0, ua, u64(0))
    return high.view(kind)


def shift_left(a, n, bits):
    n = np.asarray(n).astype(u64)
    return np.where(
        n < bits, np.left_shift(a, np.minimum(n, bits - 1).astype(np.asarray(a).dtype)), 0
    )


def shift_right(a, n, bits, signed):
    """Shift; counts past the width are clamped."""
    n = np.asarray(n).astype(u64)
    shifted = np.right_shift(a, np.minimum(n, bits - 1).astype(np.asarray(a).dtype))
    return shifted if signed else np.where(n < bits, shifted, 0)


def bfe(a, at, length, signed):
    a, at, length = (
        np.asarray(a).astype(u64),
        np.asarray(at).astype(u64) & u64(255),
        np.asarray(length).astype(u64) & u64(255),
    )
    field = shift_right(a, at, 64, False) & (shift_left(np.ones_like(length), length, 64) - u64(1))
    if signed:
        top = np.minimum(at + length - u64(1), u64(31))
        sign = shift_right(a, top, 64, False) & u64(1)
        fill = ~(
            shift_left(
                np.ones_like(length), np.minimum(length, u64(32) - np.minimum(at, u64(32))), 64
            )
            - u64(1)
        )
        field = np.where((sign == 1) & (length > 0), field | fill, field)
    return field.astype(u32)


def bfi(a, b, at, length):
    mask = shift_left(u64(1), np.asarray(length) & 255, 64) - u64(1)
    mask = shift_left(np.asarray(mask, u64), np.asarray(at) & 255, 64)
    return (
        (np.asarray(b).astype(u64) & ~mask)
        | (shift_left(np.asarray(a).astype(u64), np.asarray(at) & 255, 64) & mask)
    ).astype(u32)


def prmt(a, b, selector):
    both = np.asarray(a).astype(u64) | (np.asarray(b).astype(u64) << u64(32))
    result = np.zeros(np.broadcast(a, b, selector).shape, u64)
    for i in range(4):
        pick = (np.asarray(selector).astype(u64) >> u64(4 * i)) & u64(15)
        byte = (both >> ((pick & u64(7)) * u64(8))) & u64(255)
        byte = np.where(pick & u64(8), np.where(byte & u64(128), u64(255), u64(0)), byte)
        result |= byte << u64(8 * i)
    return result.astype(u32)


def lop3(a, b, c, table):
    result = np.zeros(np.broadcast(a, b, c).shape, u32)
    for i in range(8):
        if table >> i & 1:
            result |= (
                (a if i & 4 else ~np.asarray(a))
                & (b if i & 2 else ~np.asarray(b))
                & (c if i & 1 else ~np.asarray(c))
            )
    return result


def funnel(low, high, n, left, clamp):
    n = np.minimum(n, 32).astype(u64) if clamp else np.asarray(n).astype(u64) & u64(31)
    both = np.asarray(low).astype(u64) | (np.asarray(high).astype(u64) << u64(32))
    return ((both << n) >> u64(32) if left else both >> n).astype(u32)


def bits_set(a):
    return np.bitwise_count(np.asarray(a)).astype(u32)


def lowest_bit(a):
    a = np.asarray(a).astype(u32)
    return bits_set((a & (~a + u32(1))) - u32(1))


def leading_zeros(a, bits):
    a = np.asarray(a).astype(u64)
    length = np.zeros(a.shape, u32)
    for step in (32, 16, 8, 4, 2, 1):
        big = a >> u64(step) != 0
        length += np.where(big, u32(step), u32(0))
        a = np.where(big, a >> u64(step), a)
    return (bits - length - (a != 0)).astype(u32)


def shuffle(value, mode, b, c, lanes):
    """Return what each lane gets, and whether its source was within its segment: shfl.sync."""
    lane = lanes & 31
    b, c = np.asarray(b).astype(i64) & 31, np.asarray(c).astype(i64)
    segment = (c >> 8) & 31
    high = (lane & segment) | (c & 31 & ~segment)
    low = lane & segment
    if mode == "idx":
        source = low | (b & ~segment)
        inside = source <= high
    elif mode == "bfly":
        source = lane ^ b
        inside = source <= high
    elif mode == "up":
        source = lane - b
        inside = source >= high  # for .up the clamp is the least lane
    else:
        source = lane + b
        inside = source <= high
    source = np.where(inside, source, lane) + (lanes & ~31)
    return value[source], inside


# Eight bits

LARGEST_FP8 = {"e4m3": 0x7E, "e5m2": 0x7B}  # finite


@functools.cache
def fp8_values(kind: str) -> np.ndarray:
    """Return the values of all 256 codes, in float32."""
    bits = np.arange(256)
    if kind == "e5m2":
        return (bits << 8).astype(np.uint16).view(np.float16).astype(np.float32)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    size[bits & 127 == 127] = np.nan
    return np.where(bits & 128, -size, size).astype(np.float32)


def to_fp8(x, kind: str) -> np.ndarray:
    """Round to codes, ties to even; NaN is 0x7f: cvt.rn.satfinite."""
    x = np.asarray(x, np.float64)
    size = np.abs(np.nan_to_num(x, posinf=1e9, neginf=1e9))
    values = fp8_values(kind)[: LARGEST_FP8[kind] + 1].astype(np.float64)
    below = np.searchsorted(values, size, side="right") - 1
    above = np.minimum(below + 1, LARGEST_FP8[kind])
    over = (size - values[below]) - (values[above] - size)
    code = np.where((over > 0) | ((over == 0) & (below & 1 == 1)), above, below)
    return np.where(np.isnan(x), 0x7F, code | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def unpack_fp8(pair, kind: str) -> np.ndarray:
    """Convert both codes of 16 bits to float16, in 32 bits: cvt.f16x2."""
    codes = np.ascontiguousarray(pair, np.uint16).view(np.uint8)
    return fp8_values(kind)[codes].astype(np.float16).view(np.uint32)


def pack_fp8(high, low, kind: str) -> np.ndarray:
    return to_fp8(high, kind).astype(np.uint16) << np.uint16(8) | to_fp8(low, kind)
