"""One call, checked and brought to the form that the Python-launched kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._shared import positions as _positions
from .._shared.checks import check_cu_seqlens, check_matching, check_position_tensor, check_rows

MAX_HEAD_DIM = 1024  # the CUDA kernel keeps the cycles of a head in shared memory


@dataclass(frozen=True)
class Power:
    """Which power of which permutation every token takes."""

    permutations: Tensor  # (rows, head_dim) int64: each serves heads / rows consecutive heads
    positions: Tensor | None  # (batch or 1, seqlen), or (sequences,) when positions_are_offsets
    positions_are_offsets: bool
    offset: int
    cu_seqlens: Tensor | None
    inverse: bool

    def token_positions(self, seqlen: int) -> Tensor:
        """(batch or 1, seqlen) int64, wrapped around at 2**63."""
        positions = _positions.token_positions(
            self.positions,
            self.positions_are_offsets,
            self.cu_seqlens,
            seqlen,
            self.permutations.device,
        )
        return positions.long() + self.offset


def resolve(
    q: Tensor,
    k: Tensor | None,
    permutations: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    offset: int = 0,
    inverse: bool = False,
) -> tuple[list[Tensor], Power]:
    """Check an op's arguments; return q and k as (batch, seqlen, heads, head_dim) and the Power."""
    check(q, k, permutations, positions, cu_seqlens)
    tensors = [q] if k is None else [q, k]
    if cu_seqlens is not None:
        tensors = [x.unsqueeze(0) for x in tensors]
    sequences = tensors[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kind = _positions.position_kind(positions, tensors[0].shape, sequences)
    if kind == "offsets":
        positions = positions.reshape(-1)
    elif kind == "positions" and positions.dim() == 1:
        positions = positions.unsqueeze(0)
    return tensors, Power(permutations, positions, kind == "offsets", offset, cu_seqlens, inverse)


def check(
    q: Tensor,
    k: Tensor | None,
    permutations: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, for anything the kernels cannot take."""
    packed = cu_seqlens is not None
    check_rows("permute", "q", q, packed)
    if k is not None:
        check_rows("permute", "k", k, packed)
        check_matching("permute", q, k)
    if packed:
        check_cu_seqlens("permute", cu_seqlens, q)
    _check_permutations(permutations, q, k)
    if positions is not None:
        check_position_tensor("permute", positions, q, (torch.int32, torch.int64))
        shape = torch.Size((1, *q.shape)) if packed else q.shape
        sequences = cu_seqlens.shape[0] - 1 if packed else shape[0]
        if _positions.position_kind(positions, shape, sequences) is None:
            raise ValueError(
                f"permute: positions must be ({shape[1]},), ({shape[0]}, {shape[1]}) or "
                f"({sequences},) offsets, got shape {tuple(positions.shape)}"
            )


def _check_permutations(permutations: Tensor, q: Tensor, k: Tensor | None) -> None:
    if not isinstance(permutations, Tensor):
        raise TypeError(
            f"permute: permutations must be a Tensor, got {type(permutations).__name__}"
        )
    heads, head_dim = q.shape[-2:]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"permute: head_dim must be from 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if permutations.dtype != torch.int64:
        raise ValueError(f"permute: permutations must be int64, got {permutations.dtype}")
    if permutations.device != q.device:
        raise ValueError(
            f"permute: permutations must be on q's device {q.device}, got {permutations.device}"
        )
    shape = tuple(permutations.shape)
    rows = shape[0] if len(shape) == 2 else 0
    if rows == 0 or shape[1] != head_dim or heads % rows != 0:
        raise ValueError(
            f"permute: permutations must be (heads, {head_dim}) with heads a divisor of "
            f"{heads}, got {shape}"
        )
    if k is not None and k.shape[-2] != rows:
        raise ValueError(
            f"permute: permutations must have a row for each of the {k.shape[-2]} k heads, "
            f"got {rows} rows"
        )
    if permutations.stride(-1) != 1 and head_dim > 1:
        raise ValueError(
            "permute: permutations must be contiguous in its last dimension, "
            f"got strides {permutations.stride()}"
        )
