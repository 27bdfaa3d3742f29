"""MrRoPE-Pro."""

from __future__ import annotations

from .._checks import check_base, check_dim, check_factor, check_falling, check_length
from .._names import explains_wrong_calls
from ._ramp import index_range, yarn_amplitude
from .base import RopeFreqs, trained_inv_freq, trained_pairs, with_trained


@explains_wrong_calls
def mrrope(
    dim: int,
    *,
    factor: float,
    original_max_position_embeddings: int,
    base: float = 10000.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    over: RopeFreqs | None = None,
) -> RopeFreqs:
    """MrRoPE-Pro: positions in a mixed radix, whose scale grows from pair to pair.

    theta_i / factor ** e_i,  e_i = n (n + 1) / (m (m + 1)) for n = i - low clamped to 0 .. m,
    m = high - low;  A = 0.1 * ln(factor) + 1 for factor > 1, else 1

    Pairs up to low make beta_fast rotations or more inside the trained length, those from high on
    beta_slow or fewer. In between each pair's radix exceeds the one before; NTK-by-parts blends
    frequencies linearly there. A multiplies q and k, as in YaRN.

    dim: rotary dimension of one head, even.
    factor: target length / trained length, > 0.
    original_max_position_embeddings: the trained length in tokens, never the extended one.
    base: RoPE's base, > 1: rope_theta in configurations.
    beta_fast, beta_slow: rotations inside the trained length, 0 < beta_slow <= beta_fast.
    attention_factor: A, > 0, used unchanged if given.
    over: as in `yarn`; a pair's i is then the real one at which RoPE at `base` rotates as fast.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Source: https://github.com/mattian7/mrRoPE
    """
    dim, factor = check_dim("mrrope", dim), check_factor("mrrope", factor)
    base = check_base("mrrope", base)
    length = check_length(
        "mrrope", "original_max_position_embeddings", original_max_position_embeddings
    )
    check_falling("mrrope", "beta_fast", beta_fast, "beta_slow", beta_slow)
    low, high = index_range("mrrope", dim, base, length, beta_fast, beta_slow)
    pairs = max(high - low, 1)
    _, index = trained_pairs("mrrope", dim, base, over)
    steps = (index - low).clamp(0, pairs).double()
    # The authors' operations: a power in float64, its quotient in float32.
    step = factor ** (1.0 / (pairs * (pairs + 1)))
    scale = (step ** (steps * (steps + 1))).float()
    scale[steps == pairs] = factor
    amplitude = yarn_amplitude("mrrope", factor, attention_factor, None, None)
    return with_trained(over, trained_inv_freq("mrrope", dim, base, over) / scale, amplitude)
