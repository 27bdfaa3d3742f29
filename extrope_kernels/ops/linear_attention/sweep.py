"""The sweep: one operation of which decayed linear attention and all its gradients are made.

    out_i = x_scale_i sum_j decay**|i - j| y_scale_j (<x_i, y_j> + x_extra_i y_extra_j) w_j

over j <= i (causal), j >= i (causal, reverse), or all j. The forward takes (q, k, v) for (x, y, w);
the gradients are sweeps of (dout, v, k), (v, dout, q) and (k, q, dout). Implementations know sweeps
only, and a new one brings its `sweep` and its `row_dots`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

FEATURE_EPS = 1e-3  # of the feature map phi(x) = relu(x) + FEATURE_EPS (authors' code)


@dataclass(frozen=True)
class Sweep:
    """All of a sweep but x, y and w.

    x (batch, seqlen, x_heads, dim), y (.., y_heads, dim), w (.., y_heads, value_dim), or packed
    (total, heads, dim) with cu_seqlens. Each of `heads` states serves a group of heads of x, or
    of y, whose terms are then summed; where it has more, states share heads. The scales and extras
    are float32 (batch, heads of x or y, seqlen), or None for ones, and for no extra term.
    """

    heads: int  # states
    decay: Tensor | None = None  # (heads,) in (0, 1]; None: 1
    cu_seqlens: Tensor | None = None  # (sequences + 1,) int32
    causal: bool = True
    reverse: bool = False
    phi_scores: bool = True  # phi is applied to x and y; else to w
    normalize: bool = False  # x_scale_i = 1 / the sum of i's scores
    x_scale: Tensor | None = None
    x_extra: Tensor | None = None
    y_scale: Tensor | None = None
    y_extra: Tensor | None = None
    gate: Tensor | None = None  # like out: out counts as 0 where gate <= 0, not where it is NaN
    out_is_float: bool = False  # out in float32; else in x's dtype
    first_state: Tensor | None = None  # (batch, heads, dim, value_dim): sum of decayed y w^T
    first_sum: Tensor | None = None  # (batch, heads, dim): sum of decayed y
    keep_state: bool = False


class Swept(NamedTuple):
    """out (.., max(x_heads, heads), value_dim), and what was asked for besides, else empty."""

    out: Tensor
    den: Tensor  # (batch, x_heads, seqlen): the sum of each row's scores
    state: Tensor
    sum: Tensor


def gradients(
    sweep: Callable[..., Swept],
    row_dots: Callable[..., Tensor],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    den: Tensor | None,
    forward: Sweep,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the sweep `forward` of (q, k, v), by an implementation's functions.

    The normaliser is the sum over one more lane of v, of ones: its gradient is -<dout_i, out_i>
    over the sum of scores, and is the extra term.
    """
    by = replace(forward, normalize=False)
    rows = keys = {}
    scale = None
    if forward.normalize:
        delta = -row_dots(dout, out, by.cu_seqlens is not None)
        scale = den.reciprocal()
        rows = {"x_scale": scale, "x_extra": delta}
        keys = {"y_scale": scale, "y_extra": delta}
    dq = sweep(dout, v, k, replace(by, phi_scores=False, gate=q, **rows)).out
    back = replace(by, reverse=True, out_is_float=by.heads > k.shape[-2])
    dk = sweep(v, dout, q, replace(back, phi_scores=False, gate=k, **keys)).out
    dv = sweep(k, q, dout, replace(back, y_scale=scale)).out
    return dq, _per_key_head(dk, k), _per_key_head(dv, v)


def _per_key_head(x: Tensor, like: Tensor) -> Tensor:
    """Sum what the states that share a head of k contribute."""
    if x.shape[-2] == like.shape[-2]:
        return x
    return x.unflatten(-2, (like.shape[-2], -1)).sum(-2).to(like.dtype)


def feature(x: Tensor) -> Tensor:
    return torch.relu(x) + FEATURE_EPS
