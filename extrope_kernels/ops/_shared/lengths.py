"""One number of tokens for all sequences, as the tensor that ops over a cache take."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_cu_seqlens


def cache_lengths(
    op: str,
    cache_seqlens: int,
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    name: str = "cu_seqlens",
) -> Tensor:
    """One length of all sequences as the tensor that ops take.

    x: (batch, seqlen, heads, head_dim), or packed with cu_seqlens, which is the argument `name`.
    """
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
    batch = (x.size(0),) if x.is_nested else x.shape[:1]  # the op refuses it, by its name
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, x, name)
        batch = (cu_seqlens.shape[0] - 1,)
    return torch.full(batch, cache_seqlens, dtype=torch.int32, device=x.device)
