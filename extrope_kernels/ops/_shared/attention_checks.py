"""What any attention call is refused, with or without a cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention_call import MAP_NUMBERS, AttentionCall
from .checks import check_real, refuse_flags
from .dtypes import accumulator


def check_call(op: str, call: AttentionCall, q: Tensor, sequences: int) -> None:
    """The part of the checks that concerns neither keys nor values."""
    check_rope(op, call, q, sequences)
    scale = call.softmax_scale
    if scale is not None:
        check_real(op, "softmax_scale", scale)
        if not 0 < scale < math.inf:
            raise ValueError(f"{op}: softmax_scale must be None or a number > 0, got {scale}")
    check_log_n(op, call.log_n)
    check_real(op, "attention_factor", call.attention_factor)
    if not 0 < call.attention_factor < math.inf:
        raise ValueError(f"{op}: attention_factor must be > 0, got {call.attention_factor}")
    check_real(op, "softcap", call.softcap)
    if not 0 <= call.softcap < math.inf:
        raise ValueError(f"{op}: softcap must be >= 0 (0: none), got {call.softcap}")
    if call.softcap and not 1e-30 <= call.softcap <= 1e30:  # kernels divide by it in float32
        raise ValueError(
            f"{op}: softcap must be 0 (none) or from 1e-30 to 1e30, got {call.softcap}"
        )
    if call.sliding_window is not None and call.sliding_window < 1:
        raise ValueError(f"{op}: sliding_window must be None or >= 1, got {call.sliding_window}")
    _check_sinks(op, call.sinks, q)
    _check_regions(op, call)


def check_log_n(op: str, log_n: float | None) -> None:
    """The training length, or None."""
    if log_n is None:
        return
    check_real(op, "log_n", log_n)
    if not 1 < log_n < math.inf:
        raise ValueError(f"{op}: log_n must be None or a length > 1, got {log_n}")


def check_query_scale(op: str, query_scale: Tensor | None, q: Tensor) -> None:
    """(seqlen_q,) or (batch, seqlen_q); of packed queries (total,)."""
    if query_scale is None:
        return
    rows = tuple(q.shape[:-2])
    if not isinstance(query_scale, Tensor):
        raise TypeError(f"{op}: query_scale must be a Tensor, got {type(query_scale).__name__}")
    fits = tuple(query_scale.shape) in (rows, rows[-1:])
    if query_scale.dtype != torch.float32 or query_scale.device != q.device or not fits:
        raise ValueError(
            f"{op}: query_scale must be float32 {rows[-1:]}"
            + (f" or {rows}" if len(rows) > 1 else "")
            + f" on {q.device}, got {query_scale.dtype} {tuple(query_scale.shape)} on "
            f"{query_scale.device}"
        )


def check_start(op: str, name: str, start: Tensor | None, q: Tensor, sequences: int) -> None:
    """A position for every sequence, or one for all."""
    if start is None:
        return
    shape = tuple(start.shape)
    if start.dtype != torch.int32 or start.device != q.device or shape not in ((1,), (sequences,)):
        raise ValueError(
            f"{op}: {name} must be an int, or int32 ({sequences},) on {q.device}, "
            f"got {start.dtype} {shape} on {start.device}"
        )


def _check_sinks(op: str, sinks: Tensor | None, q: Tensor) -> None:
    if sinks is None:
        return
    if not isinstance(sinks, Tensor):
        raise TypeError(f"{op}: sinks must be a Tensor, got {type(sinks).__name__}")
    heads = q.shape[-2]
    wide = accumulator(q.dtype)
    if sinks.shape != (heads,) or sinks.dtype != wide or sinks.device != q.device:
        raise ValueError(
            f"{op}: sinks must be {wide} ({heads},) on {q.device}, "
            f"got {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}"
        )


def check_rope(op: str, call: AttentionCall, x: Tensor, sequences: int) -> None:
    """The frequencies, for rows x of so many sequences."""
    _check_inv_freq(op, call.inv_freq, x, sequences)
    decay = call.log_decay
    if decay is not None and (
        not isinstance(decay, Tensor)
        or decay.dtype != torch.float32
        or decay.shape != call.inv_freq.shape[-1:]
        or decay.device != x.device
        or not decay.is_contiguous()
    ):
        raise ValueError(
            f"{op}: log_decay must be float32 ({call.inv_freq.shape[-1]},), contiguous on "
            f"{x.device}, got {decay!r}"
        )
    refuse_flags(op, interleaved=call.interleaved)


def check_head_dim(op: str, q: Tensor) -> None:
    """The fused kernels' own limit."""
    if q.shape[-1] % 8 or not 8 <= q.shape[-1] <= 256:
        raise ValueError(
            f"{op}: head_dim must be a multiple of 8 up to 256 (backend='reference' takes any), "
            f"got {q.shape[-1]}"
        )


def refuse_softmax_options(op: str, call: AttentionCall, but: tuple[str, ...] = ()) -> None:
    """Raise NotImplementedError for what an implementation does not take of a softmax."""
    for name in ("sinks", "query_scale", "q_start", "k_start", "softcap", "sliding_window"):
        value = getattr(call, name)
        if name not in but and value is not None and not (name == "softcap" and value == 0):
            raise NotImplementedError(f"{op}: this backend does not take {name}, got one")


def _check_regions(op: str, call: AttentionCall) -> None:
    count = len(call.starts)
    if not 1 <= count <= 3 or list(call.starts) != sorted(call.starts):
        raise ValueError(f"{op}: starts must be 1 to 3 rising numbers, got {list(call.starts)}")
    if call.granularity < 1:
        raise ValueError(f"{op}: granularity must be >= 1, got {call.granularity}")
    numbers = (2 * count + 1) * MAP_NUMBERS
    if len(call.maps) != numbers:
        raise ValueError(
            f"{op}: maps must be {numbers} numbers for {count} regions, got {len(call.maps)}"
        )


def _check_inv_freq(op: str, inv_freq: Tensor, q: Tensor, sequences: int) -> None:
    if not isinstance(inv_freq, Tensor):
        raise TypeError(f"{op}: inv_freq must be a Tensor, got {type(inv_freq).__name__}")
    if inv_freq.dtype not in (torch.float32, torch.float64) or inv_freq.device != q.device:
        raise ValueError(
            f"{op}: inv_freq must be float32 or float64 on {q.device}, "
            f"got {inv_freq.dtype} on {inv_freq.device}"
        )
    dims, most = tuple(inv_freq.shape), q.shape[-1] // 2
    if len(dims) not in (1, 2) or (len(dims) == 2 and dims[0] not in (1, sequences)):
        raise ValueError(
            f"{op}: inv_freq must be (rotary_dim/2,) or ({sequences}, rotary_dim/2), got {dims}"
        )
    if not 1 <= dims[-1] <= most or (dims[-1] > 1 and inv_freq.stride(-1) != 1):
        raise ValueError(
            f"{op}: inv_freq must hold 1 to head_dim/2 = {most} contiguous frequencies, "
            f"got shape {dims} with strides {inv_freq.stride()}"
        )
