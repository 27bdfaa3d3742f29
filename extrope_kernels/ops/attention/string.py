"""STRING."""

from __future__ import annotations

from torch import Tensor

from ... import scores
from ...methods import RopeFreqs
from .._shared.attention_call import score_of
from .api import attend

_NAME = "string_attention"


def string_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    *,
    shift: int,
    window: int,
    softmax_scale: float | None = None,
    log_n: float | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which distances from `shift` on start anew at `window`.

    Query i and key j see the relative position x = i - j where x < shift, else x - shift + window:
    STRING (https://arxiv.org/abs/2410.18745), which reads with well-trained distances in place of
    the largest ones, without training. One softmax over both.

    shift: S, in tokens; about a third of the training length.
    window: W, in tokens, at most shift; the authors take 128.
    Everything else, and what is returned and raised, as in `rerope_attention`.
    """
    return attend(
        score_of(_NAME, scores.string, shift, window),
        q,
        k,
        v,
        freqs,
        softmax_scale=softmax_scale,
        log_n=log_n,
        cu_seqlens=cu_seqlens,
        interleaved=interleaved,
        return_lse=return_lse,
        backend=backend,
        op=_NAME,
    )
