"""ReRoPE, Leaky ReRoPE, InvLeaky ReRoPE and SelfExtend over a key/value cache."""

from __future__ import annotations

import math

from torch import Tensor

from ...methods import RopeFreqs
from .._shared.attention_call import rerope_score
from .api import attend_with_kvcache

_NAME = "rerope_attention_with_kvcache"


def rerope_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    freqs: RopeFreqs,
    *,
    cache_seqlens: Tensor | int,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    window: int,
    factor: float = math.inf,
    grouped: bool = False,
    softmax_scale: float | None = None,
    log_n: float | None = None,
    interleaved: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rerope_attention` of a sequence's last tokens over a cache of keys and values, at inference.

    The cache holds each key once, in the frame that its far queries see: as it came for ReRoPE
    (factor inf), else rotated to position j / factor, floored with `grouped`. Only the keys nearer
    than the window are rotated, on the way, at every call; the cache is not. Write prompts with k
    and v too, then cache and attention agree whatever the frame.

    q: (batch, seqlen_q, heads_q, head_dim), not rotated; float32, bfloat16, float16 or float64.
    k_cache, v_cache: (batch, max_len, heads_k, head_dim), any strides with a contiguous last
        dimension; with block_table (num_blocks, block_size, heads_k, head_dim).
    cache_seqlens: (batch,) int32, or one int for all (a CUDA graph would replay it unchanged). With
        k and v: how many slots were in use before them. Else: how many are, the queries' own tokens
        included.
    k, v: (batch, seqlen_q, heads_k, head_dim), k not rotated: written into the cache first.
    block_table: (batch, max_blocks) int32: the blocks of each sequence in their order.
    cache_leftpad: (batch,) int32: the first slot in use, whose position is 0.
    freqs, window, factor, grouped, softmax_scale, log_n, interleaved: as for `rerope_attention`,
        the same in every call on one cache (window and log_n may change). inv_freq
        (rotary_dim/2,), or one row a sequence; XPOS's log_decay is refused.
    backend: "cpu", "triton", "reference"; None for the best on q's device. A named backend never
        falls back.

    Returns: out like q, and with return_lse the log-sum-exp of the logits (batch, heads_q,
        seqlen_q), float32. Queries before a sequence's first key have 0 and -inf.
    Raises: ValueError or TypeError that names the argument, before anything is written;
        NotImplementedError when the named backend cannot run here. On a GPU the values of integer
        tensors are not looked at, and what does not fit the cache is neither written nor read.
    """
    return attend_with_kvcache(
        rerope_score(_NAME, window, factor, grouped),
        q,
        k_cache,
        v_cache,
        freqs,
        cache_seqlens=cache_seqlens,
        k=k,
        v=v,
        block_table=block_table,
        cache_leftpad=cache_leftpad,
        softmax_scale=softmax_scale,
        log_n=log_n,
        interleaved=interleaved,
        return_lse=return_lse,
        backend=backend,
        op=_NAME,
    )
