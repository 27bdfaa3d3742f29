"""Linear attention by its dense formula in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-3  # of the feature map


class Mode(NamedTuple):
    rates: Tensor  # (heads_q,) float64
    causal: bool
    normalize: bool


def feature(x: Tensor) -> Tensor:
    return torch.relu(x) + EPS


def expand(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def decays(tokens: int, mode: Mode) -> Tensor:
    """(heads, tokens, tokens)."""
    i = torch.arange(tokens, device=mode.rates.device)
    distance = i[:, None] - i
    faded = mode.rates[:, None, None] ** distance.clamp(min=0)
    return faded * (distance >= 0) if mode.causal else faded


def dense(q: Tensor, k: Tensor, v: Tensor, mode: Mode) -> Tensor:
    """One sequence, (tokens, heads, dim), q and k permuted; differentiable."""
    k, v = expand(k, q.shape[1]), expand(v, q.shape[1])
    scores = torch.einsum("ihd,jhd->hij", feature(q), feature(k)) * decays(q.shape[0], mode)
    out = torch.einsum("hij,jhf->ihf", scores, v)
    return out / scores.sum(-1).T[..., None] if mode.normalize else out


def last_state(k: Tensor, v: Tensor, mode: Mode, heads: int) -> tuple[Tensor, Tensor]:
    """(batch, heads, dim, value_dim) and (batch, heads, dim) of (batch, tokens, heads_k, dim)."""
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (feature(k), v))
    rates = mode.rates[:: mode.rates.shape[0] // heads]
    age = torch.arange(k.shape[1] - 1, -1, -1, device=k.device)
    k = k * (rates ** age[:, None])[..., None]
    return torch.einsum("bjhd,bjhf->bhdf", k, v), k.sum(1)
