"""`AttentionCall`, the one description of an attention call.

Checks, reference and kernels all read these. A torch op takes only tensors and numbers: a call
passes through it as `call.tensors` and `call.options`, and `read_call` rebuilds it. C++ reads the
same arguments in csrc/common/attention_args.h.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores.base import (
    FIRST_KEY,
    SAME,
    UNROTATED,
    PlainMap,
    PositionMap,
    Region,
    Score,
)
from .._math import maps
from .._math.dtypes import accumulator
from .._tables.checks import check_count, narrowed
from .._tables.fields import GRAD, Field, Range, fields_of
from .._tables.specs import ANY, DENSE, FLOAT32, FLOAT64, FLOATS, INT32, WIDE, Spec
from .._torch.layouts import cached_by_layout

PLAIN = Score("rope_attention", (Region(FIRST_KEY, SAME, SAME),), stored=SAME)
# How q and k come. None: raw. "k": q raw, k at `score.stored`. "qk": both at their own positions.
Rotated = Literal["k", "qk"] | None


class AttentionCall(NamedTuple):
    """Arguments of an attention call besides q, k and v: tensors, then a model's constants.

    Schemas, options and checks of the ops follow from it: see `_tables.fields`. Shapes are those of
    a batch, and of packed sequences by `specs.packed`.
    """

    inv_freq: Annotated[
        Tensor, Spec("inv_freq", "pairs or 1|batch pairs or 1|batch 1|heads_k pairs", FLOATS), GRAD
    ]
    cu_seqlens: Annotated[  # with a cache: the queries' boundaries
        Tensor | None, Spec("cu_seqlens", "sequences+1", INT32, strides=DENSE)
    ] = None
    log_decay: Annotated[Tensor | None, Spec("log_decay", "pairs", FLOAT32, strides=DENSE)] = None
    sinks: Annotated[  # logits without a value
        Tensor | None, Spec("sinks", "heads_q", (WIDE,), strides=ANY), GRAD
    ] = None
    query_scale: Annotated[  # factors of the logits
        Tensor | None,
        Spec("query_scale", "seqlen_q or batch seqlen_q", (torch.float32, WIDE), strides=ANY),
    ] = None
    pair_maps: Annotated[  # divisors and offsets of the PairMaps
        Tensor | None, Spec("pair_maps", "maps 2 pairs", FLOAT64, strides=ANY)
    ] = None
    q_start: Annotated[  # the first query's position
        Tensor | None, Spec("q_start", "1|batch", INT32, strides=ANY)
    ] = None
    k_start: Annotated[  # the first key's; if both are None, both sides end together
        Tensor | None, Spec("k_start", "1|batch", INT32, strides=ANY)
    ] = None
    score: Score = PLAIN
    rotated: Rotated = None
    # Kernels take float32, in which they square attention_factor and divide by softcap.
    softmax_scale: Annotated[float | None, Range(0, 1e30)] = None
    attention_factor: Annotated[float, Range(0, 1e15)] = 1.0
    interleaved: bool = False
    rotary_offset: int = 0  # the first rotated dim
    softcap: Annotated[float, Range(1e-30, 1e30, or_zero=True)] = 0.0  # 0: none
    sliding_window: Annotated[int | None, check_count] = None
    float32_results: bool = False  # out, or the gradients, in float32; not with a cache

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The call's tensors, in the order of the fields and the op's arguments."""
        return self[:_NUM_TENSORS]

    @property
    def fixed(self) -> tuple[Any, ...]:
        """All fields except tensors."""
        return self[_NUM_TENSORS:]

    @property
    def options(self) -> dict[str, Any]:
        """The other fields as the op's keyword arguments, without those that are its defaults.

        What is left out costs no host time.
        """
        if torch.compiler.is_compiling():  # a cache would not be traced
            return _options(self.fixed)
        return dict(cached_by_layout(_options, self.fixed, self.fixed))

    def unusual(self) -> list[tuple[Field, Any]]:
        """Return the numbers that are not their defaults, whatever they are instead."""
        values = self[_FIRST_NUMBER:]
        if [*map(type, values)] == _KINDS and values == _DEFAULTS:
            return []  # most calls: they pay for no loop
        return [
            (field, value)
            for field, value, kind, default in zip(NUMBERS, values, _KINDS, _DEFAULTS)
            if type(value) is not kind or value != default
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
    def q_stored(self) -> PlainMap:
        """The map by which q is rotated already."""
        return _stored(self.score, self.rotated)[0]

    @property
    def stored(self) -> PlainMap:
        """The map by which k is rotated already."""
        return _stored(self.score, self.rotated)[1]

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

    def mapped(self, by: PlainMap, positions: Tensor) -> Tensor:
        """Map positions (..., seqlen) by a map of the score, to float64.

        Like positions, or by pair (pairs, 1 or batch, seqlen), as `rope_fwd` takes axes.
        """
        if by.row is None:
            return by(positions)
        divisor, offset = self.pair_maps[by.row, :, :, None, None]
        return PositionMap(by.modulus, divisor, by.floor, offset)(torch.atleast_2d(positions))

    @property
    def layout(self) -> tuple[int, bool, int]:
        """Where the dims of pairs are: the arguments of `split_pairs`."""
        return 2 * self.inv_freq.shape[-1], self.interleaved, self.rotary_offset

    def scale(self, head_dim: int) -> float:
        """Return the factor of all logits."""
        return head_dim**-0.5 if self.softmax_scale is None else float(self.softmax_scale)


FIELDS = fields_of(AttentionCall)
_NUM_TENSORS = AttentionCall._fields.index("score")
TENSORS = FIELDS[:_NUM_TENSORS]
_FIRST_NUMBER = _NUM_TENSORS + 2  # after score and rotated
NUMBERS = FIELDS[_FIRST_NUMBER:]
_DEFAULTS = tuple(field.default for field in NUMBERS)
_KINDS = [type(default) for default in _DEFAULTS]
# The arguments of every attention op besides its tensors. The maps are the q_map and the k_map of
# each region in turn, far keys first, and then those by which q and k are rotated already.
OPTIONS = {
    **{field.name: field.argument for field in NUMBERS},
    "granularity": "int granularity",
    "region_starts": "int[] region_starts",
    **maps.SCHEMA,
}


def make_call(
    freqs: RopeFreqs,
    score: Score | None,
    rotated: Rotated = None,
    cu_seqlens: Tensor | None = None,
    **options,
) -> AttentionCall:
    """Build a call from arguments of the public functions; score None: plain RoPE."""
    return AttentionCall(
        _usable(freqs.inv_freq),
        narrowed(cu_seqlens),
        log_decay=_usable(freqs.log_decay),
        # Who has rotated q and k has multiplied both.
        attention_factor=1.0 if rotated == "qk" else freqs.attention_factor,
        score=(score or PLAIN).plain,
        rotated=rotated,
        pair_maps=None if score is None else _usable(score.pair_maps_on(freqs.inv_freq)),
        **options,
    )


def _usable(x: Any) -> Any:
    """Return x, or a copy for a graph if it was made in inference mode: autograd saves no other."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or not x.is_inference():
        return x
    return x if torch.is_inference_mode_enabled() else x.clone()


def read_call(tensors: Sequence[Tensor | None], options: Mapping[str, Any]) -> AttentionCall:
    """Rebuild the call from `call.tensors`, maybe without the last ones, and `call.options`."""
    if torch.compiler.is_compiling():  # a cache would not be traced
        return with_tensors(tensors, _read(options))
    return with_tensors(tensors, cached_by_layout(_read, options_key(options), options))


def with_tensors(tensors: Sequence[Tensor | None], fixed: Sequence[Any]) -> AttentionCall:
    """Return the call of `call.tensors`, maybe without the last ones, and `call.fixed`."""
    return AttentionCall(*tensors, *[None] * (_NUM_TENSORS - len(tensors)), *fixed)


def options_key(options: Mapping[str, Any]) -> Hashable:
    """Return an op's keyword arguments as a key; those that have their defaults may be missing."""
    values = [tuple(x) if type(x) is list else x for x in options.values()]
    return (*options, *values)


def _stored(score: Score, rotated: Rotated) -> tuple[PlainMap, PlainMap]:
    """Return the maps by which q and k are rotated already."""
    if rotated == "qk":
        return SAME, SAME
    return UNROTATED, score.stored if rotated == "k" else UNROTATED


def _options(fixed: Sequence[Any]) -> dict[str, Any]:
    """Return `call.options`."""
    call = with_tensors((), fixed)
    of_regions = [x for region in call.regions for x in (region.q_map, region.k_map)]
    farthest = maps.FARTHEST
    return {
        "granularity": min(int(call.granularity), farthest),
        "region_starts": [int(max(-farthest, min(start, farthest))) for start in call.starts],
        **maps.columns_of([*of_regions, call.q_stored, call.stored]),
        **{field.name: field.kind(value) for field, value in call.unusual()},
    }


def _read(options: Mapping[str, Any]) -> Sequence[Any]:
    """Return `call.fixed`."""
    fields = {name: x for name, x in options.items() if x is not None}  # None is a default
    starts, granularity = fields.pop("region_starts"), fields.pop("granularity")
    columns = {name: fields.pop(name, None) for name in maps.SCHEMA}
    count = len(starts)
    if not 1 <= count <= 3:
        raise ValueError(f"attention: region_starts must be of 1 to 3 regions, got {count}")
    if any(abs(start) > maps.FARTHEST for start in starts):
        raise ValueError(f"attention: region_starts must be within 2**62, got {list(starts)}")
    *of_regions, q_stored, stored = maps.maps_of("attention", columns, 2 * count + 2)
    if q_stored != UNROTATED and (q_stored, stored) != (SAME, SAME):
        raise ValueError(
            "attention: q must come raw, or at its own positions as k does, "
            f"got {q_stored} and {stored}"
        )
    rotated: Rotated = "k" if q_stored == UNROTATED else "qk"
    regions = tuple(map(Region, starts, of_regions[::2], of_regions[1::2]))
    score = Score("attention", regions, granularity, stored)
    none = [None] * _NUM_TENSORS
    return AttentionCall(*none, score=score, rotated=rotated, **fields).fixed  # type: ignore[arg-type]


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """Return (batch, heads_q, seqlen_q), or packed (heads_q, total)."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])
