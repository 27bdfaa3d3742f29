"""YaRN."""

from __future__ import annotations

from .._checks import check_base, check_dim, check_factor, check_length
from .._names import explains_wrong_calls
from ._ramp import yarn_amplitude, yarn_inv_freq
from .base import RopeFreqs, with_trained


@explains_wrong_calls
def yarn(
    dim: int,
    *,
    factor: float,
    original_max_position_embeddings: int,
    base: float = 10000.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    ramp: str = "index",
    over: RopeFreqs | None = None,
) -> RopeFreqs:
    """YaRN: fast frequencies kept, slow ones interpolated, and a temperature.

    theta_i * m_i + theta_i / factor * (1 - m_i),  m_i from 1 (beta_fast rotations inside L and
    more) to 0 (beta_slow rotations and fewer);  A = 0.1 * ln(factor) + 1 for factor > 1, else 1

    A multiplies q and k, so its square multiplies the logits. Not applied: DeepSeek's further
    softmax scale. At factor 1 the frequencies equal RoPE's to one unit in the last place, since the
    blend rounds.

    dim: rotary dimension of one head, even.
    factor: target length / trained length, > 0.
    original_max_position_embeddings: L, the trained length in tokens, never the extended one.
    base: RoPE's base, > 1: rope_theta in configurations.
    beta_fast, beta_slow: the ends of the ramp in rotations inside L,
        0 < beta_slow <= beta_fast.
    truncate: round the ends of the index ramp outwards to whole pairs.
    attention_factor: A, > 0, used unchanged if given.
    mscale, mscale_all_dim: when both are given and not 0, A = g(mscale) / g(mscale_all_dim) with
        g(k) = 0.1 * k * ln(factor) + 1; one alone is ignored, as in transformers.
    ramp: "index", linear in the pair index (the authors' code, all released checkpoints), or
        "rotations", linear in the number of rotations (the paper), where truncate has no effect.
    over: the frequencies theta_i that the model was trained with, (dim/2,), and its amplitude,
        which multiplies A; L is then the length of that training. None for RoPE's at `base`.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2309.00071
    """
    dim = check_dim("yarn", dim)
    factor = check_factor("yarn", factor)
    base = check_base("yarn", base)
    length = check_length(
        "yarn", "original_max_position_embeddings", original_max_position_embeddings
    )
    inv_freq = yarn_inv_freq(
        "yarn",
        dim,
        factor,
        base=base,
        length=length,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=truncate,
        ramp=ramp,
        over=over,
    )
    amplitude = yarn_amplitude("yarn", factor, attention_factor, mscale, mscale_all_dim)
    return with_trained(over, inv_freq, amplitude)
