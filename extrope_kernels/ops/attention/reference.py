"""Attention in plain PyTorch, all scores at once: the oracle, O(seqlen**2) in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.attention_call import AttentionCall, row_scale
from .._shared.dtypes import accumulator, without_autocast
from .._shared.positions import sequence_of_token
from .._shared.softmax import capped, softmax_of
from .frames import positions, rotate, unrotate


@without_autocast
def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """One softmax over every region's scores; differentiable to any order.

    q, k: raw, (batch, seqlen_q, heads_q, head_dim) and (batch, seqlen_k, heads_k, head_dim), or
    (total, heads, head_dim) with call.cu_seqlens; v like k, of any head_dim. Returns out like q, of
    v's head_dim, and lse (batch, heads_q, seqlen_q), or (heads_q, total).
    """
    packed = call.cu_seqlens is not None
    q_frames, k_frames = rotate(q, k, call)
    q_frames, k_frames = _batched(q_frames, packed), _batched(k_frames, packed)
    (values,) = _batched([v], packed)
    weights, lse = softmax_of(_logits(q_frames, k_frames, call), call)
    values = _per_query_head(values, q_frames[0])
    out = torch.einsum("bhij,bjhd->bihd", weights, values).to(call.results_dtype(q.dtype))
    out = out.contiguous()
    return (out[0], lse[0]) if packed else (out, lse)


@without_autocast
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each in its dtype or with call.float32_results in float32."""
    packed = call.cu_seqlens is not None
    q_frames, k_frames = rotate(q, k, call)
    q_r, k_r = _batched(q_frames, packed), _batched(k_frames, packed)
    values, dout, out, lse = _batched([v, dout, out, lse], packed)
    wide = accumulator(v.dtype)
    logits = _logits(q_r, k_r, call)
    weights = torch.exp(logits - _finite(lse)[..., None])
    dv = _per_key_head(torch.einsum("bhij,bihd->bjhd", weights, dout.to(wide)), values)
    delta = (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - (dlse[None] if packed else dlse)
    d_weights = torch.einsum("bihd,bjhd->bhij", dout.to(wide), _per_query_head(values, q_r[0]))
    d_scores = weights * (d_weights - delta[..., None]) * _scale(q_r[0], k_r[0], call)
    if call.softcap:
        d_scores = d_scores * (1 - (logits / call.softcap) ** 2)
    dq, dk = [], []
    for region in range(len(q_r)):
        here = torch.where(_visible(region, q_r[0], k_r[0], call), d_scores, 0.0)
        keys = _per_query_head(k_r[region], q_r[0])
        dq.append(torch.einsum("bhij,bjhd->bihd", here, keys))
        queries = q_r[region].to(wide)
        dk.append(_per_key_head(torch.einsum("bhij,bihd->bjhd", here, queries), k_r[region]))
    if packed:
        dq, dk, dv = [x[0] for x in dq], [x[0] for x in dk], dv[0]
    return *unrotate(dq, dk, q, k, call), dv.to(call.results_dtype(v.dtype))


def _logits(q: list[Tensor], k: list[Tensor], call: AttentionCall) -> Tensor:
    """(batch, heads_q, seqlen_q, seqlen_k): every pair's score in its region, -inf outside."""
    wide, scale = accumulator(q[0].dtype), _scale(q[0], k[0], call)
    logits = torch.tensor(-torch.inf, dtype=wide, device=q[0].device)
    for region, (q_r, k_r) in enumerate(zip(q, k)):
        scores = torch.einsum("bihd,bjhd->bhij", q_r.to(wide), _per_query_head(k_r, q_r)) * scale
        logits = torch.where(_visible(region, q_r, k_r, call), capped(scores, call), logits)
    return logits


def _scale(q: Tensor, k: Tensor, call: AttentionCall) -> Tensor | float:
    scale, rows = call.scale(q.shape[-1]), row_scale(positions(q, k, call)[0], call)
    return scale if rows is None else _per_pair(rows.to(accumulator(q.dtype)), q)[..., None] * scale


def _visible(region: int, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
    """(batch or 1, 1, seqlen_q, seqlen_k) bool: does this region hold the pair?"""
    i, j = positions(q, k, call)
    same_sequence = torch.tensor(True, device=q.device)
    if call.cu_seqlens is not None:
        sequence = sequence_of_token(call.cu_seqlens, k.shape[1])
        same_sequence = sequence[:, None] == sequence
    first, last = (_per_pair(x, q)[..., None] for x in call.first_keys(i)[region : region + 2])
    j = _per_pair(j, k)[..., None, :]
    return same_sequence & (first <= j) & (j < last)


def _per_pair(x: Tensor, rows: Tensor) -> Tensor:
    """(seqlen,) or (batch, seqlen) as (batch or 1, 1, seqlen): for all heads alike."""
    return x.expand(-1 if x.dim() > 1 else 1, rows.shape[1])[:, None]


def _batched(tensors: list[Tensor], packed: bool) -> list[Tensor]:
    return [x.unsqueeze(0) for x in tensors] if packed else list(tensors)


def _finite(lse: Tensor) -> Tensor:
    """Rows without keys have lse -inf; any finite number then makes their weights zero."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype)).repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _per_key_head(x: Tensor, k: Tensor) -> Tensor:
    """Sum what the query heads of a group contribute."""
    return x.unflatten(2, (k.shape[2], -1)).sum(3)
