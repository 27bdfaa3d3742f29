"""Positions at which XPOS's amplitude leaves the range of the tensors' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ...methods import RopeFreqs
from .._shared.decay import reach
from .checks import position_kind


def check_decay(
    freqs: RopeFreqs, q: Tensor, positions: Tensor | None, offset: int, *, packed: bool
) -> None:
    """Raise ValueError when a position is so far from decay_origin that its amplitude overflows.

    Only what the host knows is looked at: positions on the CPU, or none given.
    """
    if not freqs.steepest_decay or not isinstance(q, Tensor) or torch.compiler.is_compiling():
        return
    ends = _ends(q, positions, offset, packed)
    if ends is None:
        return
    most = reach(freqs, q.dtype)
    low, high = ends
    if max(high - freqs.decay_origin, freqs.decay_origin - low) <= most:
        return
    middle = (low + high) // 2
    cure = (
        f"decay_origin={middle:.0f} covers them"
        if high - middle <= most
        else "no origin covers them: use blockwise_causal_attention, or a dtype with more range"
    )
    raise ValueError(
        f"rope: XPOS's amplitude leaves {q.dtype} {most} positions from "
        f"decay_origin={freqs.decay_origin:.0f}, got positions {low:.0f} to {high:.0f}; {cure}"
    )


def _ends(q: Tensor, positions: Tensor | None, offset: int, packed: bool):
    """The lowest and the highest position, or None where the host does not know them."""
    if packed or q.dim() != 4 or not q.is_floating_point() or q.numel() == 0:
        return None
    length = q.shape[1]
    if positions is None:
        return offset, offset + length - 1
    if positions.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return None
    kind = position_kind(positions, q.shape, q.shape[0])
    if kind is None or positions.numel() == 0:
        return None
    low, high = (x.item() + offset for x in positions.aminmax())
    return low, high + (length - 1 if kind == "offsets" else 0)
