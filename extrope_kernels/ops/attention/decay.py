"""Keys that XPOS's amplitude takes out of the range of their dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores import Score
from .._shared.decay import reach

Start = Tensor | int | None


class _Ends(NamedTuple):
    """Positions of queries, and of the last key that one of them may see."""

    first_query: int
    last_query: int
    last_key: int


def check_decay(
    op: str,
    score: Score,
    freqs: RopeFreqs,
    tensors: tuple[Tensor, Tensor],
    starts: tuple[Start, Start],
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError when a key that is seen goes so far from 0 that its amplitude overflows.

    Only what the host knows is looked at: starts and boundaries on the CPU, or none given. What is
    wrong with the arguments is left to the op.

    tensors: q and k. starts: q_start and k_start.
    """
    q, k = tensors
    small = [x for x in (*starts, cu_seqlens) if isinstance(x, Tensor)]
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if not all(isinstance(x, Tensor) and x.dim() > 2 and x.is_floating_point() for x in tensors):
        return
    if any(x.device.type != "cpu" for x in small) or not all(x.numel() for x in (*tensors, *small)):
        return
    most = reach(freqs, q.dtype)
    keys = _farthest_keys(score, _ends(q.shape[-3], k.shape[-3], *starts, cu_seqlens))
    if (farthest := max(keys, default=0)) > most:
        raise ValueError(
            f"{op}: XPOS's amplitude leaves {q.dtype} {most} positions from 0, got keys at up to "
            f"{farthest:.0f}; blockwise_causal_attention with a block_size of at most "
            f"{2 * (most + 1)} stays within"
        )


def _ends(
    seqlen_q: int, seqlen_k: int, q_start: Start, k_start: Start, cu_seqlens: Tensor | None
) -> _Ends:
    if cu_seqlens is not None:
        seqlen_q = seqlen_k = int(cu_seqlens.diff().max())
    first_key, last_key = (at + n for at, n in zip(_range(k_start), (0, seqlen_k - 1)))
    if q_start is None:
        return _Ends(first_key + seqlen_k - seqlen_q, last_key, last_key)
    first, last = _range(q_start)
    last += seqlen_q - 1
    return _Ends(first, last, min(last_key, last))


def _range(start: Start) -> tuple[int, int]:
    if isinstance(start, Tensor):
        return int(start.min()), int(start.max())
    return start or 0, start or 0


def _farthest_keys(score: Score, ends: _Ends) -> Iterator[float]:
    """Where each region's keys go at most, of those regions that hold some."""
    first, last = (
        position // score.granularity * score.granularity
        for position in (ends.first_query, ends.last_query)
    )
    begins = [-1, *(first + region.start for region in score.regions[1:])]
    behind = [*(last + region.start for region in score.regions[1:]), ends.last_key + 1]
    for region, begin, end in zip(score.regions, begins, behind, strict=True):
        key = min(end - 1, ends.last_key)
        if key >= max(begin, 0):
            modulus = region.k_map.modulus
            at = min(key, modulus - 1) if modulus else key
            yield float(region.k_map(torch.tensor(at, device="cpu")))
