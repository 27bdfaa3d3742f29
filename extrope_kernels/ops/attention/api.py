"""The public functions: attention over a sequence, and over a cache of keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores import UNROTATED, Score
from .._tables.checks import REFUSALS, has_values, narrowed, raise_as_value_error, refuse_flags
from .._tables.decay import check_new_keys
from .._torch import backends as _backends
from .._torch.autograd import constant_when_compiled
from ..cache.call import KVCache, Scales, cache_lengths, check_slots
from . import flash_attn, op
from .call import make_call
from .checks import (
    check_attention,
    check_decode,
    check_kinds,
    check_method,
    check_values,
    warn_of_unseeing_queries,
)
from .decay import check_decay
from .log_n import with_log_n, with_log_n_of_cache

BACKENDS = ("reference", "cpu", "triton", "flash_attn")
DECODE_BACKENDS = ("reference", "cpu", "triton")


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    score: Score | None = None,
    *,
    softmax_scale: float | None = None,
    log_n: float | None = None,
    query_scale: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
    q_start: Tensor | int | None = None,
    k_start: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    rotary_offset: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
    keys_stored: bool = False,
) -> Tensor | Any:
    """Rotate queries and keys and attend causally; a score method may change their distances.

    The rotation is included: pass raw q and k. `score` maps the distance i - j of query i and key j
    to a relative position, and one softmax runs over all keys j <= i. There is neither a mask nor a
    switch for causal: cu_seqlens, q_start, k_start and sliding_window say which keys are seen.

    q: (batch, seqlen_q, heads_q, head_dim), not rotated; float32, bfloat16, float16 or float64;
        any strides with a contiguous last dimension.
    k, v: (batch, seqlen_k, heads_k, head_dim), k not rotated; heads_k divides heads_q, and nothing
        is expanded. v may have another head_dim (MLA: 192 and 128). If seqlen_q < seqlen_k, the
        queries are the last of the sequence. With cu_seqlens all are (total, heads, head_dim).
    freqs: from `extrope_kernels.methods`, on q's device; inv_freq (rotary_dim/2,), one row per
        sequence, or (1 or batch, heads_k, rotary_dim/2) as from `methods.ms_poe`: heads of q have
        those of the head of k that they share. attention_factor multiplies the rotated dims of q
        and of k, near and far.
    score: from `extrope_kernels.scores`, such as scores.rerope(window=1024), or your own `Score`;
        None is plain RoPE.
    softmax_scale: factor of the logits; head_dim**-0.5 by default.
    log_n: the training length, to multiply query i by max(1, ln(i + 1) / ln(log_n)): the factors
        of `scores.query_scale.log_n`, beside those of query_scale.
    query_scale: (seqlen_q,) or (batch, seqlen_q) float32 (float64 with float64 tensors), packed
        (total,): factors of each query's logits, such as Llama 4's and Ministral's temperatures.
    softcap: c > 0 replaces logits by c * tanh(logits / c), as in Gemma 2; 0 does not.
    sinks: (heads_q,) float32 (float64 with float64 tensors): logits that join each row's softmax
        and have no value, as in GPT-OSS. They are neither scaled nor capped.
    sliding_window: keys j with i - j >= sliding_window are not seen, in any region.
    q_start, k_start: positions of the first query and the first key, for pieces of longer
        sequences: an int or (batch,) int32, with cu_seqlens (sequences,), from 0 on, below 2**29.
        Regions, windows and log_n count from absolute positions. By default k_start is 0, and
        queries and keys end together.
    cu_seqlens: (sequences + 1,) int32 or int64, the boundaries of packed sequences, from 0 to the
        total. On a GPU nothing checks that, and tokens past the last get no result or gradient.
    interleaved: pairs of rotated dims are (2i, 2i + 1), as in GPT-J; else (i, i + rotary_dim/2).
    rotary_offset: the first of the 2 * len(inv_freq) dims that rotate, in their place: 128 if the
        last 64 of 192 do (latent attention). Even, unless backend="reference".
    return_lse: return the log-sum-exp of the logits too.
    backend: "cpu", "triton", "flash_attn", "reference"; None for the best on q's device. A named
        backend never falls back.
    keys_stored: k is rotated by `score.stored`, as in a cache, not raw.

    Returns: out like q, with v's head_dim, and with return_lse the log-sum-exp of the logits and
        the sink, (batch, heads_q, seqlen_q) or (heads_q, total), float32 (float64 with float64
        tensors); -inf for a row without keys or sink. Differentiable in q, k, v, sinks and
        inv_freq; to any order with backend="reference".
    Raises: ValueError or TypeError that begins with the score's name and names the argument;
        NotImplementedError if the named backend cannot run here.
    """
    name = "rope_attention" if score is None else getattr(score, "name", "rope_attention")
    refuse_flags(name, interleaved=interleaved, return_lse=return_lse, keys_stored=keys_stored)
    check_method(name, freqs, score)
    cu_seqlens = narrowed(cu_seqlens)
    call = make_call(
        freqs,
        score,
        keys_stored=keys_stored,
        cu_seqlens=cu_seqlens,
        sinks=sinks,
        query_scale=query_scale,
        q_start=_start(name, "q_start", q_start, q),
        k_start=_start(name, "k_start", k_start, q),
        softmax_scale=softmax_scale,
        interleaved=interleaved,
        rotary_offset=rotary_offset,
        softcap=softcap,
        sliding_window=sliding_window,
    )
    check_kinds(name, call)
    if backend is not None and isinstance(q, Tensor):
        _backends.require(name, backend, BACKENDS, q.device.type, missing)
    compiling = torch.compiler.is_compiling()
    if not compiling and (log_n is not None or freqs.log_decay is not None):
        check_attention(name, q, k, v, call)  # what reads tensors before the op does
        check_values(name, call, len(q))
    if log_n is not None:
        call = with_log_n(name, log_n, q, k, call)
    if compiling:
        out, lse = op.forward(q, k, v, call, backend)
        return (out, lse) if return_lse else out
    if freqs.log_decay is not None:
        check_decay(name, freqs, q, k, call)
    try:
        out, lse = op.forward(q, k, v, call, backend)
    except REFUSALS as error:
        # The op checks its arguments before any kernel. What it refuses is said in this function's
        # words, but for limits of a backend.
        check_attention(name, q, k, v, call)
        check_values(name, call, len(q))
        raise_as_value_error(error, "attention", name)
        raise
    warn_of_unseeing_queries(name, q, k, call)
    return (out, lse) if return_lse else out


def rope_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    freqs: RopeFreqs,
    score: Score | None = None,
    *,
    cache_seqlens: Tensor | int,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    log_n: float | None = None,
    query_scale: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
    interleaved: bool = False,
    rotary_offset: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
    stored: str | None = None,
) -> Tensor | Any:
    """Attend from a sequence's last tokens over a cache of keys and values, at inference.

    The attention is that of `rope_attention`. The cache holds each key once, rotated by
    `score.stored`, as far queries see it: raw for ReRoPE, at its own position for plain RoPE and
    STRING. Every call rotates nearer keys as it reads them; the cache does not change. Write
    prompts by k and v too: then cache and attention agree for every score.

    q: (batch, seqlen_q, heads_q, head_dim), not rotated; float32, bfloat16, float16 or float64.
        With cu_seqlens_q (total, heads_q, head_dim).
    k_cache, v_cache: (batch, max_len, heads_k, head_dim), any strides with a contiguous last
        dimension; with block_table (num_blocks, block_size, heads_k, head_dim). v_cache may have
        another head_dim. Both in q's dtype, or float8_e4m3fn with k_scale and v_scale.
    cache_seqlens: (batch,) int32 or int64, or one int for all (a CUDA graph would replay it
        unchanged): the slots in use. With k and v: before they are written. Else the queries' own
        tokens count.
    k, v: the keys and values of q's tokens, (batch, seqlen_q, heads_k, head_dim) or (total,
        heads_k, head_dim), k not rotated. They are written into the cache first.
    cu_seqlens_q: (batch + 1,) int32 or int64, the boundaries of packed queries: prefill chunks and
        single tokens of many sequences in one call. A sequence may have none. Tokens past the last
        boundary are padding: they get 0 and -inf, and are not written.
    block_table: (batch, max_blocks) int32: the blocks of each sequence, in order.
    k_scale, v_scale: (heads_k,) float32, positive, for a cache in float8_e4m3fn: a key or value is
        its stored number times its head's scale. Writes divide by the scale, round to nearest even,
        and clamp at 448 either way.
    cache_leftpad: (batch,) int32: the first slot in use, whose position is 0.
    freqs, score: as for `rope_attention`. All calls on one cache must have the same freqs and
        score.stored, unless it is raw. XPOS's log_decay is refused except
        for scores that store keys by blocks.
    softmax_scale, log_n, query_scale, softcap, sinks, sliding_window: as for `rope_attention`.
    interleaved, rotary_offset, return_lse: as for `rope_attention`.
    stored: "raw" keeps keys unrotated; every call rotates all of them, by its own freqs. So
        frequencies may follow the length, and a key may be read at any position. None stores keys
        by score.stored.
    backend: "cpu", "triton", "reference"; None for the best on q's device. A named backend never
        falls back.

    Returns: out like q, with v's head_dim, and with return_lse the log-sum-exp of the logits and
        the sink (batch, heads_q, seqlen_q), or (heads_q, total), float32 (float64 with float64
        tensors). Queries before a sequence's first key have 0, and -inf or the sink.
    Raises: ValueError or TypeError that names the argument, before anything is written;
        NotImplementedError if the named backend cannot run here. On a GPU the values of integer
        tensors are not checked. Slots past the cache's end are neither written nor read. Nothing is
        written to a page that does not exist; reading one is undefined.
    """
    name = "rope_attention_with_kvcache"
    name = name if score is None else getattr(score, "name", name)
    refuse_flags(name, interleaved=interleaved, return_lse=return_lse)
    check_method(name, freqs, score)
    if stored not in (None, "raw"):
        raise ValueError(f"{name}: stored must be None or 'raw', got {stored!r}")
    _check_stored_decay(name, freqs, None if stored else score)
    cu_seqlens_q = narrowed(cu_seqlens_q)
    cache_seqlens = cache_lengths(name, cache_seqlens, q, cu_seqlens_q, "cu_seqlens_q")
    call = make_call(
        freqs,
        score,
        keys_stored=True,
        cu_seqlens=cu_seqlens_q,
        sinks=sinks,
        query_scale=query_scale,
        softmax_scale=softmax_scale,
        interleaved=interleaved,
        rotary_offset=rotary_offset,
        softcap=softcap,
        sliding_window=sliding_window,
    )
    if stored is not None:
        call = call._replace(score=replace(call.score, stored=UNROTATED))
    check_kinds(name, call)
    appended = k.shape[1] if isinstance(k, Tensor) and not k.is_nested and k.dim() == 4 else 0
    cached = (cache_seqlens, block_table, cache_leftpad, Scales(k_scale, v_scale))
    new = (appended, None if k is None else cu_seqlens_q)
    cache = KVCache(k_cache, v_cache, *cached, *new)
    compiling = torch.compiler.is_compiling()
    _refuse_gradients(name, q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    if backend is not None and isinstance(q, Tensor):
        _backends.require(name, backend, DECODE_BACKENDS, q.device.type)
    if not compiling and (log_n is not None or freqs.log_decay is not None):
        check_decode(name, q, k, v, cache, call)  # what reads tensors before the op does
    if log_n is not None:
        call = with_log_n_of_cache(name, log_n, q, cache, call)
    if compiling:
        out, lse = op.decode(q, k, v, cache, call, backend)
        return (out, lse) if return_lse else out
    if freqs.log_decay is not None:
        check_new_keys(name, freqs, score, k, cache_seqlens, cache_leftpad, cu_seqlens_q)
    try:
        out, lse = op.decode(q, k, v, cache, call, backend)
    except REFUSALS as error:  # of the op, before any write; said as in rope_attention
        check_decode(name, q, k, v, cache, call)
        check_slots(name, cache, call.cu_seqlens, len(q))
        raise_as_value_error(error, "decode", name)
        raise
    return (out, lse) if return_lse else out


@constant_when_compiled
def missing(backend: str, device: str | None = None) -> str | None:
    """Return why `backend` cannot run here, in one line; None if it can."""
    return flash_attn.missing() if backend == "flash_attn" else _backends.missing(backend, device)


def backends() -> dict[str, str]:
    """Return each backend's state here: "available", or the reason why not."""
    return {name: missing(name) or "available" for name in BACKENDS}


def _start(op: str, name: str, start: Tensor | int | None, q: Tensor) -> Tensor | None:
    """Return a start as a tensor for the ops."""
    most = 2**29  # Triton's kernels add starts and windows in int32
    if isinstance(start, Tensor):
        dense = start.layout == torch.strided and start.numel() > 0
        whole = dense and start.dtype == torch.int32
        if whole and has_values(start) and start.max() >= most:
            raise ValueError(f"{op}: {name} must be between 0 and 2**29, got {start.tolist()}")
        return start
    if start is None:
        return None
    if isinstance(start, bool) or not isinstance(start, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int or a Tensor, got {type(start).__name__}")
    if not isinstance(q, Tensor):
        raise TypeError(f"{op}: q must be a Tensor, got {type(q).__name__}")
    if not 0 <= start < most:
        raise ValueError(f"{op}: {name} must be between 0 and 2**29, got {start}")
    return torch.full((1,), start, dtype=torch.int32, device=q.device)


def _check_stored_decay(op: str, freqs: RopeFreqs, score: Score | None) -> None:
    if freqs.log_decay is not None and not (score and score.stored.modulus):
        raise ValueError(
            f"{op}: freqs must have no log_decay (XPOS), whose amplitudes grow with the position, "
            "got one"
        )


def _refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{op}: {name} must not require grad, got one that does; the op is for inference"
            )
