"""NTK-mixed: a factor that grows with the pair index."""

from __future__ import annotations

import math

import torch

from .._checks import check_base, check_dim, check_factor, check_real
from .._names import explains_wrong_calls
from .base import RopeFreqs, exponents, scaled_over, with_trained


@explains_wrong_calls
def ntk_mixed(
    dim: int,
    *,
    factor: float,
    base: float = 10000.0,
    exponent: float = 0.625,
    over: RopeFreqs | None = None,
) -> RopeFreqs:
    """NTK-mixed: the factor spread over the pairs, as slow-downs that multiply to it.

    a = ln(k) / (dim/2) ** exponent,
    theta_i = base ** (-2i / dim) * exp(-a * (i + 1) ** exponent)

    exponent 0 is PI and exponent 1 is "NTK-fixed". The authors' Llama-2 patch uses factor 12 and
    exponent 0.75, and scales q by the logarithm of its position too; that scale is not applied.

    dim: rotary dimension of one head, even.
    factor: k, the divisor of the slowest frequency, > 0.
    base: RoPE's base, > 1: rope_theta in configurations.
    exponent: from 0 (all pairs alike) to 1 (each pair slower than the last by the same ratio).
    over: as in `ntk_aware`.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Source: https://kexue.fm/archives/9706
    """
    dim = check_dim("ntk_mixed", dim)
    factor = check_factor("ntk_mixed", factor)
    base = check_base("ntk_mixed", base)
    exponent = check_real("ntk_mixed", "exponent", exponent, at_least=0, at_most=1)
    rate = math.log(factor) / (dim / 2) ** exponent
    index = torch.arange(1, dim // 2 + 1, device="cpu").float()
    # The authors' spelling is a negative power, which differs from 1 / power in the last bit.
    inv_freq = base ** -exponents(dim) * torch.exp(-rate * index**exponent)
    return with_trained(over, scaled_over("ntk_mixed", inv_freq, dim, base, over))
