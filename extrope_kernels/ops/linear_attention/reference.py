"""Decayed linear attention in plain PyTorch, all scores at once: the oracle, O(seqlen**2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .sweep import Sweep, Swept, feature


def sweep(x: Tensor, y: Tensor, w: Tensor, by: Sweep) -> Swept:
    """See sweep.py; differentiable to any order in x, y and w."""
    packed, wide = by.cu_seqlens is not None, _wide(x)
    rows = max(x.shape[-2], by.heads)  # heads of out
    most = max(rows, y.shape[-2])
    dtype = wide if by.out_is_float else x.dtype
    gate = by.gate
    if packed:
        x, y, w = x[None], y[None], w[None]
    x, y, w = (_heads_first(t, wide) for t in (x, y, w))
    if by.phi_scores:
        x, y = feature(x), feature(y)
    else:
        w = feature(w)
    decays = _decays(by, x.shape[2], wide, x.device)
    pairs = torch.einsum("bhid,bhjd->bhij", _expand(x, most), _expand(y, most))
    if by.x_extra is not None or by.y_extra is not None:
        pairs = pairs + (
            _numbers(by.x_extra, most, pairs)[..., None]
            * _numbers(by.y_extra, most, pairs)[..., None, :]
        )
    scores = pairs * _expand(decays, most) * _numbers(by.y_scale, most, pairs)[..., None, :]
    out = torch.einsum("bhij,bhjf->bhif", scores, _expand(w, most))
    den = scores.sum(-1)
    if by.first_state is not None:
        before = _expand(x, most) * _fading(by, x)
        out = out + before @ _expand(by.first_state, most).to(wide)
        den = den + (before * _expand(by.first_sum, most)[:, :, None].to(wide)).sum(-1)
    out = out * _numbers(by.x_scale, most, pairs)[..., None]
    if by.normalize:
        out = out / den[..., None]
    out = out.unflatten(1, (rows, -1)).sum(2)
    if gate is not None:
        gate = _heads_first(gate[None] if packed else gate, wide)
        out = torch.where(_expand(gate, rows) <= 0, 0.0, out)
    out = out.transpose(1, 2).to(dtype).contiguous()
    none = out.new_empty(0, dtype=wide)
    state, total = _last(y, w, by) if by.keep_state else (none, none)
    if packed:
        out, den = out[0], den[0]
    return Swept(out, den.contiguous() if by.normalize else none, state, total)


def row_dots(x: Tensor, y: Tensor, packed: bool) -> Tensor:
    """<x, y> over the last dimension, (batch, heads, seqlen) or (heads, total)."""
    return (x.to(_wide(x)) * y.to(_wide(x))).sum(-1).transpose(-1, -2).contiguous()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _heads_first(x: Tensor, wide: torch.dtype) -> Tensor:
    return x.transpose(1, 2).to(wide)


def _expand(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _numbers(x: Tensor | None, heads: int, like: Tensor) -> Tensor:
    if x is None:
        return like.new_ones(())[None, None, None]
    return _expand(x.unflatten(0, (-1, *x.shape[:1])) if x.dim() == 2 else x, heads)


def _decays(by: Sweep, seqlen: int, wide: torch.dtype, device: torch.device) -> Tensor:
    """(1, heads, seqlen, seqlen): decay**|i - j| where row i sees j, else 0."""
    i = torch.arange(seqlen, device=device)
    distance = i[:, None] - i
    seen = distance == distance
    if by.causal:
        seen = distance <= 0 if by.reverse else distance >= 0
    if by.cu_seqlens is not None:
        sequence = torch.searchsorted(by.cu_seqlens, i.to(torch.int32), right=True)
        seen = seen & (sequence[:, None] == sequence)
    if by.decay is None:
        return seen.to(wide).expand(1, by.heads, -1, -1)
    return torch.where(seen, by.decay.to(wide)[:, None, None] ** distance.abs(), 0.0)[None]


def _fading(by: Sweep, x: Tensor) -> Tensor:
    """(1, heads of x, seqlen, 1): decay**(i + 1), for what came before the first token."""
    i = torch.arange(1, x.shape[2] + 1, device=x.device)
    if by.decay is None:
        return torch.ones_like(i)[None, None, :, None]
    return _expand((by.decay.to(x.dtype)[:, None] ** i)[None], max(x.shape[1], by.heads))[..., None]


def _last(y: Tensor, w: Tensor, by: Sweep) -> tuple[Tensor, Tensor]:
    """The state after the last token."""
    y, w = _expand(y, by.heads), _expand(w, by.heads)
    seqlen = y.shape[2]
    decay = y.new_ones(by.heads) if by.decay is None else by.decay.to(y.dtype)
    age = torch.arange(seqlen - 1, -1, -1, device=y.device)
    faded = y * (decay[:, None] ** age)[..., None]
    state, total = faded.transpose(-1, -2) @ w, faded.sum(2)
    if by.first_state is not None:
        shrink = (decay**seqlen)[:, None]
        state = state + shrink[..., None] * by.first_state.to(y.dtype)
        total = total + shrink * by.first_sum.to(y.dtype)
    return state, total
