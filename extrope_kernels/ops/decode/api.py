"""The public function: attention over a cache of keys and values."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..._names import explains_wrong_calls
from ...methods import RopeFreqs
from ...scores import Score
from .._tables.checks import REFUSALS, raise_as_value_error
from .._tables.decay import check_new_keys
from .._torch.library import require
from ..attention import check_given, check_numbers, check_rotated, make_call, scaled_by_log_n
from ..attention.call import AttentionCall
from ..attention.places import positions
from ..cache.call import KVCache, cache_lengths, check_slots
from . import op

BACKENDS = ("reference", "cpu", "triton")


@explains_wrong_calls
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
    rotated: Literal["qk"] | None = None,
    backend: str | None = None,
    stored: Literal["raw"] | None = None,
) -> Tensor | Any:
    """Attend from a sequence's last tokens over a cache of keys and values, at inference.

    The attention is that of `rope_attention`. The cache holds each key once, rotated by
    `score.stored`, as far queries see it: raw for ReRoPE, at its own position for plain RoPE and
    STRING. Every call rotates nearer keys as it reads them; the cache does not change. Write
    prompts by k and v too: then cache and attention agree for every score. A model's own cache has
    keys at their own positions: see `rotated`.

    q: (batch, seqlen_q, heads_q, head_dim), float32, bfloat16, float16 or float64. With
        cu_seqlens_q (total, heads_q, head_dim).
    k_cache, v_cache: (batch, max_len, heads_k, head_dim), any strides with a contiguous last
        dimension; with block_table (num_blocks, block_size, heads_k, head_dim). v_cache may have
        another head_dim. Both in q's dtype, or float8_e4m3fn with k_scale and v_scale.
    cache_seqlens: (batch,) int32 or int64, or one int for all (a CUDA graph would replay it
        unchanged): the slots in use. With k and v: before they are written. Else the queries' own
        tokens count.
    k, v: the keys and values of q's tokens, (batch, seqlen_q, heads_k, head_dim) or (total,
        heads_k, head_dim). They are written into the cache first, k rotated as the cache has it.
    cu_seqlens_q: (batch + 1,) int32 or int64, the boundaries of packed queries: prefill chunks and
        single tokens of many sequences in one call. A sequence may have none. Tokens past the last
        boundary are padding: they get 0 and -inf, and are not written.
    block_table: (batch, max_blocks) int32: the blocks of each sequence, in order.
    k_scale, v_scale: (heads_k,) float32, positive, for a cache in float8_e4m3fn: a key or value is
        its stored number times its head's scale. Writes divide by the scale, round to nearest even,
        and clamp at 448 either way.
    cache_leftpad: (batch,) int32: the first slot in use, whose position is 0.
    freqs, score: as for `rope_attention`. All calls on one cache must have the same freqs and
        score.stored, unless it is raw. XPOS's log_decay is refused except for scores that store
        keys by blocks.
    softmax_scale, log_n, query_scale, softcap, sinks, sliding_window: as for `rope_attention`.
    interleaved, rotary_offset, return_lse: as for `rope_attention`.
    rotated: None: q and k are raw. "qk": q, k and the cached keys are rotated to their own
        positions, amplitudes included, as models do it; k is written as it is. So a cache means the
        same with any score, or none; far keys rotate as they are read.
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
    name = score.name if isinstance(score, Score) else "rope_attention_with_kvcache"
    if stored not in (None, "raw"):
        raise ValueError(f"{name}: stored must be None or 'raw', got {stored!r}")
    check_rotated(name, rotated, (None, "qk"))
    if rotated and stored:
        raise ValueError(f"{name}: stored must be None with rotated='qk', got {stored!r}")
    check_given(name, freqs, score, rotated, interleaved, return_lse)
    call = make_call(
        freqs,
        score,
        rotated or (None if stored else "k"),
        interleaved=interleaved,
        cu_seqlens=cu_seqlens_q,
        sinks=sinks,
        query_scale=query_scale,
        softmax_scale=softmax_scale,
        rotary_offset=rotary_offset,
        softcap=softcap,
        sliding_window=sliding_window,
    )
    check_numbers(name, call)
    _check_stored_decay(name, freqs, None if stored or rotated else score)
    cu_seqlens_q = call.cu_seqlens
    cache_seqlens = cache_lengths(name, cache_seqlens, q, cu_seqlens_q, "cu_seqlens_q")
    planes = (k_cache, v_cache, cache_seqlens, block_table, cache_leftpad, k_scale, v_scale)
    cache = KVCache.of(*planes, new=k, cu_seqlens=cu_seqlens_q)
    compiling = torch.compiler.is_compiling()
    _refuse_gradients(name, q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    if backend is not None and isinstance(q, Tensor):
        require(name, backend, BACKENDS, q.device.type)
    if not compiling and (log_n is not None or freqs.log_decay is not None):
        op.check_decode(name, q, k, v, cache, call)  # what reads tensors before the op does
    if log_n is not None:
        call = _with_log_n(name, log_n, q, cache, call)
    if compiling:
        out, lse = op.decode(q, k, v, cache, call, backend)
        return (out, lse) if return_lse else out
    if freqs.log_decay is not None:
        check_new_keys(name, freqs, score, k, cache_seqlens, cache_leftpad, cu_seqlens_q)
    try:
        out, lse = op.decode(q, k, v, cache, call, backend)
    except REFUSALS as error:  # of the op, before any write; said as in rope_attention
        op.check_decode(name, q, k, v, cache, call)
        check_slots(name, cache, call.cu_seqlens, len(q))
        raise_as_value_error(error, "decode", name)
        raise
    return (out, lse) if return_lse else out


def _with_log_n(
    op: str, log_n: float, q: Tensor, cache: KVCache, call: AttentionCall
) -> AttentionCall:
    """Return the call with log_n's factors; its queries are the last tokens of each sequence."""
    tokens = q.shape[1] if call.cu_seqlens is None else call.cu_seqlens.diff()
    placed = call._replace(q_start=cache.lengths() - tokens)
    return scaled_by_log_n(op, log_n, positions(q, q, placed)[0], q, call)


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
