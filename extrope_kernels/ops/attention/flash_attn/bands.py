"""Regions of granularity 1 as bands of keys, and the pieces of q, k and v that bands read.

In a band, query i sees the keys i - left <= j <= i - shift. A piece is cut so that its shift is
zero: of each sequence the first rows and the last keys are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call import AttentionCall


@dataclass(frozen=True)
class Band:
    """The keys i - left <= j <= i - shift of query i, for one region."""

    region: int
    left: int | None  # None: from the first key on
    shift: int


def bands(starts: Sequence[int], sliding_window: int | None, seqlen_k: int) -> list[Band]:
    """Return the bands with a key in sequences of at most seqlen_k keys."""
    found = []
    if sliding_window is not None:
        starts = [max(start, 1 - sliding_window) for start in starts]
    for region, (start, end) in enumerate(zip(starts, (*starts[1:], 1))):
        left = None if start <= -seqlen_k else -start
        shift = max(0, 1 - end)
        if shift < seqlen_k and (left is None or left >= shift):
            found.append(Band(region, left, shift))
    return found


@dataclass(frozen=True)
class Dense:
    """A piece without the first rows and the last keys."""

    first_row: int
    keys_kept: int
    keys_dropped: int
    arguments: tuple  # softmax_scale, left, cu_seqlens, softcap: other arguments of an engine

    def rows(self, x: Tensor) -> Tensor:
        return x[:, self.first_row :]

    def row_lse(self, lse: Tensor) -> Tensor:
        return lse[..., self.first_row :].contiguous()

    def keys(self, x: Tensor) -> Tensor:
        return x[:, : self.keys_kept]

    def put_rows(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.first_row, 0)) if self.first_row else x

    def put_lse(self, lse: Tensor) -> Tensor:
        return F.pad(lse, (self.first_row, 0), value=-torch.inf) if self.first_row else lse

    def put_keys(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, self.keys_dropped)) if self.keys_dropped else x


@dataclass(frozen=True)
class Whole:
    """A piece of packed sequences that drops nothing."""

    arguments: tuple

    def rows(self, x: Tensor) -> Tensor:
        return x

    row_lse = keys = put_rows = put_lse = put_keys = rows


@dataclass(frozen=True)
class Gathered:
    """A piece of packed sequences, each without its first rows and last keys.

    The buffers keep their length, so that the host need not know how many tokens remain. Tokens
    after the last sequence are never read.
    """

    row_source: Tensor  # (total,) old index of each remaining row
    key_source: Tensor
    row_target: Tensor  # (total,) new index of each row
    key_target: Tensor
    row_kept: Tensor  # (total,) bool
    key_kept: Tensor
    arguments: tuple

    def rows(self, x: Tensor) -> Tensor:
        return x[self.row_source]

    def row_lse(self, lse: Tensor) -> Tensor:
        return lse[:, self.row_source]

    def keys(self, x: Tensor) -> Tensor:
        return x[self.key_source]

    def put_rows(self, x: Tensor) -> Tensor:
        return x[self.row_target].masked_fill(~self.row_kept[:, None, None], 0.0)

    def put_lse(self, lse: Tensor) -> Tensor:
        return lse[:, self.row_target].masked_fill(~self.row_kept, -torch.inf)

    def put_keys(self, x: Tensor) -> Tensor:
        return x[self.key_target].masked_fill(~self.key_kept[:, None, None], 0.0)


def cut(band: Band, q: Tensor, v: Tensor, call: AttentionCall) -> Dense | Whole | Gathered | None:
    """Cut the piece of a band; None if no row is left."""
    scale, cu_seqlens = call.scale(q.shape[-1]), call.cu_seqlens
    if cu_seqlens is not None and band.shift == 0:
        return Whole((scale, band.left, cu_seqlens, call.softcap))
    left = None if band.left is None else band.left - band.shift
    if cu_seqlens is not None:
        return _gathered(band.shift, cu_seqlens, v.shape[0], scale, left, call.softcap)
    seqlen_q, seqlen_k = q.shape[1], v.shape[1]
    # Row i is at position i + seqlen_k - seqlen_q. If rows are dropped, the first one left is at
    # `shift` and sees key 0; bottom-right alignment does the rest.
    first_row = max(0, band.shift - (seqlen_k - seqlen_q))
    if first_row >= seqlen_q:
        return None
    return Dense(first_row, seqlen_k - band.shift, band.shift, (scale, left, None, call.softcap))


def _gathered(
    shift: int, cu_seqlens: Tensor, total: int, scale: float, left: int | None, softcap: float
) -> Gathered:
    lengths = cu_seqlens.diff()
    remaining = (lengths - shift).clamp(min=0)
    starts = F.pad(remaining.cumsum(0, dtype=torch.int32), (1, 0))
    token = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)

    sequence = _sequence(starts, token)
    key_source = (token - starts[sequence] + cu_seqlens[sequence]).clamp(max=total - 1)
    row_source = (key_source + shift).clamp(max=total - 1)

    sequence = _sequence(cu_seqlens, token)
    local = token - cu_seqlens[sequence]
    key_target = starts[sequence] + local
    row_target = (key_target - shift).clamp(min=0)
    return Gathered(
        row_source=row_source,
        key_source=key_source,
        row_target=row_target,
        key_target=key_target,
        row_kept=local >= shift,
        key_kept=local < remaining[sequence],
        arguments=(scale, left, starts, softcap),
    )


def _sequence(cu_seqlens: Tensor, token: Tensor) -> Tensor:
    """Return each token's sequence, (total,); the last sequence for tokens past the end."""
    found = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return found.clamp(max=cu_seqlens.shape[0] - 2)
