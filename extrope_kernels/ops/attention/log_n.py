"""Su's log n as a part of query_scale, by the positions of the queries: no kernel knows it."""

from __future__ import annotations

from torch import Tensor

from ...scores import query_scale
from .._math.dtypes import accumulator
from .call import AttentionCall, check_log_n, check_query_scale
from .places import positions


def with_log_n(op: str, log_n: float, q: Tensor, k: Tensor, call: AttentionCall) -> AttentionCall:
    """Return the call with the factors of log_n in its query_scale."""
    return scaled_by_log_n(op, log_n, positions(q, k, call)[0], q, call)


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
