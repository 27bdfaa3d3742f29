"""Score methods by definition: an example of each, and its relative positions from the paper."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from extrope_kernels import scores
from extrope_kernels.scores import FIRST_KEY, PairMap, PositionMap, Region, Score


@dataclass(frozen=True)
class Relative:
    """Relative positions [i][j], and the pairs of absolute ones that make them, by branch."""

    seen: Tensor  # (seqlen_q, seqlen_k) float64, NaN where query i does not see key j
    branches: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # mask, q at, k at
    # (batch or 1, heads or 1, seqlen_q, seqlen_k, pairs or 1): what pairs see, where they differ.
    by_pair: Tensor | None = None

    def within(self, sliding_window: int | None) -> Relative:
        """Without the keys j where i - j >= sliding_window."""
        if sliding_window is None:
            return self
        i, j = indices(*self.seen.shape)
        outside = i - j >= sliding_window
        branches = [(mask & ~outside, *at) for mask, *at in self.branches]
        return Relative(self.seen.masked_fill(outside, torch.nan), branches, self.by_pair)

    def part(self, rows: slice, keys: slice) -> Relative:
        """Of these queries and keys alone."""
        branches = [(mask[rows, keys], i[rows], j[:, keys]) for mask, i, j in self.branches]
        by_pair = None if self.by_pair is None else self.by_pair[..., rows, keys, :]
        return Relative(self.seen[rows, keys], branches, by_pair)


def indices(seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(seqlen_q).double() + (seqlen_k - seqlen_q)
    return i[:, None], torch.arange(seqlen_k).double()[None]


def rerope(seqlen_q, seqlen_k, window, factor=math.inf) -> Relative:
    i, j = indices(seqlen_q, seqlen_k)
    x = i - j
    far = (window + (i - window) / factor, j / factor)
    if factor == math.inf:
        far = (torch.full_like(i, window), torch.zeros_like(j))
    near = x < window
    seen = torch.where(near, x, far[0] - far[1]).masked_fill(x < 0, torch.nan)
    return Relative(seen, [(near & (x >= 0), i, j), (~near, *far)])


def self_extend(seqlen_q, seqlen_k, window, factor) -> Relative:
    i, j = indices(seqlen_q, seqlen_k)
    x = i - j
    far = (i // factor + window - window // factor, j // factor)
    near = x < window
    seen = torch.where(near, x, far[0] - far[1]).masked_fill(x < 0, torch.nan)
    return Relative(seen, [(near & (x >= 0), i, j), (~near, *far)])


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


def of_pairs(seqlen_q, seqlen_k, window, sizes=None, divisors=None) -> Relative:
    """DPE by sizes, or other frequencies far away by divisors: of each pair."""
    i, j = (x[..., None] for x in indices(seqlen_q, seqlen_k))
    x = i - j
    by = torch.as_tensor(sizes if divisors is None else divisors).double()
    far = window + (x - window) / by if sizes is None else i // by - j // by + window - window // by
    seen = x[..., 0].masked_fill(x[..., 0] < 0, torch.nan)
    return Relative(seen, by_pair=torch.where(x < window, x, far)[None, None])


def other_frequencies(window: int, divisors) -> Score:
    """Keep distances up to a window; past it pair n's grow by 1 / divisors[n] a token."""
    d = torch.as_tensor(divisors, dtype=torch.float64)
    far = Region(FIRST_KEY, PairMap(d, window - window / d), PairMap(d))
    near = Region(1 - window, PositionMap(), PositionMap())
    return Score("other_frequencies", (far, near))


def by_regions(seqlen_q: int, seqlen_k: int, score: Score) -> Relative:
    """What the formula of scores/base.py makes of a score's regions and maps."""
    i, j = indices(seqlen_q, seqlen_k)
    block = torch.div(i, score.granularity, rounding_mode="floor") * score.granularity
    firsts = [torch.minimum(block + region.start, i + 1) for region in score.regions]
    branches, seen = [], torch.full((seqlen_q, seqlen_k), torch.nan, dtype=torch.float64)
    for region, (first, end) in zip(score.regions, pairwise([*firsts, i + 1])):
        here, at = (first <= j) & (j < end), (region.q_map(i), region.k_map(j))
        branches.append((here, *at))
        seen = torch.where(here, at[0] - at[1], seen)
    return Relative(seen, branches)


@dataclass(frozen=True)
class Example:
    """A score method with parameters, and what they mean by definition."""

    score: Score
    relative: Callable[[int, int], Relative]  # of seqlen_q queries at the end of seqlen_k keys
    parameters: dict = field(default_factory=dict)

    @property
    def by_pair(self) -> bool:
        """Whether pairs of dims see other positions."""
        return self.score is not None and self.score.pair_maps is not None


def example(score: Callable[..., Score], relative: Callable, **parameters) -> Example:
    return Example(score(**parameters), functools.partial(relative, **parameters), parameters)


def example_of(score: Score) -> Example:
    """An example of a score that no paper defines."""
    return Example(score, functools.partial(by_regions, score=score))


EXAMPLES = {
    "rerope": example(scores.rerope, rerope, window=6),
    "leaky_rerope": example(scores.leaky_rerope, rerope, window=6, factor=2.5),
    "self_extend": example(scores.self_extend, self_extend, window=6, factor=3),
    "dual_chunk": example(scores.dual_chunk, dual_chunk, chunk_size=9, local_window=2),
    "blockwise_causal": example(scores.blockwise_causal, blockwise_causal, block_size=10),
    "string": example(scores.string, string, shift=9, window=2),
}
# Scores with maps of pairs, by the number of pairs: tests/attention/test_pair_maps.py has them.
OF_PAIRS: dict[str, Callable[[int], dict]] = {
    "dpe": lambda pairs: {"window": 6, "group_sizes": [1 + 2 * n % 7 for n in range(pairs)]},
}
PLAIN = Example(None, functools.partial(rerope, window=1 << 40))  # rope_attention without a score
