"""LEX: XPOS with blockwise causal attention at inference."""

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

_NAME = "blockwise_causal_attention"


@public
def blockwise_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    *,
    block_size: int,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention to the own and the previous half block, as LEX reads past its training.

    With h = block_size / 2, query i sees the keys (i // h - 1) * h .. i: between h + 1 and
    block_size of them once there are as many (https://arxiv.org/abs/2212.10554). Relative positions
    are the true distances. XPOS's amplitudes (freqs.log_decay) are taken within one block, so they
    stay finite at any length.

    block_size: in tokens, even; LEX takes the training length.
    Everything else, and what is returned and raised, as in `rerope_attention`.
    """
    return attend(
        score_of(_NAME, scores.blockwise_causal, block_size),
        q,
        k,
        v,
        freqs,
        op=_NAME,
        **options,
    )
