"""STRING."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ... import scores
from ...methods import RopeFreqs
from .._shared.attention_call import score_of
from .._shared.options import AttentionOptions
from .api import attend, public

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NAME = "string_attention"


@public
def string_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    *,
    shift: int,
    window: int,
    **options: Unpack[AttentionOptions],
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
        op=_NAME,
        **options,
    )
