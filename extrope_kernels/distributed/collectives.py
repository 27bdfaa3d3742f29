"""PyTorch's functional collectives, by group name: torch.compile traces them.

The functions that begin with `start_` return at once; read their result after `wait`. They take
contiguous tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ops = torch.ops._c10d_functional


class Group(NamedTuple):
    """A process group by the collectives' name for it, and this rank's place in it."""

    name: str
    size: int
    rank: int


def wait(x: Tensor) -> Tensor:
    """Wait for a collective, and return its result."""
    return _ops.wait_tensor(x)


def start_gather(rows: Tensor, group: Group) -> Tensor:
    """Gather (n, ...) of every rank as (size * n, ...), in the ranks' order."""
    return _ops.all_gather_into_tensor(rows, group.size, group.name)


def start_scatter_sum(rows: Tensor, group: Group) -> Tensor:
    """Sum all ranks' (size * n, ...), and return this rank's (n, ...) of it."""
    return _ops.reduce_scatter_tensor(rows, "sum", group.size, group.name)


def start_exchange(rows: Tensor, group: Group) -> Tensor:
    """Exchange rows: n rows for this rank from every rank's (size * n, ...), in their order."""
    even = [rows.shape[0] // group.size] * group.size
    return _ops.all_to_all_single(rows, even, even, group.name)


def start_shift(rows: Tensor, group: Group) -> Tensor:
    """Send rows to the next rank of the ring; return those of the rank before."""
    before, after = (group.rank - 1) % group.size, (group.rank + 1) % group.size
    received = [rows.shape[0] if n == before else 0 for n in range(group.size)]
    sent = [rows.shape[0] if n == after else 0 for n in range(group.size)]
    return _ops.all_to_all_single(rows, received, sent, group.name)


def gathered(rows: Tensor, group: Group) -> Tensor:
    """Gather as `start_gather`, wait, and differentiate: gradients of all ranks are summed."""
    return rows if group.size == 1 else _Gathered.apply(rows, group)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, group):
        ctx.group = group
        return wait(start_gather(rows, group))

    @staticmethod
    def backward(ctx, grad):
        return wait(start_scatter_sum(grad.contiguous(), ctx.group)), None
