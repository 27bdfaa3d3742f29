"""Rotate queries and keys to each region's places, and gradients back.

For implementations that take rotated tensors; the fused kernels rotate rows themselves.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...scores import Region
from .._math.positions import sequence_of_token
from .._torch.library import ops
from .call import AttentionCall


class Places(NamedTuple):
    """How far a region rotates queries and keys: (seqlen,), or (batch, seqlen).

    That is to its own places, from where q and k stand already. If every pair has its own place:
    (pairs, 1 or batch, seqlen).
    """

    q: Tensor
    k: Tensor


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
    q_from, k_from = call.mapped(call.q_stored, i), call.mapped(call.stored, j)
    return [
        Places(
            torch.where(of_q, call.mapped(region.q_map, i) - q_from, 0.0),
            torch.where(of_k, call.mapped(region.k_map, j) - k_from, 0.0),
        )
        for region, (of_q, of_k) in zip(call.regions, used(q, k, call))
    ]


def centered_places(q: Tensor, k: Tensor, call: AttentionCall) -> list[Places]:
    """Return the places less a constant of each sequence and region, which no logit knows.

    Places times the gradients of their angles add up to the gradient of inv_freq. Those gradients
    add up to 0, but for their rounding, which places as large as a start would multiply.
    """
    at = places(q, k, call)
    if not q.numel() or not k.numel():
        return at
    found = []
    for place, (of_q, of_k) in zip(at, used(q, k, call)):
        first = _least(place.q, of_q, call).minimum(_least(place.k, of_k, call))
        last = -_least(-place.q, of_q, call).minimum(_least(-place.k, of_k, call))
        middle = (first + last) / 2
        q_place = torch.where(of_q, place.q - middle, 0.0)
        found.append(Places(q_place, torch.where(of_k, place.k - middle, 0.0)))
    return found


def _least(place: Tensor, used: Tensor, call: AttentionCall) -> Tensor:
    """Return each sequence's least place in use: (..., 1), or of each packed token (..., total)."""
    place = torch.where(used, place, torch.inf)
    if call.cu_seqlens is None:
        return place.amin(-1, keepdim=True)
    sequence = sequence_of_token(call.cu_seqlens, place.shape[-1])
    found = place.new_full((*place.shape[:-1], call.cu_seqlens.shape[0] - 1), torch.inf)
    return found.scatter_reduce(-1, sequence.expand(place.shape), place, "amin")[..., sequence]


def rotate(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[list[Tensor], list[Tensor]]:
    """Return q and k rotated for each region.

    q: (..., seqlen_q, heads_q, head_dim), k: (..., seqlen_k, heads_k, head_dim).
    """
    at = places(q, k, call)
    return [
        q if _keeps_queries(region, call) else _rotate_queries(q, place.q, call)
        for region, place in zip(call.regions, at)
    ], [
        k if region.k_map == call.stored else _rotate_keys(k, place.k, call)
        for region, place in zip(call.regions, at)
    ]


def _keeps_queries(region: Region, call: AttentionCall) -> bool:
    """Return True if the region takes queries as they are given."""
    return region.q_map == call.q_stored and call.attention_factor == 1


def unrotate(
    dq: list[Tensor], dk: list[Tensor], q: Tensor, k: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Return gradients of q and k as given, in the call's dtype for results, from the regions'."""
    at = places(q, k, call)
    given_q = [
        g if _keeps_queries(region, call) else _rotate_queries(g, place.q, call, adjoint=True)
        for g, region, place in zip(dq, call.regions, at)
    ]
    given_k = [
        g if region.k_map == call.stored else _rotate_keys(g, place.k, call, adjoint=True)
        for g, region, place in zip(dk, call.regions, at)
    ]
    dtypes = call.results_dtype(q.dtype), call.results_dtype(k.dtype)
    return sum(given_q).to(dtypes[0]), sum(given_k).to(dtypes[1])


def _rotate_queries(x: Tensor, i: Tensor, call: AttentionCall, adjoint: bool = False) -> Tensor:
    """Rotate queries by i positions.

    Queries take the attention factor of both sides: keys that come rotated need no change.
    """
    return _rotate(x, i, call, call.log_decay, call.attention_factor**2, adjoint)


def _rotate_keys(x: Tensor, j: Tensor, call: AttentionCall, adjoint: bool = False) -> Tensor:
    decay = None if call.log_decay is None else -call.log_decay
    return _rotate(x, j, call, decay, 1.0, adjoint)


def _rotate(x, position, call, log_decay, amplitude, adjoint) -> Tensor:
    inv_freq, axes = call.inv_freq, None
    if inv_freq.dim() == 3 and inv_freq.shape[-2] > 1:
        inv_freq = inv_freq.repeat_interleave(x.shape[-2] // inv_freq.shape[-2], dim=-2)
    if position.dim() == 3:  # each pair is an axis
        axes = torch.arange(len(position), dtype=torch.int32, device=x.device)
    rope_args = (inv_freq, position, call.cu_seqlens, log_decay, axes)
    options = {"attention_factor": amplitude, **call.dims_that_rotate}
    if adjoint:
        return ops.rope_bwd(x, None, None, None, *rope_args, **options)[0]
    return ops.rope_fwd(x, None, *rope_args, **options)[0]


def _of_tokens(start: Tensor | None, sequence: Tensor | None) -> Tensor | int:
    """Return a start in a shape that adds to the positions of tokens."""
    if start is None:
        return 0
    if start.shape[0] == 1:
        return start.long()
    return start.long()[:, None] if sequence is None else start.long()[sequence]
