"""Rotate raw queries and keys into the frame of every region, and gradients back out of it.

For implementations that take rotated tensors; the kernels rotate rows themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.attention_call import AttentionCall
from .._shared.frames import rotate_keys, rotate_queries
from .._shared.positions import sequence_of_token


def positions(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """int64 positions of queries and of keys: (seqlen,), or (batch, seqlen) where they differ."""
    seqlen_q, seqlen_k = q.shape[-3], k.shape[-3]
    rows, keys = (torch.arange(n, device=q.device) for n in (seqlen_q, seqlen_k))
    sequence = None
    if call.cu_seqlens is not None:
        sequence = sequence_of_token(call.cu_seqlens, seqlen_k)
        rows = keys = keys - call.cu_seqlens[sequence]
    k_start = _of_tokens(call.k_start, sequence)
    q_start = _of_tokens(call.q_start, sequence)
    if call.q_start is None:
        q_start = k_start if sequence is not None else k_start + (seqlen_k - seqlen_q)
    return rows + q_start, keys + k_start


def _of_tokens(start: Tensor | None, sequence: Tensor | None) -> Tensor | int:
    """A start as it is added to the positions of tokens."""
    if start is None:
        return 0
    if start.shape[0] == 1:
        return start.long()
    return start.long()[:, None] if sequence is None else start.long()[sequence]


def rotate(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[list[Tensor], list[Tensor]]:
    """q and k as every region sees them; differentiable.

    q: (..., seqlen_q, heads_q, head_dim), k: (..., seqlen_k, heads_k, head_dim). Regions that
    rotate keys alike share one tensor, and what comes rotated so is not copied.
    """
    i, j = positions(q, k, call)
    maps = {region.k_map for region in call.regions}
    frames = {k_map: rotate_keys(k, k_map, j, call) for k_map in maps}
    q_frames = [rotate_queries(q, region.q_map(i), call) for region in call.regions]
    return q_frames, [frames[region.k_map] for region in call.regions]


def unrotate(
    dq: list[Tensor], dk: list[Tensor], q: Tensor, k: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """The gradients of raw q and k, of the call's dtype for results, from those of the frames."""
    i, j = positions(q, k, call)
    regions = call.regions
    raw_q = [rotate_queries(g, r.q_map(i), call, adjoint=True) for g, r in zip(dq, regions)]
    raw_k = [rotate_keys(g, r.k_map, j, call, adjoint=True) for g, r in zip(dk, regions)]
    return sum(raw_q).to(call.results_dtype(q.dtype)), sum(raw_k).to(call.results_dtype(k.dtype))
