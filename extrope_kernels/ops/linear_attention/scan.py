"""The chunkwise scan: the one operation of decayed linear attention and all its gradients.

    out_i = q_scale_i sum_j decay**|i - j| k_scale_j (<q_i, k_j> + q_extra_i k_extra_j) v_j

over j <= i (causal), j >= i (causal, reverse), or all j. The forward is that of (q, k, v); dq, dk
and dv are scans of (dout, v, k), (v, dout, q) and (k, q, dout). Implementations know scans only,
and a new one brings its `scan` and its `row_dots`; where a call's checks may be made once for each
layout of its tensors, also `scan_resolved`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

FEATURE_EPS = 1e-3  # of the feature map phi(x) = relu(x) + FEATURE_EPS (authors' code)


@dataclass(frozen=True)
class Scan:
    """All of a scan but q, k and v.

    q (batch, seqlen, q_heads, dim), k (.., k_heads, dim), v (.., k_heads, value_dim), or packed
    (total, heads, dim) with cu_seqlens. Each of `heads` states serves a group of heads of q, or
    of k, whose terms are then summed; where it has more, states share heads. The scales and extras
    are float32 (batch, heads of q or k, seqlen), or None for ones, and for no extra term.
    """

    heads: int  # states
    decay: Tensor | None = None  # (heads,) in (0, 1]; None: 1
    cu_seqlens: Tensor | None = None  # (sequences + 1,) int32
    causal: bool = True
    reverse: bool = False
    phi_scores: bool = True  # phi is applied to q and k; else to v
    normalize: bool = False  # q_scale_i = 1 / the sum of i's scores
    q_scale: Tensor | None = None
    q_extra: Tensor | None = None
    k_scale: Tensor | None = None
    k_extra: Tensor | None = None
    gate: Tensor | None = None  # like out: out counts as 0 where gate <= 0, not where it is NaN
    out_is_float: bool = False  # out in float32; else in q's dtype
    first_state: Tensor | None = None  # (batch, heads, dim, value_dim): sum of decayed k v^T
    first_sum: Tensor | None = None  # (batch, heads, dim): sum of decayed k
    keep_state: bool = False

    @property
    def others(self) -> Others:
        return Others._make(_others_of(self))


class Others(NamedTuple):
    """The tensors of a scan beside q, k and v."""

    decay: Tensor | None = None
    cu_seqlens: Tensor | None = None
    gate: Tensor | None = None
    q_scale: Tensor | None = None
    q_extra: Tensor | None = None
    k_scale: Tensor | None = None
    k_extra: Tensor | None = None
    first_state: Tensor | None = None
    first_sum: Tensor | None = None


_others_of = attrgetter(*Others._fields)


class Scanned(NamedTuple):
    """out (.., max(q_heads, heads), value_dim), and what was asked for besides, else empty."""

    out: Tensor
    den: Tensor  # (batch, q_heads, seqlen): the sum of each row's scores
    state: Tensor
    sum: Tensor


def gradients(
    scan: Callable[..., Scanned],
    row_dots: Callable[..., Tensor],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    den: Tensor | None,
    forward: Scan,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the scan `forward` of (q, k, v), by an implementation's functions.

    The normaliser is the sum over one more dim of v, of ones: its gradient is -<dout_i, out_i>
    over the sum of scores, and is the extra term.
    """
    options = replace(forward, normalize=False)
    rows = keys = {}
    scale = None
    if forward.normalize:
        delta = -row_dots(dout, out, options.cu_seqlens is not None)
        scale = den.reciprocal()
        rows = {"q_scale": scale, "q_extra": delta}
        keys = {"k_scale": scale, "k_extra": delta}
    dq = scan(dout, v, k, replace(options, phi_scores=False, gate=q, **rows)).out
    back = replace(options, reverse=True, out_is_float=options.heads > k.shape[-2])
    dk = scan(v, dout, q, replace(back, phi_scores=False, gate=k, **keys)).out
    dv = scan(k, q, dout, replace(back, k_scale=scale)).out
    return dq, _per_key_head(dk, k), _per_key_head(dv, v)


def _per_key_head(x: Tensor, like: Tensor) -> Tensor:
    """Sum what the states that share a head of k contribute."""
    if x.shape[-2] == like.shape[-2]:
        return x
    return x.unflatten(-2, (like.shape[-2], -1)).sum(-2).to(like.dtype)


def feature(x: Tensor) -> Tensor:
    return torch.relu(x) + FEATURE_EPS
