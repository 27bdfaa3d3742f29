"""What a call over a cache may be given: errors that name the argument, before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.attention_call import MAP_NUMBERS, AttentionCall
from .._shared.attention_checks import check_call, check_query_scale, check_rope
from .._shared.checks import DTYPES, check_cu_seqlens, check_dense, check_ints, overlaps_itself
from .._shared.dtypes import FP8, check_cache_dtype, check_scale_values, check_scales
from .arguments import KVCache


def check_decode(
    op: str,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: KVCache,
    call: AttentionCall,
) -> None:
    """Raise ValueError or TypeError that names the argument, for what has no meaning."""
    if (k is None) != (v is None):
        given = "v" if k is None else "k"
        raise ValueError(f"{op}: k and v must be given together, got {given} alone")
    packed = call.cu_seqlens is not None
    _check_rows(op, "q", q, packed)
    batch = q.shape[0]
    if packed:
        check_cu_seqlens(op, call.cu_seqlens, q, "cu_seqlens_q")
        batch = call.cu_seqlens.shape[0] - 1
    _check_cache(op, cache, q, batch)
    heads_q, heads_k = q.shape[-2], cache.k.shape[2]
    if heads_k == 0 or heads_q % heads_k:
        raise ValueError(f"{op}: k_cache's heads must divide q's {heads_q} heads, got {heads_k}")
    if k is not None:
        _check_new(op, k, v, cache, q, packed)
        if k.shape[:-2] != q.shape[:-2]:
            raise ValueError(
                f"{op}: k must have q's {'total' if packed else 'batch and seqlen'} "
                f"{tuple(q.shape[:-2])}, got {tuple(k.shape[:-2])}"
            )
    check_call(op, call, q, batch)
    check_query_scale(op, call.query_scale, q)


def check_append(op: str, k: Tensor, v: Tensor, cache: KVCache, call: AttentionCall) -> None:
    """The same for keys and values that are to be written into the cache."""
    _check_rows(op, "k", k)
    _check_cache(op, cache, k, k.shape[0])
    _check_new(op, k, v, cache, k)
    check_rope(op, call, k, k.shape[0])
    if len(call.maps) != MAP_NUMBERS:
        raise ValueError(f"{op}: stored must be {MAP_NUMBERS} numbers, got {len(call.maps)}")


def _check_new(
    op: str, k: Tensor, v: Tensor, cache: KVCache, like: Tensor, packed: bool = False
) -> None:
    for label, x, of in (("k", k, cache.k), ("v", v, cache.v)):
        _check_rows(op, label, x, packed)
        if x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"{op}: {label} must be {like.dtype} on {like.device} like the other tensors, "
                f"got {x.dtype} on {x.device}"
            )
        if x.shape[-2:] != of.shape[-2:]:
            raise ValueError(
                f"{op}: {label} must have {label}_cache's heads and head_dim "
                f"{tuple(of.shape[-2:])}, got {tuple(x.shape[-2:])}"
            )
    if v.shape[:-2] != k.shape[:-2]:
        raise ValueError(
            f"{op}: v must have k's tokens {tuple(k.shape[:-2])}, got {tuple(v.shape[:-2])}"
        )
    for label, x in (("k_cache", cache.k), ("v_cache", cache.v)):
        if overlaps_itself(x):
            raise ValueError(
                f"{op}: {label} must not be expanded to be written to, got strides {x.stride()}"
            )


def check_values(
    op: str, cache: KVCache, cu_seqlens_q: Tensor | None = None, tokens: int = 0
) -> None:
    """What only the values of the integer tensors show: on a CPU, where looking costs nothing.

    tokens: of the packed queries.
    """
    if cache.seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens_q is not None:
        if cu_seqlens_q[0] != 0 or (cu_seqlens_q.diff() < 0).any():
            raise ValueError(f"{op}: cu_seqlens_q must rise from 0, got {cu_seqlens_q.tolist()}")
        if cu_seqlens_q[-1] > tokens:
            raise ValueError(
                f"{op}: cu_seqlens_q must rise to q's {tokens} tokens at most, "
                f"got {cu_seqlens_q.tolist()}"
            )
    ends, writes = cache.ends(), cache.appended or cache.cu_seqlens_new is not None
    if ends.numel() and not (cache.seqlens.min() >= 0 and ends.max() <= cache.capacity):
        new = cache.appended or "its"
        raise ValueError(
            f"{op}: cache_seqlens must be between 0 and the cache's {cache.capacity} slots"
            + (f", {new} new tokens included" if writes else "")
            + f", got {cache.seqlens.tolist()}"
        )
    if cache.leftpad is not None and cache.leftpad.numel() and cache.leftpad.min() < 0:
        raise ValueError(f"{op}: cache_leftpad must be >= 0, got {cache.leftpad.tolist()}")
    check_scale_values(op, cache.scales)
    if cache.block_table is None:
        return
    pages = torch.arange(cache.block_table.shape[1], device="cpu")
    used = cache.block_table[pages * cache.k.shape[1] < ends[:, None]]
    if used.numel() and not (used.min() >= 0 and used.max() < cache.k.shape[0]):
        raise ValueError(
            f"{op}: block_table must name pages between 0 and {cache.k.shape[0] - 1}, "
            f"got {used.tolist()}"
        )


def _check_cache(op: str, cache: KVCache, x: Tensor, batch: int) -> None:
    """x: (batch, tokens, heads, head_dim), queries or new keys; or packed queries."""
    paged = cache.block_table is not None
    for label, plane in (("k_cache", cache.k), ("v_cache", cache.v)):
        _check_rows(op, label, plane, dtypes=(*DTYPES, FP8))
        check_cache_dtype(op, label, plane, x, cache.scales)
    if cache.v.shape[:-1] != cache.k.shape[:-1]:
        raise ValueError(
            f"{op}: v_cache must have k_cache's shape {tuple(cache.k.shape)} but for head_dim, "
            f"got {tuple(cache.v.shape)}"
        )
    if cache.k.shape[3] != x.shape[-1] or not (paged or cache.k.shape[0] == batch):
        expected = ("num_blocks, block_size" if paged else f"{batch}, max_len") + ", heads_k"
        raise ValueError(
            f"{op}: k_cache must be ({expected}, {x.shape[-1]}), got {tuple(cache.k.shape)}"
        )
    check_scales(op, cache.scales, cache.k.shape[2], x)
    check_ints(op, "cache_seqlens", cache.seqlens, (batch,), x)
    if cache.leftpad is not None:
        check_ints(op, "cache_leftpad", cache.leftpad, (batch,), x)
    if paged:
        check_ints(op, "block_table", cache.block_table, (batch, None), x)
        if cache.k.shape[1] == 0:
            raise ValueError(f"{op}: k_cache must have a block_size >= 1, got 0")


def _check_rows(
    op: str,
    label: str,
    x: Tensor,
    packed: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    check_dense(op, label, x)
    dims = 3 if packed else 4
    if x.dim() != dims:
        raise ValueError(
            f"{op}: {label} must have {dims} dimensions{' with cu_seqlens_q' if packed else ''}, "
            f"got shape {tuple(x.shape)}"
        )
    if x.dtype not in dtypes:
        raise ValueError(
            f"{op}: {label} must be float32, bfloat16, float16 or float64, got {x.dtype}"
        )
    if x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel() > 0:
        raise ValueError(
            f"{op}: {label} must be contiguous in its last dimension, got strides {x.stride()}"
        )
