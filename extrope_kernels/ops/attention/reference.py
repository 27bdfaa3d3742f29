"""Attention in plain PyTorch with all logits at once: the reference, O(seqlen**2) memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._math.dtypes import accumulator, without_autocast
from .call import AttentionCall
from .places import positions, rotate, unrotate


@without_autocast
def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attend with one softmax over all regions; differentiable to any order.

    q, k: as call.rotated says, (batch, seqlen_q, heads_q, head_dim) and (batch, seqlen_k, heads_k,
    head_dim), or (total, heads, head_dim) with call.cu_seqlens; v like k, of any head_dim. Returns
    out like q, with v's head_dim, and lse (batch, heads_q, seqlen_q), or (heads_q, total).
    """
    if call.cu_seqlens is not None:
        found = _each_sequence(forward, call, rows=(q, k, v))
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], -1)
    weights, lse = _softmax(_logits(*rotate(q, k, call), call, _positions(q, k, call)), call)
    out = torch.einsum("bhij,bjhd->bihd", weights, _per_query_head(v, q))
    return out.to(call.results_dtype(q.dtype)).contiguous(), lse


@without_autocast
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of q, k and v, each in its dtype; in float32 with call.float32_results.

    out, lse: for all keys that the queries see; k and v may be a part of them.
    """
    if call.cu_seqlens is not None:
        rows, columns = (dout, q, k, v, out), (dlse, lse)

        def of_one(dout, q, k, v, out, dlse, lse, call):
            return backward(dout, dlse, q, k, v, out, lse, call)

        found = _each_sequence(of_one, call, rows, columns)
        return tuple(torch.cat(grads) for grads in zip(*found))
    wide, at = accumulator(v.dtype), _positions(q, k, call)
    q_rotated, k_rotated = rotate(q, k, call)
    logits = _logits(q_rotated, k_rotated, call, at)
    # Rows without keys have lse -inf; any finite number then makes their weights zero.
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    dv = _per_key_head(torch.einsum("bhij,bihd->bjhd", weights, dout.to(wide)), v)
    delta = (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    d_weights = torch.einsum("bihd,bjhd->bhij", dout.to(wide), _per_query_head(v, q))
    d_scores = weights * (d_weights - delta[..., None]) * _scale(q, call)
    if call.softcap:
        d_scores = d_scores * (1 - (logits / float(call.softcap)) ** 2)
    dq, dk = [], []
    for visible, q_r, k_r in zip(_visible(call, *at), q_rotated, k_rotated):
        here = torch.where(visible, d_scores, 0.0)
        dq.append(torch.einsum("bhij,bjhd->bihd", here, _per_query_head(k_r, q)))
        dk.append(_per_key_head(torch.einsum("bhij,bihd->bjhd", here, q_r.to(wide)), k))
    return *unrotate(dq, dk, q, k, call), dv.to(call.results_dtype(v.dtype))


def _each_sequence(
    run: Callable[..., Any],
    call: AttentionCall,
    rows: tuple[Tensor, ...],
    columns: tuple[Tensor | None, ...] = (),
) -> list[Any]:
    """Return run(*rows, *columns, call) for every packed sequence, without its batch.

    One after another, so that a NaN stays in its sequence. rows: (total, ...); columns: (heads,
    total).
    """
    found = []
    for b, (begin, end) in enumerate(pairwise(call.cu_seqlens.tolist())):
        tokens = slice(begin, end)
        own = [x[None, tokens] for x in rows]
        own += [None if x is None else x[None, :, tokens] for x in columns]
        found.append(tuple(x[0] for x in run(*own, call_of_sequence(b, tokens, call))))
    return found


def call_of_sequence(b: int, tokens: slice, call: AttentionCall) -> AttentionCall:
    """Return the call of packed sequence b, which has these tokens."""

    def own(x: Tensor | None) -> Tensor | None:  # x has one row for all sequences, or one each
        return x if x is None or x.shape[0] == 1 else x[b : b + 1]

    return call._replace(
        cu_seqlens=None,
        inv_freq=call.inv_freq if call.inv_freq.dim() == 1 else own(call.inv_freq),
        query_scale=None if call.query_scale is None else call.query_scale[tokens],
        q_start=own(call.q_start),
        k_start=own(call.k_start),
    )


def _positions(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return positions of queries and of keys: (batch or 1, seqlen)."""
    i, j = positions(q, k, call)
    return i.expand(-1 if i.dim() > 1 else 1, -1), j.expand(-1 if j.dim() > 1 else 1, -1)


def _visible(call: AttentionCall, i: Tensor, j: Tensor) -> list[Tensor]:
    """Return each region's mask of its pairs: (batch or 1, 1, seqlen_q, seqlen_k) bool."""
    firsts = [first[:, None, :, None] for first in call.first_keys(i)]
    j = j[:, None, None]
    return [(first <= j) & (j < end) for first, end in pairwise(firsts)]


def _logits(
    q: list[Tensor], k: list[Tensor], call: AttentionCall, at: tuple[Tensor, Tensor]
) -> Tensor:
    """Return each pair's logit, -inf outside all regions: (batch, heads_q, seqlen_q, seqlen_k)."""
    wide, scale = accumulator(q[0].dtype), _scale(q[0], call)
    logits = torch.tensor(-torch.inf, dtype=wide, device=q[0].device)
    for visible, q_r, k_r in zip(_visible(call, *at), q, k):
        scores = torch.einsum("bihd,bjhd->bhij", q_r.to(wide), _per_query_head(k_r, q_r)) * scale
        if call.softcap:
            cap = float(call.softcap)  # an int may be past int64
            scores = cap * torch.tanh(scores / cap)
        logits = torch.where(visible, scores, logits)
    return logits


def _scale(q: Tensor, call: AttentionCall) -> Tensor | float:
    scale, rows = call.scale(q.shape[-1]), call.query_scale
    if rows is None:
        return scale
    return torch.atleast_2d(rows.to(accumulator(q.dtype)))[:, None, :, None] * scale


def _softmax(logits: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return the weights of keys, and the log-sum-exp of the logits and the sink.

    logits: (batch, heads_q, seqlen_q, seqlen_k), -inf for unseen keys. Rows without keys have
    weights 0. Their intermediate values are unused but finite, so that gradients are finite too.
    """
    empty = (logits == -torch.inf).all(-1)
    lse = torch.logsumexp(logits.masked_fill(empty[..., None], 0.0), dim=-1)
    if call.sinks is None:
        return torch.exp(logits - lse[..., None]), lse.masked_fill(empty, -torch.inf)
    sinks = call.sinks.to(logits.dtype)[:, None].expand(lse.shape)
    lse = torch.where(empty, sinks, torch.logaddexp(lse, sinks))
    # With a sink of -inf (off) a row without keys has nothing to see either.
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.exp(logits - finite[..., None]), lse


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype)).repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _per_key_head(x: Tensor, k: Tensor) -> Tensor:
    """Sum the contributions of the query heads of a group."""
    return x.unflatten(2, (k.shape[2], -1)).sum(3)
