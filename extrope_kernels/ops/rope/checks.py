"""What a rotary call may be given: every refusal, in words."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

_NUMBERS = (Real, torch.SymInt, torch.SymFloat)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
POSITION_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


def check(
    q: Tensor,
    k: Tensor | None,
    inv_freq: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: Tensor | None,
    axes: Tensor | None = None,
    *,
    attention_factor: float,
) -> None:
    """Raise ValueError or TypeError, naming the argument, for anything the kernels cannot take."""
    packed = cu_seqlens is not None
    _check_rotated("q", q, packed)
    if k is not None:
        _check_rotated("k", k, packed)
        _check_matching(q, k)
    shape = q.shape if not packed else torch.Size((1, *q.shape))
    if packed:
        _check_cu_seqlens(cu_seqlens, q)
    sequences = cu_seqlens.shape[0] - 1 if packed else shape[0]
    _check_inv_freq(inv_freq, q, k, shape, sequences)
    if axes is not None:
        _check_axes(axes, inv_freq)
    if positions is not None:
        _check_positions(positions, q, shape, sequences, axes is not None)
    if log_decay is not None:
        _check_log_decay(log_decay, inv_freq)
    if isinstance(attention_factor, bool) or not isinstance(attention_factor, _NUMBERS):
        kind = type(attention_factor).__name__
        raise TypeError(f"rope: attention_factor must be a number, got {kind}")
    if not attention_factor > 0:
        raise ValueError(f"rope: attention_factor must be > 0, got {attention_factor}")


def position_kind(positions: Tensor | None, shape: torch.Size, sequences: int) -> str | None:
    """'index' (none given), 'positions', 'offsets', 'positions by axis', or None: fits no shape."""
    if positions is None:
        return "index"
    batch, seqlen = shape[0], shape[1]
    dims = tuple(positions.shape)
    if dims in ((seqlen,), (batch, seqlen), (1, seqlen)):
        return "positions"
    if dims in ((sequences,), (sequences, 1)):
        return "offsets"
    if len(dims) == 3 and dims[0] >= 1 and dims[1:] in ((batch, seqlen), (1, seqlen)):
        return "positions by axis"
    return None


def refuse_overlap(q: Tensor, k: Tensor | None) -> None:
    """Raise ValueError for a tensor that cannot be overwritten: its elements share memory."""
    for name, x in (("q", q), ("k", k)):
        if x is not None and any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape)):
            raise ValueError(
                f"rope: {name} must not be expanded to be rotated in place, "
                f"got strides {x.stride()}"
            )


def _check_rotated(name: str, x: Tensor, packed: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"rope: {name} must be a Tensor, got {type(x).__name__}")
    if x.dim() != (3 if packed else 4):
        layout = (
            "(total, heads, head_dim) with cu_seqlens"
            if packed
            else "(batch, seqlen, heads, head_dim)"
        )
        raise ValueError(f"rope: {name} must be {layout}, got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"rope: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}"
        )
    if x.layout != torch.strided:
        raise ValueError(f"rope: {name} must be a dense tensor, got {x.layout}")
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
        raise ValueError(
            f"rope: {name} must be contiguous in its last dimension, got strides {x.stride()}"
        )


def _check_matching(q: Tensor, k: Tensor) -> None:
    if k.dtype != q.dtype:
        raise ValueError(f"rope: k must have q's dtype {q.dtype}, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"rope: k must be on q's device {q.device}, got {k.device}")
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"rope: k must have q's shape {tuple(q.shape)} but for the heads, got {tuple(k.shape)}"
        )


def _check_inv_freq(
    inv_freq: Tensor, q: Tensor, k: Tensor | None, shape: torch.Size, sequences: int
) -> None:
    if not isinstance(inv_freq, Tensor):
        raise TypeError(f"rope: inv_freq must be a Tensor, got {type(inv_freq).__name__}")
    if inv_freq.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rope: inv_freq must be float32 or float64, got {inv_freq.dtype}")
    if inv_freq.device != q.device:
        raise ValueError(f"rope: inv_freq must be on q's device {q.device}, got {inv_freq.device}")
    heads, head_dim = shape[2], shape[3]
    dims = tuple(inv_freq.shape)
    rows_fit = (
        len(dims) == 1
        or (len(dims) == 2 and dims[0] in (1, sequences))
        or (len(dims) == 3 and dims[0] in (1, sequences) and dims[1] in (1, heads))
    )
    if not rows_fit:
        raise ValueError(
            f"rope: inv_freq must be (rotary_dim/2,), ({sequences}, rotary_dim/2) or "
            f"({sequences} or 1, {heads} or 1, rotary_dim/2), got {dims}"
        )
    if not 1 <= dims[-1] <= head_dim // 2:
        raise ValueError(
            f"rope: inv_freq must hold between 1 and head_dim/2 = {head_dim // 2} frequencies, "
            f"got {dims[-1]}"
        )
    if inv_freq.layout != torch.strided:
        raise ValueError(f"rope: inv_freq must be a dense tensor, got {inv_freq.layout}")
    if dims[-1] > 1 and inv_freq.stride(-1) != 1 and inv_freq.numel() > 0:
        raise ValueError(
            "rope: inv_freq must be contiguous in its last dimension, "
            f"got strides {inv_freq.stride()}"
        )
    if len(dims) == 3 and dims[1] > 1 and k is not None and k.shape[-2] != heads:
        raise ValueError(
            f"rope: frequencies per head need as many k heads as q heads ({heads}), "
            f"got {k.shape[-2]}; rotate q and k in two calls"
        )


def _check_positions(
    positions: Tensor, q: Tensor, shape: torch.Size, sequences: int, with_axes: bool
) -> None:
    if not isinstance(positions, Tensor):
        raise TypeError(f"rope: positions must be a Tensor, got {type(positions).__name__}")
    if positions.dtype not in POSITION_DTYPES:
        raise ValueError(
            f"rope: positions must be int32, int64, float32 or float64, got {positions.dtype}"
        )
    if positions.device != q.device:
        raise ValueError(
            f"rope: positions must be on q's device {q.device}, got {positions.device}"
        )
    kind = position_kind(positions, shape, sequences)
    if kind is None or (kind == "positions by axis" and not with_axes):
        raise ValueError(
            f"rope: positions must be ({shape[1]},), ({shape[0]}, {shape[1]}), ({sequences},) "
            f"offsets or, with axes, (axes, {shape[0]}, {shape[1]}), "
            f"got shape {tuple(positions.shape)}"
        )


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"rope: cu_seqlens must be a Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "rope: cu_seqlens must be int32 (sequences + 1,), "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != q.device or not cu_seqlens.is_contiguous():
        raise ValueError(
            f"rope: cu_seqlens must be contiguous on q's device {q.device}, got {cu_seqlens.device}"
        )


def _check_axes(axes: Tensor, inv_freq: Tensor) -> None:
    if not isinstance(axes, Tensor):
        raise TypeError(f"rope: axes must be a Tensor, got {type(axes).__name__}")
    if (
        axes.dtype != torch.int32
        or axes.shape != inv_freq.shape[-1:]
        or axes.device != inv_freq.device
        or not axes.is_contiguous()
    ):
        raise ValueError(
            f"rope: axes must be contiguous int32 ({inv_freq.shape[-1]},) on {inv_freq.device}, "
            f"got {axes.dtype} {tuple(axes.shape)} on {axes.device}"
        )


def _check_log_decay(log_decay: Tensor, inv_freq: Tensor) -> None:
    if not isinstance(log_decay, Tensor):
        raise TypeError(f"rope: log_decay must be a Tensor, got {type(log_decay).__name__}")
    if (
        log_decay.dtype != torch.float32
        or log_decay.shape != inv_freq.shape[-1:]
        or log_decay.device != inv_freq.device
        or not log_decay.is_contiguous()
    ):
        raise ValueError(
            f"rope: log_decay must be contiguous float32 ({inv_freq.shape[-1]},) on "
            f"{inv_freq.device}, got {log_decay.dtype} {tuple(log_decay.shape)} on "
            f"{log_decay.device}"
        )
