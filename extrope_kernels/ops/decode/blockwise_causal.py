"""LEX's blockwise causal attention over a key/value cache."""

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

_NAME = "blockwise_causal_attention_with_kvcache"


@public
def blockwise_causal_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    freqs: RopeFreqs,
    *,
    cache_seqlens: Tensor | int,
    block_size: int,
    **options: Unpack[CacheOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`blockwise_causal_attention` of a sequence's last tokens over a cache, at inference.

    The cache holds each key once, rotated to its position within its half block, where XPOS's
    amplitudes (freqs.log_decay) stay finite at any length. block_size: as for
    `blockwise_causal_attention`, the same in every call on one cache. Everything else as in
    `rerope_attention_with_kvcache`.
    """
    return attend_with_kvcache(
        score_of(_NAME, scores.blockwise_causal, block_size),
        q,
        k_cache,
        v_cache,
        freqs,
        cache_seqlens=cache_seqlens,
        op=_NAME,
        **options,
    )
