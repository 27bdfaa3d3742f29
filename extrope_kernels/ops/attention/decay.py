"""Refuse positions at which XPOS's amplitude overflows the keys' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ...methods import RopeFreqs
from .._tables.checks import has_values
from .._tables.decay import reach
from .call import AttentionCall
from .places import positions, used


def check_decay(op: str, freqs: RopeFreqs, q: Tensor, k: Tensor, call: AttentionCall) -> None:
    """Raise ValueError if a visible key is so far from 0 that its amplitude overflows.

    Only on a CPU, where reading positions costs nothing.
    """
    if not freqs.steepest_decay or k.device.type != "cpu" or not (q.numel() and k.numel()):
        return
    _, j = positions(q, k, call)
    if not has_values(j):
        return
    farthest = max(
        float(torch.where(of_k, region.k_map(j), 0.0).max())
        for region, (_, of_k) in zip(call.regions, used(q, k, call))
    )
    if farthest > (most := reach(freqs, q.dtype)):
        raise ValueError(
            f"{op}: keys must be within {most} positions of 0 for XPOS in {q.dtype}, got one at "
            f"{farthest:.0f}; scores.blockwise_causal with a block_size of at most "
            f"{2 * (most + 1)} keeps them there"
        )
