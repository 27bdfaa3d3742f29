"""Axial RoPE: one ladder of frequencies for each axis of a grid."""

from __future__ import annotations

import torch

from .._checks import check_base, check_choice, check_count, check_dim
from .._names import explains_wrong_calls
from .base import RopeFreqs, rope_inv_freq

_NAME = "axial"


@explains_wrong_calls
def axial(dim: int, *, axes: int = 2, base: float = 10000.0, ladder: str = "own") -> RopeFreqs:
    """Axial RoPE: every axis of an image or a video has pairs of its own.

    With n = floor(dim / (2 axes)) pairs an axis, those of axis a are a n .. (a + 1) n - 1, and
    theta_{a n + i} = base ** (-i / n),  or with ladder "shared": base ** (-(axes i + a) / (axes n))

    The rotation then takes positions of shape (axes, batch, seqlen), such as the row and column of
    every patch; those of text are the same on every axis. Dims past 2 axes n pass through.

    dim: rotary dimension of one head, even, at least 2 axes.
    axes: axes of the positions, >= 1: 2 for images (row, column), 3 for videos (time, row, column).
    base: RoPE's base, > 1: rope_theta in configurations.
    ladder: "own", the same frequencies for every axis (Qwen2-VL, Llama 4, most models); or
        "shared", one ladder dealt out to the axes in turn (Pixtral).

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2403.13298
    """
    axes = check_count(_NAME, "axes", axes)
    dim = check_dim(_NAME, dim, minimum=2 * axes)
    base = check_base(_NAME, base)
    check_choice(_NAME, "ladder", ladder, ("own", "shared"))
    pairs = dim // (2 * axes)
    if ladder == "own":
        inv_freq = rope_inv_freq(2 * pairs, base).repeat(axes)
    else:
        inv_freq = rope_inv_freq(2 * pairs * axes, base).view(pairs, axes).T.flatten()
    of_pairs = torch.arange(axes, dtype=torch.int32, device="cpu").repeat_interleave(pairs)
    return RopeFreqs(inv_freq, axes=of_pairs)
