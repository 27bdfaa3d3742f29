"""The tokens of a sequence that a rank holds: cut a tensor so, and join it again."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .collectives import Group, gathered

Mesh: TypeAlias = DeviceMesh | dist.ProcessGroup
Balance: TypeAlias = Literal["zigzag"] | None


def group_of(op: str, mesh: Mesh) -> Group:
    """Return the ranks that share a sequence."""
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"{op}: mesh must have 1 dimension, got {mesh.ndim}")
        mesh = mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(
            f"{op}: mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}"
        )
    return Group(mesh.group_name, mesh.size(), mesh.rank())


def check_balance(op: str, balance: Balance) -> None:
    """Raise ValueError for an unknown balance."""
    if balance not in ("zigzag", None):
        raise ValueError(f"{op}: balance must be 'zigzag' or None, got {balance!r}")


def local_positions(
    seqlen: int,
    mesh: Mesh,
    *,
    balance: Balance = "zigzag",
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the positions of this rank's tokens, (seqlen / P,) int64, for P ranks.

    seqlen: of the whole sequence, a multiple of 2 P (of P without balance).
    mesh: DeviceMesh of one dimension, or a ProcessGroup: the ranks that share the sequence.
    balance: "zigzag" cuts the sequence into 2 P chunks and gives rank r those numbered r and
        2 P - 1 - r: causal attention then costs all ranks the same. torch's head-tail load
        balancer has the same order. None gives every rank one run of tokens.
    device: of the result, by default the CPU.

    Raises: ValueError or TypeError that names the argument.
    """
    check_balance("local_positions", balance)
    group = group_of("local_positions", mesh)
    mine = chunks(group, balance)
    size = _per_rank("local_positions", "seqlen", seqlen, group, balance) // len(mine)
    starts = torch.tensor(mine, device=device or "cpu") * size
    return (starts[:, None] + torch.arange(size, device=starts.device)).flatten()


def shard(x: Tensor, mesh: Mesh, *, dim: int = 1, balance: Balance = "zigzag") -> Tensor:
    """Cut this rank's tokens along `dim` out of a tensor that every rank has whole.

    x: (..., seqlen, ...); any dtype. Shift labels before.
    dim: the dimension of the sequence.
    mesh, balance: as in `local_positions`.

    Returns: x with seqlen / P tokens: a copy with balance, else a view. Differentiable.
    Raises: ValueError or TypeError that names the argument.
    """
    check_balance("shard", balance)
    group = group_of("shard", mesh)
    _per_rank("shard", f"x's dimension {dim}", _length("shard", x, dim), group, balance)
    mine = chunks(group, balance)
    parts = x.chunk(len(mine) * group.size, dim)
    return parts[mine[0]] if len(mine) == 1 else torch.cat([parts[n] for n in mine], dim)


def unshard(x: Tensor, mesh: Mesh, *, dim: int = 1, balance: Balance = "zigzag") -> Tensor:
    """Join the parts that `shard` gave the ranks into the whole tensor, on every rank.

    x: this rank's part, of one shape on all ranks.
    dim, mesh, balance: as given to `shard`.

    Returns: the tokens of all ranks in order. Differentiable: the gradients of all ranks' losses
        are summed.
    Raises: ValueError or TypeError that names the argument.
    """
    check_balance("unshard", balance)
    group = group_of("unshard", mesh)
    tokens = _length("unshard", x, dim)
    if balance is not None and tokens % 2:
        raise ValueError(
            f"unshard: x's dimension {dim} must be even with balance='zigzag', got {tokens}"
        )
    rows = gathered(x.movedim(dim, 0).contiguous(), group)
    return in_order(rows, group, balance).movedim(0, dim)


def chunks(group: Group, balance: Balance) -> list[int]:
    """Return the numbers of the rank's chunks, among the sequence's P (with balance 2 P)."""
    return [group.rank] if balance is None else [group.rank, 2 * group.size - 1 - group.rank]


def in_order(rows: Tensor, group: Group, balance: Balance) -> Tensor:
    """Sort rows (size * n, ...), which come rank by rank, by their positions."""
    if balance is None or group.size == 1:
        return rows
    parts = rows.chunk(2 * group.size)
    return torch.cat([*parts[0::2], *reversed(parts[1::2])])


def by_rank(rows: Tensor, group: Group, balance: Balance) -> Tensor:
    """Invert `in_order`."""
    if balance is None or group.size == 1:
        return rows
    parts = rows.chunk(2 * group.size)
    return torch.cat([part for n in range(group.size) for part in (parts[n], parts[-1 - n])])


def _length(op: str, x: Tensor, dim: int) -> int:
    """Return the sequence's length in x."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a Tensor, got {type(x).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: dim must be one of x's {x.dim()} dimensions, got {dim}")
    return x.shape[dim]


def _per_rank(op: str, name: str, seqlen: int, group: Group, balance: Balance) -> int:
    parts = group.size * len(chunks(group, balance))
    if isinstance(seqlen, bool) or not isinstance(seqlen, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(seqlen).__name__}")
    if seqlen < 0 or seqlen % parts:
        raise ValueError(
            f"{op}: {name} must be a multiple of {parts} for {group.size} ranks"
            f"{'' if balance is None else ' in zigzag'}, got {seqlen}"
        )
    return seqlen // group.size
