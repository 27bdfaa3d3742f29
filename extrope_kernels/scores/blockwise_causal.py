"""LEX's blockwise causal attention, XPOS at inference."""

from __future__ import annotations

from .._checks import check_int
from .._names import explains_wrong_calls
from .base import PositionMap, Region, Score, made_once


@explains_wrong_calls
@made_once
def blockwise_causal(block_size: int) -> Score:
    """LEX, blockwise causal: a query sees the keys of its own and the previous half block.

    With h = block_size / 2, query i sees the keys (i // h - 1) * h .. i at their true distances.
    Positions restart in every half block: XPOS's amplitudes never exceed those of one block.

    block_size: in tokens, even; LEX takes the training length.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.

    Paper: https://arxiv.org/abs/2212.10554
    """
    block_size = check_int("blockwise_causal", "block_size", block_size, at_least=2)
    if block_size % 2:
        raise ValueError(f"blockwise_causal: block_size must be even, got {block_size}")
    half = block_size // 2
    within = PositionMap(modulus=half)
    previous = PositionMap(modulus=half, offset=half)
    regions = (Region(-half, previous, within), Region(0, within, within))
    given = {"block_size": block_size}
    return Score("blockwise_causal", regions, granularity=half, stored=within, given=given)
