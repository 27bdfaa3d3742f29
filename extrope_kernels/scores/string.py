"""STRING: well-trained distances replace the largest."""

from __future__ import annotations

from .._checks import check_int
from .._names import explains_wrong_calls
from .base import FIRST_KEY, SAME, PositionMap, Region, Score, made_once


@explains_wrong_calls
@made_once
def string(shift: int, window: int) -> Score:
    """Shifted positions, STRING: distances from `shift` on restart at `window`.

    With x = i - j: x where x < shift, else x - shift + window. In the authors' prefill a query sees
    the key at x = shift twice, once in either part; in their decoding, and here, once.

    shift: S, in tokens, >= 1; about a third of the training length.
    window: W, in tokens, >= 0 and at most shift; the authors take 128.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.

    Paper: https://arxiv.org/abs/2410.18745
    """
    shift = check_int("string", "shift", shift, at_least=1)
    window = check_int("string", "window", window, at_least=0)
    if window > shift:
        raise ValueError(f"string: window must be at most shift {shift}, got {window}")
    far = Region(FIRST_KEY, PositionMap(offset=window - shift), SAME)
    near = Region(1 - shift, SAME, SAME)
    return Score("string", (far, near), stored=SAME, given={"shift": shift, "window": window})
