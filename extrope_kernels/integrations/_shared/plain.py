"""Causal attention by no score method: every key at its own distance."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import RopeFreqs, scores

PLAIN = scores.rerope(window=1, factor=1.0)


def no_freqs(x: Tensor) -> RopeFreqs:
    """Return frequencies of 0, for queries and keys that a layer has rotated itself, or never."""
    return RopeFreqs(torch.zeros(1, dtype=torch.float32, device=x.device))
