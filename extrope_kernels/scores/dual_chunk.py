"""Dual Chunk Attention."""

from __future__ import annotations

from .._checks import check_int
from .._names import explains_wrong_calls
from .base import FIRST_KEY, PositionMap, Region, Score, constant, made_once


@explains_wrong_calls
@made_once
def dual_chunk(chunk_size: int, local_window: int) -> Score:
    """Dual Chunk Attention: distances restart in every chunk; older chunks are at a fixed one.

    Chunks have c = chunk_size - local_window tokens. Positions are ChunkLlama's. A key is at j % c.
    A query is at i % c for keys of its own chunk, at min(i % c + c, chunk_size) for the previous
    chunk, and at min(2c - 1, chunk_size) for older ones.

    chunk_size: in tokens, at most the training length; ChunkLlama takes three quarters of it.
    local_window: in tokens, below chunk_size; ChunkLlama takes an eighth of the training length.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.

    Paper: https://arxiv.org/abs/2402.17463
    """
    chunk_size = check_int("dual_chunk", "chunk_size", chunk_size, at_least=1)
    local_window = check_int("dual_chunk", "local_window", local_window, at_least=0)
    if local_window >= chunk_size:
        raise ValueError(
            f"dual_chunk: local_window must be less than chunk_size {chunk_size}, "
            f"got {local_window}"
        )
    chunk = chunk_size - local_window
    within = PositionMap(modulus=chunk)
    previous = PositionMap(modulus=chunk, offset=chunk, cap=chunk_size)
    older = constant(min(2 * chunk - 1, chunk_size))
    regions = (
        Region(FIRST_KEY, older, within),
        Region(-chunk, previous, within),
        Region(0, within, within),
    )
    given = {"chunk_size": chunk_size, "local_window": local_window}
    return Score("dual_chunk", regions, granularity=chunk, stored=within, given=given)
