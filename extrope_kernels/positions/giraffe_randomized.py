"""Giraffe's randomised positions: real positions with random steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_count, check_device, check_generator
from ._draws import copy_to

_NAME = "positions.giraffe_randomized"


def giraffe_randomized(
    batch: int,
    seqlen: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """Giraffe, randomised positions: real steps at random, 1 on average.

    t = cumsum(2 * U(0, 1)),  positions = t * seqlen / max(t_last, seqlen)

    The distances between tokens change, so this acts on a purely relative rotation too. The
    positions are not whole and do not start at 0. Draw once per training step and share the
    positions between layers; evaluate with plain positions. The authors report good perplexity and
    poor retrieval.

    batch, seqlen: sequences, and tokens in each; every sequence has its own steps.
    generator: for the steps, on the CPU.
    device: of the result; None is the CPU.

    Returns: (batch, seqlen) float32, with the bits of the authors' code; the last is seqlen at
        most, up to its rounding.
    Raises: ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2308.10882
    """
    batch = check_count(_NAME, "batch", batch)
    seqlen = check_count(_NAME, "seqlen", seqlen)
    generator = check_generator(_NAME, generator)
    device = check_device(_NAME, device)
    uniform = torch.rand(batch, seqlen, generator=generator, dtype=torch.float32, device="cpu")
    positions = (2 * uniform).cumsum(dim=-1)
    return copy_to(positions * (seqlen / positions[:, -1:].clamp(min=seqlen)), device)
