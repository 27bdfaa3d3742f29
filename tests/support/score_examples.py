"""Score methods by definition: relative positions, and examples of the public functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import extrope_kernels
from extrope_kernels import (
    blockwise_causal_attention,
    dual_chunk_attention,
    rerope_attention,
    string_attention,
)


@dataclass(frozen=True)
class Relative:
    """Relative positions [i][j], and the pairs of absolute ones that make them, by branch."""

    seen: Tensor  # (seqlen_q, seqlen_k) float64, NaN where query i does not see key j
    branches: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # mask, q at, k at

    def within(self, sliding_window: int | None) -> Relative:
        """Without the keys j where i - j >= sliding_window."""
        if sliding_window is None:
            return self
        i, j = indices(*self.seen.shape)
        outside = i - j >= sliding_window
        branches = [(mask & ~outside, *at) for mask, *at in self.branches]
        return Relative(self.seen.masked_fill(outside, torch.nan), branches)

    def part(self, rows: slice, keys: slice) -> Relative:
        """Of these queries and keys alone."""
        branches = [(mask[rows, keys], i[rows], j[:, keys]) for mask, i, j in self.branches]
        return Relative(self.seen[rows, keys], branches)


def indices(seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(seqlen_q).double() + (seqlen_k - seqlen_q)
    return i[:, None], torch.arange(seqlen_k).double()[None]


def rerope(seqlen_q, seqlen_k, window, factor=math.inf, grouped=False) -> Relative:
    i, j = indices(seqlen_q, seqlen_k)
    x = i - j
    near = (i, j)
    far = (window + (i - window) / factor, j / factor)
    if grouped:
        far = ((i // factor) + window - window // factor, j // factor)
    elif factor == math.inf:
        far = (torch.full_like(i, window), torch.zeros_like(j))
    is_near = x < window
    seen = torch.where(is_near, near[0] - near[1], far[0] - far[1])
    seen = seen.masked_fill(x < 0, torch.nan)
    return Relative(seen, [(is_near & (x >= 0), *near), (~is_near, *far)])


def dual_chunk(seqlen_q, seqlen_k, chunk_size, local_window) -> Relative:
    i, j = indices(seqlen_q, seqlen_k)
    c = chunk_size - local_window
    chunks = torch.div(i, c, rounding_mode="floor") - torch.div(j, c, rounding_mode="floor")
    own = i % c
    previous = torch.clamp(i % c + c, max=chunk_size)
    older = torch.full_like(i, min(2 * c - 1, chunk_size))
    visible = i >= j
    branches = [
        (visible & (chunks == 0), own, j % c),
        (visible & (chunks == 1), previous, j % c),
        (visible & (chunks >= 2), older, j % c),
    ]
    seen = torch.full_like(i - j, torch.nan)
    for mask, at_i, at_j in branches:
        seen = torch.where(mask, at_i - at_j, seen)
    return Relative(seen, branches)


def blockwise_causal(seqlen_q, seqlen_k, block_size) -> Relative:
    i, j = indices(seqlen_q, seqlen_k)
    half = block_size // 2
    blocks = torch.div(i, half, rounding_mode="floor") - torch.div(j, half, rounding_mode="floor")
    visible = (i >= j) & (blocks <= 1)
    return Relative((i - j).masked_fill(~visible, torch.nan), [(visible, i, j)])


def string(seqlen_q, seqlen_k, shift, window) -> Relative:
    i, j = indices(seqlen_q, seqlen_k)
    x = i - j
    near = x < shift
    seen = torch.where(near, x, x - shift + window).masked_fill(x < 0, torch.nan)
    return Relative(seen, [(near & (x >= 0), i, j), (~near, i - shift + window, j)])


@dataclass(frozen=True)
class Example:
    """A score method: its public function, parameters for it, and what they mean by definition."""

    attention: Callable[..., Tensor]
    parameters: dict
    relative: Callable[..., Relative]

    @property
    def with_kvcache(self) -> Callable[..., Tensor]:
        """The public function of the same name over a cache."""
        return getattr(extrope_kernels, f"{self.attention.__name__}_with_kvcache")


EXAMPLES = {
    "rerope": Example(rerope_attention, {"window": 6}, rerope),
    "leaky_rerope": Example(rerope_attention, {"window": 6, "factor": 2.5}, rerope),
    "self_extend": Example(rerope_attention, {"window": 6, "factor": 3, "grouped": True}, rerope),
    "dual_chunk": Example(dual_chunk_attention, {"chunk_size": 9, "local_window": 2}, dual_chunk),
    "blockwise_causal": Example(blockwise_causal_attention, {"block_size": 10}, blockwise_causal),
    "string": Example(string_attention, {"shift": 9, "window": 2}, string),
}
