"""Dynamic NTK: NTK-aware scaling by the current length."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_base, check_dim, check_factor, check_length, check_seq_len
from .._names import explains_wrong_calls
from .base import RopeFreqs, copy_to, exponents, rope_inv_freq, scaled_over, with_trained
from .ntk_aware import ntk_base


@explains_wrong_calls
def dynamic_ntk(
    dim: int,
    *,
    factor: float,
    seq_len: int | Tensor,
    max_position_embeddings: int,
    base: float = 10000.0,
    over: RopeFreqs | None = None,
) -> RopeFreqs:
    """Dynamic NTK: NTK-aware scaling by the length of the sequence.

    n = max(seq_len, max_position_embeddings),
    alpha = factor * n / max_position_embeddings - (factor - 1),
    base' = base * alpha ** (dim / (dim - 2)),  theta_i = base' ** (-2i / dim)

    A pure function of seq_len: no state is kept between calls. Up to the trained length it is plain
    RoPE. Keys that were rotated and cached at another length do not fit.

    dim: rotary dimension of one head, even, at least 4.
    factor: how steeply alpha grows with the length, > 0; 1 means alpha = n / trained length.
    seq_len: tokens in the sequence, > 0; or an integer tensor of shape () or (batch,), whose values
        are not read on the host. inv_freq is then (dim/2,) or (batch, dim/2), computed on the
        tensor's device with base' in float32.
    max_position_embeddings: the trained length in tokens.
    base: RoPE's base, > 1: rope_theta in configurations.
    over: as in `ntk_aware`.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Source: https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr/ ; appendix A.2 of
    https://arxiv.org/abs/2309.00071
    """
    dim = check_dim("dynamic_ntk", dim, minimum=4)
    factor = check_factor("dynamic_ntk", factor)
    seq_len = check_seq_len("dynamic_ntk", seq_len)
    trained = check_length("dynamic_ntk", "max_position_embeddings", max_position_embeddings)
    base = check_base("dynamic_ntk", base)
    if isinstance(seq_len, Tensor):
        length = seq_len.clamp(min=trained).to(torch.float32).unsqueeze(-1)
        alpha = factor * length / trained - (factor - 1)
        powers = ntk_base(dim, base, alpha) ** exponents(dim, seq_len.device)
        # alpha is rounded, and the device has its own pow: neither may touch the trained length.
        plain = copy_to(rope_inv_freq(dim, base), seq_len.device)
        scaled = torch.where(length > trained, 1.0 / powers, plain)
        return with_trained(over, scaled_over("dynamic_ntk", scaled, dim, base, over))
    alpha = factor * max(seq_len, trained) / trained - (factor - 1)
    scaled = rope_inv_freq(dim, ntk_base(dim, base, alpha))
    return with_trained(over, scaled_over("dynamic_ntk", scaled, dim, base, over))
