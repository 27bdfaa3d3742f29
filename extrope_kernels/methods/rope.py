"""Plain RoPE."""

from __future__ import annotations

from .._checks import check_base, check_dim
from .._names import explains_wrong_calls
from .base import RopeFreqs, rope_inv_freq


@explains_wrong_calls
def rope(dim: int, *, base: float = 10000.0) -> RopeFreqs:
    """Plain RoPE: frequencies fall from 1 by powers of the base.

    theta_i = base ** (-2i / dim), i = 0 .. dim/2 - 1

    dim: rotary dimension of one head, even.
    base: number whose powers are the wavelengths (in units of 2 pi positions), > 1:
        rope_theta in configurations.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2104.09864
    """
    dim = check_dim("rope", dim)
    base = check_base("rope", base)
    return RopeFreqs(rope_inv_freq(dim, base))
