"""Forms of positions, and the position of every token."""

from __future__ import annotations

import torch
from torch import Tensor


def position_kind(positions: Tensor, shape: torch.Size, sequences: int) -> str | None:
    """Classify by shape: 'positions', 'offsets', or None if neither fits."""
    batch, seqlen = shape[0], shape[1]
    dims = tuple(positions.shape)
    if dims in ((seqlen,), (batch, seqlen), (1, seqlen)):
        return "positions"
    if dims in ((sequences,), (sequences, 1)):
        return "offsets"
    return None


def token_positions(
    positions: Tensor | None,
    are_offsets: bool,
    cu_seqlens: Tensor | None,
    seqlen: int,
    device: torch.device,
) -> Tensor:
    """Return the position of every token, (batch or 1, seqlen); float offsets become float64."""
    if positions is not None and not are_offsets:
        return positions
    if positions is not None and positions.is_floating_point():
        positions = positions.double()  # float32 cannot hold sums past 2**24
    index = torch.arange(seqlen, device=device)
    if cu_seqlens is None:
        return index[None] if positions is None else positions[:, None] + index
    sequence = sequence_of_token(cu_seqlens, seqlen)
    index = index - cu_seqlens[sequence]
    return (index if positions is None else positions[sequence] + index)[None]


def sequence_of_token(cu_seqlens: Tensor, total: int) -> Tensor:
    """Return the packed sequence of each token, (total,) int64."""
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    found = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    return found.clamp(0, max(cu_seqlens.shape[0] - 2, 0))
