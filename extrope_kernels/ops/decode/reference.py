"""Attention over a key/value cache in plain PyTorch: the cache gathered, all scores at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from .._shared.attention_call import AttentionCall, lse_shape, row_scale
from .._shared.dtypes import accumulator, dequantize, quantize, without_autocast
from .._shared.frames import rotate_keys, rotate_queries, store_keys
from .._shared.softmax import capped, softmax_of
from .arguments import KVCache


@without_autocast
def decode(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """The last tokens of every sequence see the keys up to their own.

    q: (batch, seqlen_q, heads_q, head_dim), raw, or packed (total, heads_q, head_dim) with
    call.cu_seqlens; k, v: of the same tokens, raw, to be written into the cache first, or None.
    Returns out like q, of v's head_dim, and lse (batch, heads_q, seqlen_q) or (heads_q, total);
    float32 inside, float64 for float64 tensors.
    """
    if call.cu_seqlens is not None:
        return _decode_packed(q, k, v, cache, call)
    if k is not None:
        append(k, v, cache, call)
    wide = accumulator(q.dtype)
    group = q.shape[2] // cache.k.shape[2]
    lengths = cache.lengths()[:, None]
    i = lengths - q.shape[1] + torch.arange(q.shape[1], device=q.device)  # (batch, seqlen_q)
    j = torch.arange(cache.capacity, device=q.device).expand(q.shape[0], -1)
    firsts = call.first_keys(i)
    seen = (j < lengths) & (j >= firsts[0][:, :1]) if q.shape[1] else j < 0
    stored, values = (x.repeat_interleave(group, 2) for x in _gather(cache, j, seen, wide))
    scale, rows = call.scale(q.shape[-1]), row_scale(i, call)
    if rows is not None:
        scale = rows.to(wide).expand(i.shape)[:, None, :, None] * scale
    logits = q.new_full((), -torch.inf, dtype=wide)
    for region, first, last in zip(call.regions, firsts, firsts[1:]):
        q_r = rotate_queries(q.to(wide), region.q_map(i), call)
        k_r = rotate_keys(stored, region.k_map, j, call)
        scores = torch.einsum("bihd,bjhd->bhij", q_r, k_r) * scale
        here = (j[:, None] >= first[..., None]) & (j[:, None] < last[..., None])
        logits = torch.where(here[:, None], capped(scores, call), logits)
    weights, lse = softmax_of(logits, call)
    return torch.einsum("bhij,bjhd->bihd", weights, values).to(q.dtype), lse


def _decode_packed(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence; tokens past the last boundary get 0, and -inf as lse."""
    ends = call.cu_seqlens.tolist()
    out = q.new_zeros(*q.shape[:-1], cache.v.shape[-1])
    lse = q.new_full(lse_shape(q), -torch.inf, dtype=accumulator(q.dtype))
    for b, (begin, end) in enumerate(pairwise(ends)):
        tokens = slice(begin, end)
        new = (None, None) if k is None else (k[None, tokens], v[None, tokens])
        its_cache, its_call = _one_sequence(b, tokens, cache, call)
        out_b, lse_b = decode(q[None, tokens], *new, its_cache, its_call)
        out[tokens], lse[:, tokens] = out_b[0], lse_b[0]
    return out, lse


def _one_sequence(
    b: int, tokens: slice, cache: KVCache, call: AttentionCall
) -> tuple[KVCache, AttentionCall]:
    """The cache and the call of one sequence of packed ones."""
    planes = (cache.k, cache.v)
    if cache.block_table is None:
        planes = tuple(x[b : b + 1] for x in planes)
    rows = (None if x is None else x[b : b + 1] for x in (cache.block_table, cache.leftpad))
    appended = 0 if cache.cu_seqlens_new is None else tokens.stop - tokens.start
    inv_freq, scale = call.inv_freq, call.query_scale
    own = (cache.seqlens[b : b + 1], *rows, appended, None, cache.scales)
    return KVCache(*planes, *own), replace(
        call,
        cu_seqlens=None,
        inv_freq=inv_freq[b % inv_freq.shape[0]] if inv_freq.dim() == 2 else inv_freq,
        query_scale=None if scale is None else scale[tokens],
    )


def append(k: Tensor, v: Tensor, cache: KVCache, call: AttentionCall) -> None:
    """Write raw keys (batch, new, heads_k, head_dim) and values behind those of each sequence."""
    slots = cache.seqlens.long()[:, None] + torch.arange(k.shape[1], device=k.device)
    j = slots if cache.leftpad is None else slots - cache.leftpad[:, None]
    rows = cache.rows(slots)
    for plane, x, scale in zip((cache.k, cache.v), (store_keys(k, j, call), v), cache.scales):
        plane.index_put_(rows, x if scale is None else quantize(x, scale))


def _gather(cache: KVCache, j: Tensor, seen: Tensor, wide: torch.dtype) -> tuple[Tensor, ...]:
    """Keys and values by position, (batch, capacity, heads_k, head_dim); zero where not seen."""
    slots = j if cache.leftpad is None else j + cache.leftpad[:, None]
    block, slot = cache.rows(torch.where(seen, slots, 0))
    if cache.block_table is not None:
        block = torch.where(seen, block, 0)
    return tuple(
        torch.where(seen[..., None, None], dequantize(x[block, slot], scale, wide), 0.0)
        for x, scale in zip((cache.k, cache.v), cache.scales)
    )
