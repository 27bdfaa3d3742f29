"""The ramp shared by YaRN, dynamic YaRN and NTK-by-parts: which pairs keep their frequency."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import check_bool, check_choice, check_falling, check_real
from .base import RopeFreqs, copy_to, trained_pairs


def rotations_index(rotations: float, dim: int, base: float, length: int) -> float:
    """Return the (real) pair index at which a pair rotates `rotations` times inside `length`."""
    return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))


def index_range(
    method: str,
    dim: int,
    base: float,
    length: int,
    fast: float,
    slow: float,
    truncate: bool = True,
) -> tuple[float, float]:
    """Return the pairs that make `fast` and `slow` rotations inside `length`.

    They are rounded outwards if `truncate`, and limited to 0 .. dim - 1 (not dim/2 - 1) as in the
    authors' code.
    """
    low, high = rotations_index(fast, dim, base, length), rotations_index(slow, dim, base, length)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low > high:
        raise ValueError(
            f"{method}: original_max_position_embeddings and base must let some pair of dims make "
            f"between {slow:g} and {fast:g} rotations, got {length} and {base:g}"
        )
    return low, high


def index_ramp(
    method: str,
    index: Tensor,
    base: float,
    length: int,
    fast: float,
    slow: float,
    truncate: bool = True,
) -> Tensor:
    """Return 1 for pairs that make `fast` rotations or more, falling linearly to 0 at `slow`.

    index: of every pair in plain RoPE, (dim/2,), from `trained_pairs`. The ends are those of
        `index_range`.
    """
    dim = 2 * index.shape[0]
    low, high = index_range(method, dim, base, length, fast, slow, truncate)
    if low == high:
        high += 0.001
    ramp = (index - low) / (high - low)
    return 1 - ramp.clamp(0, 1)


def check_yarn_ramp(
    method: str, beta_fast: float, beta_slow: float, truncate: bool, ramp: str
) -> None:
    """Check the ends of `yarn_inv_freq`'s ramp, as it does itself."""
    check_falling(method, "beta_fast", beta_fast, "beta_slow", beta_slow)
    check_bool(method, "truncate", truncate)
    check_choice(method, "ramp", ramp, _RAMPS)


def yarn_inv_freq(
    method: str,
    dim: int,
    scale: float | Tensor,
    *,
    base: float,
    length: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
    ramp: str,
    over: RopeFreqs | None,
) -> Tensor:
    """Return trained frequencies, divided by `scale` where the ramp is 0; the rest as for `yarn`.

    (dim/2,) float32; with a float64 tensor `scale` (..., 1), (..., dim/2) on its device.
    """
    check_yarn_ramp(method, beta_fast, beta_slow, truncate, ramp)
    powers, keep = _RAMPS[ramp](method, dim, base, length, beta_fast, beta_slow, truncate, over)
    if isinstance(scale, Tensor):
        powers, keep = copy_to(powers, scale.device), copy_to(keep, scale.device)
        scale = scale.to(powers.dtype)
    return (1.0 / (scale * powers) * (1 - keep) + 1.0 / powers * keep).float()


def yarn_amplitude(
    method: str,
    scale: float,
    attention_factor: float | None,
    mscale: float | None,
    mscale_all_dim: float | None,
) -> float:
    """Return the factor on q and k at extension `scale`."""
    if attention_factor is not None:
        return check_real(method, "attention_factor", attention_factor, above=0)
    for name, value in (("mscale", mscale), ("mscale_all_dim", mscale_all_dim)):
        if value is not None:
            check_real(method, name, value, at_least=0)
    if mscale and mscale_all_dim:
        return yarn_temperature(scale, mscale) / yarn_temperature(scale, mscale_all_dim)
    return yarn_temperature(scale, 1.0)


def yarn_temperature(scale: float, weight: float) -> float:
    """Return the factor on q and on k at extension `scale`; weight: an mscale."""
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0


def _by_index(
    method: str,
    dim: int,
    base: float,
    length: int,
    fast: float,
    slow: float,
    truncate: bool,
    over: RopeFreqs | None,
) -> tuple[Tensor, Tensor]:
    """Ramp by pair index, in float32, as the authors' code and every released checkpoint do."""
    powers, index = trained_pairs(method, dim, base, over)
    return powers, index_ramp(method, index, base, length, fast, slow, truncate)


def _by_rotations(
    method: str,
    dim: int,
    base: float,
    length: int,
    fast: float,
    slow: float,
    truncate: bool,
    over: RopeFreqs | None,
) -> tuple[Tensor, Tensor]:
    """Ramp by number of rotations, in float64, as in the paper's equations."""
    powers, _ = trained_pairs(method, dim, base, over)
    if powers.dtype == torch.float32:  # plain RoPE
        powers = base ** (torch.arange(0, dim, 2, device="cpu").double() / dim)
    rotations = length / (2 * math.pi * powers)
    return powers, ((rotations - slow) / (fast - slow or 0.001)).clamp(0, 1)


_RAMPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "index": _by_index,
    "rotations": _by_rotations,
}
