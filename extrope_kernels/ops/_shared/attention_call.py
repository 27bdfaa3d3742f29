"""The one description of an attention call, with or without a cache: what its op takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores import PositionMap, Region, Score, query_scale, rerope, self_extend
from .checks import check_count, check_real, refuse_flags
from .dtypes import accumulator

MAP_NUMBERS = len(PositionMap._fields)  # as kMapNumbers in csrc/common/regions.h

# Of both families of ops, after their tensors. Regions and maps are those of a `Score`: the first
# key of each region, then for each region the numbers of q_map and k_map, and last those of the map
# that keys come rotated by.
SCHEMA = (
    "int[] starts, int granularity, float[] maps, float? softmax_scale=None, float? log_n=None, "
    "float attention_factor=1.0, bool interleaved=False, float softcap=0.0, "
    "int? sliding_window=None"
)


@dataclass(frozen=True)
class AttentionCall:
    """One attention call as an op takes it, beside q, k and v."""

    inv_freq: Tensor  # (rotary_dim/2,), or one row a sequence
    cu_seqlens: Tensor | None = None  # with a cache: of the queries
    log_decay: Tensor | None = None
    sinks: Tensor | None = None  # (heads_q,) float32: logits without a value
    query_scale: Tensor | None = None  # (seqlen_q,) or (batch, seqlen_q) float32; packed (total,)
    q_start: Tensor | None = None  # (1,) or (sequences,) int32: the first query's position
    k_start: Tensor | None = None  # the first key's; where both are None, both sides end together
    starts: tuple[int, ...] = ()
    granularity: int = 1
    maps: tuple[float, ...] = ()
    softmax_scale: float | None = None
    log_n: float | None = None
    attention_factor: float = 1.0
    interleaved: bool = False
    softcap: float = 0.0  # 0: none
    sliding_window: int | None = None
    float32_results: bool = False  # without a cache: see `results_dtype`

    @property
    def regions(self) -> list[Region]:
        """The regions, far keys first."""
        maps = [self._map(n) for n in range(2 * len(self.starts))]
        return [Region(start, *maps[2 * r : 2 * r + 2]) for r, start in enumerate(self.starts)]

    @property
    def stored(self) -> PositionMap:
        """The map that keys come rotated by."""
        return self._map(2 * len(self.starts))

    def trimmed(self, longest: int) -> list[Region]:
        """The regions that hold a key in sequences of `longest` tokens, and the last one."""
        regions = self.regions
        most = max(longest - 1, 0) // self.granularity * self.granularity
        if self.sliding_window is not None:
            most = min(most, self.sliding_window - 1)
        while len(regions) > 1 and most + regions[1].start <= 0:
            regions = regions[1:]
        return regions

    def first_keys(self, i: Tensor) -> list[Tensor]:
        """Each region's first key as queries at positions i see it, and the key behind the last."""
        block = torch.div(i, self.granularity, rounding_mode="floor") * self.granularity
        firsts = [block + start for start in self.starts]
        if self.sliding_window is not None:
            firsts = [first.maximum(i + 1 - self.sliding_window) for first in firsts]
        return [first.minimum(i + 1) for first in firsts] + [i + 1]

    def results_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of out, or of the gradients, where q, k and v are of `dtype`."""
        return accumulator(dtype) if self.float32_results else dtype

    def scale(self, head_dim: int) -> float:
        """The factor of all logits."""
        return self.softmax_scale or head_dim**-0.5

    def _map(self, n: int) -> PositionMap:
        return position_map(self.maps[n * MAP_NUMBERS : (n + 1) * MAP_NUMBERS])


def position_map(numbers: Sequence[float]) -> PositionMap:
    """The map that an op is told of by its numbers."""
    modulus, divisor, floor, offset, cap = numbers
    return PositionMap(int(modulus), divisor, bool(floor), offset, cap)


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """(batch, heads_q, seqlen_q), or packed (heads_q, total)."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def row_scale(i: Tensor, call: AttentionCall) -> Tensor | None:
    """What the logits of queries at positions i are multiplied by beside call.scale, float32.

    (seqlen_q,) or (batch, seqlen_q), as log_n and query_scale make it; None for nothing.
    """
    scale = None if call.log_n is None else query_scale.log_n(i, call.log_n)
    if call.query_scale is None:
        return scale
    return call.query_scale if scale is None else call.query_scale * scale


def score_options(score: Score, stored: bool = False) -> dict:
    """What an op is told of a score method; stored: keys come as a cache keeps them."""
    maps = score.stored_maps if stored else score.maps
    return {"starts": score.starts, "granularity": score.granularity, "maps": maps}


def check_freqs(op: str, freqs: RopeFreqs) -> None:
    """Attention takes frequencies of one axis."""
    if not isinstance(freqs, RopeFreqs):
        raise TypeError(f"{op}: freqs must be a RopeFreqs, got {type(freqs).__name__}")
    if freqs.axes is not None:
        raise ValueError(f"{op}: freqs must have no axes (mRoPE), got some")


def rope_options(
    op: str,
    freqs: RopeFreqs,
    softmax_scale: float | None,
    log_n: float | None,
    interleaved: bool,
    softcap: float,
    sliding_window: int | None,
) -> dict:
    """The options that differ from an op's defaults: every argument costs the dispatcher time."""
    options = {}
    if softmax_scale is not None:
        check_real(op, "softmax_scale", softmax_scale)
        options["softmax_scale"] = softmax_scale
    if log_n is not None:
        check_real(op, "log_n", log_n)
        options["log_n"] = log_n
    if type(softcap) is not float or softcap != 0.0:
        check_real(op, "softcap", softcap)
        options["softcap"] = softcap
    if sliding_window is not None:
        options["sliding_window"] = check_count(op, "sliding_window", sliding_window)
    factor = freqs.attention_factor
    if type(factor) is not float or factor != 1.0:
        check_real(op, "attention_factor", factor)
        options["attention_factor"] = factor
    if interleaved:
        options["interleaved"] = True
    return options


def given_up_to_last(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Positional arguments without the trailing ones that are None, as the op's defaults are."""
    for count in range(len(tensors), 0, -1):
        if tensors[count - 1] is not None:
            return tensors[:count]
    return ()


@functools.lru_cache(maxsize=256, typed=True)
def _cached(function: Callable[..., Score], *parameters) -> Score:
    return function(*parameters)


def score_of(op: str, function: Callable[..., Score], *parameters) -> Score:
    """A score method with its parameters; what it refuses is told in the public function's name."""
    try:
        if not torch.compiler.is_compiling():
            return _cached(function, *parameters)
    except (TypeError, ValueError):
        pass  # refused, or not to be hashed: said below
    try:
        return function(*parameters)
    except (TypeError, ValueError) as error:
        _, _, refusal = str(error).partition(": ")
        raise type(error)(f"{op}: {refusal or error}") from None


def rerope_score(op: str, window: int, factor: float, grouped: bool) -> Score:
    """ReRoPE's score, or with `grouped` that of SelfExtend, for the public function `op`."""
    if type(grouped) is not bool:
        refuse_flags(op, grouped=grouped)
    return score_of(op, self_extend if grouped else rerope, window, factor)
