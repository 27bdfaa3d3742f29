"""NTK-aware scaling."""

from __future__ import annotations

from .._checks import check_base, check_dim, check_factor
from .._names import explains_wrong_calls
from .base import RopeFreqs, rope_inv_freq, scaled_over, with_trained


@explains_wrong_calls
def ntk_aware(
    dim: int, *, factor: float, base: float = 10000.0, over: RopeFreqs | None = None
) -> RopeFreqs:
    """NTK-aware: a base that divides the slowest frequency by exactly the factor.

    base' = base * factor ** (dim / (dim - 2)),  theta_i = base' ** (-2i / dim)

    In the digit picture, where beta = base ** (2 / dim), this is beta' = beta * factor ** (2 /
    (dim - 2)). The fastest pair is unchanged, and the context reached is less than `factor` times
    the trained one. The "old" form base' = base * factor is `rope` at that base.

    dim: rotary dimension of one head, even, at least 4.
    factor: alpha, the divisor of the slowest frequency, > 0.
    base: RoPE's base, > 1: rope_theta in configurations.
    over: the frequencies that the model was trained with, (dim/2,), each divided by what divides
        RoPE's of the same pair; None for RoPE's at `base`.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Source: https://www.reddit.com/r/LocalLLaMA/comments/14lz7j5/ ; the YaRN paper's section 3.1,
    https://arxiv.org/abs/2309.00071
    """
    dim = check_dim("ntk_aware", dim, minimum=4)
    factor = check_factor("ntk_aware", factor)
    base = check_base("ntk_aware", base)
    scaled = rope_inv_freq(dim, ntk_base(dim, base, factor))
    return with_trained(over, scaled_over("ntk_aware", scaled, dim, base, over))


def ntk_base(dim: int, base: float, factor: float) -> float:
    """Return the base at which the slowest pair rotates `factor` times slower than at `base`."""
    return base * factor ** (dim / (dim - 2))
