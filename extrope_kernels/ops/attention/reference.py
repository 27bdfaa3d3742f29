"""Attention in plain PyTorch, all scores at once: the oracle, O(seqlen**2) in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.attention_call import AttentionCall
from .._shared.frames import row_scale
from .._shared.positions import sequence_of_token
from .frames import positions, rotate, unrotate


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """One softmax over every region's scores; differentiable to any order.

    q, k: raw, (batch, seqlen_q, heads_q, head_dim) and (batch, seqlen_k, heads_k, head_dim), or
    (total, heads, head_dim) with call.cu_seqlens; v like k. Returns out like q and lse
    (batch, heads_q, seqlen_q), or (heads_q, total).
    """
    packed = call.cu_seqlens is not None
    q_frames, k_frames = rotate(q, k, call)
    q_frames, k_frames = _batched(q_frames, packed), _batched(k_frames, packed)
    (values,) = _batched([v], packed)
    logits = _logits(q_frames, k_frames, call)
    empty = (logits == -torch.inf).all(-1)
    # What an empty row gets here is never used, but has to be finite for the gradients to be.
    lse = torch.logsumexp(logits.masked_fill(empty[..., None], 0.0), dim=-1)
    weights = torch.exp(logits - lse[..., None])
    values = _per_query_head(values, q_frames[0])
    out = torch.einsum("bhij,bjhd->bihd", weights, values).to(q.dtype).contiguous()
    lse = lse.masked_fill(empty, -torch.inf)
    return (out[0], lse[0]) if packed else (out, lse)


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
    """The gradients of q, k and v, each in its dtype."""
    packed = call.cu_seqlens is not None
    q_frames, k_frames = rotate(q, k, call)
    q_r, k_r = _batched(q_frames, packed), _batched(k_frames, packed)
    values, dout, out, lse = _batched([v, dout, out, lse], packed)
    wide = _wide(v)
    weights = torch.exp(_logits(q_r, k_r, call) - _finite(lse)[..., None])
    dv = _per_key_head(torch.einsum("bhij,bihd->bjhd", weights, dout.to(wide)), values)
    delta = (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - (dlse[None] if packed else dlse)
    d_weights = torch.einsum("bihd,bjhd->bhij", dout.to(wide), _per_query_head(values, q_r[0]))
    d_scores = weights * (d_weights - delta[..., None]) * _scale(q_r[0], k_r[0], call)
    dq, dk = [], []
    for region in range(len(q_r)):
        here = torch.where(_visible(region, q_r[0], k_r[0], call), d_scores, 0.0)
        keys = _per_query_head(k_r[region], q_r[0])
        dq.append(torch.einsum("bhij,bjhd->bihd", here, keys))
        queries = q_r[region].to(wide)
        dk.append(_per_key_head(torch.einsum("bhij,bihd->bjhd", here, queries), k_r[region]))
    if packed:
        dq, dk, dv = [x[0] for x in dq], [x[0] for x in dk], dv[0]
    return *unrotate(dq, dk, q, k, call), dv.to(v.dtype)


def _logits(q: list[Tensor], k: list[Tensor], call: AttentionCall) -> Tensor:
    """(batch, heads_q, seqlen_q, seqlen_k): every pair's score in its region, -inf outside."""
    wide = _wide(q[0])
    logits = torch.tensor(-torch.inf, dtype=wide, device=q[0].device)
    for region, (q_r, k_r) in enumerate(zip(q, k)):
        scores = torch.einsum("bihd,bjhd->bhij", q_r.to(wide), _per_query_head(k_r, q_r))
        logits = torch.where(_visible(region, q_r, k_r, call), scores, logits)
    return logits * _scale(q[0], k[0], call)


def _scale(q: Tensor, k: Tensor, call: AttentionCall) -> Tensor | float:
    scale = call.scale(q.shape[-1])
    if call.log_n is None:
        return scale
    i, _ = positions(q, k, call.cu_seqlens)
    return row_scale(i, call).to(_wide(q))[:, None] * scale


def _visible(region: int, q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
    """(seqlen_q, seqlen_k) bool: does this region hold the pair?"""
    i, j = positions(q, k, call.cu_seqlens)
    same_sequence = torch.tensor(True, device=q.device)
    if call.cu_seqlens is not None:
        sequence = sequence_of_token(call.cu_seqlens, k.shape[1])
        same_sequence = sequence[:, None] == sequence
    block = i // call.granularity * call.granularity
    starts = [block + start for start in call.starts] + [i + 1]
    first, last = starts[region], starts[region + 1]
    return same_sequence & (first[:, None] <= j) & (j < last[:, None]) & (j <= i[:, None])


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _batched(tensors: list[Tensor], packed: bool) -> list[Tensor]:
    return [x.unsqueeze(0) for x in tensors] if packed else list(tensors)


def _finite(lse: Tensor) -> Tensor:
    """Rows without keys have lse -inf; any finite number then makes their weights zero."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.to(_wide(x)).repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _per_key_head(x: Tensor, k: Tensor) -> Tensor:
    """Sum what the query heads of a group contribute."""
    return x.unflatten(2, (k.shape[2], -1)).sum(3)
