"""Decayed linear attention in plain PyTorch, all scores at once: the oracle, O(seqlen**2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.dtypes import accumulator, without_autocast
from .scan import Scan, Scanned, feature


@without_autocast
def scan(q: Tensor, k: Tensor, v: Tensor, how: Scan) -> Scanned:
    """See scan.py; differentiable to any order in q, k and v."""
    packed, wide = how.cu_seqlens is not None, accumulator(q.dtype)
    rows = max(q.shape[-2], how.heads)  # heads of out
    most = max(rows, k.shape[-2])
    dtype = wide if how.out_is_float else q.dtype
    gate = how.gate
    if packed:
        q, k, v = q[None], k[None], v[None]
    q, k, v = (_heads_first(t, wide) for t in (q, k, v))
    if how.phi_scores:
        q, k = feature(q), feature(k)
    else:
        v = feature(v)
    decays = _decays(how, q.shape[2], wide, q.device)
    pairs = torch.einsum("bhid,bhjd->bhij", _expand(q, most), _expand(k, most))
    if how.q_extra is not None or how.k_extra is not None:
        pairs = pairs + (
            _numbers(how.q_extra, most, pairs)[..., None]
            * _numbers(how.k_extra, most, pairs)[..., None, :]
        )
    scores = pairs * _expand(decays, most) * _numbers(how.k_scale, most, pairs)[..., None, :]
    out = torch.einsum("bhij,bhjf->bhif", scores, _expand(v, most))
    den = scores.sum(-1)
    if how.first_state is not None:
        before = _expand(q, most) * _decay_of_first(how, q)
        out = out + before @ _expand(how.first_state, most).to(wide)
        den = den + (before * _expand(how.first_sum, most)[:, :, None].to(wide)).sum(-1)
    out = out * _numbers(how.q_scale, most, pairs)[..., None]
    if how.normalize:
        out = out / den[..., None]
    out = out.unflatten(1, (rows, -1)).sum(2)
    if gate is not None:
        gate = _heads_first(gate[None] if packed else gate, wide)
        out = torch.where(_expand(gate, rows) <= 0, 0.0, out)
    out = out.transpose(1, 2).to(dtype).contiguous()
    none = out.new_empty(0, dtype=wide)
    state, total = _last(k, v, how) if how.keep_state else (none, none)
    if packed:
        out, den = out[0], den[0]
    return Scanned(out, den.contiguous() if how.normalize else none, state, total)


def row_dots(x: Tensor, y: Tensor, packed: bool) -> Tensor:
    """<x, y> over the last dimension, (batch, heads, seqlen) or (heads, total)."""
    wide = accumulator(x.dtype)
    return (x.to(wide) * y.to(wide)).sum(-1).transpose(-1, -2).contiguous()


def _heads_first(x: Tensor, wide: torch.dtype) -> Tensor:
    return x.transpose(1, 2).to(wide)


def _expand(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _numbers(x: Tensor | None, heads: int, like: Tensor) -> Tensor:
    if x is None:
        return like.new_ones(())[None, None, None]
    return _expand(x.unflatten(0, (-1, *x.shape[:1])) if x.dim() == 2 else x, heads)


def _decays(how: Scan, seqlen: int, wide: torch.dtype, device: torch.device) -> Tensor:
    """(1, heads, seqlen, seqlen): decay**|i - j| where row i sees j, else 0."""
    i = torch.arange(seqlen, device=device)
    distance = i[:, None] - i
    seen = distance == distance
    if how.causal:
        seen = distance <= 0 if how.reverse else distance >= 0
    if how.cu_seqlens is not None:
        sequence = torch.searchsorted(how.cu_seqlens, i.to(torch.int32), right=True)
        seen = seen & (sequence[:, None] == sequence)
    if how.decay is None:
        return seen.to(wide).expand(1, how.heads, -1, -1)
    return torch.where(seen, how.decay.to(wide)[:, None, None] ** distance.abs(), 0.0)[None]


def _decay_of_first(how: Scan, q: Tensor) -> Tensor:
    """(1, heads of q, seqlen, 1): decay**(i + 1), for what came before the first token."""
    i = torch.arange(1, q.shape[2] + 1, device=q.device)
    if how.decay is None:
        return torch.ones_like(i)[None, None, :, None]
    return _expand((how.decay.to(q.dtype)[:, None] ** i)[None], max(q.shape[1], how.heads))[
        ..., None
    ]


def _last(k: Tensor, v: Tensor, how: Scan) -> tuple[Tensor, Tensor]:
    """The state after the last token."""
    k, v = _expand(k, how.heads), _expand(v, how.heads)
    seqlen = k.shape[2]
    decay = k.new_ones(how.heads) if how.decay is None else how.decay.to(k.dtype)
    age = torch.arange(seqlen - 1, -1, -1, device=k.device)
    decayed = k * (decay[:, None] ** age)[..., None]
    state, total = decayed.transpose(-1, -2) @ v, decayed.sum(2)
    if how.first_state is not None:
        over_all = (decay**seqlen)[:, None]
        state = state + over_all[..., None] * how.first_state.to(k.dtype)
        total = total + over_all * how.first_sum.to(k.dtype)
    return state, total
