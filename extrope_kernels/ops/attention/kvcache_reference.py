"""Attention over a key/value cache in plain PyTorch: the cache gathered, all scores at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .frames import Call, log_n_scale
from .kvcache_arguments import KVCache

_EVERY_REGION = 1 << 62  # a length past any window


def decode(q: Tensor, cache: KVCache, call: Call) -> tuple[Tensor, Tensor]:
    """The last seqlen_q tokens of every sequence see the keys up to their own.

    q: (batch, seqlen_q, heads_q, head_dim), raw. Returns out like q and lse
    (batch, heads_q, seqlen_q); float32 inside, float64 for float64 tensors.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // cache.k.shape[2]
    lengths = cache.lengths()[:, None]
    i = lengths - q.shape[1] + torch.arange(q.shape[1], device=q.device)  # (batch, seqlen_q)
    j = torch.arange(cache.capacity, device=q.device)
    stored, v = (x.to(wide).repeat_interleave(group, dim=2) for x in _gather(cache, j, lengths))
    regions = call.score.regions(_EVERY_REGION)
    logits = q.new_full((), -torch.inf, dtype=wide)
    for region in regions:
        q_r = turn(q.to(wide), region.q_positions(i.double()), call, call.attention_factor**2)
        k_r = stored
        if region.k_positions != call.score.stored_position:
            k_r = turn(stored, unturned(region.k_positions, j.double(), call), call)
        scores = torch.einsum("bihd,bjhd->bhij", q_r, k_r)
        here = (j <= i[..., None]) & (j >= i[..., None] + region.start)
        logits = torch.where(here[:, None], scores, logits)
    logits = logits * (call.softmax_scale or q.shape[-1] ** -0.5)
    if call.log_n is not None:
        logits = logits * log_n_scale(i.double(), call.log_n).to(wide)[:, None, :, None]
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("bhij,bjhd->bihd", weights, v).to(q.dtype), lse


def append(cache: KVCache, k: Tensor, v: Tensor, call: Call) -> None:
    """Write raw keys (batch, new, heads_k, head_dim) and values behind those of each sequence."""
    slots = cache.seqlens.long()[:, None] + torch.arange(k.shape[1], device=k.device)
    position = call.score.stored_position
    if position is not None:
        j = slots if cache.leftpad is None else slots - cache.leftpad[:, None]
        k = turn(k, position(j.double()), call)
    rows = cache.rows(slots)
    cache.k.index_put_(rows, k)
    cache.v.index_put_(rows, v)


def unturned(positions, j: Tensor, call: Call) -> Tensor:
    """How far keys must still turn from where the cache has them to positions(j)."""
    stored = call.score.stored_position
    return positions(j) if stored is None else positions(j) - stored(j)


def turn(x: Tensor, position: Tensor, call: Call, amplitude: float = 1.0) -> Tensor:
    """Rotate x (batch, n, heads, head_dim) to float64 positions (batch, n) or (n,)."""
    if position.shape[0] != x.shape[0] or position.dim() == 1:
        position = position.expand(x.shape[0], x.shape[1])
    options = {"attention_factor": amplitude, "interleaved": call.interleaved}
    return torch.ops.extrope.rope_fwd(x, None, call.inv_freq, position, **options)[0]


def _gather(cache: KVCache, j: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values by position, (batch, capacity, heads_k, head_dim); zero past the last."""
    live = (j < lengths)[..., None, None]
    slots = j if cache.leftpad is None else j + cache.leftpad[:, None]
    first_of_padding = torch.where(live[..., 0, 0], slots, 0)
    if cache.block_table is None:
        rows = cache.rows(first_of_padding)
        return tuple(torch.where(live, x[rows], 0.0) for x in (cache.k, cache.v))
    page, slot = cache.rows(first_of_padding)
    rows = (torch.where(live[..., 0, 0], page, 0), slot)
    return tuple(torch.where(live, x[rows], 0.0) for x in (cache.k, cache.v))
