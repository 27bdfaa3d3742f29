"""XPOS: rotation with an amplitude that decays with the distance."""

from __future__ import annotations

import math

import torch

from .._checks import check_base, check_dim, check_real
from .._names import explains_wrong_calls
from .base import RopeFreqs, rope_inv_freq


@explains_wrong_calls
def xpos(
    dim: int,
    *,
    base: float = 10000.0,
    scale_base: float = 512,
    gamma: float = 0.4,
    decay_origin: float = 0.0,
) -> RopeFreqs:
    """XPOS: plain RoPE with an amplitude that decays with distance.

    zeta_i = (2i / dim + gamma) / (1 + gamma),  log_decay_i = ln(zeta_i) / scale_base

    A logit's pair i is multiplied by zeta_i ** ((m - n) / scale_base) for query m and key n: fast
    pairs decay most. Not applied: the blockwise causal mask that the authors use at inference.

    The amplitude of one key is zeta_i ** ((decay_origin - n) / scale_base). With the defaults it
    overflows float16 4,532 positions from the origin, float32 and bfloat16 36,260. The authors put
    the origin into the middle of the sequence; q and k must share it. For longer sequences
    `scores.blockwise_causal` restarts positions in every block.

    dim: rotary dimension of one head, even.
    base: RoPE's base, > 1: rope_theta in configurations.
    scale_base: positions over which a pair decays by zeta, > 0.
    gamma: softens the decay, > 0; the larger, the closer every zeta is to 1.
    decay_origin: the position at which the amplitude is 1.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2212.10554
    """
    dim = check_dim("xpos", dim)
    base = check_base("xpos", base)
    scale_base = check_real("xpos", "scale_base", scale_base, above=0)
    gamma = check_real("xpos", "gamma", gamma, above=0)
    zeta = (torch.arange(0, dim, 2, device="cpu").float() + gamma * dim) / ((1 + gamma) * dim)
    log_decay = (zeta.double().log() / scale_base).float()
    return RopeFreqs(
        rope_inv_freq(dim, base),
        log_decay=log_decay,
        decay_origin=check_real("xpos", "decay_origin", decay_origin),
        steepest_decay=math.log((1 + gamma) / gamma) / scale_base,
    )
