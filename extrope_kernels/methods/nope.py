"""NoPE: no rotation at all."""

from __future__ import annotations

import torch

from .._checks import check_dim
from .._names import explains_wrong_calls
from .base import RopeFreqs


@explains_wrong_calls
def nope(dim: int) -> RopeFreqs:
    """NoPE: frequencies of zero, for models that were retrained without positions.

    theta_i = 0

    DroPE drops the rotation of a trained model and briefly recalibrates its weights. A model that
    was trained with RoPE writes nonsense without such weights.

    dim: rotary dimension of one head, even.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2512.12167
    """
    pairs = check_dim("nope", dim) // 2
    return RopeFreqs(torch.zeros(pairs, dtype=torch.float32, device="cpu"))
