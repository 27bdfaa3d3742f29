"""`AttentionCall`, the one description of an attention call, and what is refused of one.

Checks, reference and kernels all read these. A torch op takes only tensors and numbers: a call
passes through it as `call.tensors` and `call.options`, and `read_call` rebuilds it. C++ reads the
same arguments in csrc/common/attention_args.h.
"""

from __future__ import annotations

import math
import warnings
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
    check_of_pairs,
)
from .._math import maps
from .._math.dtypes import accumulator
from .._math.pairs import PairDims
from .._tables import specs
from .._tables.checks import (
    check_boundaries,
    check_count,
    check_freqs,
    check_real,
    check_rotary_offset,
    has_values,
    narrowed,
    refuse_flags,
)
from .._tables.fields import GRAD, Field, Range, check_number, fields_of
from .._tables.specs import ANY, DENSE, FLOAT32, FLOAT64, FLOATS, INT32, ROWS, WIDE, Spec
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

    def of_heads(self, heads: slice) -> AttentionCall:
        """Return the call of these heads of q, if all share the frequencies."""
        return self if self.sinks is None else self._replace(sinks=self.sinks[heads])

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
    def pair_dims(self) -> PairDims:
        return PairDims(2 * self.inv_freq.shape[-1], self.interleaved, self.rotary_offset)

    @property
    def dims_that_rotate(self) -> dict[str, Any]:
        """Where they are, as options of `rope_fwd`."""
        return {"interleaved": self.interleaved, "rotary_offset": self.rotary_offset}

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


# -------------------------------------------------------------------------------------------------
# What is refused, before anything runs

START_END = 2**29  # Triton's kernels add starts and windows in int32
# The call's tensors; all sizes are known after cu_seqlens.
CALL = tuple(sorted(TENSORS, key=lambda field: field.name != "cu_seqlens"))
Q = Spec("q", "batch seqlen_q heads_q head_dim", ROWS)
# A call without a cache, and what its backward is given.
_TABLE = (
    Q,
    Spec("k", "batch seqlen_k heads_k head_dim"),
    Spec("v", "batch seqlen_k heads_k head_dim_v"),
    *(field.spec for field in CALL),
    Spec("dout", "batch seqlen_q heads_q head_dim_v"),
    Spec("dlse", "batch heads_q seqlen_q", (WIDE,), optional=True, strides=ANY),
    Spec("out", "batch seqlen_q heads_q head_dim_v"),
    Spec("lse", "batch heads_q seqlen_q", (WIDE,), strides=ANY),
)

_MOST_HEADS = 256  # no model has more


def check_given(
    op: str,
    freqs: RopeFreqs,
    score: Score | None,
    rotated: Rotated,
    interleaved: bool,
    return_lse: bool,
) -> None:
    """Check what of a public function's arguments is no tensor and no number, in one order."""
    refuse_flags(op, interleaved=interleaved, return_lse=return_lse)
    check_freqs(op, freqs)
    if freqs.axes is not None:
        raise ValueError(f"{op}: freqs must have no axes (mRoPE), got some")
    if score is not None and not isinstance(score, Score):
        raise TypeError(
            f"{op}: score must be None or a Score, as scores.rerope(window=1024) makes one, "
            f"got {type(score).__name__}"
        )
    check_rotated(op, rotated)


def check_rotated(
    op: str, rotated: Rotated, choices: tuple[Rotated, ...] = (None, "k", "qk")
) -> None:
    """Check how q and k are said to come."""
    if rotated not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{op}: rotated must be one of {expected}, got {rotated!r}")


def check_numbers(op: str, call: AttentionCall) -> None:
    """Check that options are numbers in their ranges: an op takes them all as floats."""
    for field, value in call.unusual():
        check_number(op, field, value)


def check_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    results: tuple[Tensor | None, ...] = (),
) -> None:
    """Check a call without a cache; results: for a backward dout, dlse, out and lse."""
    tensors = (q, k, v, *(getattr(call, field.name) for field in CALL), *results)
    table = specs.for_rows(_TABLE[: len(tensors)], call.cu_seqlens is not None)
    sizes = specs.check(op, table, tensors)
    if sizes["heads_k"] == 0 or sizes["heads_q"] % sizes["heads_k"]:
        raise ValueError(
            f"{op}: k's heads must divide q's {sizes['heads_q']} heads, got {sizes['heads_k']}"
        )
    check_options(op, call, sizes["pairs"], sizes["head_dim"])


def warn_of_unseeing_queries(op: str, q: Tensor, k: Tensor, call: AttentionCall) -> None:
    """Warn of queries that see no key, and of what (batch, heads, seqlen, head_dim) looks like."""
    if call.cu_seqlens is not None:
        return
    (_, tokens, heads, _), (_, keys, _, _) = q.shape, k.shape
    if tokens > keys and call.q_start is None and call.k_start is None:
        told = f"the first {tokens - keys} of q's {tokens} tokens see no key"
    elif heads > max(tokens, _MOST_HEADS):
        told = f"q has {heads} heads of {tokens} tokens"
    else:
        return
    shapes = "shapes are (batch, seqlen, heads, head_dim)"
    warnings.warn(f"{op}: {told}: {shapes}", stacklevel=4)  # of the caller of `rope_attention`


def check_query_scale(op: str, query_scale: Tensor | None, q: Tensor) -> None:
    """Check factors that are to be multiplied by others."""
    table = (Q, next(field.spec for field in CALL if field.name == "query_scale"))
    specs.check(op, specs.for_rows(table, q.dim() == 3), (q, query_scale))


def check_options(op: str, call: AttentionCall, pairs: int, head_dim: int) -> None:
    """Check all but tensors' shapes."""
    if not 1 <= pairs <= head_dim // 2:
        raise ValueError(
            f"{op}: inv_freq must hold between 1 and head_dim/2 = {head_dim // 2} frequencies, "
            f"got {pairs}"
        )
    check_numbers(op, call)
    check_rotary_offset(op, call.rotary_offset, 2 * pairs, head_dim)
    _check_pair_maps(op, call)


def check_values(op: str, call: AttentionCall, tokens: int) -> None:
    """Check the values of small tensors, on a CPU, where reading them costs nothing."""
    check_boundaries(op, call.cu_seqlens, tokens)
    check_values_of_pairs(op, call)
    for name, start in (("q_start", call.q_start), ("k_start", call.k_start)):
        if start is None or not has_values(start):
            continue
        if ((start < 0) | (start >= START_END)).any():
            raise ValueError(f"{op}: {name} must be between 0 and 2**29, got {start.tolist()}")


def check_values_of_pairs(op: str, call: AttentionCall) -> None:
    """Check the divisors and offsets of pairs: those of a Score are right."""
    if call.pair_maps is not None and has_values(call.pair_maps):
        check_of_pairs(op, *call.pair_maps.unbind(1))


def check_dims(op: str, call: AttentionCall, q: Tensor, v: Tensor) -> None:
    """Check the fused kernels' limits on head_dim and on the first rotated dim."""
    for x in (q, v):
        if x.shape[-1] % 8 or not 8 <= x.shape[-1] <= 256:
            raise ValueError(
                f"{op}: head_dim must be a multiple of 8 up to 256 (backend='reference' takes "
                f"any), got {x.shape[-1]}"
            )
    if call.rotary_offset % 2:
        raise ValueError(
            f"{op}: rotary_offset must be even (backend='reference' takes odd ones too), "
            f"got {call.rotary_offset}"
        )


def check_log_n(op: str, log_n: float | None) -> None:
    """Check the training length, or None."""
    if log_n is None:
        return
    check_real(op, "log_n", log_n)
    if not 1 < log_n < math.inf:
        raise ValueError(f"{op}: log_n must be None or a length > 1, got {log_n}")


def _check_pair_maps(op: str, call: AttentionCall) -> None:
    """Check that pair_maps has a row per map."""
    maps = [x for region in call.regions for x in (region.q_map, region.k_map)]
    rows = [x.row for x in (*maps, call.score.stored) if x.row is not None]
    table = call.pair_maps
    if table is None:
        if rows:
            raise ValueError(
                f"{op}: pair_maps must be given for a score with maps of pairs, got None"
            )
        return
    for row in rows:
        if not 0 <= row < len(table):
            raise ValueError(f"{op}: maps name row {row} of {len(table)} in pair_maps")
    if call.log_decay is not None:
        raise ValueError(
            f"{op}: log_decay (XPOS) needs maps of one divisor for all pairs, got maps of pairs"
        )
