"""Giraffe's power scaling."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_base, check_dim, check_real
from .._names import explains_wrong_calls
from .base import RopeFreqs, trained_inv_freq, with_trained


@explains_wrong_calls
def giraffe_power(
    dim: int,
    *,
    power: float,
    base: float = 10000.0,
    factor: float = 1.0,
    over: RopeFreqs | None = None,
) -> RopeFreqs:
    """Giraffe, power scaling: slow frequencies slowed further by a power.

    theta_i = base ** (-2i / dim) / factor * (1 - 2i / dim) ** power

    dim: rotary dimension of one head, even.
    power: kappa, >= 0; 0 leaves the frequencies alone. The authors report 0.5.
    base: RoPE's base, > 1: rope_theta in configurations.
    factor: linear interpolation applied first, target length / trained length, >= 1.
    over: the frequencies that the model was trained with, (dim/2,); None for RoPE's at `base`.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2308.10882
    """
    return with_trained(over, power_inv_freq("giraffe_power", dim, power, base, factor, over))


def power_inv_freq(
    method: str, dim: int, power: float, base: float, factor: float, over: RopeFreqs | None = None
) -> Tensor:
    """Return the scaled frequencies on behalf of `method`: (dim/2,) float32."""
    dim = check_dim(method, dim)
    power = check_real(method, "power", power, at_least=0)
    base = check_base(method, base)
    factor = check_real(method, "factor", factor, at_least=1)
    pairs = dim // 2
    fade = (1.0 - torch.arange(pairs, device="cpu").float() / pairs) ** power
    return trained_inv_freq(method, dim, base, over) / factor * fade
