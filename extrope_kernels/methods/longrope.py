"""LongRoPE: one searched factor per pair, in a short and a long set."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import (
    check_base,
    check_dim,
    check_factor,
    check_length,
    check_pair_factors,
    check_real,
    check_seq_len,
)
from .._names import explains_wrong_calls
from .base import RopeFreqs, base_powers, copy_to


@explains_wrong_calls
def longrope(
    dim: int,
    *,
    short_factor: Sequence[float] | Tensor,
    long_factor: Sequence[float] | Tensor,
    original_max_position_embeddings: int,
    seq_len: int | Tensor,
    factor: float | None = None,
    max_position_embeddings: int | None = None,
    attention_factor: float | None = None,
    base: float = 10000.0,
) -> RopeFreqs:
    """LongRoPE: a searched factor for every pair, in a short and a long set.

    theta_i = 1 / (lambda_i * base ** (2i / dim)),  lambda = short_factor if seq_len <= L else
    long_factor;  A = sqrt(1 + ln(s) / ln(L)) for s > 1, else 1

    One set serves all positions. A is the same for both, so it stays a float when seq_len is a
    tensor. Keys that were cached under the other set do not fit. Not applied: the paper's unchanged
    first positions, and the dynamic blend of Microsoft's code.

    dim: rotary dimension of one head, even.
    short_factor, long_factor: dim/2 positive numbers each, the factor of every pair. A tensor is
        read on the host, and gradients of inv_freq reach it: factors can be trained.
    original_max_position_embeddings: L, the trained length in tokens.
    seq_len: tokens in the sequence, > 0; or an integer tensor of shape () or (batch,), whose values
        are not read on the host. inv_freq is then (dim/2,) or (batch, dim/2) on its device.
    factor: s, target length / trained length, > 0; max_position_embeddings / L if None.
    max_position_embeddings: the target length in tokens, for s.
    attention_factor: A, > 0, used unchanged if given.
    base: RoPE's base, > 1: rope_theta in configurations.

    Raises ValueError for a value outside these, or if A needs factor or max_position_embeddings
    and neither is given; TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2402.13753
    """
    dim = check_dim("longrope", dim)
    short = check_pair_factors("longrope", "short_factor", short_factor, dim // 2)
    long = check_pair_factors("longrope", "long_factor", long_factor, dim // 2)
    trained = check_length(
        "longrope", "original_max_position_embeddings", original_max_position_embeddings
    )
    seq_len = check_seq_len("longrope", seq_len)
    amplitude = _amplitude(trained, factor, max_position_embeddings, attention_factor)
    powers = base_powers(dim, check_base("longrope", base))
    short_inv_freq, long_inv_freq = 1.0 / (short * powers), 1.0 / (long * powers)
    if isinstance(seq_len, Tensor):
        inv_freq = torch.where(
            (seq_len > trained).unsqueeze(-1),
            copy_to(long_inv_freq, seq_len.device),
            copy_to(short_inv_freq, seq_len.device),
        )
        return RopeFreqs(inv_freq, amplitude)
    return RopeFreqs(long_inv_freq if seq_len > trained else short_inv_freq, amplitude)


def _amplitude(
    trained: int, factor: float | None, target: int | None, attention_factor: float | None
) -> float:
    if factor is not None:
        factor = check_factor("longrope", factor)
    if target is not None:
        target = check_length("longrope", "max_position_embeddings", target)
    if attention_factor is not None:
        return check_real("longrope", "attention_factor", attention_factor, above=0)
    if factor is None:
        if target is None:
            raise ValueError(
                "longrope: one of factor, max_position_embeddings and attention_factor must be "
                "given, got None for all"
            )
        factor = target / trained
    if factor <= 1.0:
        return 1.0
    if trained == 1:
        raise ValueError("longrope: original_max_position_embeddings must be > 1, got 1")
    return math.sqrt(1 + math.log(factor) / math.log(trained))
