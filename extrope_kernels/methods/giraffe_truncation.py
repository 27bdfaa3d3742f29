"""Giraffe's basis truncation."""

from __future__ import annotations

import math

import torch

from .._checks import check_length
from .._names import explains_wrong_calls
from .base import RopeFreqs
from .giraffe_power import power_inv_freq


@explains_wrong_calls
def giraffe_truncation(
    dim: int,
    *,
    truncate_pos: int,
    base: float = 10000.0,
    factor: float = 1.0,
    power: float = 0.0,
) -> RopeFreqs:
    """Giraffe, truncation: frequencies too slow for the trained length cut to zero.

    With b = 2 pi / truncate_pos:  theta_i if theta_i >= b;  b / 16 if b / 8 <= theta_i < b;
    0 (no rotation) if theta_i < b / 8

    The middle band is set below its own lower edge, as in the authors' code.

    dim: rotary dimension of one head, even.
    truncate_pos: T, a context length in tokens.
    base: RoPE's base, > 1: rope_theta in configurations.
    factor, power: scaling applied first, as in `giraffe_power`.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2308.10882
    """
    truncate_pos = check_length("giraffe_truncation", "truncate_pos", truncate_pos)
    inv_freq = power_inv_freq("giraffe_truncation", dim, power, base, factor)
    cutoff = 2 * math.pi / truncate_pos
    slow = 2 * math.pi / (truncate_pos * 16)
    truncated = torch.where(inv_freq < cutoff, slow, inv_freq)
    return RopeFreqs(torch.where(inv_freq < cutoff / 8, 0.0, truncated))
