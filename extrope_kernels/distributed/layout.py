"""Which tokens of a sequence a rank holds, and how to cut a tensor so and join it again."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .collectives import Group, gathered

Mesh: TypeAlias = DeviceMesh | dist.ProcessGroup
Balance: TypeAlias = Literal["zigzag"] | None
ALONE = Group("", 1, 0)


class Devices(NamedTuple):
    """The ranks that share a sequence, as a grid: rank = outer.rank * inner.size + inner.rank."""

    outer: Group
    inner: Group = ALONE

    @property
    def size(self) -> int:
        return self.outer.size * self.inner.size

    @property
    def rank(self) -> int:
        return self.outer.rank * self.inner.size + self.inner.rank


def groups_of(op: str, mesh: Mesh) -> list[dist.ProcessGroup]:
    """One process group for each dimension of the mesh."""
    if isinstance(mesh, dist.ProcessGroup):
        return [mesh]
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"{op}: mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}"
        )
    if mesh.ndim not in (1, 2):
        raise ValueError(f"{op}: mesh must have 1 or 2 dimensions, got {mesh.ndim}")
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


def devices_of(op: str, mesh: Mesh) -> Devices:
    """The grid that a mesh is."""
    return Devices(*(Group(g.group_name, g.size(), g.rank()) for g in groups_of(op, mesh)))


def local_positions(
    seqlen: int,
    mesh: Mesh,
    *,
    balance: Balance = "zigzag",
    device: torch.device | str | None = None,
) -> Tensor:
    """The positions of this rank's tokens, (seqlen / P,) int64, P being the number of ranks.

    seqlen: of the whole sequence, a multiple of 2 P (of P without balance).
    mesh: DeviceMesh of one or two dimensions, or a ProcessGroup: the ranks that share the sequence.
    balance: "zigzag" cuts the sequence into 2 P chunks and gives rank r those numbered r and
        2 P - 1 - r, so that causal attention costs all ranks the same; it is the order of torch's
        head-tail load balancer. None gives every rank one run of tokens.
    device: of the result, by default the CPU.

    Raises: ValueError or TypeError that names the argument.
    """
    devices = _checked("local_positions", mesh, balance)
    mine = chunks(devices.rank, devices.size, balance)
    size = _per_rank("local_positions", "seqlen", seqlen, devices, balance) // len(mine)
    starts = torch.tensor(mine, device=device or "cpu") * size
    return (starts[:, None] + torch.arange(size, device=starts.device)).flatten()


def shard(x: Tensor, mesh: Mesh, *, dim: int = 1, balance: Balance = "zigzag") -> Tensor:
    """This rank's part of a tensor that every rank has whole: its tokens along `dim`.

    x: (..., seqlen, ...) with the sequence at `dim`; of any dtype. Shift labels before.
    mesh, balance: as in `local_positions`.

    Returns: x with seqlen / P tokens, a copy with balance, else a view. Differentiable.
    Raises: ValueError or TypeError that names the argument.
    """
    devices = _checked("shard", mesh, balance)
    seqlen = _length("shard", x, dim)
    _per_rank("shard", f"x's dimension {dim}", seqlen, devices, balance)
    mine = chunks(devices.rank, devices.size, balance)
    parts = x.chunk(len(mine) * devices.size, dim)
    return parts[mine[0]] if len(mine) == 1 else torch.cat([parts[n] for n in mine], dim)


def unshard(x: Tensor, mesh: Mesh, *, dim: int = 1, balance: Balance = "zigzag") -> Tensor:
    """The whole tensor on every rank, from the parts that `shard` gave them.

    x: this rank's part; of one shape on all ranks.
    dim, mesh, balance: as they were given to `shard`.

    Returns: the tokens of all ranks in order. Differentiable; what the ranks' losses add to the
        gradient of a token is summed.
    Raises: ValueError or TypeError that names the argument.
    """
    devices = _checked("unshard", mesh, balance)
    tokens = _length("unshard", x, dim)
    if balance is not None and tokens % 2:
        raise ValueError(
            f"unshard: x's dimension {dim} must be even with balance='zigzag', got {tokens}"
        )
    rows = x.movedim(dim, 0).contiguous()
    for group in (devices.inner, devices.outer):
        rows = gathered(rows, group)
    return in_order(rows, devices.size, balance).movedim(0, dim)


def chunks(rank: int, size: int, balance: Balance) -> list[int]:
    """The numbers of the chunks that a rank holds, of the P (balanced 2 P) of the sequence."""
    return [rank] if balance is None else [rank, 2 * size - 1 - rank]


def in_order(rows: Tensor, size: int, balance: Balance) -> Tensor:
    """Rows (size * n, ...) of all ranks, one rank's after the other's, by their positions."""
    if balance is None or size == 1:
        return rows
    parts = rows.chunk(2 * size)
    return torch.cat([*parts[0::2], *reversed(parts[1::2])])


def by_rank(rows: Tensor, size: int, balance: Balance) -> Tensor:
    """The inverse of `in_order`."""
    if balance is None or size == 1:
        return rows
    parts = rows.chunk(2 * size)
    return torch.cat([part for n in range(size) for part in (parts[n], parts[-1 - n])])


def check_balance(op: str, balance: Balance) -> None:
    if balance not in ("zigzag", None):
        raise ValueError(f"{op}: balance must be 'zigzag' or None, got {balance!r}")


def _checked(op: str, mesh: Mesh, balance: Balance) -> Devices:
    check_balance(op, balance)
    return devices_of(op, mesh)


def _length(op: str, x: Tensor, dim: int) -> int:
    """Of the sequence in x."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a Tensor, got {type(x).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: dim must be one of x's {x.dim()} dimensions, got {dim}")
    return x.shape[dim]


def _per_rank(op: str, name: str, seqlen: int, devices: Devices, balance: Balance) -> int:
    parts = devices.size * len(chunks(devices.rank, devices.size, balance))
    if isinstance(seqlen, bool) or not isinstance(seqlen, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(seqlen).__name__}")
    if seqlen < 0 or seqlen % parts:
        raise ValueError(
            f"{op}: {name} must be a multiple of {parts} for {devices.size} ranks"
            f"{'' if balance is None else ' in zigzag'}, got {seqlen}"
        )
    return seqlen // devices.size
