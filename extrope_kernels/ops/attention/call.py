"""`AttentionCall`, the one description of an attention call, and `KVCache`, its cache.

Checks, reference and kernels all read these. A torch op takes only tensors and numbers: a call
passes through it as `call.tensors` and `call.numbers`, and `read_call` rebuilds it. C++ reads the
same numbers in csrc/common/attention_numbers.h.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores.base import (
    FIRST_KEY,
    MAP_NUMBERS,
    SAME,
    UNROTATED,
    PositionMap,
    Region,
    Score,
    map_pairs,
)
from .._shared.dtypes import NO_SCALES, Scales, accumulator

_TENSORS = 8  # before a call's other fields
_SINGLE_NUMBERS = 8  # before the regions
PLAIN = Score("rope_attention", (Region(FIRST_KEY, SAME, SAME),), stored=SAME)


class AttentionCall(NamedTuple):
    """Arguments of an attention call besides q, k and v: tensors, then a model's constants."""

    inv_freq: Tensor  # (pairs,), or (1 or sequences, pairs), or (1 or sequences, heads_k, pairs)
    cu_seqlens: Tensor | None = None  # with a cache: the queries' boundaries
    log_decay: Tensor | None = None
    sinks: Tensor | None = None  # (heads_q,) float32: logits without a value
    query_scale: Tensor | None = None  # (seqlen_q,) or (batch, seqlen_q) float32; packed (total,)
    # (rows, 2, heads_k or 1, pairs) float64: divisors and offsets of the PairMaps
    pair_maps: Tensor | None = None
    q_start: Tensor | None = None  # (1,) or (sequences,) int32: the first query's position
    k_start: Tensor | None = None  # the first key's; if both are None, both sides end together
    score: Score = PLAIN
    keys_stored: bool = False  # k is rotated by score.stored, else raw
    softmax_scale: float | None = None
    log_n: float | None = None
    attention_factor: float = 1.0
    interleaved: bool = False
    softcap: float = 0.0  # 0: none
    sliding_window: int | None = None
    float32_results: bool = False  # out, or the gradients, in float32; not with a cache

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The call's tensors, in the order of the fields and the op's arguments."""
        return self[:_TENSORS]

    @property
    def fixed(self) -> Hashable:
        """All fields except tensors."""
        return self[_TENSORS:]

    @property
    def numbers(self) -> list[float]:
        """The other fields as the op's list of floats; 0 stands for None."""
        return [
            _or_zero(self.softmax_scale),
            _or_zero(self.log_n),
            float(self.attention_factor),
            float(self.interleaved),
            float(self.softcap),
            _or_zero(self.sliding_window),
            float(self.float32_results),
            *self.score.numbers,
            *self.stored.numbers(),
        ]

    @property
    def regions(self) -> tuple[Region, ...]:
        """The score's regions, far keys first."""
        return self.score.regions

    @property
    def granularity(self) -> int:
        """Block size in tokens; queries of one block share the regions' starts."""
        return self.score.granularity

    @property
    def stored(self) -> PositionMap:
        """The map by which k is rotated already."""
        return self.score.stored if self.keys_stored else UNROTATED

    @property
    def starts(self) -> tuple[int, ...]:
        """The first key of each region, counted from the query's block."""
        return tuple(region.start for region in self.regions)

    def trimmed(self, longest: int) -> list[Region]:
        """Return the regions with a key in sequences of `longest` tokens, and the last one."""
        regions = list(self.regions)
        most = max(longest - 1, 0) // self.granularity * self.granularity
        if self.sliding_window is not None:
            most = min(most, self.sliding_window - 1)
        while len(regions) > 1 and most + regions[1].start <= 0:
            regions = regions[1:]
        return regions

    def first_keys(self, i: Tensor) -> list[Tensor]:
        """Return each region's first key for queries at positions i, then the end of the last."""
        block = torch.div(i, self.granularity, rounding_mode="floor") * self.granularity
        firsts = [block + start for start in self.starts]
        if self.sliding_window is not None:
            firsts = [first.maximum(i + 1 - self.sliding_window) for first in firsts]
        return [first.minimum(i + 1) for first in firsts] + [i + 1]

    def first_key(self, query: int) -> int:
        """Return the first key that a query at this position sees; may be negative."""
        first = query // self.granularity * self.granularity + self.starts[0]
        return first if self.sliding_window is None else max(first, query + 1 - self.sliding_window)

    def queries_end(self, end: int) -> int:
        """Return 1 + the last query's position that sees a key before position `end`."""
        last = -((self.starts[0] - end) // self.granularity) * self.granularity
        return last if self.sliding_window is None else min(last, end + self.sliding_window - 1)

    def results_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of out, or of the gradients, for q, k and v of `dtype`."""
        return accumulator(dtype) if self.float32_results else dtype

    def mapped(self, by: PositionMap, positions: Tensor) -> Tensor:
        """Map positions (...) by a map of the score: (...) or (..., heads, pairs) float64."""
        if by.row is None:
            return by(positions)
        divisor, offset = self.pair_maps[by.row]
        return map_pairs(positions, by.modulus, divisor, by.floor, offset)

    def scale(self, head_dim: int) -> float:
        """Return the factor of all logits."""
        return self.softmax_scale or head_dim**-0.5


class KVCache(NamedTuple):
    """The cached keys, rotated by `score.stored`, and values of every sequence."""

    k: Tensor  # (batch, max_len, heads_k, head_dim), or (pages, page_size, ...) with block_table
    v: Tensor
    seqlens: Tensor  # (batch,) int32: slots in use, left padding included
    block_table: Tensor | None = None  # (batch, max_pages) int32
    leftpad: Tensor | None = None  # (batch,) int32: the slot of position 0
    scales: Scales = NO_SCALES  # for a cache in float8_e4m3fn
    appended: int = 0  # tokens that this call writes after seqlens
    cu_seqlens_new: Tensor | None = None  # boundaries of new tokens, if packed

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors besides k and v, in the order of the op's arguments."""
        return (self.seqlens, self.block_table, self.leftpad, *self.scales)

    @property
    def capacity(self) -> int:
        """The number of slots per sequence."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k.shape[1]

    def ends(self) -> Tensor:
        """Return the slots in use after this call's writes: (batch,) int64."""
        if self.cu_seqlens_new is None:
            return self.seqlens.long() + self.appended
        return self.seqlens.long() + self.cu_seqlens_new.diff()

    def lengths(self) -> Tensor:
        """Return the number of keys of each sequence: (batch,) int64."""
        return self.ends() if self.leftpad is None else self.ends() - self.leftpad

    def rows(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices of the first two dimensions of k and v for (batch, n) slots."""
        sequence = torch.arange(slots.shape[0], device=slots.device)[:, None]
        if self.block_table is None:
            return sequence, slots
        page_size = self.k.shape[1]
        return self.block_table[sequence, slots // page_size].long(), slots % page_size


def make_call(freqs: RopeFreqs, score: Score | None, **options) -> AttentionCall:
    """Build a call from arguments of the public functions; score None: plain RoPE."""
    return AttentionCall(
        freqs.inv_freq,
        log_decay=freqs.log_decay,
        attention_factor=freqs.attention_factor,
        score=(score or PLAIN).plain,
        pair_maps=None if score is None else score.pair_maps_on(freqs.inv_freq),
        **options,
    )


def read_call(tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> AttentionCall:
    """Rebuild the call from `call.numbers` and `call.tensors`; the last tensors may be missing."""
    return AttentionCall(*tensors, *(None,) * (_TENSORS - len(tensors)), *_read(tuple(numbers)))


@functools.lru_cache(maxsize=4096)
def _read(numbers: tuple[float, ...]) -> tuple:
    """Return the fields of a call that are not tensors."""
    softmax_scale, log_n, factor, interleaved, softcap, window, float32, granularity = numbers[
        :_SINGLE_NUMBERS
    ]
    count, over = divmod(len(numbers) - _SINGLE_NUMBERS - MAP_NUMBERS, 1 + 2 * MAP_NUMBERS)
    if over or not 1 <= count <= 3:
        raise ValueError(
            f"attention: numbers must describe 1 to 3 regions, got {len(numbers)} of them"
        )
    starts = numbers[_SINGLE_NUMBERS : _SINGLE_NUMBERS + count]
    maps = [
        PositionMap.read(numbers[n : n + MAP_NUMBERS])
        for n in range(_SINGLE_NUMBERS + count, len(numbers), MAP_NUMBERS)
    ]
    of_regions = zip(starts, maps[:count], maps[count : 2 * count], strict=True)
    regions = tuple(Region(int(start), q_map, k_map) for start, q_map, k_map in of_regions)
    call = AttentionCall(
        *(None,) * _TENSORS,
        score=Score("attention", regions, int(granularity), maps[-1]),
        keys_stored=True,
        softmax_scale=softmax_scale or None,
        log_n=log_n or None,
        attention_factor=factor,
        interleaved=bool(interleaved),
        softcap=softcap,
        sliding_window=int(window) or None,
        float32_results=bool(float32),
    )
    return call[_TENSORS:]


def _or_zero(x: float | None) -> float:
    """Encode None as 0, and 0, which every option refuses, as -1."""
    return 0.0 if x is None else float(x) or -1.0


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """Return (batch, heads_q, seqlen_q), or packed (heads_q, total)."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])
