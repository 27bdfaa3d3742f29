"""SelfExtend (https://arxiv.org/abs/2401.01325)."""

from __future__ import annotations

from .._checks import check_real
from .base import FIRST_KEY, SAME, PositionMap, Region, Score
from .rerope import rerope


def self_extend(window: int, factor: int) -> Score:
    """Distances past a window are counted in groups of G = factor tokens.

    i - j where i - j < window, else i // G - j // G + window - window // G.

    window: in tokens, a multiple of factor.
    factor: a whole number >= 1; a float that holds one will do.
    """
    near = rerope(window, 1.0)  # checks the window
    factor = check_real("self_extend", "factor", factor, above=0)
    if not factor.is_integer():
        raise ValueError(f"self_extend: factor must be an integer when grouped, got {factor}")
    group = int(factor)
    if window % group:
        raise ValueError(
            f"self_extend: window must be a multiple of factor {group} when grouped, got {window}"
        )
    if group == 1:
        return near
    far_query = PositionMap(divisor=group, floor=True, offset=window - window // group)
    far = Region(FIRST_KEY, far_query, PositionMap(divisor=group, floor=True))
    return Score("self_extend", (far, Region(1 - window, SAME, SAME)), stored=far.k_map)
