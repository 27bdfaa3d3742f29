"""Dual Chunk Attention."""

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

_NAME = "dual_chunk_attention"


@public
def dual_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    *,
    chunk_size: int,
    local_window: int,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in chunks of chunk_size - local_window tokens, as in ChunkLlama.

    Keys sit at their position within the chunk, c = chunk_size - local_window. Queries sit, for
    keys of their own chunk, at i % c; for those of the previous one, at min(i % c + c, chunk_size);
    for older ones, at min(2c - 1, chunk_size) (https://arxiv.org/abs/2402.17463). Distances up to
    local_window are exact. One softmax over all.

    chunk_size: in tokens, at most the training length; ChunkLlama takes three quarters of it.
    local_window: in tokens, below chunk_size; ChunkLlama takes an eighth of the training length.
    Everything else, and what is returned and raised, as in `rerope_attention`.
    """
    return attend(
        score_of(_NAME, scores.dual_chunk, chunk_size, local_window),
        q,
        k,
        v,
        freqs,
        op=_NAME,
        **options,
    )
