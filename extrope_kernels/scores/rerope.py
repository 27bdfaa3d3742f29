"""ReRoPE, Leaky ReRoPE and InvLeaky ReRoPE."""

from __future__ import annotations

import math
from numbers import Real

from .._checks import as_float, check_int
from .._names import explains_wrong_calls
from .base import FIRST_KEY, SAME, UNROTATED, PositionMap, Region, Score, constant, made_once


@explains_wrong_calls
@made_once
def rerope(window: int) -> Score:
    """ReRoPE: distances past a window do not grow.

    With x = i - j: x where x < window, else window.

    window: in tokens, >= 1. Half of the training length is a good start.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.

    Source: https://kexue.fm/archives/9708
    """
    return _rerope("rerope", window, math.inf)


@explains_wrong_calls
@made_once
def leaky_rerope(window: int, factor: float) -> Score:
    """Leaky ReRoPE: distances past a window grow a factor slower.

    With x = i - j: x where x < window, else window + (x - window) / factor. Below 1 it is InvLeaky
    (https://kexue.fm/archives/9728): models train with it and then run as plain RoPE.

    window: in tokens, >= 1.
    factor: > 0; 16 in the author's code; 1 is plain RoPE, inf ReRoPE.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.

    Source: https://kexue.fm/archives/9708
    """
    return _rerope("leaky_rerope", window, factor)


def check_factor(score: str, factor: float) -> float:
    """Return the factor as a float; raise ValueError unless it is > 0, infinity included."""
    if isinstance(factor, bool) or not isinstance(factor, Real):
        raise TypeError(f"{score}: factor must be a number, got {type(factor).__name__}")
    if not factor > 0:
        raise ValueError(f"{score}: factor must be > 0 (inf for ReRoPE), got {factor}")
    return as_float(score, "factor", factor)


def _rerope(name: str, window: int, factor: float) -> Score:
    window = check_int(name, "window", window, at_least=1)
    factor = check_factor(name, factor)
    given = {"window": window} if factor == math.inf else {"window": window, "factor": factor}
    if factor == 1:
        return Score(name, (Region(FIRST_KEY, SAME, SAME),), stored=SAME, given=given)
    if factor == math.inf:  # torch.compile does not trace math.isinf
        far_query, far_key = constant(window), UNROTATED
    else:
        far_query = PositionMap(divisor=factor, offset=window - window / factor)
        far_key = PositionMap(divisor=factor)
    regions = (Region(FIRST_KEY, far_query, far_key), Region(1 - window, SAME, SAME))
    return Score(name, regions, stored=far_key, given=given)
