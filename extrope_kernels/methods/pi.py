"""PI, position interpolation."""

from __future__ import annotations

from .._checks import check_base, check_dim, check_factor
from .._names import explains_wrong_calls
from .base import RopeFreqs, trained_inv_freq, with_trained


@explains_wrong_calls
def pi(
    dim: int, *, factor: float, base: float = 10000.0, over: RopeFreqs | None = None
) -> RopeFreqs:
    """Position interpolation: every frequency divided by the factor.

    theta_i = base ** (-2i / dim) / factor, i = 0 .. dim/2 - 1

    The frequencies are divided, not the positions. The two give the same angles; in float32
    arithmetic they may differ by a rounding when factor is not a power of two.

    dim: rotary dimension of one head, even.
    factor: target length / trained length, > 0. The current length over the trained one makes the
        method dynamic ("dynamic linear").
    base: RoPE's base, > 1: rope_theta in configurations.
    over: the frequencies that the model was trained with, (dim/2,); None for RoPE's at `base`.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2306.15595
    """
    dim = check_dim("pi", dim)
    factor = check_factor("pi", factor)
    base = check_base("pi", base)
    return with_trained(over, trained_inv_freq("pi", dim, base, over) / factor)
