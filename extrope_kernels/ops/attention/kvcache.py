"""ReRoPE, Leaky ReRoPE, InvLeaky ReRoPE and SelfExtend over a key/value cache."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ...methods import RopeFreqs
from .._shared import backends as _backends
from . import kvcache_ops
from .arguments import check_bool, check_real
from .kvcache_arguments import NAME, check

_ops = torch.ops.extrope
BACKENDS = ("reference", "cpu", "triton")


def rerope_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    freqs: RopeFreqs,
    *,
    cache_seqlens: Tensor | int,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    window: int,
    factor: float = math.inf,
    grouped: bool = False,
    softmax_scale: float | None = None,
    log_n: float | None = None,
    interleaved: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rerope_attention` of a sequence's last tokens over a cache of keys and values, at inference.

    The cache holds each key once, in the frame that its far queries see: as it came for ReRoPE
    (factor inf), else rotated to position j / factor, floored with `grouped`. Only the keys nearer
    than the window are turned, on the way, at every call; the cache is not. Write prompts with k
    and v too, then cache and attention agree whatever the frame.

    q: (batch, seqlen_q, heads_q, head_dim), not rotated; float32, bfloat16, float16 or float64.
    k_cache, v_cache: (batch, max_len, heads_k, head_dim), any strides with a contiguous last
        dimension; with block_table (num_blocks, block_size, heads_k, head_dim).
    cache_seqlens: int or (batch,) int32. With k and v: how many slots were in use before them.
        Else: how many are, the queries' own tokens included.
    k, v: (batch, seqlen_q, heads_k, head_dim), k not rotated: written into the cache first.
    block_table: (batch, max_blocks) int32: the blocks of each sequence in their order.
    cache_leftpad: (batch,) int32: the first slot in use, whose position is 0.
    freqs, window, factor, grouped, softmax_scale, log_n, interleaved: as for `rerope_attention`,
        the same in every call on one cache (window and log_n may change). inv_freq
        (rotary_dim/2,), or one row a sequence; XPOS's log_decay is refused.
    backend: "cpu", "triton", "reference"; None for the best on q's device. A named backend never
        falls back.

    Returns: out like q, and with return_lse the log-sum-exp of the logits (batch, heads_q,
        seqlen_q), float32. Queries before a sequence's first key have 0 and -inf.
    Raises: ValueError or TypeError that names the argument; NotImplementedError when the named
        backend cannot run here. On a GPU the values of integer tensors are not looked at, and what
        does not fit the cache is neither written nor read.
    """
    if not isinstance(freqs, RopeFreqs):
        raise TypeError(f"{NAME}: freqs must be a RopeFreqs, got {type(freqs).__name__}")
    if freqs.log_decay is not None:
        raise ValueError(f"{NAME}: freqs must have no log_decay (XPOS), got one")
    if freqs.axes is not None:
        raise ValueError(f"{NAME}: freqs must have no axes (mRoPE), got some")
    check_real(NAME, "factor", factor)
    check_bool(NAME, "return_lse", return_lse)
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    _check_tensors(tensors)
    if backend is not None:
        _backends.require(NAME, backend, BACKENDS, q.device.type)
    place = (freqs.inv_freq, _lengths(cache_seqlens, q), block_table, cache_leftpad)
    frame = {"window": window, "grouped": grouped, "interleaved": interleaved}
    if factor != math.inf:
        frame["factor"] = factor  # a schema's default cannot be infinite
    scale = {
        "softmax_scale": softmax_scale,
        "log_n": log_n,
        "attention_factor": freqs.attention_factor,
    }
    check(q, *kvcache_ops.parse(k_cache, v_cache, *place, **frame, **scale))
    append, decode = _functions(backend)
    if k is not None:  # what is wrong with the rest has shown: nothing is written in vain
        append(k_cache, v_cache, k, v, *place, **frame)
        scale["appended"] = k.shape[1]
    out, lse = decode(q, k_cache, v_cache, *place, **frame, **scale)
    return (out, lse) if return_lse else out


def _functions(backend: str | None):
    """append and decode, as an op or as the reference."""
    if backend == "reference":
        return (functools.partial(f, backend) for f in (kvcache_ops.append, kvcache_ops.decode))
    if backend == "triton":
        return _ops.rerope_attn_append_triton, _ops.rerope_attn_decode_triton
    return _ops.rerope_attn_append, _ops.rerope_attn_decode


def _check_tensors(tensors: dict[str, Tensor | None]) -> None:
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    if (k is None) != (v is None):
        given = "v" if k is None else "k"
        raise ValueError(f"{NAME}: k and v must be given together, got {given} alone")
    for name, x in tensors.items():
        if x is None and name in ("k", "v"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{NAME}: {name} must be a Tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            raise ValueError(f"{NAME}: {name} must be a dense tensor, got {x.layout}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{NAME} is for inference, got {name} that requires grad")
    if k is not None and k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"{NAME}: k must have q's batch and seqlen {tuple(q.shape[:2])}, "
            f"got {tuple(k.shape[:2])}"
        )


def _lengths(cache_seqlens: Tensor | int, q: Tensor) -> Tensor:
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, (int, torch.SymInt)):
        raise TypeError(
            f"{NAME}: cache_seqlens must be an int or a Tensor, got {type(cache_seqlens).__name__}"
        )
    if not 0 <= cache_seqlens < 2**31:
        raise ValueError(
            f"{NAME}: cache_seqlens must be between 0 and the cache's slots, got {cache_seqlens}"
        )
    return torch.full(q.shape[:1], cache_seqlens, dtype=torch.int32, device=q.device)
