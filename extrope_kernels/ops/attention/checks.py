"""What an attention call may be given: errors that name the argument, before anything runs."""

from __future__ import annotations

from torch import Tensor

from .._shared.attention_call import AttentionCall
from .._shared.attention_checks import check_call, check_query_scale, check_start
from .._shared.checks import check_cu_seqlens, check_rows


def check(op: str, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> None:
    """Raise ValueError or TypeError, naming `op` and the argument, for what has no meaning."""
    packed = call.cu_seqlens is not None
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rows(op, name, x, packed)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{op}: {name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}"
            )
    _check_shapes(op, q, k, v, packed)
    if packed:
        check_cu_seqlens(op, call.cu_seqlens, q)
    sequences = q.shape[0] if not packed else call.cu_seqlens.shape[0] - 1
    check_call(op, call, q, sequences)
    check_query_scale(op, call.query_scale, q)
    check_start(op, "q_start", call.q_start, q, sequences)
    check_start(op, "k_start", call.k_start, q, sequences)


def check_boundaries(op: str, cu_seqlens: Tensor | None, q: Tensor) -> None:
    """What only the values of cu_seqlens show: on a CPU, where looking costs nothing."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != q.shape[0] or ends != sorted(ends):
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to the number of tokens {q.shape[0]}, got {ends}"
        )


def _check_shapes(op: str, q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    if k.shape[-1] != q.shape[-1] or (packed and k.shape[0] != q.shape[0]):
        raise ValueError(
            f"{op}: k must have q's head_dim"
            + (" and total" if packed else "")
            + f" of {tuple(q.shape)}, got shape {tuple(k.shape)}"
        )
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: k must have q's batch {q.shape[0]}, got {k.shape[0]}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{op}: v must have k's shape {tuple(k.shape)} but for head_dim, got {tuple(v.shape)}"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{op}: k's heads must divide q's {q.shape[-2]} heads, got {k.shape[-2]}")
