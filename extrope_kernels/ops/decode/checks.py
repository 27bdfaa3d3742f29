"""Refuse wrong calls with a cache before anything is written."""

from __future__ import annotations

from torch import Tensor

from .._tables.checks import check_cu_seqlens, check_rows
from ..attention.call import AttentionCall
from ..attention.checks import check_options
from ..cache.call import KVCache
from ..cache.checks import check_cache, check_new


def check_decode(
    op: str, q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> None:
    """Check a call with a cache; k and v are written into it first."""
    if (k is None) != (v is None):
        given = "v" if k is None else "k"
        raise ValueError(f"{op}: k and v must be given together, got {given} alone")
    packed = call.cu_seqlens is not None
    check_rows(op, "q", q, packed, boundaries="cu_seqlens_q")
    batch = q.shape[0]
    if packed:
        check_cu_seqlens(op, call.cu_seqlens, q, "cu_seqlens_q")
        batch = call.cu_seqlens.shape[0] - 1
    check_cache(op, cache, q, batch)
    heads_q, heads_k = q.shape[-2], cache.k.shape[2]
    if heads_k == 0 or heads_q % heads_k:
        raise ValueError(f"{op}: k_cache's heads must divide q's {heads_q} heads, got {heads_k}")
    if k is not None:
        check_new(op, k, v, cache, q)
    check_options(op, call, q, heads_k, batch)
