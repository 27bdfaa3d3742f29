"""Attention over a key/value cache in plain PyTorch: the cache gathered, all scores at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.attention_call import AttentionCall
from .._shared.frames import rotate_keys, rotate_queries, row_scale, store_keys
from .arguments import KVCache


def decode(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """The last seqlen_q tokens of every sequence see the keys up to their own.

    q: (batch, seqlen_q, heads_q, head_dim), raw; k, v: (batch, seqlen_q, heads_k, head_dim), raw,
    to be written into the cache first, or None. Returns out like q and lse
    (batch, heads_q, seqlen_q); float32 inside, float64 for float64 tensors.
    """
    if k is not None:
        append(k, v, cache, call)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // cache.k.shape[2]
    lengths = cache.lengths()[:, None]
    i = lengths - q.shape[1] + torch.arange(q.shape[1], device=q.device)  # (batch, seqlen_q)
    j = torch.arange(cache.capacity, device=q.device).expand(q.shape[0], -1)
    stored, values = (x.to(wide).repeat_interleave(group, 2) for x in _gather(cache, j, lengths))
    block = torch.div(i, call.granularity, rounding_mode="floor") * call.granularity
    logits = q.new_full((), -torch.inf, dtype=wide)
    for region in call.regions:
        q_r = rotate_queries(q.to(wide), region.q_map(i), call)
        k_r = rotate_keys(stored, region.k_map, j, call)
        scores = torch.einsum("bihd,bjhd->bhij", q_r, k_r)
        first = (block + region.start)[..., None]
        here = (j[:, None] <= i[..., None]) & (j[:, None] >= first)
        logits = torch.where(here[:, None], scores, logits)
    logits = logits * call.scale(q.shape[-1])
    if call.log_n is not None:
        logits = logits * row_scale(i, call).to(wide)[:, None, :, None]
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("bhij,bjhd->bihd", weights, values).to(q.dtype), lse


def append(k: Tensor, v: Tensor, cache: KVCache, call: AttentionCall) -> None:
    """Write raw keys (batch, new, heads_k, head_dim) and values behind those of each sequence."""
    slots = cache.seqlens.long()[:, None] + torch.arange(k.shape[1], device=k.device)
    j = slots if cache.leftpad is None else slots - cache.leftpad[:, None]
    rows = cache.rows(slots)
    cache.k.index_put_(rows, store_keys(k, j, call))
    cache.v.index_put_(rows, v)


def _gather(cache: KVCache, j: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values by position, (batch, capacity, heads_k, head_dim); zero past the last."""
    valid = j < lengths
    slots = j if cache.leftpad is None else j + cache.leftpad[:, None]
    block, slot = cache.rows(torch.where(valid, slots, 0))
    if cache.block_table is not None:
        block = torch.where(valid, block, 0)
    return tuple(
        torch.where(valid[..., None, None], x[block, slot], 0.0) for x in (cache.k, cache.v)
    )
