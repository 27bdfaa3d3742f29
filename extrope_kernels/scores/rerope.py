"""ReRoPE, Leaky ReRoPE and InvLeaky ReRoPE (https://kexue.fm/archives/9708, /9728)."""

from __future__ import annotations

import math

from .._checks import check_int, check_real
from .base import FIRST_KEY, SAME, UNROTATED, PositionMap, Region, Score, constant


def rerope(window: int, factor: float = math.inf) -> Score:
    """Distances x = i - j past a window grow `factor` times slower, or not at all.

    x where x < window, else window + (x - window) / factor.

    window: in tokens, >= 1. A quarter to a half of the training length is best.
    factor: > 0; inf for ReRoPE, above 1 for Leaky, below 1 for InvLeaky, 1 for plain RoPE.
    """
    window = check_int("rerope", "window", window, at_least=1)
    factor = check_real("rerope", "factor", factor, above=0, finite=False)
    if factor == 1:
        return Score("rerope", (Region(FIRST_KEY, SAME, SAME),), stored=SAME)
    if math.isinf(factor):
        far = Region(FIRST_KEY, constant(window), UNROTATED)
    else:
        far_query = PositionMap(divisor=factor, offset=window - window / factor)
        far = Region(FIRST_KEY, far_query, PositionMap(divisor=factor))
    return Score("rerope", (far, Region(1 - window, SAME, SAME)), stored=far.k_map)


def leaky_rerope(window: int, factor: float) -> Score:
    """`rerope` with a factor: x where x < window, else window + (x - window) / factor."""
    return rerope(window, factor)
