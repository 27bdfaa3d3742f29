"""One rotary call, checked and brought to the form that the Python-launched kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
POSITION_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


@dataclass(frozen=True)
class Rotation:
    """What to rotate by: the fields of csrc/common/rope_params.h that are not tensors to rotate."""

    inv_freq: Tensor  # (sequences or 1, heads or 1, rotary_dim / 2)
    positions: Tensor | None  # (batch or 1, seqlen), or (sequences,) when positions_are_offsets
    positions_are_offsets: bool
    offset: int
    cu_seqlens: Tensor | None
    log_decay: Tensor | None
    decay_signs: tuple[float, ...]  # one for each of q, k
    amplitude: float
    conjugate: bool
    interleaved: bool

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.shape[-1]

    @property
    def per_head(self) -> bool:
        return self.inv_freq.shape[1] > 1


def resolve(
    q: Tensor,
    k: Tensor | None,
    inv_freq: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    adjoint: bool,
    attention_factor: float = 1.0,
    offset: int = 0,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[list[Tensor], Rotation]:
    """Check an op's arguments; return q and k as (batch, seqlen, heads, head_dim) and the Rotation.

    `adjoint` asks for the transposed linear map, which is what a backward applies: the angle turns
    round, the amplitude stays. `inverse` undoes the map: angle and amplitude both turn round.
    """
    check(q, k, inv_freq, positions, cu_seqlens, log_decay, attention_factor)
    tensors = [q] if k is None else [q, k]
    if cu_seqlens is not None:
        tensors = [x.unsqueeze(0) for x in tensors]
    sequences = tensors[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kind = position_kind(positions, tensors[0].shape, sequences)
    if positions is not None:
        if kind == "offsets":
            positions = positions.reshape(-1)
        elif positions.dim() == 1:
            positions = positions.unsqueeze(0)
    sign = -1.0 if inverse else 1.0
    rotation = Rotation(
        inv_freq=frequencies_3d(inv_freq),
        positions=positions,
        positions_are_offsets=kind == "offsets",
        offset=offset,
        cu_seqlens=cu_seqlens,
        log_decay=log_decay,
        decay_signs=(sign, -sign)[: len(tensors)],
        amplitude=1.0 / attention_factor if inverse else attention_factor,
        conjugate=adjoint != inverse,
        interleaved=interleaved,
    )
    return tensors, rotation


def frequencies_3d(inv_freq: Tensor) -> Tensor:
    if inv_freq.dim() == 1:
        return inv_freq[None, None]
    return inv_freq.unsqueeze(1) if inv_freq.dim() == 2 else inv_freq


def position_kind(positions: Tensor | None, shape: torch.Size, sequences: int) -> str | None:
    """'index' (none given), 'positions', 'offsets', or None when the shape fits neither."""
    if positions is None:
        return "index"
    batch, seqlen = shape[0], shape[1]
    dims = tuple(positions.shape)
    if dims in ((seqlen,), (batch, seqlen), (1, seqlen)):
        return "positions"
    if dims in ((sequences,), (sequences, 1)):
        return "offsets"
    return None


def token_positions(rotation: Rotation, batch: int, seqlen: int) -> Tensor:
    """(batch or 1, seqlen) float64: the position of every token."""
    device = rotation.inv_freq.device
    index = torch.arange(seqlen, device=device)
    if rotation.cu_seqlens is not None:
        sequence = sequence_of_token(rotation.cu_seqlens, seqlen)
        index = index - rotation.cu_seqlens[sequence]
    if rotation.positions is None:
        positions = index[None]
    elif not rotation.positions_are_offsets:
        positions = rotation.positions
    elif rotation.cu_seqlens is not None:
        positions = (rotation.positions[sequence] + index)[None]
    else:
        positions = rotation.positions[:, None] + index
    return positions.double() + rotation.offset


def sequence_of_token(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) int64: which packed sequence each token belongs to."""
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    found = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    return found.clamp(0, max(cu_seqlens.shape[0] - 2, 0))


# -------------------------------------------------------------------------------------------------
# Checks


def check(
    q: Tensor,
    k: Tensor | None,
    inv_freq: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: Tensor | None,
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
    if positions is not None:
        _check_positions(positions, q, shape, sequences)
    if log_decay is not None:
        _check_log_decay(log_decay, inv_freq)
    if not attention_factor > 0:
        raise ValueError(f"rope: attention_factor must be > 0, got {attention_factor}")


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


def _check_positions(positions: Tensor, q: Tensor, shape: torch.Size, sequences: int) -> None:
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
    if position_kind(positions, shape, sequences) is None:
        raise ValueError(
            f"rope: positions must be ({shape[1]},), ({shape[0]}, {shape[1]}) or "
            f"({sequences},) offsets, got shape {tuple(positions.shape)}"
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


def _check_log_decay(log_decay: Tensor, inv_freq: Tensor) -> None:
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
