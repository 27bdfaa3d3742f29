"""CoPE, clipped RoPE."""

from __future__ import annotations

import math

import torch

from .._checks import check_base, check_dim, check_int
from .._names import explains_wrong_calls
from .base import RopeFreqs, rope_inv_freq


@explains_wrong_calls
def cope(dim: int, *, base: float = 10000.0, clip: int = 20) -> RopeFreqs:
    """CoPE: the slowest frequencies faded out by a half cosine.

    With n = min(clip, dim/2), the last n pairs, k = 0 .. n - 1:
    theta_i = base ** (-2i / dim) * (1 + cos(pi * k / (n - 1))) / 2

    The first of the n keeps its frequency, the last one does not rotate. The authors fade the table
    of the model's own scaling; this function fades plain RoPE's.

    dim: rotary dimension of one head, even.
    base: RoPE's base, > 1: rope_theta in configurations.
    clip: pairs to fade, >= 0; the authors take 20 of the 64 of a head of 128.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2602.05258
    """
    dim = check_dim("cope", dim)
    base = check_base("cope", base)
    faded = min(check_int("cope", "clip", clip, at_least=0), dim // 2)
    angles = torch.linspace(0.0, math.pi, faded, dtype=torch.float32, device="cpu")
    inv_freq = rope_inv_freq(dim, base)
    inv_freq[dim // 2 - faded :] *= 0.5 * (1.0 + angles.cos())
    return RopeFreqs(inv_freq)
