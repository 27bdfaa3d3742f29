"""How many programs attend, and what they leave for each other: from shapes, never from lengths."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from ...._shared.triton.launch import processors_of
from ...call import AttentionCall, KVCache
from .configs import Config

LEAST_KEYS = 256  # of a split, or its start and merge show
MOST_SPLITS = 128  # of a sequence: one program merges them
# Programs for each multiprocessor: enough loads in flight, and an even last wave.
WAVES = 2


class Grid(NamedTuple):
    """Of one launch, for each head of k."""

    slots: int  # of the schedule
    row_blocks: int  # a program for each of them in every slot
    rows: int  # of partial results in a slot
    counters: int  # of each sequence; of packed queries in all
    splits: bool  # sequences may be shared by several programs
    least_blocks: int  # of keys in a split


def grid_of(q: Tensor, cache: KVCache, call: AttentionCall, chosen: Config) -> Grid:
    """q: (batch, seqlen_q, heads_q, head_dim), where batch is 1 of packed queries."""
    batch, heads_k = cache.seqlens.shape[0], cache.k.shape[2]
    group, seqlen_q = q.shape[2] // heads_k, q.shape[1]
    rows = group * seqlen_q
    row_blocks = triton.cdiv(rows, chosen.block_m)
    splits = _most_keys(seqlen_q, cache, call) // LEAST_KEYS  # that a sequence may be worth
    least = triton.cdiv(LEAST_KEYS, chosen.block_n)
    if call.cu_seqlens is None:
        slots = batch + _more_slots(q, heads_k * row_blocks, batch * splits)
        return Grid(slots, row_blocks, rows, row_blocks, splits > 1, least)
    # The last block of a sequence may have a row alone, and so may that of the padding; but a block
    # is of a token at least.
    blocks = min(row_blocks + batch + 1, seqlen_q * triton.cdiv(group, chosen.block_m))
    slots = blocks + _more_slots(q, heads_k, blocks * splits)
    return Grid(slots, 1, chosen.block_m, slots, True, least)


def _most_keys(seqlen_q: int, cache: KVCache, call: AttentionCall) -> int:
    if call.sliding_window is None:
        return cache.capacity
    return min(cache.capacity, call.sliding_window + seqlen_q - 1)


def _more_slots(q: Tensor, programs: int, useful: int) -> int:
    """How many slots the schedule has beyond one to each sequence.

    programs: of a slot; useful: how many splits there may be at most.
    """
    wanted = triton.cdiv(WAVES * processors_of(q), programs)
    more = min(wanted, useful, MOST_SPLITS)
    return more if more > 1 else 0
