"""Region attention in plain PyTorch, all scores at once: the oracle, O(seqlen**2) in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .regions import Layout


def forward(q: list[Tensor], k: list[Tensor], v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """One softmax over every region's scores; differentiable to any order.

    q, k: a rotated frame for each region, (batch, seqlen_q, heads_q, head_dim) and
    (batch, seqlen_k, heads_k, head_dim), or (total, heads, head_dim) with layout.cu_seqlens;
    v like k[0]. Returns out like q[0] and lse (batch, heads_q, seqlen_q), or (heads_q, total).
    """
    packed = layout.cu_seqlens is not None
    q, k, v = _batched(q, packed), _batched(k, packed), _batched([v], packed)[0]
    logits = _logits(q, k, layout)
    empty = (logits == -torch.inf).all(-1)
    # What an empty row gets here is never used, but has to be finite for the gradients to be.
    lse = torch.logsumexp(logits.masked_fill(empty[..., None], 0.0), dim=-1)
    weights = torch.exp(logits - lse[..., None])
    out = torch.einsum("bhij,bjhd->bihd", weights, _per_query_head(v, q[0])).to(q[0].dtype)
    out = out.contiguous()
    lse = lse.masked_fill(empty, -torch.inf)
    return (out[0], lse[0]) if packed else (out, lse)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The gradients of every frame of q and k (wide), and of v (in v's dtype)."""
    packed = layout.cu_seqlens is not None
    q, k = _batched(q, packed), _batched(k, packed)
    v, dout, out, lse = _batched([v, dout, out, lse], packed)
    wide = _wide(v)
    weights = torch.exp(_logits(q, k, layout) - _finite(lse)[..., None])
    dv = _per_key_head(torch.einsum("bhij,bihd->bjhd", weights, dout.to(wide)), v)
    delta = (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - (dlse[None] if packed else dlse)
    d_weights = torch.einsum("bihd,bjhd->bhij", dout.to(wide), _per_query_head(v, q[0]))
    d_scores = weights * (d_weights - delta[..., None]) * _scale(layout, wide)
    dq, dk = [], []
    for region, (q_r, k_r) in enumerate(zip(q, k)):
        here = torch.where(_visible(region, q_r, k_r, layout), d_scores, 0.0)
        dq.append(torch.einsum("bhij,bjhd->bihd", here, _per_query_head(k_r, q_r)))
        dk.append(_per_key_head(torch.einsum("bhij,bihd->bjhd", here, q_r.to(wide)), k_r))
    unpack = (lambda x: x[0]) if packed else (lambda x: x)
    return [unpack(x) for x in dq], [unpack(x) for x in dk], unpack(dv.to(v.dtype))


def _logits(q: list[Tensor], k: list[Tensor], layout: Layout) -> Tensor:
    """(batch, heads_q, seqlen_q, seqlen_k): every pair's score in its region, -inf outside."""
    wide = _wide(q[0])
    logits = torch.tensor(-torch.inf, dtype=wide, device=q[0].device)
    for region, (q_r, k_r) in enumerate(zip(q, k)):
        scores = torch.einsum("bihd,bjhd->bhij", q_r.to(wide), _per_query_head(k_r, q_r))
        logits = torch.where(_visible(region, q_r, k_r, layout), scores, logits)
    return logits * _scale(layout, wide)


def _scale(layout: Layout, wide: torch.dtype) -> Tensor | float:
    if layout.row_scale is None:
        return layout.softmax_scale
    return layout.row_scale.to(wide)[:, None] * layout.softmax_scale


def _visible(region: int, q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """(seqlen_q, seqlen_k) bool: does this region hold the pair?"""
    i = torch.arange(q.shape[1], device=q.device) + (k.shape[1] - q.shape[1])
    j = torch.arange(k.shape[1], device=q.device)
    same_sequence = torch.tensor(True, device=q.device)
    if layout.cu_seqlens is not None:
        sequence = torch.searchsorted(layout.cu_seqlens, j.to(torch.int32), right=True) - 1
        same_sequence = sequence[:, None] == sequence
        i = j = j - layout.cu_seqlens[sequence.clamp(max=layout.cu_seqlens.shape[0] - 2)]
    block = i // layout.granularity * layout.granularity
    starts = [block + start for start in layout.starts] + [i + 1]
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
