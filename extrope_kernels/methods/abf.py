"""ABF, the adjusted base frequency."""

from __future__ import annotations

from .._checks import check_base, check_dim
from .._names import explains_wrong_calls
from .base import RopeFreqs, rope_inv_freq


@explains_wrong_calls
def abf(dim: int, *, base: float = 500000.0) -> RopeFreqs:
    """ABF: plain RoPE at a larger base, 500000 in the paper.

    theta_i = base ** (-2i / dim), i = 0 .. dim/2 - 1

    dim: rotary dimension of one head, even.
    base: the adjusted base, > 1. A larger base slows every pair but the first.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2309.16039
    """
    dim = check_dim("abf", dim)
    base = check_base("abf", base)
    return RopeFreqs(rope_inv_freq(dim, base))
