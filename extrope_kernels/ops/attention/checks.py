"""Refuse wrong calls before anything runs, with errors that name the argument."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from ...methods import RopeFreqs
from ...scores import Score
from ...scores.base import check_of_pairs
from .._tables import specs
from .._tables.checks import (
    check_boundaries,
    check_freqs,
    check_real,
    check_rotary_offset,
    has_values,
    refuse_flags,
)
from .._tables.fields import check_number
from .._tables.specs import ANY, ROWS, WIDE, Spec
from .call import TENSORS, AttentionCall, Rotated

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


def check_head_dim(op: str, x: Tensor, rotary_offset: int = 0) -> None:
    """Check the fused kernels' limits on head_dim and on the first rotated dim."""
    if x.shape[-1] % 8 or not 8 <= x.shape[-1] <= 256:
        raise ValueError(
            f"{op}: head_dim must be a multiple of 8 up to 256 (backend='reference' takes any), "
            f"got {x.shape[-1]}"
        )
    if rotary_offset % 2:
        raise ValueError(
            f"{op}: rotary_offset must be even (backend='reference' takes odd ones too), "
            f"got {rotary_offset}"
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
