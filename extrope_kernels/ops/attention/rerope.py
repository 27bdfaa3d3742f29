"""ReRoPE, Leaky ReRoPE, InvLeaky ReRoPE and SelfExtend."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from ...methods import RopeFreqs
from .._shared.attention_call import rerope_score
from .._shared.options import AttentionOptions
from .api import attend, public

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NAME = "rerope_attention"


@public
def rerope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    *,
    window: int,
    factor: float = math.inf,
    grouped: bool = False,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which distances past a window grow slower, or not at all.

    Query i and key j see the relative position x = i - j where x < window, else
    window + (x - window) / factor: ReRoPE and Leaky ReRoPE (https://kexue.fm/archives/9708). With
    `grouped`, i // G - j // G + window - window // G past the window, G = factor: SelfExtend
    (https://arxiv.org/abs/2401.01325). One softmax over both. Rotation is included.

    q: (batch, seqlen_q, heads_q, head_dim), not rotated; float32, bfloat16, float16 or float64;
        any strides with a contiguous last dimension.
    k, v: (batch, seqlen_k, heads_k, head_dim), k not rotated; heads_k divides heads_q, and nothing
        is expanded. v may have another head_dim (MLA: 192 and 128). Where seqlen_q < seqlen_k the
        queries are the last of the sequence. With cu_seqlens all are (total, heads, head_dim).
    freqs: from `extrope_kernels.methods`, on q's device; inv_freq (rotary_dim/2,), or one row a
        sequence. attention_factor multiplies the rotated dims of q and of k, near and far.
    window: in tokens, >= 1; at seqlen_k or more this is plain attention. Half of the training
        length is a good start.
    factor: inf for ReRoPE, above 1 for Leaky, below 1 for InvLeaky, 1 for plain RoPE. With
        `grouped` an integer that divides window.
    softmax_scale: of the logits; head_dim**-0.5 by default.
    log_n: the training length, to multiply query i by max(1, ln(i + 1) / ln(log_n)).
    query_scale: (seqlen_q,) or (batch, seqlen_q) float32, packed (total,): further factors of the
        logits of each query, as Llama 4's and Ministral's temperatures.
    softcap: c > 0 makes logits c * tanh(logits / c), as in Gemma 2; 0 leaves them.
    sinks: (heads_q,) float32 (float64 with float64 tensors), logits that join each row's softmax
        and have no value, as in GPT-OSS. Neither scaled nor capped.
    sliding_window: keys j with i - j >= sliding_window are not seen, whatever their region.
    q_start, k_start: positions of the first query and the first key, an int or (batch,) int32 (with
        cu_seqlens (sequences,)), for pieces of longer sequences: regions, windows and log_n count
        from absolute positions. k_start is 0 by default, and q_start such that both end together.
    cu_seqlens: (sequences + 1,) int32 or int64, the boundaries of packed sequences.
    interleaved: pairs of dims are (2i, 2i + 1), as in GPT-J; else (i, i + rotary_dim/2).
    backend: "cpu", "triton", "flash_attn", "reference"; None for the best on q's device. A named
        backend never falls back.

    Returns: out like q, of v's head_dim, and with return_lse the log-sum-exp of the logits and the
        sink, (batch, heads_q, seqlen_q) or (heads_q, total), float32 (float64 with float64
        tensors), -inf where there is neither. Differentiable in q, k, v and sinks; to any order,
        and in inv_freq, with backend="reference".
    Raises: ValueError or TypeError that names the argument; NotImplementedError when the named
        backend cannot run here.
    """
    return attend(
        rerope_score(_NAME, window, factor, grouped),
        q,
        k,
        v,
        freqs,
        op=_NAME,
        **options,
    )
