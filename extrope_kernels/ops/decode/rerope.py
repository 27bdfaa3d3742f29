"""ReRoPE, Leaky ReRoPE, InvLeaky ReRoPE and SelfExtend over a key/value cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from ...methods import RopeFreqs
from .._shared.attention_call import rerope_score
from .._shared.options import CacheOptions
from .api import attend_with_kvcache, public

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NAME = "rerope_attention_with_kvcache"


@public
def rerope_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    freqs: RopeFreqs,
    *,
    cache_seqlens: Tensor | int,
    window: int,
    factor: float = math.inf,
    grouped: bool = False,
    **options: Unpack[CacheOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`rerope_attention` of a sequence's last tokens over a cache of keys and values, at inference.

    The cache holds each key once, in the frame that its far queries see: as it came for ReRoPE
    (factor inf), else rotated to position j / factor, floored with `grouped`. Only the keys nearer
    than the window are rotated, on the way, at every call; the cache is not. Write prompts with k
    and v too, then cache and attention agree whatever the frame.

    q: (batch, seqlen_q, heads_q, head_dim), not rotated; float32, bfloat16, float16 or float64.
        With cu_seqlens_q (total, heads_q, head_dim).
    k_cache, v_cache: (batch, max_len, heads_k, head_dim), any strides with a contiguous last
        dimension; with block_table (num_blocks, block_size, heads_k, head_dim). The head_dim of
        v_cache may be another. Both in q's dtype, or float8_e4m3fn with k_scale and v_scale.
    cache_seqlens: (batch,) int32, or one int for all (a CUDA graph would replay it unchanged). With
        k and v: how many slots were in use before them. Else: how many are, the queries' own tokens
        included.
    k, v: of q's tokens, (batch, seqlen_q, heads_k, head_dim) or (total, heads_k, head_dim), k not
        rotated: written into the cache first.
    cu_seqlens_q: (batch + 1,) int32, the boundaries of packed queries: prefill chunks and single
        tokens of many sequences in one call. A sequence may have none; what is past the last
        boundary is padding, gets 0 and -inf, and is not written.
    block_table: (batch, max_blocks) int32: the blocks of each sequence in their order.
    k_scale, v_scale: (heads_k,) float32, positive, of a cache in float8_e4m3fn: a key or value is
        what is stored times its head's scale. It is written over the scale, rounded to nearest
        even, and at most 448 either way.
    cache_leftpad: (batch,) int32: the first slot in use, whose position is 0.
    freqs, window, factor, grouped, softmax_scale, log_n, query_scale, softcap, sinks,
        sliding_window, interleaved: as for `rerope_attention`; freqs, factor and grouped the same
        in every call on one cache. inv_freq (rotary_dim/2,), or one row a sequence; XPOS's
        log_decay is refused.
    backend: "cpu", "triton", "reference"; None for the best on q's device. A named backend never
        falls back.

    Returns: out like q, of v's head_dim, and with return_lse the log-sum-exp of the logits and the
        sink (batch, heads_q, seqlen_q), or (heads_q, total), float32 (float64 with float64
        tensors). Queries before a sequence's first key have 0, and -inf or the sink.
    Raises: ValueError or TypeError that names the argument, before anything is written;
        NotImplementedError when the named backend cannot run here. On a GPU the values of integer
        tensors are not looked at: what does not fit the cache is neither written nor read, and
        nothing is written to a page that is not there; reading one is undefined.
    """
    return attend_with_kvcache(
        rerope_score(_NAME, window, factor, grouped),
        q,
        k_cache,
        v_cache,
        freqs,
        cache_seqlens=cache_seqlens,
        op=_NAME,
        **options,
    )
