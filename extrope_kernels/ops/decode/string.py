"""STRING over a key/value cache."""

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

_NAME = "string_attention_with_kvcache"


@public
def string_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    freqs: RopeFreqs,
    *,
    cache_seqlens: Tensor | int,
    shift: int,
    window: int,
    **options: Unpack[CacheOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`string_attention` of a sequence's last tokens over a cache, at inference.

    The cache holds each key once, rotated to its own position, as a model's cache does without
    STRING. shift, window: as for `string_attention`; both may change between calls. Everything else
    as in `rerope_attention_with_kvcache`.
    """
    return attend_with_kvcache(
        score_of(_NAME, scores.string, shift, window),
        q,
        k_cache,
        v_cache,
        freqs,
        cache_seqlens=cache_seqlens,
        op=_NAME,
        **options,
    )
