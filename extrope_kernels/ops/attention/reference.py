"""Attention in plain PyTorch with all logits at once: the reference, O(seqlen**2) memory.

It places queries and keys, rotates them to their places in each region, masks pairs and takes one
softmax. No op is inside.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...scores.base import UNROTATED, PlainMap
from .._math.dtypes import accumulator, without_autocast
from .._math.pairs import split_pairs, with_pairs
from .call import AttentionCall

# Cosines and sines of each row's angles, times its amplitude; None: rows are taken as they come.
CosSin = tuple[Tensor, Tensor] | None


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
    logits = torch.tensor(-torch.inf, dtype=accumulator(q.dtype), device=q.device)
    for region in _regions(q, k, call):
        logits = torch.where(region.visible, _logits(*region.rotate(q, k, call), call), logits)
    weights, lse = _softmax(logits, call)
    out = torch.einsum("bhij,bjhd->bihd", weights, _per_query_head(v, q))
    return out.to(call.results_dtype(q.dtype)).contiguous(), lse


class _Region(NamedTuple):
    """The pairs that a region has, and how it rotates both sides to its places."""

    visible: Tensor  # (batch or 1, 1, seqlen_q, seqlen_k) bool
    q: CosSin
    k: CosSin

    def rotate(self, q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
        return _rotate(q, self.q, call), _rotate(k, self.k, call)


def _regions(q: Tensor, k: Tensor, call: AttentionCall) -> list[_Region]:
    """Place queries and keys, from where they stand already, for each region."""
    i, j = _positions(q, k, call)
    found = []
    for region, (first, end) in zip(call.regions, pairwise(call.first_keys(i))):
        visible = (first[..., None] <= j[:, None]) & (j[:, None] < end[..., None])
        of_q, of_k = visible.any(-1)[..., None], visible.any(-2)[..., None]
        q_place = _place(i, region.q_map, call.q_stored, of_q, call)
        k_place = _place(j, region.k_map, call.stored, of_k, call)
        stays_q = region.q_map == call.q_stored and call.attention_factor == 1
        stays_k = region.k_map == call.stored
        # No logit knows a constant of both sides; the gradient of inv_freq reads places less it.
        # Gradients of angles add up to 0, but for their rounding, which large places multiply.
        mean = q_place.new_zeros(())
        if not (stays_q or stays_k):
            count = of_q.sum(1, keepdim=True) + of_k.sum(1, keepdim=True)
            mean = (q_place.sum(1, True) + k_place.sum(1, True)) / count.clamp(min=1)
        # Queries take the attention factor of both sides: keys that come rotated need no change.
        of_both = call.attention_factor**2
        q_amplitude, k_amplitude = of_both * _decay(q_place, call), _decay(-k_place, call)
        q_cos_sin = _cos_sin(q_place, mean * of_q, q_amplitude, q.shape[2], call)
        k_cos_sin = _cos_sin(k_place, mean * of_k, k_amplitude, k.shape[2], call)
        found.append(
            _Region(
                visible[:, None],
                None if stays_q else q_cos_sin,
                None if stays_k else k_cos_sin,
            )
        )
    return found


def _positions(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return int64 positions of queries and of keys: (batch or 1, seqlen)."""
    rows, keys = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    k_start = 0 if call.k_start is None else call.k_start.long()[:, None]
    if call.q_start is None:  # both sides end together
        return rows[None] + k_start + (k.shape[1] - q.shape[1]), keys[None] + k_start
    return rows + call.q_start.long()[:, None], keys[None] + k_start


def _place(p: Tensor, to: PlainMap, start: PlainMap, used: Tensor, call: AttentionCall) -> Tensor:
    """Return how far rows at positions p rotate: (batch or 1, seqlen, pairs or 1) float64.

    0 for rows that the region does not pair: far from its keys XPOS's amplitude may overflow, and
    infinity times a weight of 0 is NaN.
    """
    by_pair = [
        x.movedim(0, -1) if x.dim() == 3 else x[..., None]
        for x in (call.mapped(to, p), call.mapped(start, p))
    ]
    return torch.where(used, by_pair[0] - by_pair[1], 0.0)


def _cos_sin(
    place: Tensor, center: Tensor, amplitude: Tensor | float, heads: int, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, (batch or 1, seqlen, heads or 1, pairs) float64.

    place, center: (batch or 1, seqlen, pairs or 1): frequencies have the gradient that they would
    have if rows rotated by place - center.
    """
    inv_freq = call.inv_freq.double()
    if inv_freq.dim() < 3:
        inv_freq = torch.atleast_2d(inv_freq)[:, None]
    elif inv_freq.shape[1] > 1:
        inv_freq = inv_freq.repeat_interleave(heads // inv_freq.shape[1], dim=1)
    place, center, inv_freq = place[:, :, None], center[:, :, None], inv_freq[:, None]
    fixed = inv_freq.detach()
    angle = place * fixed + (place - center) * (inv_freq - fixed)  # exact below 2**29
    return angle.cos() * amplitude, angle.sin() * amplitude


def _decay(place: Tensor, call: AttentionCall) -> Tensor | float:
    """Return XPOS's amplitudes: (batch or 1, seqlen, 1, pairs) float64."""
    if call.log_decay is None:
        return 1.0
    return torch.exp(place * call.log_decay.double())[:, :, None]


def _rotate(x: Tensor, cos_sin: CosSin, call: AttentionCall, adjoint: bool = False) -> Tensor:
    """Rotate rows (batch, seqlen, heads, head_dim); round the rotated dims once, to x's dtype."""
    if cos_sin is None:
        return x
    wide = accumulator(x.dtype)
    cos, sin = (table.to(wide) for table in cos_sin)
    if adjoint:
        sin = -sin
    a, b = split_pairs(x.to(wide), call.pair_dims)
    return with_pairs(x, a * cos - b * sin, b * cos + a * sin, call.pair_dims)


def _logits(q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
    """Return the logits of rotated queries and keys: (batch, heads_q, seqlen_q, seqlen_k)."""
    wide = accumulator(q.dtype)
    logits = torch.einsum("bihd,bjhd->bhij", q.to(wide), _per_query_head(k, q)) * _scale(q, call)
    if not call.softcap:
        return logits
    cap = float(call.softcap)  # an int may be past int64
    return cap * torch.tanh(logits / cap)


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


# -------------------------------------------------------------------------------------------------
# The backward, by hand: of a part of the keys that queries see


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
    wide = accumulator(v.dtype)
    dout, out, scale = dout.to(wide), out.to(wide), _scale(q, call)
    delta = (dout * out).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    d_weights = torch.einsum("bihd,bjhd->bhij", dout, _per_query_head(v, q))
    # Rows without keys have lse -inf; any finite number then makes their weights zero.
    finite = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    for region in _regions(q, k, call):
        q_rotated, k_rotated = region.rotate(q, k, call)
        logits = _logits(q_rotated, k_rotated, call)
        weights = torch.where(region.visible, torch.exp(logits - finite), 0.0)
        dv += _per_key_head(torch.einsum("bhij,bihd->bjhd", weights, dout), v)
        d_logits = weights * (d_weights - delta[..., None]) * scale
        if call.softcap:
            d_logits = d_logits * (1 - (logits / float(call.softcap)) ** 2)
        here = torch.where(region.visible, d_logits, 0.0)
        of_q = torch.einsum("bhij,bjhd->bihd", here, _per_query_head(k_rotated, q))
        of_k = _per_key_head(torch.einsum("bhij,bihd->bjhd", here, q_rotated.to(wide)), k)
        dq += _rotate(of_q, region.q, call, adjoint=True)
        dk += _rotate(of_k, region.k, call, adjoint=True)
    return tuple(grad.to(call.results_dtype(x.dtype)) for grad, x in zip((dq, dk, dv), (q, k, v)))


def _per_key_head(x: Tensor, k: Tensor) -> Tensor:
    """Sum the contributions of the query heads of a group."""
    return x.unflatten(2, (k.shape[2], -1)).sum(3)


# -------------------------------------------------------------------------------------------------
# Packed sequences, and keys of a cache


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


def store_keys(k: Tensor, j: Tensor, call: AttentionCall) -> Tensor:
    """Rotate new keys at positions j (batch, seqlen) as a cache stores them."""
    if call.stored == call.q_stored:  # raw, or at their own positions as q is
        return k
    place = _place(j, call.stored, UNROTATED, torch.ones_like(j[..., None], dtype=bool), call)
    cos_sin = _cos_sin(place, torch.zeros_like(place), _decay(-place, call), k.shape[2], call)
    return _rotate(k, cos_sin, call)
