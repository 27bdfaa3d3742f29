"""What an attention call may be given: errors that name the argument, before anything runs."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .._shared.checks import check_cu_seqlens
from .frames import Call
from .regions import DualChunk, ReRope

_NUMBERS = (Real, torch.SymInt, torch.SymFloat)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(name: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
    """Raise ValueError or TypeError, naming `name` and the argument, for what has no meaning."""
    packed = call.cu_seqlens is not None
    for label, x in (("q", q), ("k", k), ("v", v)):
        _check_rows(name, label, x, packed)
    for label, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: {label} must be {q.dtype} on {q.device} like q, "
                f"got {x.dtype} on {x.device}"
            )
    _check_shapes(name, q, k, v, packed)
    if packed:
        check_cu_seqlens(name, call.cu_seqlens, q)
    sequences = q.shape[0] if not packed else call.cu_seqlens.shape[0] - 1
    check_rotation(name, call, q, sequences)


def check_head_dim(name: str, q: Tensor) -> None:
    """The fused kernels' own limit."""
    if q.shape[-1] % 8 or not 8 <= q.shape[-1] <= 256:
        raise ValueError(
            f"{name}: head_dim must be a multiple of 8 up to 256 (backend='reference' takes any), "
            f"got {q.shape[-1]}"
        )


def check_boundaries(name: str, cu_seqlens: Tensor | None, q: Tensor) -> None:
    """What only the values of cu_seqlens show: on a CPU, where looking costs nothing."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != q.shape[0] or ends != sorted(ends):
        raise ValueError(
            f"{name}: cu_seqlens must rise from 0 to the number of tokens {q.shape[0]}, got {ends}"
        )


def check_rotation(name: str, call: Call, q: Tensor, sequences: int) -> None:
    """The part of the checks that concerns neither keys nor values."""
    _check_inv_freq(name, call.inv_freq, q, sequences)
    decay = call.log_decay
    if decay is not None and (
        not isinstance(decay, Tensor)
        or decay.dtype != torch.float32
        or decay.shape != call.inv_freq.shape[-1:]
        or decay.device != q.device
    ):
        raise ValueError(
            f"{name}: log_decay must be float32 ({call.inv_freq.shape[-1]},) on {q.device}, "
            f"got {decay!r}"
        )
    scale, log_n = call.softmax_scale, call.log_n
    if scale is not None:
        check_real(name, "softmax_scale", scale)
        if not 0 < scale < math.inf:
            raise ValueError(f"{name}: softmax_scale must be None or a number > 0, got {scale}")
    if log_n is not None:
        check_real(name, "log_n", log_n)
        if not 1 < log_n < math.inf:
            raise ValueError(f"{name}: log_n must be None or a length > 1, got {log_n}")
    check_real(name, "attention_factor", call.attention_factor)
    if not 0 < call.attention_factor < math.inf:
        raise ValueError(f"{name}: attention_factor must be > 0, got {call.attention_factor}")
    check_bool(name, "interleaved", call.interleaved)
    if isinstance(call.score, ReRope):
        _check_rerope(name, call.score)
    elif isinstance(call.score, DualChunk):
        _check_dual_chunk(name, call.score)
    else:
        _check_int(name, "block_size", call.score.block_size, 2)
        if call.score.block_size % 2:
            raise ValueError(f"{name}: block_size must be even, got {call.score.block_size}")


def _check_rerope(name: str, score: ReRope) -> None:
    _check_int(name, "window", score.window, 1)
    check_real(name, "factor", score.factor)
    check_bool(name, "grouped", score.grouped)
    if not score.factor > 0:
        raise ValueError(f"{name}: factor must be > 0 (inf for ReRoPE), got {score.factor}")
    if score.grouped:
        if not float(score.factor).is_integer():
            raise ValueError(f"{name}: grouped needs an integer factor, got {score.factor}")
        if score.window % int(score.factor):
            raise ValueError(
                f"{name}: grouped needs a window that is a multiple of factor "
                f"{int(score.factor)}, got {score.window}"
            )


def _check_dual_chunk(name: str, score: DualChunk) -> None:
    _check_int(name, "chunk_size", score.chunk_size, 1)
    _check_int(name, "local_window", score.local_window, 0)
    if score.local_window >= score.chunk_size:
        raise ValueError(
            f"{name}: local_window must be less than chunk_size {score.chunk_size}, "
            f"got {score.local_window}"
        )


def check_bool(name: str, label: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {label} must be a bool, got {type(value).__name__}")


def check_real(name: str, label: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: {label} must be a number, got {type(value).__name__}")


def _check_int(name: str, label: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: {label} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: {label} must be >= {least}, got {value}")
    if value >= 2**62:  # what the kernels add to it has to fit 64 bits
        raise ValueError(f"{name}: {label} must be < 2**62, got {value}")


def _check_rows(name: str, label: str, x: Tensor, packed: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {label} must be a Tensor, got {type(x).__name__}")
    if x.dim() != (3 if packed else 4):
        layout = "(batch, seqlen, heads, head_dim)"
        if packed:
            layout = "(total, heads, head_dim) with cu_seqlens"
        raise ValueError(f"{name}: {label} must be {layout}, got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name}: {label} must be float32, bfloat16, float16 or float64, got {x.dtype}"
        )
    if x.layout != torch.strided:
        raise ValueError(f"{name}: {label} must be a dense tensor, got {x.layout}")
    if x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel() > 0:
        raise ValueError(
            f"{name}: {label} must be contiguous in its last dimension, got strides {x.stride()}"
        )


def _check_shapes(name: str, q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    if k.shape[-1] != q.shape[-1] or (packed and k.shape[0] != q.shape[0]):
        raise ValueError(
            f"{name}: k must have q's head_dim"
            + (" and total" if packed else "")
            + f" of {tuple(q.shape)}, got shape {tuple(k.shape)}"
        )
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"{name}: k must have q's batch {q.shape[0]}, got {k.shape[0]}")
    if v.shape != k.shape:
        raise ValueError(f"{name}: v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{name}: k's heads must divide q's {q.shape[-2]} heads, got {k.shape[-2]}"
        )


def _check_inv_freq(name: str, inv_freq: Tensor, q: Tensor, sequences: int) -> None:
    if not isinstance(inv_freq, Tensor):
        raise TypeError(f"{name}: inv_freq must be a Tensor, got {type(inv_freq).__name__}")
    if inv_freq.dtype not in (torch.float32, torch.float64) or inv_freq.device != q.device:
        raise ValueError(
            f"{name}: inv_freq must be float32 or float64 on {q.device}, "
            f"got {inv_freq.dtype} on {inv_freq.device}"
        )
    dims, largest = tuple(inv_freq.shape), q.shape[-1] // 2
    if len(dims) not in (1, 2) or (len(dims) == 2 and dims[0] not in (1, sequences)):
        raise ValueError(
            f"{name}: inv_freq must be (rotary_dim/2,) or ({sequences}, rotary_dim/2), got {dims}"
        )
    if not 1 <= dims[-1] <= largest or (dims[-1] > 1 and inv_freq.stride(-1) != 1):
        raise ValueError(
            f"{name}: inv_freq must hold 1 to head_dim/2 = {largest} contiguous frequencies, "
            f"got shape {dims} with strides {inv_freq.stride()}"
        )
