"""Device functions for caches in float8_e4m3fn, which kernels read as int8: the bits of numbers.

A number has a sign, 4 bits of exponent with bias 7, and 3 of mantissa. There is no infinity; NaN
has all bits except the sign set. float16, bfloat16 and float32 can represent all of these numbers.
"""

import triton
import triton.language as tl

CHIPS_WITH_FP8 = 89


def kind_of_cache(chip: int | str | None) -> int:
    """Choose how kernels read a cache in fp8; chip: from `chip_of`.

    1: by integers, on any chip; 2: two numbers at a time, on NVIDIA's chips; 3: by the chip's own
    instruction.
    """
    if not isinstance(chip, int):
        return 1
    return 3 if chip >= CHIPS_WITH_FP8 else 2


@triton.constexpr_function
def _asm_that_moves(by, mask):
    """Return assembly that moves four codes to the fields of 16-bit numbers in two registers."""
    lines = []
    for out, bytes_and_signs in (("$0", "0x9180"), ("$1", "0xb3a2")):
        lines.append(f"prmt.b32 {out}, $2, 0, {bytes_and_signs};")
        lines.append(f"shl.b32 {out}, {out}, {by};")
        lines.append(f"and.b32 {out}, {out}, {mask};")
    return "\n".join(lines)


@triton.jit
def _four(bits, ASM: tl.constexpr):
    """Convert four codes by ASM to the bits of four 16-bit numbers."""
    # Not declared pure: Triton would move it after the copy into shared memory, which is then read
    # byte by byte.
    return tl.inline_asm_elementwise(ASM, "=&r,=r,r", [bits], dtype=tl.int16, is_pure=False, pack=4)


@triton.jit
def _unbiased(moved, like: tl.constexpr):
    """Correct the exponent's bias from e4m3's to `like`'s; NaN becomes a number."""
    power: tl.constexpr = 2.0**8 if like == tl.float16 else 2.0**120
    return moved.to(like, bitcast=True) * power


@triton.jit
def _by_integers(bits, like: tl.constexpr):
    if like == tl.float16:
        moved = (bits.to(tl.int16) << 7) & -0x4080
    elif like == tl.bfloat16:
        moved = (bits.to(tl.int16) << 4) & -0x7810
    else:
        moved = (bits.to(tl.int32) << 20) & -0x78100000
    return tl.where((bits | -0x80) == -1, float("nan"), _unbiased(moved, like)).to(like)


@triton.jit
def _by_pairs(bits, like: tl.constexpr):
    # Times 141 in float16, or 7.3e35 in bfloat16, the largest number is finite and NaN is not.
    if like == tl.bfloat16:
        x = _unbiased(_four(bits, _asm_that_moves(4, "0x87f087f0")), tl.bfloat16)
        zero_or_nan = x * 7.3e35 * 0.0
    else:
        x = _unbiased(_four(bits, _asm_that_moves(7, "0xbf80bf80")), tl.float16)
        zero_or_nan = x * 141.0 * 0.0
    return (x + zero_or_nan).to(like)


@triton.jit
def _by_chip(bits, like: tl.constexpr):
    ASM: tl.constexpr = """{
        .reg .b16 low, high;
        mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
    }"""
    x = _four(bits, ASM).to(tl.float16, bitcast=True)
    if like == tl.bfloat16:  # conversions between 16-bit types are slow
        x = x.to(tl.float32)
    return x.to(like)


@triton.jit
def widened_codes(bits, like: tl.constexpr, KIND: tl.constexpr):
    """Convert codes to the type `like`: float16, bfloat16 or float32.

    KIND: from `kind_of_cache`.
    """
    if KIND == 3:
        x = _by_chip(bits, like)
    elif KIND == 2:
        x = _by_pairs(bits, like)
    else:
        x = _by_integers(bits, like)
    return x


@triton.jit
def codes_of(x, scale):
    """Divide float32 numbers by their scale, clamp at 448, round to nearest even; return codes."""
    LARGEST: tl.constexpr = 448.0
    LEAST_NORMAL: tl.constexpr = 2.0**-6
    ROUNDER: tl.constexpr = 2.0**14  # its last place is the step of subnormal numbers
    x = tl.div_rn(x, scale)
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), LARGEST)
    of = size.to(tl.int32, bitcast=True)
    normal = ((of + 0x7FFFF + ((of >> 20) & 1)) >> 20) - (120 << 3)
    few = (size + ROUNDER).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < LEAST_NORMAL, few, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def parts_of_codes(parts, scale, LIKE: tl.constexpr, TILE: tl.constexpr):
    """Return codes of parts from load_parts, rounded to LIKE first, like a cache of that type."""
    first = codes_of(parts[0].to(LIKE).to(tl.float32), scale)
    second = codes_of(parts[1].to(LIKE).to(tl.float32), scale)
    rest = first
    if TILE.rest > 0:
        rest = codes_of(parts[2].to(LIKE).to(tl.float32), scale)
    return first, second, rest


@triton.jit
def quantize_rows(rows, to, scale, valid, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr):
    """Copy rows as copy_rows does, into a cache in fp8."""
    dim = tl.arange(0, DIMS)[None, :]
    mask = valid[:, None] & (dim < HEAD_DIM)
    x = tl.load(rows[:, None] + dim, mask=mask, other=0.0).to(tl.float32)
    tl.store(to[:, None] + dim, codes_of(x, scale), mask=mask)
