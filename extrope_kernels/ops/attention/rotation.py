"""Rotate raw queries and keys to each region's places, and gradients back.

For implementations that take rotated tensors; the fused kernels rotate rows themselves.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...scores import UNROTATED, PositionMap
from .._shared.dtypes import accumulator
from .._shared.library import ops
from .._shared.pairs import join_pairs, split_pairs, with_rotated
from .._shared.positions import sequence_of_token
from .call import AttentionCall


class Places(NamedTuple):
    """The places to which a region rotates queries and keys: (seqlen,), or (batch, seqlen).

    If every pair has its own place, dimensions (heads_k or 1, pairs) follow.
    """

    q: Tensor
    k: Tensor  # relative to the rotation that k already has


def positions(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return int64 positions of queries and keys: (seqlen,), or (batch, seqlen) if they differ."""
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


def used(q: Tensor, k: Tensor, call: AttentionCall) -> list[tuple[Tensor, Tensor]]:
    """Return for each region the masks of queries and of keys that it pairs."""
    i, j = positions(q, k, call)
    firsts, found = call.first_keys(i), []
    for first, end in pairwise(firsts):
        if call.cu_seqlens is None:  # else every sequence has its own first and last keys
            first, end = first.maximum(j[..., :1]), end.minimum(j[..., -1:] + 1)
        of_k = (j >= first.amin(-1, keepdim=True)) & (j < end.amax(-1, keepdim=True))
        found.append((first.clamp(min=0) < end, of_k))
    return found


def places(q: Tensor, k: Tensor, call: AttentionCall) -> list[Places]:
    """Return each region's places; 0 for queries and keys that it does not pair.

    Far from a region's keys XPOS's amplitude may overflow, and infinity times a weight of 0 is NaN.
    """
    i, j = positions(q, k, call)
    if not i.numel() or not j.numel():
        return [Places(i, j) for _ in call.regions]
    found = []
    for region, (of_q, of_k) in zip(call.regions, used(q, k, call)):
        by_pair = region.k_map.row is not None or call.stored.row is not None
        found.append(
            Places(
                _where(of_q, call.mapped(region.q_map, i), region.q_map.row is not None),
                _where(of_k, moved(region.k_map, j, call), by_pair),
            )
        )
    return found


def moved(by: PositionMap, j: Tensor, call: AttentionCall) -> Tensor:
    """Return how far keys at positions j (...) rotate on from their present rotation.

    (...), or for pairs (..., heads_k or 1, pairs).
    """
    to, origin = call.mapped(by, j), call.mapped(call.stored, j)
    most = max(to.dim(), origin.dim())
    to, origin = (x if x.dim() == most else x[..., None, None] for x in (to, origin))
    return to - origin


def _where(seen: Tensor, places: Tensor, by_pair: bool) -> Tensor:
    """Return the places of tokens that are seen, and 0 for others."""
    return torch.where(seen[..., None, None] if by_pair else seen, places, 0.0)


def rotate(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[list[Tensor], list[Tensor]]:
    """Return q and k rotated for each region; differentiable.

    q: (..., seqlen_q, heads_q, head_dim), k: (..., seqlen_k, heads_k, head_dim).
    """
    at = places(q, k, call)
    return [rotate_queries(q, place.q, call) for place in at], [
        k if region.k_map == call.stored else _rotate_keys(k, place.k, call)
        for region, place in zip(call.regions, at)
    ]


def unrotate(
    dq: list[Tensor], dk: list[Tensor], q: Tensor, k: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Return gradients of raw q and k, in the call's dtype for results, from the regions'."""
    at = places(q, k, call)
    raw_q = [rotate_queries(g, place.q, call, adjoint=True) for g, place in zip(dq, at)]
    raw_k = [
        g if region.k_map == call.stored else _rotate_keys(g, place.k, call, adjoint=True)
        for g, region, place in zip(dk, call.regions, at)
    ]
    return sum(raw_q).to(call.results_dtype(q.dtype)), sum(raw_k).to(call.results_dtype(k.dtype))


def rotate_queries(x: Tensor, i: Tensor, call: AttentionCall, adjoint: bool = False) -> Tensor:
    """Rotate queries to positions i.

    Queries take the attention factor of both sides: keys that come rotated need no change.
    """
    return _rotate(x, i, call, call.log_decay, call.attention_factor**2, adjoint)


def store_keys(x: Tensor, j: Tensor, call: AttentionCall) -> Tensor:
    """Rotate raw keys as a cache stores them."""
    return x if call.stored == UNROTATED else _rotate_keys(x, call.mapped(call.stored, j), call)


def _rotate_keys(x: Tensor, j: Tensor, call: AttentionCall, adjoint: bool = False) -> Tensor:
    decay = None if call.log_decay is None else -call.log_decay
    return _rotate(x, j, call, decay, 1.0, adjoint)


def _rotate(x, position, call, log_decay, amplitude, adjoint) -> Tensor:
    inv_freq = _of_heads(call.inv_freq, x)
    if call.pair_maps is not None and position.dim() > x.dim() - 2:
        return _rotate_pairs(x, position, inv_freq, call, amplitude, adjoint)
    rope_args = (inv_freq, position, call.cu_seqlens, log_decay)
    options = {"attention_factor": amplitude, "interleaved": call.interleaved}
    options["rotary_offset"] = call.rotary_offset
    if adjoint:
        return ops.rope_bwd(x, None, None, None, *rope_args, **options)[0]
    return ops.rope_fwd(x, None, *rope_args, **options)[0]


def _of_heads(of_keys: Tensor, x: Tensor) -> Tensor:
    """Repeat frequencies or places (..., heads_k, pairs) for the heads of x, (..., heads, dims)."""
    if of_keys.dim() < 3 or of_keys.shape[-2] == 1:
        return of_keys
    return of_keys.repeat_interleave(x.shape[-2] // of_keys.shape[-2], dim=-2)


def _rotate_pairs(x, position, inv_freq, call, amplitude, adjoint=False) -> Tensor:
    """Rotate each pair to its own place; position: (..., seqlen, heads_k or 1, pairs)."""
    if inv_freq.dim() < 3:
        inv_freq = inv_freq.unsqueeze(-2)
    if call.cu_seqlens is not None and inv_freq.dim() == 3 and inv_freq.shape[0] > 1:
        inv_freq = inv_freq[sequence_of_token(call.cu_seqlens, x.shape[0])]
    elif inv_freq.dim() == 3:
        inv_freq = inv_freq.unsqueeze(-3) if call.cu_seqlens is None else inv_freq[0]
    angle = _of_heads(position, x) * inv_freq.double()
    wide = accumulator(x.dtype)
    cos, sin = ((f(angle) * amplitude).to(wide) for f in (torch.cos, torch.sin))
    sin = -sin if adjoint else sin
    a, b = split_pairs(x.to(wide), *call.layout)
    rotated = join_pairs(a * cos - b * sin, b * cos + a * sin, call.interleaved)
    return with_rotated(x, rotated, call.rotary_offset)


def _of_tokens(start: Tensor | None, sequence: Tensor | None) -> Tensor | int:
    """Return a start in a shape that adds to the positions of tokens."""
    if start is None:
        return 0
    if start.shape[0] == 1:
        return start.long()
    return start.long()[:, None] if sequence is None else start.long()[sequence]
