"""Dual Chunk Attention over a key/value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ... import scores
from ...methods import RopeFreqs
from .._shared.attention_call import score_of
from .._shared.options import CacheOptions
from .api import attend_with_kvcache, public

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NAME = "dual_chunk_attention_with_kvcache"


@public
def dual_chunk_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    freqs: RopeFreqs,
    *,
    cache_seqlens: Tensor | int,
    chunk_size: int,
    local_window: int,
    **options: Unpack[CacheOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`dual_chunk_attention` of a sequence's last tokens over a cache, at inference.

    The cache holds each key once, rotated to its position within its chunk, which is what queries
    of every chunk see. chunk_size and local_window: as for `dual_chunk_attention`; the chunks'
    length chunk_size - local_window stays the same in every call on one cache. Everything else as
    in `rerope_attention_with_kvcache`.
    """
    return attend_with_kvcache(
        score_of(_NAME, scores.dual_chunk, chunk_size, local_window),
        q,
        k_cache,
        v_cache,
        freqs,
        cache_seqlens=cache_seqlens,
        op=_NAME,
        **options,
    )
