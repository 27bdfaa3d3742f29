"""Llama 3.1's frequency scaling."""

from __future__ import annotations

import math

import torch

from .._checks import check_base, check_dim, check_factor, check_falling, check_length
from .._names import explains_wrong_calls
from .base import RopeFreqs, trained_inv_freq, with_trained


@explains_wrong_calls
def llama3(
    dim: int,
    *,
    factor: float,
    original_max_position_embeddings: int,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    base: float = 500000.0,
    over: RopeFreqs | None = None,
) -> RopeFreqs:
    """Llama 3.1: slow frequencies interpolated, fast ones kept, blended between.

    With rotations_i = L * theta_i / (2 pi), those of pair i inside the trained length L:
    theta_i if rotations_i > high;  theta_i / factor if rotations_i < low;  between them
    (1 - t) * theta_i / factor + t * theta_i,  t = (rotations_i - low) / (high - low)

    dim: rotary dimension of one head, even.
    factor: divisor of the slow frequencies, > 0.
    original_max_position_embeddings: L, the trained length in tokens.
    low_freq_factor, high_freq_factor: low and high, in rotations, 0 < low <= high; a step
        where they are equal.
    base: RoPE's base, > 1: rope_theta in configurations.
    over: the frequencies theta_i that the model was trained with, (dim/2,); L is then the length of
        that training. None for RoPE's at `base`.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2407.21783
    """
    dim = check_dim("llama3", dim)
    factor = check_factor("llama3", factor)
    length = check_length(
        "llama3", "original_max_position_embeddings", original_max_position_embeddings
    )
    low, high = low_freq_factor, high_freq_factor
    check_falling("llama3", "high_freq_factor", high, "low_freq_factor", low)
    inv_freq = trained_inv_freq("llama3", dim, check_base("llama3", base), over)

    wavelength = 2 * math.pi / inv_freq
    t = (length / wavelength - low) / (high - low or 1.0)  # of no pair where they are equal
    blended = (1 - t) * inv_freq / factor + t * inv_freq
    slowed = torch.where(wavelength > length / low, inv_freq / factor, blended)
    return with_trained(over, torch.where(wavelength < length / high, inv_freq, slowed))
