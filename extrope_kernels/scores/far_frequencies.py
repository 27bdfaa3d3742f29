"""Frequencies of their own for distances past a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._checks import check_int, check_of_pairs
from .base import FIRST_KEY, SAME, PairMap, Region, Score


def far_frequencies(window: int, divisors: Sequence[Any] | Tensor) -> Score:
    """Exact up to a window, and past it by another method's frequencies, without a jump.

    For pair n with divisor d: i - j where i - j < window, else window + (i - j - window) / d.

    The distance past the window then rotates by theta_n / d. For YaRN far away and RoPE nearby:
    divisors = methods.rope(dim).inv_freq / methods.yarn(dim, ...).inv_freq. With equal divisors
    this is `leaky_rerope`. The other method's attention_factor is not applied: it has no part of
    the near keys that could be told from the far ones'.

    window: in tokens.
    divisors: > 0, one a pair, (pairs,), or a pair and head of k, (heads_k, pairs). As a tensor it
        may require gradients, on every backend.

    Source: https://kexue.fm/archives/9708 (the window)
    """
    window = check_int("far_frequencies", "window", window, at_least=1)
    d = check_of_pairs("far_frequencies", "divisors", divisors)
    far = Region(FIRST_KEY, PairMap(d, window - window / d), PairMap(d))
    return Score("far_frequencies", (far, Region(1 - window, SAME, SAME)), stored=far.k_map)
