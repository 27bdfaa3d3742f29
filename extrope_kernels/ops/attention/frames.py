"""Rotate raw queries and keys into the frame of every region, and gradients back out of it.

For implementations that take rotated tensors; the kernels rotate rows themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.attention_call import AttentionCall
from .._shared.frames import rotate_keys, rotate_queries
from .._shared.positions import sequence_of_token


def positions(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64 positions of queries and keys; queries are the last of the keys' positions."""
    seqlen_q, seqlen_k = q.shape[-3], k.shape[-3]
    j = torch.arange(seqlen_k, device=q.device)
    if cu_seqlens is not None:
        j = j - cu_seqlens[sequence_of_token(cu_seqlens, seqlen_k)]
        return j, j
    return torch.arange(seqlen_q, device=q.device) + (seqlen_k - seqlen_q), j


def rotate(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[list[Tensor], list[Tensor]]:
    """q and k as every region sees them; differentiable.

    q: (..., seqlen_q, heads_q, head_dim), k: (..., seqlen_k, heads_k, head_dim). Regions that
    rotate keys alike share one tensor, and what comes rotated so is not copied.
    """
    i, j = positions(q, k, call.cu_seqlens)
    maps = {region.k_map for region in call.regions}
    frames = {k_map: rotate_keys(k, k_map, j, call) for k_map in maps}
    q_frames = [rotate_queries(q, region.q_map(i), call) for region in call.regions]
    return q_frames, [frames[region.k_map] for region in call.regions]


def unrotate(
    dq: list[Tensor], dk: list[Tensor], q: Tensor, k: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """The gradients of raw q and k, in their dtypes, from those of the frames."""
    i, j = positions(q, k, call.cu_seqlens)
    regions = call.regions
    raw_q = [rotate_queries(g, r.q_map(i), call, adjoint=True) for g, r in zip(dq, regions)]
    raw_k = [rotate_keys(g, r.k_map, j, call, adjoint=True) for g, r in zip(dk, regions)]
    return sum(raw_q).to(q.dtype), sum(raw_k).to(k.dtype)
