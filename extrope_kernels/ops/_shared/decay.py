"""The range of XPOS's amplitude: it grows without bound with the distance from its origin."""

from __future__ import annotations

import math

import torch

from ...methods import RopeFreqs


def reach(freqs: RopeFreqs, dtype: torch.dtype) -> int:
    """How many positions from its origin the amplitude is a number of `dtype`."""
    return math.floor(math.log(torch.finfo(dtype).max) / freqs.steepest_decay)
