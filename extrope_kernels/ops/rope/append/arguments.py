"""One fused step as its op takes it: what is written into a cache, where, and rotated by what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....scores import PositionMap
from ..._shared.fp8 import Scales
from ..._shared.positions import sequence_of_token


@dataclass(frozen=True)
class Append:
    """The arguments of `rope_append`."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    k_cache: Tensor  # (batch, max_len, heads_k, head_dim), or (pages, page_size, ...)
    v_cache: Tensor
    q_norm_weight: Tensor | None
    k_norm_weight: Tensor | None
    inv_freq: Tensor | None  # None: nothing is rotated
    cache_seqlens: Tensor | None = None  # (sequences,) int32: slots in use, left padding included
    block_table: Tensor | None = None  # (sequences, max_pages) int32
    slot_mapping: Tensor | None = None  # of k's tokens: page * page_size + slot, -1 for nowhere
    cu_seqlens: Tensor | None = None
    cache_leftpad: Tensor | None = None  # (sequences,) int32: the slot of position 0
    positions: Tensor | None = None  # None: behind those in use
    log_decay: Tensor | None = None
    axes: Tensor | None = None
    k_scale: Tensor | None = None  # of a cache in float8_e4m3fn
    v_scale: Tensor | None = None
    stored: tuple[float, ...] | list[float] = ()  # a map: k rotates to there, and q not at all
    norm_eps: float = 1e-6
    attention_factor: float = 1.0
    interleaved: bool = False
    decay_origin: float = 0.0

    @property
    def scales(self) -> Scales:
        return Scales(self.k_scale, self.v_scale)

    @property
    def packed(self) -> bool:
        return self.k.dim() == 3

    @property
    def batch(self) -> int:
        return 1 if self.packed else self.k.shape[0]

    @property
    def seqlen(self) -> int:
        return self.k.shape[-3]

    @property
    def sequences(self) -> int:
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def capacity(self) -> int:
        """How many slots a sequence has."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k_cache.shape[1]

    @property
    def rotates_q(self) -> bool:
        return self.inv_freq is not None and not self.stored

    @property
    def map(self) -> PositionMap | None:
        """Where a score method stores keys."""
        return PositionMap.read(self.stored) if self.stored else None

    def sequence_and_place(self) -> tuple[Tensor, Tensor]:
        """(batch, seqlen): each token's sequence, and its number among the new ones of that."""
        index = torch.arange(self.seqlen, device=self.k.device)
        if self.cu_seqlens is None:
            sequence = torch.arange(self.batch, device=self.k.device)[:, None]
            return sequence.expand(-1, self.seqlen), index.expand(self.batch, -1)
        sequence = sequence_of_token(self.cu_seqlens, self.seqlen)
        return sequence[None], (index - self.cu_seqlens[sequence])[None]

    def token_positions(self) -> Tensor:
        """`positions`, or (batch, seqlen) int64 of the tokens behind those in use."""
        if self.positions is not None:
            return self.positions
        sequence, place = self.sequence_and_place()
        first = self.cache_seqlens.long()
        if self.cache_leftpad is not None:
            first = first - self.cache_leftpad
        return first[sequence] + place

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, seqlen): whether a token is written; the indices of its block and of its slot."""
        page_size = self.k_cache.shape[1]
        if self.slot_mapping is not None:
            slot = self.slot_mapping.long().view(self.batch, self.seqlen)
            return slot >= 0, slot // max(page_size, 1), slot % max(page_size, 1)
        sequence, place = self.sequence_and_place()
        slot = self.cache_seqlens.long()[sequence] + place
        written = slot < self.capacity
        if self.cu_seqlens is not None:
            written = written & (place < self.cu_seqlens.diff()[sequence])
        if self.block_table is None:
            return written, sequence, slot
        page = torch.where(written, slot // page_size, 0)
        return written, self.block_table[sequence, page].long(), slot % page_size
