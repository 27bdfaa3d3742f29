"""PyTorch's functional collectives, by the names of groups: torch.compile traces them.

Those that `start_` something return at once; their result may be read after `wait`. They take
contiguous tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ops = torch.ops._c10d_functional


class Group(NamedTuple):
    """A process group as collectives name it, and this rank's place in it."""

    name: str
    size: int
    rank: int


def wait(x: Tensor) -> Tensor:
    return _ops.wait_tensor(x)


def start_gather(rows: Tensor, group: Group) -> Tensor:
    """(n, ...) of every rank as (size * n, ...), in the ranks' order."""
    return _ops.all_gather_into_tensor(rows, group.size, group.name)


def start_scatter_sum(rows: Tensor, group: Group) -> Tensor:
    """This rank's (n, ...) of the sum over all ranks' (size * n, ...)."""
    return _ops.reduce_scatter_tensor(rows, "sum", group.size, group.name)


def start_exchange(rows: Tensor, group: Group) -> Tensor:
    """The n rows for this rank of every rank's (size * n, ...), in the ranks' order."""
    even = [rows.shape[0] // group.size] * group.size
    return _ops.all_to_all_single(rows, even, even, group.name)


def start_shift(rows: Tensor, group: Group) -> Tensor:
    """Send rows to the next rank of the ring; the result is what the rank before sends."""
    before, after = (group.rank - 1) % group.size, (group.rank + 1) % group.size
    received = [rows.shape[0] if n == before else 0 for n in range(group.size)]
    sent = [rows.shape[0] if n == after else 0 for n in range(group.size)]
    return _ops.all_to_all_single(rows, received, sent, group.name)


def gathered(rows: Tensor, group: Group) -> Tensor:
    """`start_gather`, waited for and differentiable: gradients of all ranks are summed."""
    return rows if group.size == 1 else _Gathered.apply(rows, group)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, group):
        ctx.group = group
        return wait(start_gather(rows, group))

    @staticmethod
    def backward(ctx, grad):
        return wait(start_scatter_sum(grad.contiguous(), ctx.group)), None
