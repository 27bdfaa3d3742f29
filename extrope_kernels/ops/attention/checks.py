"""Refuse wrong calls before anything runs, with errors that name the argument."""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores import Score
from .._tables import specs
from .._tables.checks import (
    check_boundaries,
    check_count,
    check_freqs,
    check_int,
    check_real,
    check_rotary_offset,
    has_values,
    refuse_flags,
)
from .._tables.specs import ANY, DENSE, FLOAT32, FLOAT64, FLOATS, INT32, ROWS, WIDE, Spec
from .call import AttentionCall


def check_method(op: str, freqs: RopeFreqs, score: Score | None) -> None:
    """Check the types of frequencies, of one axis, and of a score method or None."""
    check_freqs(op, freqs)
    if not isinstance(freqs.inv_freq, Tensor):
        raise TypeError(f"{op}: inv_freq must be a Tensor, got {type(freqs.inv_freq).__name__}")
    if freqs.axes is not None:
        raise ValueError(f"{op}: freqs must have no axes (mRoPE), got some")
    if score is not None and not isinstance(score, Score):
        raise TypeError(
            f"{op}: score must be None or a Score, as scores.rerope(window=1024) makes one, "
            f"got {type(score).__name__}"
        )


def check_kinds(op: str, call: AttentionCall) -> None:
    """Check that options are numbers, and counts whole: an op takes them all as floats."""
    if call.softmax_scale is not None:
        check_real(op, "softmax_scale", call.softmax_scale)
    for name in ("attention_factor", "softcap"):
        check_real(op, name, getattr(call, name))
    check_int(op, "rotary_offset", call.rotary_offset)
    if call.sliding_window is not None:
        check_count(op, "sliding_window", call.sliding_window)


def check_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    results: tuple[Tensor | None, ...] = (),
) -> None:
    """Check a call without a cache; results: for a backward dout, dlse, out and lse."""
    packed = call.cu_seqlens is not None
    table, tensors = _table(packed), (q, k, v, call.cu_seqlens, call.q_start, call.k_start)
    sizes = specs.check(op, table[: len(tensors + results)], tensors + results)
    heads_q, heads_k = sizes["heads_q"], sizes["heads_k"]
    if heads_k == 0 or heads_q % heads_k:
        raise ValueError(f"{op}: k's heads must divide q's {heads_q} heads, got {heads_k}")
    check_options(op, call, q, heads_k, sizes["sequences" if packed else "batch"])


def warn_of_unseeing_queries(op: str, q: Tensor, k: Tensor, call: AttentionCall) -> None:
    """Warn of what tensors of (batch, heads, seqlen, head_dim) with grouped heads look like."""
    more, packed = q.shape[1] - k.shape[1], call.cu_seqlens is not None
    placed = packed or call.q_start is not None or call.k_start is not None
    if more > 0 and q.shape[2] == k.shape[2] and not placed:
        warnings.warn(
            f"{op}: the first {more} of q's {q.shape[1]} tokens see no key: shapes are "
            "(batch, seqlen, heads, head_dim)",
            stacklevel=3,
        )


@functools.cache
def _table(packed: bool) -> tuple[Spec, ...]:
    """Return the table of a call without a cache, and of what its backward is given."""
    queries, keys = ("total", "total") if packed else ("batch seqlen_q", "batch seqlen_k")
    sequences = "sequences" if packed else "batch"
    lse = "heads_q total" if packed else "batch heads_q seqlen_q"
    return (
        Spec("q", f"{queries} heads_q head_dim", ROWS),
        Spec("k", f"{keys} heads_k head_dim"),
        Spec("v", f"{keys} heads_k head_dim_v"),
        Spec("cu_seqlens", "sequences+1", INT32, optional=True, strides=DENSE),
        Spec("q_start", f"1|{sequences}", INT32, optional=True, strides=ANY),
        Spec("k_start", f"1|{sequences}", INT32, optional=True, strides=ANY),
        Spec("dout", f"{queries} heads_q head_dim_v"),
        Spec("dlse", lse, (WIDE,), optional=True, strides=ANY),
        Spec("out", f"{queries} heads_q head_dim_v"),
        Spec("lse", lse, (WIDE,), strides=ANY),
    )


def check_query_scale(op: str, query_scale: Tensor | None, q: Tensor) -> None:
    """Check factors that are to be multiplied by others."""
    if query_scale is not None:
        packed = q.dim() == 3
        rows = zip(("total",) if packed else ("batch", "seqlen_q"), q.shape)
        sizes = {word: (n, "q") for word, n in rows}
        specs.check(op, [_query_scale(packed)], [query_scale], sizes, ("q", q))


def _query_scale(packed: bool) -> Spec:
    dims = "total" if packed else "seqlen_q or batch seqlen_q"
    return Spec("query_scale", dims, (torch.float32, WIDE), optional=True, strides=ANY)


def _options(packed: bool) -> tuple[Spec, ...]:
    """Return the table of a call's small tensors."""
    sequences = "sequences" if packed else "batch"
    rows = f"pairs or 1|{sequences} pairs or 1|{sequences} 1|heads_k pairs"
    return (
        Spec("inv_freq", rows, FLOATS),
        Spec("log_decay", "pairs", FLOAT32, optional=True, strides=DENSE),
        Spec("sinks", "heads_q", (WIDE,), optional=True, strides=ANY),
        _query_scale(packed),
        Spec("pair_maps", "maps 2 pairs", FLOAT64, optional=True, strides=ANY),
    )


_OPTIONS = {packed: _options(packed) for packed in (False, True)}


def check_values(op: str, call: AttentionCall, tokens: int) -> None:
    """Check the values of integer tensors, on a CPU, where reading them costs nothing."""
    check_boundaries(op, call.cu_seqlens, tokens)
    for name, start in (("q_start", call.q_start), ("k_start", call.k_start)):
        if start is not None and has_values(start) and (start < 0).any():
            raise ValueError(f"{op}: {name} must be between 0 and 2**31, got {start.tolist()}")


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


def check_options(op: str, call: AttentionCall, q: Tensor, heads_k: int, sequences: int) -> None:
    """Check all that depends on neither keys nor values, after q."""
    packed, (heads_q, head_dim) = q.dim() == 3, q.shape[-2:]
    rows = dict(zip(("total",) if packed else ("batch", "seqlen_q"), q.shape))
    known = rows | {"heads_q": heads_q, "head_dim": head_dim, "heads_k": heads_k}
    sizes = {word: (n, "q") for word, n in known.items()}
    sizes["sequences" if packed else "batch"] = (sequences, "cu_seqlens" if packed else "q")
    tensors = (call.inv_freq, call.log_decay, call.sinks, call.query_scale, call.pair_maps)
    pairs = specs.check(op, _OPTIONS[packed], tensors, sizes, ("q", q))["pairs"]
    if not 1 <= pairs <= head_dim // 2:
        raise ValueError(
            f"{op}: inv_freq must hold between 1 and head_dim/2 = {head_dim // 2} frequencies, "
            f"got {pairs}"
        )
    check_rotary_offset(op, call.rotary_offset, 2 * pairs, head_dim)
    _check_pair_maps(op, call)
    refuse_flags(op, interleaved=call.interleaved)
    check_kinds(op, call)
    if call.softmax_scale is not None and not 0 < call.softmax_scale < math.inf:
        raise ValueError(
            f"{op}: softmax_scale must be None or a number > 0, got {call.softmax_scale}"
        )
    if call.softmax_scale is not None and call.softmax_scale > 1e30:  # kernels take float32
        raise ValueError(f"{op}: softmax_scale must be at most 1e30, got {call.softmax_scale}")
    if not 0 < call.attention_factor < math.inf:
        raise ValueError(f"{op}: attention_factor must be > 0, got {call.attention_factor}")
    if call.attention_factor > 1e15:  # kernels multiply by its square in float32
        raise ValueError(
            f"{op}: attention_factor must be at most 1e15, got {call.attention_factor}"
        )
    if not 0 <= call.softcap < math.inf:
        raise ValueError(f"{op}: softcap must be >= 0 (0: none), got {call.softcap}")
    if call.softcap and not 1e-30 <= call.softcap <= 1e30:  # kernels divide by it in float32
        raise ValueError(
            f"{op}: softcap must be 0 (none) or from 1e-30 to 1e30, got {call.softcap}"
        )


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
    if max(rows, default=-1) >= len(table):
        raise ValueError(f"{op}: maps name row {max(rows)} of {len(table)} in pair_maps")
    if call.log_decay is not None:
        raise ValueError(
            f"{op}: log_decay (XPOS) needs maps of one divisor for all pairs, got maps of pairs"
        )
