"""A checked rotary call in one form, and the pairs of dims that rotate together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._math import positions as _positions
from .checks import check, check_values, position_kind


@dataclass(frozen=True)
class Rotation:
    """Frequencies, positions and options of a rotation, as in csrc/common/rope_params.h."""

    inv_freq: Tensor  # (sequences or 1, heads or 1, rotary_dim / 2)
    # (batch or 1, seqlen), with positions_are_offsets (sequences,), with axes (axes, batch or 1,
    # seqlen)
    positions: Tensor | None
    positions_are_offsets: bool
    offset: int
    cu_seqlens: Tensor | None
    log_decay: Tensor | None
    decay_signs: tuple[float, ...]  # one for each of q, k
    amplitude: float
    conjugate: bool
    interleaved: bool
    axes: Tensor | None = None  # (rotary_dim / 2,) int32: the row of positions of each pair
    decay_origin: float = 0.0  # the position at which log_decay changes nothing
    rotary_offset: int = 0  # the first rotated dim

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.shape[-1]

    @property
    def layout(self) -> tuple[int, bool, int]:
        """Where the dims of pairs are: the arguments of `split_pairs`."""
        return self.rotary_dim, self.interleaved, self.rotary_offset

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
    axes: Tensor | None = None,
    *,
    adjoint: bool,
    attention_factor: float = 1.0,
    offset: int | None = None,
    interleaved: bool = False,
    rotary_offset: int | None = None,
    inverse: bool = False,
    decay_origin: float = 0.0,
) -> tuple[list[Tensor], Rotation]:
    """Check an op's arguments; return q and k as (batch, seqlen, heads, head_dim) and the Rotation.

    `adjoint` asks for the transposed linear map, which a backward applies: the angle is negated,
    the amplitude stays. `inverse` undoes the map: minus the angle, one over the amplitude.
    """
    rotary_offset = rotary_offset or 0
    numbers = {"rotary_offset": rotary_offset, "decay_origin": decay_origin}
    rope_args = (inv_freq, positions, cu_seqlens, log_decay, axes)
    check(q, k, *rope_args, attention_factor=attention_factor, **numbers)
    check_values(positions, cu_seqlens, axes, offset, q.shape[0])
    tensors = [q] if k is None else [q, k]
    if cu_seqlens is not None:
        tensors = [x.unsqueeze(0) for x in tensors]
    sequences = tensors[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kind = None
    if positions is not None:
        kind = position_kind(positions, tensors[0].shape, sequences)
        if kind == "offsets":
            positions = positions.reshape(-1)
        elif positions.dim() == 1:
            positions = positions.unsqueeze(0)
    sign = -1.0 if inverse else 1.0
    rotation = Rotation(
        inv_freq=frequencies_3d(inv_freq),
        positions=positions,
        positions_are_offsets=kind == "offsets",
        offset=offset or 0,
        cu_seqlens=cu_seqlens,
        log_decay=log_decay,
        decay_signs=(sign, -sign)[: len(tensors)],
        amplitude=1.0 / attention_factor if inverse else attention_factor,
        conjugate=adjoint != inverse,
        interleaved=interleaved,
        axes=axes if kind == "positions by axis" else None,  # else all axes are alike
        decay_origin=decay_origin,
        rotary_offset=rotary_offset,
    )
    return tensors, rotation


def frequencies_3d(inv_freq: Tensor) -> Tensor:
    """Return inv_freq as (sequences or 1, heads or 1, rotary_dim / 2)."""
    if inv_freq.dim() == 1:
        return inv_freq[None, None]
    return inv_freq.unsqueeze(1) if inv_freq.dim() == 2 else inv_freq


def token_positions(rotation: Rotation, batch: int, seqlen: int) -> Tensor:
    """Return positions by token and pair: (batch or 1, seqlen, 1 or rotary_dim / 2) float64."""
    if rotation.axes is not None:
        # Clamped as in a GPU's kernels: reading if an axis is out of range would wait for it.
        axes = rotation.axes.clamp(0, rotation.positions.shape[0] - 1)
        positions = rotation.positions[axes].permute(1, 2, 0)
    else:
        given = (rotation.positions, rotation.positions_are_offsets, rotation.cu_seqlens)
        positions = _positions.token_positions(*given, seqlen, rotation.inv_freq.device)[..., None]
    return positions.double() + rotation.offset
