"""A call over a cache as its ops take it: where cached keys and values lie, and the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._shared.attention_call import AttentionCall
from .._shared.dtypes import NO_SCALES, Scales


@dataclass(frozen=True)
class KVCache:
    """Keys, rotated to their stored position, and values of every sequence."""

    k: Tensor  # (batch, max_len, heads_k, head_dim), or (pages, page_size, ...) with block_table
    v: Tensor
    seqlens: Tensor  # (batch,) int32: slots in use, the left padding among them
    block_table: Tensor | None = None  # (batch, max_pages) int32
    leftpad: Tensor | None = None  # (batch,) int32: the slot of position 0
    appended: int = 0  # tokens that this call writes, to be added to seqlens
    cu_seqlens_new: Tensor | None = None  # of tokens that it writes packed
    scales: Scales = NO_SCALES

    @property
    def capacity(self) -> int:
        """How many slots a sequence has."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k.shape[1]

    def ends(self) -> Tensor:
        """(batch,) int64: the slots in use once this call has written."""
        if self.cu_seqlens_new is None:
            return self.seqlens.long() + self.appended
        return self.seqlens.long() + self.cu_seqlens_new.diff()

    def lengths(self) -> Tensor:
        """(batch,) int64: the number of keys of each sequence."""
        return self.ends() if self.leftpad is None else self.ends() - self.leftpad

    def rows(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the first two dimensions of k and v for (batch, n) slots."""
        sequence = torch.arange(slots.shape[0], device=slots.device)[:, None]
        if self.block_table is None:
            return sequence, slots
        page_size = self.k.shape[1]
        return self.block_table[sequence, slots // page_size].long(), slots % page_size


def parse(
    q,
    k_cache,
    v_cache,
    k,
    v,
    inv_freq,
    cache_seqlens,
    block_table=None,
    cache_leftpad=None,
    log_decay=None,
    sinks=None,
    query_scale=None,
    cu_seqlens_q=None,
    k_scale=None,
    v_scale=None,
    **options,
) -> tuple[KVCache, AttentionCall]:
    """The classes that implementations take, from the arguments of `decode`."""
    has_rows = isinstance(k, Tensor) and not k.is_nested and k.dim() == 4
    appended = k.shape[1] if has_rows else 0
    cu_seqlens_new = None if k is None else cu_seqlens_q
    of_cache = (cache_seqlens, block_table, cache_leftpad, appended, cu_seqlens_new)
    cache = KVCache(k_cache, v_cache, *of_cache, Scales(k_scale, v_scale))
    return cache, AttentionCall(inv_freq, cu_seqlens_q, log_decay, sinks, query_scale, **options)


def parse_append(
    k_cache, v_cache, k, v, *others, stored, **options
) -> tuple[KVCache, AttentionCall]:
    """The same from the arguments of `append`: a call without a region."""
    regions = {"starts": (), "granularity": 1, "maps": stored}
    scales = dict(zip(("k_scale", "v_scale"), others[5:]))
    return parse(None, k_cache, v_cache, k, v, *others[:5], **scales, **regions, **options)
