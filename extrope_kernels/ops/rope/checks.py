"""Check the arguments of a rotary call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...methods import RopeFreqs
from .._shared.checks import (
    DTYPES,
    REFUSALS,
    check_cu_seqlens,
    check_matching,
    check_position_tensor,
    check_real,
    check_rotary_offset,
    check_rows,
    has_values,
    overlaps_itself,
)
from .._shared.decay import reach
from .._shared.positions import position_kind as position_kind_of_one_axis

POSITION_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)
INPLACE = "rope: inplace=True is for inference, got tensors that require grad"


def not_differentiable(name: str) -> str:
    """Return the error for an argument that has no gradient."""
    return f"rope: {name} must not require grad, got one that does"


def check(
    q: Tensor,
    k: Tensor | None,
    inv_freq: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log_decay: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    attention_factor: float,
    rotary_offset: int = 0,
) -> None:
    """Raise ValueError or TypeError that names the argument, for calls that kernels cannot run."""
    packed = cu_seqlens is not None
    check_rows("rope", "q", q, packed)
    if k is not None:
        check_rows("rope", "k", k, packed)
        check_matching("rope", q, k)
    shape = q.shape if not packed else torch.Size((1, *q.shape))
    if packed:
        check_cu_seqlens("rope", cu_seqlens, q)
    sequences = cu_seqlens.shape[0] - 1 if packed else shape[0]
    _check_inv_freq(inv_freq, q, k, shape, sequences)
    check_rotary_offset("rope", rotary_offset, 2 * inv_freq.shape[-1], shape[3])
    if axes is not None:
        _check_per_frequency("axes", axes, torch.int32, inv_freq)
    if positions is not None:
        _check_positions(positions, q, shape, sequences, axes is not None)
    if log_decay is not None:
        _check_per_frequency("log_decay", log_decay, torch.float32, inv_freq)
    check_real("rope", "attention_factor", attention_factor)
    if not 0 < attention_factor < math.inf:
        raise ValueError(f"rope: attention_factor must be > 0 and finite, got {attention_factor}")


def check_saved(
    grad_q: Tensor, grad_k: Tensor | None, q: Tensor, k: Tensor | None, *, packed: bool
) -> None:
    """Check a forward's inputs, which a backward is given, after `check` of their gradients."""
    if (k is None) != (grad_k is None):
        raise ValueError("rope: k must be given with grad_k and q, or not at all")
    for name, x, grad in (("q", q, grad_q), ("k", k, grad_k)):
        if x is None:
            continue
        check_rows("rope", name, x, packed)
        if (x.dtype, x.shape, x.device) != (grad.dtype, grad.shape, grad.device):
            raise ValueError(
                f"rope: {name} must be {grad.dtype} {tuple(grad.shape)} on {grad.device} like its "
                f"gradient, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )


def check_norm(
    q: Tensor,
    k: Tensor | None,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
) -> None:
    """Check a norm before the rotation, after `check` of q and k."""
    if k is None and k_norm_weight is not None:
        raise ValueError("rope: k_norm_weight needs a k, got None")
    for name, x, weight in (("q", q, q_norm_weight), ("k", k, k_norm_weight)):
        if weight is not None:
            _check_norm_weight(f"{name}_norm_weight", x, weight)
    check_norm_eps(norm_eps)


def check_norm_eps(norm_eps: float) -> None:
    """Check the epsilon of a norm."""
    check_real("rope", "norm_eps", norm_eps)
    if not norm_eps >= 0:
        raise ValueError(f"rope: norm_eps must be >= 0, got {norm_eps}")


def _check_norm_weight(name: str, x: Tensor, weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"rope: {name} must be a Tensor, got {type(weight).__name__}")
    heads, head_dim = x.shape[-2:]
    if tuple(weight.shape) not in ((head_dim,), (heads * head_dim,)):
        raise ValueError(
            f"rope: {name} must be ({head_dim},) to norm each head or ({heads * head_dim},) to "
            f"norm all together, got shape {tuple(weight.shape)}"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"rope: {name} must be float32, bfloat16, float16 or float64, got {weight.dtype}"
        )
    if weight.device != x.device or weight.layout != torch.strided or not weight.is_contiguous():
        raise ValueError(
            f"rope: {name} must be contiguous on q's device {x.device}, got {weight.layout} "
            f"on {weight.device}"
        )


def position_kind(positions: Tensor | None, shape: torch.Size, sequences: int) -> str | None:
    """Return the kind of positions of one axis, or 'positions by axis'."""
    kind = position_kind_of_one_axis(positions, shape, sequences)
    if kind is None and positions.dim() == 3 and positions.shape[0] >= 1:
        fits = tuple(positions.shape[1:]) in ((shape[0], shape[1]), (1, shape[1]))
        return "positions by axis" if fits else None
    return kind


def refuse_expanded(q: Tensor, k: Tensor | None) -> None:
    """Raise ValueError for a tensor whose elements share memory: it cannot be overwritten."""
    for name, x in (("q", q), ("k", k)):
        if x is not None and overlaps_itself(x):
            raise ValueError(
                f"rope: {name} must not be expanded to be rotated in place, "
                f"got strides {x.stride()}"
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
        or (len(dims) == 3 and dims[0] in (1, sequences) and dims[1] in (1, heads or 1))
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
    check_position_tensor("rope", positions, q, POSITION_DTYPES)
    kind = position_kind(positions, shape, sequences)
    if kind is None or (kind == "positions by axis" and not with_axes):
        raise ValueError(
            f"rope: positions must be ({shape[1]},), ({shape[0]}, {shape[1]}), ({sequences},) "
            f"offsets or, with axes, (axes, {shape[0]}, {shape[1]}), "
            f"got shape {tuple(positions.shape)}"
        )


def _check_per_frequency(name: str, x: Tensor, dtype: torch.dtype, inv_freq: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"rope: {name} must be a Tensor, got {type(x).__name__}")
    shape, device = inv_freq.shape[-1:], inv_freq.device
    if (x.dtype, x.shape, x.device) != (dtype, shape, device) or not x.is_contiguous():
        raise ValueError(
            f"rope: {name} must be contiguous {str(dtype).removeprefix('torch.')} ({shape[0]},) "
            f"on {device}, got {x.dtype} {tuple(x.shape)} on {x.device}"
        )


# -------------------------------------------------------------------------------------------------
# XPOS


def check_decay(
    freqs: RopeFreqs,
    q: Tensor,
    positions: Tensor | None,
    offset: int,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError if a position is so far from decay_origin that its amplitude overflows.

    Only positions known to the host are checked: those on the CPU, or none given.
    """
    if not freqs.steepest_decay or not isinstance(q, Tensor) or torch.compiler.is_compiling():
        return
    try:
        ends = _ends_of(q, positions, offset, cu_seqlens)
    except REFUSALS:  # the op names what is wrong
        return
    if ends is None:
        return
    most = reach(freqs, q.dtype)
    low, high = ends
    if max(high - freqs.decay_origin, freqs.decay_origin - low) <= most:
        return
    middle = (low + high) // 2
    cure = (
        f"decay_origin={middle:.0f} covers them"
        if high - middle <= most
        else "no origin covers them: use scores.blockwise_causal or a dtype with more range"
    )
    raise ValueError(
        f"rope: positions must be within {most} of decay_origin={freqs.decay_origin:.0f} for XPOS "
        f"in {q.dtype}, got {low:.0f} to {high:.0f}; {cure}"
    )


def _ends_of(q: Tensor, positions: Tensor | None, offset: int, cu_seqlens: Tensor | None):
    """Return the lowest and the highest position, or None if the host does not know them."""
    packed = cu_seqlens is not None
    if q.dim() != (3 if packed else 4) or not q.is_floating_point() or q.numel() == 0:
        return None
    shape, sequences = q.shape, q.shape[0]
    lengths: int | Tensor = q.shape[1]
    if packed:
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or not has_values(cu_seqlens):
            return None
        shape, sequences = torch.Size((1, *q.shape)), cu_seqlens.shape[0] - 1
        lengths = cu_seqlens.diff()
    if positions is None:
        return offset, offset + int(lengths.max() if packed else lengths) - 1
    if not has_values(positions):
        return None
    kind = position_kind(positions, shape, sequences)
    if kind is None or positions.numel() == 0:
        return None
    last = positions.flatten().double() + lengths - 1 if kind == "offsets" else positions
    return positions.min().item() + offset, last.max().item() + offset
