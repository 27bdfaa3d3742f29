"""Position maps: from a token's position to its cosines and sines, in the attention kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....scores import UNROTATED
from ....scores.base import FARTHEST_POSITION, PairRow, PlainMap
from ..._math.triton.exp import exp
from ..._math.triton.sincos import cos_sin, fixed_angle

_LARGEST = 2**31 - 1  # largest int32 position


class MapConstants(NamedTuple):
    """A PositionMap as constants of a kernel, which reads their names through `nth_map`.

    Position p becomes whole * factor + fraction, with the whole number
    whole = min(p % modulus // divisor + offset, cap). Its angle is exact in fixed point.

    per_pair: each pair of dims has a divisor and an offset, in row `row` of pair_maps. Of the
    other fields only modulus and floor then count.
    """

    modulus: int = 0  # 0: none
    constant: bool = False  # p % modulus // divisor is 0 for every position
    divisor: int = 1
    offset: int = 0
    has_cap: bool = False
    cap: int = 0
    factor: float = 1.0
    fraction: float = 0.0
    per_pair: bool = False
    row: int = 0
    floor: bool = False  # round quotients of pairs down


def map_of(position_map: PlainMap) -> tuple:
    """Return a MapConstants as a plain tuple: Triton 3.6 takes no named one within a tuple."""
    modulus = position_map.modulus if position_map.modulus <= _LARGEST else 0
    if isinstance(position_map, PairRow):
        row, floor = position_map.row, bool(position_map.floor)
        return tuple(MapConstants(modulus, per_pair=True, row=row, floor=floor))
    divisor, floor, offset = position_map.divisor, position_map.floor, position_map.offset
    has_cap = position_map.cap < FARTHEST_POSITION  # past it: no cap
    others: dict[str, Any] = {"has_cap": has_cap, "cap": int(position_map.cap) if has_cap else 0}
    # Whole numbers make angles exact. Only half a token, or a divisor without floor, needs a
    # fraction or a factor.
    if float(offset).is_integer():
        others["offset"] = int(offset)
    else:
        others["fraction"] = float(offset)
    if math.isinf(divisor) or (floor and divisor > _LARGEST):
        return tuple(MapConstants(constant=True, **others))
    if floor or divisor == 1:
        return tuple(MapConstants(modulus, divisor=int(divisor), **others))
    others |= {"offset": 0, "fraction": float(offset)}
    return tuple(MapConstants(modulus, factor=1 / divisor, **others))


def stored_map(by: PlainMap) -> MapConstants | None:
    """Return the map by which rows already come rotated, or None: they are raw."""
    return None if by == UNROTATED else MapConstants(*map_of(by))


@triton.constexpr_function
def named_map(by):
    """Return a plain tuple from `map_of` with names, or None."""
    return None if by is None else MapConstants(*by)


@triton.constexpr_function
def nth_map(maps, n):
    """Return the n-th of plain tuples from `map_of`, with names."""
    return MapConstants(*maps[n])


@triton.jit
def _whole_number(position, MAP: tl.constexpr):
    """Return the map's whole number, int64: (tokens, 1), or (1, 1) if all tokens share one."""
    if MAP.constant:
        whole = tl.zeros((1, 1), tl.int64)
    else:
        whole = position[:, None]
        # In 64 bits, a GPU calls a function for every division.
        if MAP.modulus > 0:
            whole = whole % MAP.modulus
        if MAP.divisor > 1:
            whole = whole // MAP.divisor
        whole = whole.to(tl.int64)
    if MAP.offset != 0:
        whole += MAP.offset
    if MAP.has_cap:
        whole = tl.minimum(whole, MAP.cap)
    return whole


@triton.jit
def _mapped(position, MAP: tl.constexpr):
    """Return the mapped position, float64: (tokens, 1) or (1, 1)."""
    return _whole_number(position, MAP).to(tl.float64) * MAP.factor + MAP.fraction


@triton.jit
def _angle(position, freq, pair_maps, pair, MAP: tl.constexpr, HALF: tl.constexpr):
    """Return angles, int64 that count 2**-64 circles: (tokens, pairs) or (1, pairs)."""
    if MAP.per_pair:
        LARGEST: tl.constexpr = 2147483520.0  # the largest float32 within int32
        divisor_ptr = pair_maps + MAP.row * 2 * HALF + pair  # of (rows, 2: divisors, offsets, HALF)
        divisor = tl.load(divisor_ptr, mask=pair < HALF, other=1.0)[None, :]
        offset = tl.load(divisor_ptr + HALF, mask=pair < HALF, other=0.0)[None, :]
        whole = position[:, None]
        if MAP.modulus > 0:
            whole = whole % MAP.modulus
        if MAP.floor:
            whole = whole // tl.minimum(divisor, LARGEST).to(tl.int32)
            angle = whole.to(tl.int64) * fixed_angle(freq, 1.0)
        else:
            angle = whole.to(tl.int64) * fixed_angle(freq, 1.0 / divisor)
        angle += fixed_angle(freq, offset)
    else:
        angle = _whole_number(position, MAP) * fixed_angle(freq, MAP.factor)
        if MAP.fraction != 0.0:
            angle += fixed_angle(freq, MAP.fraction)
    return angle


@triton.jit
def not_finite(freq):
    """Return NaN for frequencies that are no numbers, else 0: angles in fixed point have no NaN.

    Added to a row, or to its cosines, it reaches every logit of the row.
    """
    return (freq * 0.0).to(tl.float32)


@triton.jit
def cos_sin_of_map(
    position, freq, decay, pair_maps, pair, MAP: tl.constexpr, FROM: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Return cosine and sine, float32, that rotate tokens to the positions of MAP.

    FROM: the map by which tokens already come rotated, or None. position: (tokens,) int32. freq:
    (1 or tokens, pairs). decay: None, or the logarithm of the amplitude per position, (1, pairs)
    float64. pair: numbers of the pairs, (pairs,), of which HALF rotate.

    The results have as many rows as the maps need.
    """
    angle = _angle(position, freq, pair_maps, pair, MAP, HALF)
    if FROM is not None:
        angle -= _angle(position, freq, pair_maps, pair, FROM, HALF)
    cos, sin = cos_sin(angle)
    if decay is not None:
        moved = _mapped(position, MAP)
        if FROM is not None:
            moved -= _mapped(position, FROM)
        amplitude = exp(moved * decay).to(tl.float32)
        cos *= amplitude
        sin *= amplitude
    return cos, sin
