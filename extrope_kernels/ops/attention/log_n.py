"""Su's log n as a part of query_scale, by the positions of the queries: no kernel knows it."""

from __future__ import annotations

from torch import Tensor

from ...scores import query_scale
from .._math.dtypes import accumulator
from ..cache.call import KVCache
from .call import AttentionCall
from .checks import check_log_n, check_query_scale
from .places import positions


def with_log_n(op: str, log_n: float, q: Tensor, k: Tensor, call: AttentionCall) -> AttentionCall:
    """Return the call with the factors of log_n in its query_scale."""
    return scaled_by_log_n(op, log_n, positions(q, k, call)[0], q, call)


def with_log_n_of_cache(
    op: str, log_n: float, q: Tensor, cache: KVCache, call: AttentionCall
) -> AttentionCall:
    """Return the call likewise; its queries are the last tokens of each sequence in the cache."""
    tokens = q.shape[1] if call.cu_seqlens is None else call.cu_seqlens.diff()
    placed = call._replace(q_start=cache.lengths() - tokens)
    return scaled_by_log_n(op, log_n, positions(q, q, placed)[0], q, call)


def scaled_by_log_n(
    op: str, log_n: float, i: Tensor, q: Tensor, call: AttentionCall
) -> AttentionCall:
    """Multiply query_scale by max(1, ln(i + 1) / ln(log_n)) of queries at positions i.

    i: (seqlen_q,) or (batch, seqlen_q); packed (total,).
    """
    check_log_n(op, log_n)
    check_query_scale(op, call.query_scale, q)
    scale = query_scale.log_n(i, log_n, accumulator(q.dtype))
    if call.query_scale is not None:
        scale = scale * call.query_scale
    return call._replace(query_scale=scale)
