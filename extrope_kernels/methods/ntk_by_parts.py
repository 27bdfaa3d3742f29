"""NTK-by-parts, in the two forms that carry the name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from .._checks import (
    check_base,
    check_choice,
    check_dim,
    check_factor,
    check_falling,
    check_length,
    check_real,
)
from .._names import explains_wrong_calls
from ._ramp import index_ramp, yarn_inv_freq
from .base import RopeFreqs, rope_inv_freq, scaled_over, trained_pairs, with_trained
from .ntk_aware import ntk_base

_NAME = "ntk_by_parts"


@explains_wrong_calls
def ntk_by_parts(
    dim: int,
    *,
    factor: float,
    original_max_position_embeddings: int,
    base: float = 10000.0,
    variant: str = "pr1",
    beta_0: float = 1.25,
    beta_1: float = 0.75,
    gamma_0: float = 16,
    gamma_1: float = 2,
    ntk_factor: float = 1.0,
    extrapolation_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    ramp: str = "index",
    over: RopeFreqs | None = None,
) -> RopeFreqs:
    """NTK-by-parts: fast frequencies kept, slow ones interpolated.

    variant "pr1", the author's first form: with N the NTK-aware frequencies and m(r0, r1) the ramp
    from 1 (r0 rotations inside L) to 0 (r1 rotations),
    x = N * m_beta + theta / factor * (1 - m_beta),  result = theta * m_gamma + x * (1 - m_gamma)
    variant "paper", YaRN's definition: `yarn` with attention_factor 1

    The variants give different numbers. factor = current length / L makes either dynamic.

    dim: rotary dimension of one head, even; at least 4 for "pr1".
    factor: target length / trained length, > 0.
    original_max_position_embeddings: L, the trained length in tokens.
    base: RoPE's base, > 1: rope_theta in configurations.
    variant: "pr1" or "paper".
    beta_0, beta_1: ramp from NTK-aware to linear interpolation, in rotations, 0 < beta_1 <= beta_0.
    gamma_0, gamma_1: ramp from plain RoPE to that, in rotations, 0 < gamma_1 <= gamma_0.
    ntk_factor, extrapolation_factor: multiply the two ramps, from 0 to 1.
    beta_fast, beta_slow, truncate, ramp: as in `yarn`, for "paper".
    over: as in `yarn`.

    Raises ValueError for a value outside these, or for one that the variant does not use; TypeError
    for an argument of the wrong kind.
    Source: https://github.com/jquesnelle/yarn/pull/1 ; https://arxiv.org/abs/2309.00071
    """
    dim = check_dim(_NAME, dim)
    factor = check_factor(_NAME, factor)
    base = check_base(_NAME, base)
    length = check_length(
        _NAME, "original_max_position_embeddings", original_max_position_embeddings
    )
    pr1 = {"beta_0": beta_0, "beta_1": beta_1, "gamma_0": gamma_0, "gamma_1": gamma_1}
    pr1 |= {"ntk_factor": ntk_factor, "extrapolation_factor": extrapolation_factor}
    paper = {"beta_fast": beta_fast, "beta_slow": beta_slow, "truncate": truncate, "ramp": ramp}
    check_choice(_NAME, "variant", variant, _VARIANTS)
    used, unused = (pr1, paper) if variant == "pr1" else (paper, pr1)
    _check_untouched(variant, unused)
    inv_freq = _VARIANTS[variant](dim, factor, base, length, over=over, **used)
    return with_trained(over, inv_freq)


def _check_untouched(variant: str, unused: Mapping[str, Any]) -> None:
    defaults = inspect.unwrap(ntk_by_parts).__kwdefaults__ or {}
    for name, value in unused.items():
        if not isinstance(value, Real | str) or value != defaults[name]:
            raise ValueError(
                f"{_NAME}: {name} must be left out for variant {variant!r}, got {value!r}"
            )


def _pr1(
    dim: int,
    factor: float,
    base: float,
    length: int,
    *,
    beta_0: float,
    beta_1: float,
    gamma_0: float,
    gamma_1: float,
    ntk_factor: float,
    extrapolation_factor: float,
    over: RopeFreqs | None,
) -> Tensor:
    check_dim(_NAME, dim, minimum=4)
    check_falling(_NAME, "beta_0", beta_0, "beta_1", beta_1)
    check_falling(_NAME, "gamma_0", gamma_0, "gamma_1", gamma_1)
    ntk_factor = check_real(_NAME, "ntk_factor", ntk_factor, at_least=0, at_most=1)
    extrapolation_factor = check_real(
        _NAME, "extrapolation_factor", extrapolation_factor, at_least=0, at_most=1
    )
    powers, index = trained_pairs(_NAME, dim, base, over)
    linear = 1.0 / (factor * powers)
    ntk = scaled_over(_NAME, rope_inv_freq(dim, ntk_base(dim, base, factor)), dim, base, over)
    to_ntk = index_ramp(_NAME, index, base, length, beta_0, beta_1) * ntk_factor
    to_rope = index_ramp(_NAME, index, base, length, gamma_0, gamma_1) * extrapolation_factor
    slowed = linear * (1 - to_ntk) + ntk * to_ntk
    return (slowed * (1 - to_rope) + 1.0 / powers * to_rope).float()


def _paper(dim: int, factor: float, base: float, length: int, **ends: Any) -> Tensor:
    return yarn_inv_freq(_NAME, dim, factor, base=base, length=length, **ends)


_VARIANTS: dict[str, Callable[..., Tensor]] = {"pr1": _pr1, "paper": _paper}
