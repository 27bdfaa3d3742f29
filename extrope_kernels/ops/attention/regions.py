"""Which relative position a (query, key) pair sees: the score methods as data.

Causal attention with changed positions is plain attention in a few regions. In region r, query at
position i and key at position j are rotated to `q_positions(i)` and `k_positions(j)`, so that they
see the difference of the two; the region holds the keys

    start_r(i) <= j < start_{r+1}(i),    start_r(i) = i // granularity * granularity + starts[r],

and the last one ends at the diagonal, j <= i. One softmax runs over all regions. Kernels know
regions only; a new score method is a class here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_KEY = -(1 << 62)  # as a start: from the first key on


@dataclass(frozen=True)
class Layout:
    """The shape of the regions, and how scores become logits: all that a kernel needs to know.

    A logit is softmax_scale * row_scale[i] * <q_r[i], k_r[j]>, in the region r that holds j.
    """

    starts: tuple[int, ...]  # one a region, rising
    granularity: int
    softmax_scale: float
    row_scale: Tensor | None  # (seqlen_q,), or (total,) with cu_seqlens: float32
    cu_seqlens: Tensor | None  # (sequences + 1,) int32
    turns: Turns | None = None  # q and k come raw, and the kernel turns rows as it reads them


@dataclass(frozen=True)
class Turns:
    """By what the kernel turns q and k: a table for each region, or an empty one for not at all.

    A table is (batch or 1, seqlen or 1, rotary_dim), or (1, total or 1, rotary_dim) with
    cu_seqlens, in float32: the cosines of a token, or of all alike, then as many sines. Those of k
    are empty in 16 bits.
    """

    q: list[Tensor]
    k: list[Tensor]
    interleaved: bool


@dataclass(frozen=True)
class Region:
    """Where one region starts and to which positions it rotates; None leaves keys as they are."""

    start: int
    q_positions: Callable[[Tensor], Tensor]
    k_positions: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class ReRope:
    """ReRoPE, Leaky ReRoPE and SelfExtend: i - j up to the window, then slower or not at all.

    https://kexue.fm/archives/9708 and https://arxiv.org/abs/2401.01325.
    """

    window: int
    factor: float = math.inf
    grouped: bool = False
    granularity = 1

    def regions(self, longest: int) -> list[Region]:
        """The regions of sequences of at most `longest` tokens, far keys first."""
        if self.factor == 1.0 or self.window >= longest:
            return [Region(FIRST_KEY, _same, _same)]
        far = Region(FIRST_KEY, self._far_query, self.stored_position)
        return [far, Region(1 - self.window, _same, _same)]

    @property
    def stored_position(self) -> Callable[[Tensor], Tensor] | None:
        """The position that a cached key is rotated to: that of the far region, once for all."""
        if math.isinf(self.factor):
            return None
        if self.factor == 1.0:
            return _same
        return self._grouped_position if self.grouped else self._slow_position

    def _far_query(self, i: Tensor) -> Tensor:
        if math.isinf(self.factor):
            return _constant(i, self.window)
        if self.grouped:
            return self._grouped_position(i) + (self.window - self.window // int(self.factor))
        return self.window + (i - self.window) / self.factor

    def _slow_position(self, j: Tensor) -> Tensor:
        return j / self.factor

    def _grouped_position(self, j: Tensor) -> Tensor:
        return torch.floor(j / self.factor)


@dataclass(frozen=True)
class DualChunk:
    """Dual Chunk Attention with ChunkLlama's positions (https://arxiv.org/abs/2402.17463)."""

    chunk_size: int
    local_window: int

    @property
    def granularity(self) -> int:
        return self.chunk_size - self.local_window

    def regions(self, longest: int) -> list[Region]:
        """The regions of sequences of at most `longest` tokens: older, previous, own chunk."""
        chunk, cap = self.granularity, self.chunk_size
        own = Region(0, self.stored_position, self.stored_position)
        previous = Region(
            -chunk, lambda i: torch.clamp(i % chunk + chunk, max=cap), self.stored_position
        )
        older = Region(
            FIRST_KEY, lambda i: _constant(i, min(2 * chunk - 1, cap)), self.stored_position
        )
        regions = [older, previous, own][-max(1, min(3, -(-longest // chunk))) :]
        return [Region(FIRST_KEY, regions[0].q_positions, regions[0].k_positions), *regions[1:]]

    def stored_position(self, j: Tensor) -> Tensor:
        """The position that a cached key is rotated to: that within its chunk."""
        return j % self.granularity


@dataclass(frozen=True)
class BlockwiseCausal:
    """LEX's blockwise causal attention: the own and the previous half block, causally.

    https://arxiv.org/abs/2212.10554. Positions restart in every window of a block, so XPOS's
    amplitudes never exceed those of one block.
    """

    block_size: int

    @property
    def granularity(self) -> int:
        return self.block_size // 2

    def regions(self, longest: int) -> list[Region]:
        """The regions of sequences of at most `longest` tokens: previous half block, own."""
        half = self.granularity
        own = Region(0, self.stored_position, self.stored_position)
        if longest <= half:
            return [own]
        return [Region(-half, lambda i: i % half + half, self.stored_position), own]

    def stored_position(self, j: Tensor) -> Tensor:
        """The position that a cached key is rotated to: that within its half block."""
        return j % self.granularity


def _same(position: Tensor) -> Tensor:
    return position


def _constant(position: Tensor, value: int) -> Tensor:
    return position.new_full((1,), value).expand(position.shape)  # its stride tells kernels


Score = ReRope | DualChunk | BlockwiseCausal
