"""Refuse wrong calls with a cache before anything is written."""

from __future__ import annotations

from torch import Tensor

from .._tables import specs
from ..attention.call import CALL, AttentionCall, Q, check_options
from ..cache.call import KVCache, check_cache, check_new

_CALL = tuple(field.spec for field in CALL)
_QUERIES = (Q, _CALL[0]._replace(name="cu_seqlens_q"))


def check_decode(
    op: str, q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> None:
    """Check a call with a cache; k and v are written into it first."""
    if (k is None) != (v is None):
        given = "v" if k is None else "k"
        raise ValueError(f"{op}: k and v must be given together, got {given} alone")
    packed, like, sizes = call.cu_seqlens is not None, ("q", q), {}
    table = specs.for_rows(_QUERIES, packed, "cu_seqlens_q")
    specs.check(op, table, (q, call.cu_seqlens), sizes)
    check_cache(op, cache, sizes, like, packed)
    heads_q, heads_k = sizes["heads_q"][0], sizes["heads_k"][0]
    if heads_k == 0 or heads_q % heads_k:
        raise ValueError(f"{op}: k_cache's heads must divide q's {heads_q} heads, got {heads_k}")
    if k is not None:
        new = sizes if packed else sizes | {"seqlen": sizes["seqlen_q"]}
        check_new(op, k, v, cache, new, like, packed)
    tensors = [getattr(call, field.name) for field in CALL]
    found = specs.check(op, specs.for_rows(_CALL, packed), tensors, sizes, like)
    check_options(op, call, found["pairs"], found["head_dim"])
    _check_decay(op, cache, call)


def _check_decay(op: str, cache: KVCache, call: AttentionCall) -> None:
    """Refuse XPOS if a region that this cache can have sees keys by another map than the stored.

    Keys are rotated on as they are read, but keep the amplitudes with which they were written.
    """
    others = [x.k_map for x in call.regions if x.k_map != call.stored]
    if call.log_decay is None or not others:
        return  # before a graph would be bound to a capacity
    if any(region.k_map in others for region in call.trimmed(cache.capacity)):
        raise ValueError(
            f"{op}: log_decay (XPOS) needs keys that are stored as every region sees them, by "
            f"{call.stored}, got {others[0]}"
        )
