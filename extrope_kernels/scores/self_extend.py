"""SelfExtend."""

from __future__ import annotations

from .._checks import check_int
from .._names import explains_wrong_calls
from .base import FIRST_KEY, SAME, PositionMap, Region, Score, made_once
from .rerope import check_factor


@explains_wrong_calls
@made_once
def self_extend(window: int, factor: float) -> Score:
    """SelfExtend: count distances past a window in groups of tokens.

    With G = factor: i - j where i - j < window, else i // G - j // G + window - window // G.

    window: in tokens, a multiple of factor.
    factor: a whole number >= 1, as an int or a float.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.

    Paper: https://arxiv.org/abs/2401.01325
    """
    window = check_int("self_extend", "window", window, at_least=1)
    factor = check_factor("self_extend", factor)
    if not factor.is_integer():
        raise ValueError(f"self_extend: factor must be a whole number, got {factor}")
    group = int(factor)
    if window % group:
        raise ValueError(f"self_extend: window must be a multiple of factor {group}, got {window}")
    given = {"window": window, "factor": group}
    if group == 1:
        return Score("self_extend", (Region(FIRST_KEY, SAME, SAME),), stored=SAME, given=given)
    far_query = PositionMap(divisor=group, floor=True, offset=window - window // group)
    far_key = PositionMap(divisor=group, floor=True)
    regions = (Region(FIRST_KEY, far_query, far_key), Region(1 - window, SAME, SAME))
    return Score("self_extend", regions, stored=far_key, given=given)
