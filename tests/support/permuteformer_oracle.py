"""Linear attention by its dense formula in float64, and how large the terms of its sums are."""

from __future__ import annotations

import functools
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sizes:
    """The largest sum of absolute terms behind each result of one sequence.

    With a normaliser the gradients of q and k are differences of two terms; `saved` is the second
    one alone, which takes the out that was rounded to q's dtype.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    mode: Mode

    @property
    def out(self) -> float:
        return _most(self._outs)

    @property
    def dq(self) -> float:
        return _most(torch.einsum("hij,jhd->ihd", self._pairs, self._keys))

    @property
    def dk(self) -> float:
        return _most(self._per_key_head(torch.einsum("hij,ihd->jhd", self._pairs, feature(self.q))))

    @property
    def dv(self) -> float:
        weights = self._weights
        return _most(self._per_key_head(torch.einsum("hij,ihf->jhf", weights, self.upstream.abs())))

    @property
    def saved_dq(self) -> float:
        return _most(torch.einsum("hij,jhd->ihd", self._saved, self._keys))

    @property
    def saved_dk(self) -> float:
        return _most(self._per_key_head(torch.einsum("hij,ihd->jhd", self._saved, feature(self.q))))

    saved_dv = 0.0

    @property
    def kv(self) -> float:
        return _most(last_state(self.k[None], self.v[None].abs(), self.mode, self.q.shape[1])[0])

    @property
    def key_sum(self) -> float:
        return _most(last_state(self.k[None], self.v[None], self.mode, self.q.shape[1])[1])

    @property
    def _keys(self) -> Tensor:
        return expand(feature(self.k), self.q.shape[1])

    @property
    def _values(self) -> Tensor:
        return expand(self.v, self.q.shape[1]).abs()

    @functools.cached_property
    def _decays(self) -> Tensor:
        """Over the normaliser, if there is one."""
        found = decays(self.q.shape[0], self.mode)
        if not self.mode.normalize:
            return found
        scores = torch.einsum("ihd,jhd->hij", feature(self.q), self._keys) * found
        return found / scores.sum(-1, keepdim=True)

    @functools.cached_property
    def _weights(self) -> Tensor:
        return torch.einsum("ihd,jhd->hij", feature(self.q), self._keys) * self._decays

    @functools.cached_property
    def _outs(self) -> Tensor:
        return torch.einsum("hij,jhf->ihf", self._weights, self._values)

    @functools.cached_property
    def _saved(self) -> Tensor:
        if not self.mode.normalize:
            return torch.zeros_like(self._decays)
        delta = torch.einsum("ihf,ihf->hi", self.upstream.abs(), self._outs)
        return self._decays * delta[..., None]

    @functools.cached_property
    def _pairs(self) -> Tensor:
        dots = torch.einsum("ihf,jhf->hij", self.upstream.abs(), self._values)
        return self._decays * dots + self._saved

    def _per_key_head(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.k.shape[1], -1)).sum(2)


def _most(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0
