"""One number of tokens for all sequences, as the tensor that ops over a cache take."""

from __future__ import annotations

from typing import Any

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
    if not _keeps_lengths(x):
        return torch.full(batch, cache_seqlens, dtype=torch.int32, device=x.device)
    global _last_lengths
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None
    key = (cache_seqlens, batch, x.device, stream)
    known, lengths = _last_lengths
    if known != key:
        lengths = torch.full(key[1], cache_seqlens, dtype=torch.int32, device=x.device)
        _last_lengths = key, lengths
    return lengths


# Of the last call, for the other layers of its step; nobody writes to it.
_last_lengths: tuple[tuple[Any, ...], Any] = ((), None)


def _keeps_lengths(x: Tensor) -> bool:
    """A graph's tensors are its own: no other call may have one that is made during a capture."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
