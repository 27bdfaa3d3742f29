"""Attention over a cache in plain PyTorch: append, gather, and attend as without a cache."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .._math.dtypes import accumulator, dequantize, quantize, without_autocast
from ..attention.call import AttentionCall, lse_shape
from ..attention.reference import call_of_sequence, forward, store_keys
from ..cache.call import KVCache


@without_autocast
def decode(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Attend from the last tokens of every sequence to the keys up to their own.

    q: (batch, seqlen_q, heads_q, head_dim), raw, or packed (total, heads_q, head_dim) with
    call.cu_seqlens. k, v: raw, of the same tokens, written into the cache first; or None.
    Returns out like q, with v's head_dim, and lse (batch, heads_q, seqlen_q) or (heads_q, total).
    Computes in float32, in float64 for float64 tensors.
    """
    if call.cu_seqlens is not None:
        return _decode_packed(q, k, v, cache, call)
    if k is not None:
        q = q.clone()  # it may be a view of a slot that is written
        _append(k, v, cache, call)
    lengths = cache.lengths()
    first = lengths - q.shape[1]  # position of the first query; negative with too few keys
    call = call._replace(q_start=first, k_start=torch.zeros_like(first[:1]))
    keys, values = _gather(cache, first, call, q)
    out, lse = forward(q.to(keys.dtype), keys, values, call)
    return out.to(q.dtype), lse


def _decode_packed(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Decode one sequence after another; tokens past the last boundary get 0, and lse -inf."""
    out = q.new_zeros(*q.shape[:-1], cache.v.shape[-1])
    lse = q.new_full(lse_shape(q), -torch.inf, dtype=accumulator(q.dtype))
    for b, (begin, end) in enumerate(pairwise(call.cu_seqlens.tolist())):
        tokens = slice(begin, end)
        new = (None, None) if k is None else (k[None, tokens], v[None, tokens])
        own = _one_cache(b, cache, 0 if k is None else end - begin)
        out_b, lse_b = decode(q[None, tokens], *new, own, call_of_sequence(b, tokens, call))
        out[tokens], lse[:, tokens] = out_b[0], lse_b[0]
    return out, lse


def _one_cache(b: int, cache: KVCache, appended: int) -> KVCache:
    planes = (cache.k, cache.v)
    if cache.block_table is None:
        planes = tuple(x[b : b + 1] for x in planes)
    own = (cache.seqlens, cache.block_table, cache.leftpad)
    own = (None if x is None else x[b : b + 1] for x in own)
    return KVCache(*planes, *own, cache.scales, appended)


def _append(k: Tensor, v: Tensor, cache: KVCache, call: AttentionCall) -> None:
    """Append raw keys (batch, new, heads_k, head_dim) and values to each sequence's."""
    slots = cache.seqlens.long()[:, None] + torch.arange(k.shape[1], device=k.device)
    j = slots if cache.leftpad is None else slots - cache.leftpad[:, None]
    rows, new = cache.rows(slots), (store_keys(k, j, call), v.clone())
    for plane, x, scale in zip((cache.k, cache.v), new, cache.scales):
        plane.index_put_(rows, x if scale is None else quantize(x, scale))


def _gather(cache: KVCache, first: Tensor, call: AttentionCall, q: Tensor) -> tuple[Tensor, ...]:
    """Return keys and values by position: (batch, capacity, heads_k, head_dim), 0 if unseen."""
    wide = accumulator(q.dtype)
    capacity = cache.capacity if len(cache.k) else 0  # a table may name pages of an empty cache
    j = torch.arange(capacity, device=q.device).expand(q.shape[0], -1)
    seen = (j < cache.lengths()[:, None]) & (j >= call.first_keys(first[:, None])[0])
    if not q.shape[1]:
        seen = torch.zeros_like(seen)
    slots = j if cache.leftpad is None else j + cache.leftpad[:, None]
    block, slot = cache.rows(torch.where(seen, slots, 0))
    if cache.block_table is not None:
        block = torch.where(seen, block, 0)
    return tuple(
        torch.where(seen[..., None, None], dequantize(x[block, slot], scale, wide), 0.0)
        for x, scale in zip((cache.k, cache.v), cache.scales)
    )
