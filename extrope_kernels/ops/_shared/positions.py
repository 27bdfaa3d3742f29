"""Forms of positions and lengths, and the position of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_cu_seqlens, narrowed


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


def cache_lengths(
    op: str,
    cache_seqlens: Tensor | int,
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    name: str = "cu_seqlens",
) -> Tensor:
    """Return the lengths as ops take them: int64 narrowed, or one int for all sequences.

    x: (batch, seqlen, heads, head_dim), or packed with cu_seqlens, the argument called `name`; one
        sequence if packed without.
    """
    if isinstance(cache_seqlens, Tensor):
        return narrowed(cache_seqlens)
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, (int, torch.SymInt)):
        raise TypeError(
            f"{op}: cache_seqlens must be an int or a Tensor, got {type(cache_seqlens).__name__}"
        )
    if not 0 <= cache_seqlens < 2**31:
        raise ValueError(
            f"{op}: cache_seqlens must be between 0 and the cache's slots, got {cache_seqlens}"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: q must be a Tensor, got {type(x).__name__}")
    # The op refuses a nested x by name.
    batch = (x.size(0),) if x.is_nested else x.shape[:-3] or (1,)
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, x, name)
        batch = (cu_seqlens.shape[0] - 1,)
    return torch.full(batch, cache_seqlens, dtype=torch.int32, device=x.device)
