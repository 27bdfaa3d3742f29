"""The range of XPOS's amplitude, which grows without bound with the distance from its origin."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores import Score
from .checks import has_values


def reach(freqs: RopeFreqs, dtype: torch.dtype) -> int:
    """Return the number of positions from the origin to which the amplitude fits `dtype`."""
    return math.floor(math.log(torch.finfo(dtype).max) / freqs.steepest_decay)


def check_new_keys(
    op: str,
    freqs: RopeFreqs,
    score: Score | None,
    k: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_leftpad: Tensor | None,
    cu_seqlens: Tensor | None,
    positions: Tensor | None = None,
) -> None:
    """Raise ValueError for new keys so far from the origin that their amplitude overflows.

    Only tensors on the CPU are read; other mistakes in the arguments are left to the op. With a
    score that stores keys by blocks, positions count from 0 in each block.
    """
    if torch.compiler.is_compiling() or not freqs.steepest_decay:
        return
    if not isinstance(k, Tensor) or k.dim() < 3 or not k.is_floating_point():
        return
    given = [x for x in (cache_seqlens, cache_leftpad, cu_seqlens, positions) if x is not None]
    if not all(isinstance(x, Tensor) and x.numel() and has_values(x) for x in given):
        return
    ends = _ends(k, cache_seqlens, cache_leftpad, cu_seqlens, positions)
    if ends is None:
        return
    low, high = ends
    origin = freqs.decay_origin if score is None else 0.0
    if score is not None:
        low, high = 0, min(high, score.stored.modulus - 1)
    most = reach(freqs, k.dtype)
    if max(high - origin, origin - low) > most:
        raise ValueError(
            f"{op}: keys must be within {most} positions of XPOS's origin {origin:.0f} in "
            f"{k.dtype}, got some at {low:.0f} to {high:.0f}"
        )


def _ends(
    k: Tensor,
    cache_seqlens: Tensor | None,
    cache_leftpad: Tensor | None,
    cu_seqlens: Tensor | None,
    positions: Tensor | None,
) -> tuple[float, float] | None:
    """Return the lowest and the highest position of the new keys, or None if they are unknown."""
    if positions is not None:
        return float(positions.min()), float(positions.max())
    if cache_seqlens is None:
        return None
    first = cache_seqlens.long()
    new = torch.full_like(first, k.shape[-3]) if cu_seqlens is None else cu_seqlens.diff()
    pad = torch.zeros_like(first) if cache_leftpad is None else cache_leftpad
    if not first.shape == new.shape == pad.shape:
        return None
    first = first - pad
    return float(first.min()), float((first + new).max()) - 1
