"""Position maps on a GPU: from a token's position to the cosines and sines it is rotated by.

What a map does is known to the compiler, its numbers are not: another window compiles nothing.
"""

import functools
import math
from collections.abc import Sequence

import triton
import triton.language as tl

from ....scores import UNROTATED, PositionMap
from .angles import cos_sin, fixed_angle
from .exp import exp

_LARGEST = 2**31 - 1  # of the int32 positions
_NUMBERS = ("modulus", "factor", "offset", "cap")


# Parts of a map, as bits of its kind: Triton 3.6 takes no named tuples within a tuple.
CONSTANT = tl.constexpr(1)  # every position becomes the offset
MODULUS = tl.constexpr(2)
FLOOR = tl.constexpr(4)  # divided, and floored
SLOW = tl.constexpr(8)  # divided, and not
WHOLE = tl.constexpr(16)  # an offset that is a whole number
FRACTION = tl.constexpr(32)  # another offset
CAP = tl.constexpr(64)


@functools.lru_cache(maxsize=256)
def kind_of(position_map: PositionMap) -> int:
    """Which parts the map has."""
    modulus, divisor, floor, offset, cap = position_map
    if floor and not (math.isinf(divisor) or float(divisor).is_integer()):
        raise ValueError(f"triton: a position map with floor needs a whole divisor, got {divisor}")
    constant = math.isinf(divisor) or (floor and divisor > _LARGEST)
    integral = float(offset).is_integer()
    slow = not (constant or floor) and (divisor != 1 or not integral)
    parts = {
        CONSTANT: constant,
        MODULUS: 0 < modulus <= _LARGEST and not constant,
        FLOOR: floor and not constant and divisor != 1,
        SLOW: slow,
        WHOLE: offset != 0 and integral and not slow,
        FRACTION: offset != 0 and (slow or not integral),
        CAP: cap < math.inf,
    }
    return sum(part.value for part, present in parts.items() if present)


@functools.lru_cache(maxsize=256)
def numbers_of(position_map: PositionMap) -> tuple[float, float, float, float]:
    """Modulus, factor, offset and cap, as kernels take them."""
    modulus, divisor, floor, offset, cap = position_map
    factor = divisor if floor and divisor <= _LARGEST else 1 / divisor
    offset, cap = (max(-(2.0**53), min(n, 2.0**53)) for n in (offset, cap))
    return float(min(modulus, _LARGEST)), float(factor), offset, cap


def map_arguments(label: str, position_map: PositionMap) -> dict[str, float]:
    """The numbers of a map, by parameters of kernels."""
    numbers = zip(_NUMBERS, numbers_of(position_map), strict=True)
    return {f"{label}_{name}": number for name, number in numbers}


def side_arguments(side: str, maps: Sequence[PositionMap]) -> dict[str, float]:
    """Of up to three maps of a side, "q" or "k"; kernels do not look at those that are missing."""
    numbers: dict[str, float] = {}
    for n, position_map in enumerate((*maps, UNROTATED, UNROTATED, UNROTATED)[:3]):
        numbers |= map_arguments(f"{side}{n}", position_map)
    return numbers


@triton.jit
def _whole(number, TYPE: tl.constexpr):
    # The interpreter's scalars are Python's, and cast to float32 on their way.
    return tl.full((1, 1), number, tl.float64).to(TYPE)


@triton.jit
def _index(position, numbers, MAP: tl.constexpr):
    """What of the map is whole, int64: (tokens, 1), or (1, 1) where all tokens have the same."""
    modulus, factor, offset, cap = numbers
    if CONSTANT & MAP:
        index = tl.zeros((1, 1), tl.int64)
    else:
        index = position[:, None]
        # In 64 bits, a GPU calls a function for every division.
        if MODULUS & MAP:
            index = index % _whole(modulus, tl.int32)
        if FLOOR & MAP:
            index = index // _whole(factor, tl.int32)
        index = index.to(tl.int64)
    if WHOLE & MAP:
        index += _whole(offset, tl.int64)
    if CAP & MAP:
        index = tl.minimum(index, _whole(cap, tl.int64))
    return index


@triton.jit
def _angle(position, freq, numbers, MAP: tl.constexpr):
    """(tokens, pairs) int64, or (1, pairs)."""
    frequency = fixed_angle(freq, 1.0)
    if SLOW & MAP:
        frequency = fixed_angle(freq, numbers[1])
    angle = _index(position, numbers, MAP) * frequency
    if FRACTION & MAP:
        angle += fixed_angle(freq, numbers[2])
    return angle


@triton.jit
def _mapped(position, numbers, MAP: tl.constexpr):
    """The position itself, float64: (tokens, 1) or (1, 1)."""
    mapped = _index(position, numbers, MAP).to(tl.float64)
    if SLOW & MAP:
        mapped *= numbers[1]
    if FRACTION & MAP:
        mapped += numbers[2]
    return mapped


@triton.jit
def map_cos_sin(
    position, freq, decay, numbers, origin, MAP: tl.constexpr, ORIGIN: tl.constexpr
):  # fmt: skip
    """Cosine and sine, float32, that take tokens from where `origin` puts them to where a map does.

    position: (tokens,) int32; freq: (1 or tokens, pairs); decay: None, or (1, pairs) float64, the
    logarithm of the amplitude a position. The results have as many rows as the maps need.
    """
    angle = _angle(position, freq, numbers, MAP) - _angle(position, freq, origin, ORIGIN)
    cos, sin = cos_sin(angle)
    if decay is not None:
        moved = _mapped(position, numbers, MAP) - _mapped(position, origin, ORIGIN)
        amplitude = exp(moved * decay).to(tl.float32)
        cos *= amplitude
        sin *= amplitude
    return cos, sin


@triton.jit
def log_n_scale(position, per_log_n):
    """(tokens, 1) float32: max(1, ln(position + 1) / ln(log_n)), by the inverse of the latter."""
    scale = tl.full((position.shape[0], 1), 1.0, tl.float32)
    if per_log_n is not None:
        log = tl.log((tl.maximum(position, 0) + 1).to(tl.float32))
        scale = tl.maximum(log * per_log_n, 1.0)[:, None]
    return scale
