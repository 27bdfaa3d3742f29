"""Other frequencies for distances past a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._checks import check_int, check_of_pairs
from .base import FIRST_KEY, SAME, PairMap, Region, Score


def far_frequencies(window: int, divisors: Sequence[Any] | Tensor) -> Score:
    """Keep distances up to a window, and use another method's frequencies past it, without a jump.

    For pair n with divisor d: i - j where i - j < window, else window + (i - j - window) / d.

    The distance past the window then rotates by theta_n / d. For YaRN far away and RoPE nearby:
    divisors = methods.rope(dim).inv_freq / methods.yarn(dim, ...).inv_freq. With equal divisors
    this is `leaky_rerope`. The other method's attention_factor is not applied: it would change near
    keys as well as far ones.

    window: in tokens.
    divisors: > 0, one per pair, (pairs,), or per head of k and pair, (heads_k, pairs). A tensor may
        require gradients, on every backend.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.

    Source: https://kexue.fm/archives/9708 (the window)
    """
    window = check_int("far_frequencies", "window", window, at_least=1)
    d = check_of_pairs("far_frequencies", "divisors", divisors)
    far = Region(FIRST_KEY, PairMap(d, window - window / d), PairMap(d))
    near = Region(1 - window, SAME, SAME)
    given = {"window": window, "divisors": d}
    return Score("far_frequencies", (far, near), stored=far.k_map, given=given)
