"""p-RoPE ("proportional"): only the fastest share of the pairs rotates."""

from __future__ import annotations

import torch

from .._checks import check_base, check_dim, check_factor, check_real
from .._names import explains_wrong_calls
from .base import RopeFreqs, exponents


@explains_wrong_calls
def proportional(
    dim: int, *, partial_rotary_factor: float, base: float = 10000.0, factor: float = 1.0
) -> RopeFreqs:
    """p-RoPE: all but the fastest share of the frequencies set to zero.

    theta_i = base ** (-2i / dim) / factor for i < int(p * dim / 2), and 0 for the others

    The exponent and the pairing are those of the full dimension. Partial rotary is something else:
    `rope(int(p * head_dim))` rotates only the first dims of a head.

    dim: rotary dimension of one head, even; the whole head for this method.
    partial_rotary_factor: p, the share of the pairs that rotate, from 0 to 1.
    base: RoPE's base, > 1: rope_theta in configurations.
    factor: linear interpolation, target length / trained length, > 0.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2410.06205
    """
    dim = check_dim("proportional", dim)
    share = check_real(
        "proportional", "partial_rotary_factor", partial_rotary_factor, at_least=0, at_most=1
    )
    base = check_base("proportional", base)
    factor = check_factor("proportional", factor)
    rotating = int(share * dim // 2)
    inv_freq = torch.zeros(dim // 2, dtype=torch.float32, device="cpu")
    inv_freq[:rotating] = 1.0 / base ** exponents(dim)[:rotating]
    return RopeFreqs(inv_freq / factor)
