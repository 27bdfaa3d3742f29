"""The public function: attention over a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._names import explains_wrong_calls
from ...methods import RopeFreqs
from ...scores import Score
from .._tables.checks import REFUSALS, raise_as_value_error
from .._torch import library as _library
from .._torch.autograd import constant_when_compiled
from . import flash_attn, op
from .call import (
    START_END,
    Rotated,
    check_attention,
    check_given,
    check_numbers,
    check_values,
    make_call,
    warn_of_unseeing_queries,
)
from .decay import check_decay
from .log_n import with_log_n

BACKENDS = ("reference", "cpu", "triton", "flash_attn")


@explains_wrong_calls
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
    rotated: Rotated = None,
    backend: str | None = None,
) -> Tensor | Any:
    """Rotate queries and keys and attend causally; a score method may change their distances.

    The rotation is included: pass raw q and k, or say how they are `rotated`. `score` maps the
    distance i - j of query i and key j to a relative position, and one softmax runs over all keys
    j <= i. There is neither a mask nor a switch for causal: cu_seqlens, q_start, k_start and
    sliding_window say which keys are seen.

    q: (batch, seqlen_q, heads_q, head_dim), float32, bfloat16, float16 or float64; any strides with
        a contiguous last dimension.
    k, v: (batch, seqlen_k, heads_k, head_dim); heads_k divides heads_q, and nothing is expanded. v
        may have another head_dim (MLA: 192 and 128). If seqlen_q < seqlen_k, the queries are the
        last of the sequence. With cu_seqlens all are (total, heads, head_dim).
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
    rotated: None: q and k are raw. "qk": both are rotated to their own positions, amplitudes
        included, as `apply_rope_qk` and models do it: each region moves them on to where it has
        them, or takes them as they are if that is there. "k": q is raw, and k rotated by
        `score.stored`, as in a cache, without amplitudes. Gradients are those of q and k as given.
    backend: "cpu", "triton", "flash_attn", "reference"; None for the best on q's device. A named
        backend never falls back.

    Returns: out like q, with v's head_dim, and with return_lse the log-sum-exp of the logits and
        the sink, (batch, heads_q, seqlen_q) or (heads_q, total), float32 (float64 with float64
        tensors); -inf for a row without keys or sink. Differentiable in q, k, v, sinks and
        inv_freq; to any order with backend="reference".
    Raises: ValueError or TypeError that begins with the score's name and names the argument;
        NotImplementedError if the named backend cannot run here.
    """
    name = score.name if isinstance(score, Score) else "rope_attention"
    check_given(name, freqs, score, rotated, interleaved, return_lse)
    call = make_call(
        freqs,
        score,
        rotated,
        interleaved=interleaved,
        cu_seqlens=cu_seqlens,
        sinks=sinks,
        query_scale=query_scale,
        q_start=_start(name, "q_start", q_start, q),
        k_start=_start(name, "k_start", k_start, q),
        softmax_scale=softmax_scale,
        rotary_offset=rotary_offset,
        softcap=softcap,
        sliding_window=sliding_window,
    )
    check_numbers(name, call)
    if backend is not None and isinstance(q, Tensor):
        _library.require(name, backend, BACKENDS, q.device.type, missing)
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


@constant_when_compiled
def missing(backend: str, device: str | None = None) -> str | None:
    """Return why `backend` cannot run here, in one line; None if it can."""
    return flash_attn.missing() if backend == "flash_attn" else _library.missing(backend, device)


def backends() -> dict[str, str]:
    """Return each backend's state here: "available", or the reason why not."""
    return {name: missing(name) or "available" for name in BACKENDS}


def _start(op: str, name: str, start: Tensor | int | None, q: Tensor) -> Tensor | None:
    """Return a start as a tensor for the ops."""
    if start is None or isinstance(start, Tensor):
        return start
    if isinstance(start, bool) or not isinstance(start, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int or a Tensor, got {type(start).__name__}")
    if not isinstance(q, Tensor):
        raise TypeError(f"{op}: q must be a Tensor, got {type(q).__name__}")
    if not 0 <= start < START_END:
        raise ValueError(f"{op}: {name} must be between 0 and 2**29, got {start}")
    return torch.full((1,), start, dtype=torch.int32, device=q.device)
