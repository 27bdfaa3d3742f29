"""Ulysses: ranks exchange tokens for heads, so that each attends to all tokens with some heads.

Paper: https://arxiv.org/abs/2309.14509
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .collectives import Group, gathered, start_exchange, wait
from .layout import Balance, by_rank, in_order


def check_heads(op: str, heads_q: int, heads_k: int, group: Group) -> None:
    """Every rank needs heads of queries, and with few key heads a whole one of keys."""
    if heads_q % group.size:
        raise ValueError(
            f"{op}: q's heads must be a multiple of the {group.size} ranks that exchange them, "
            f"got {heads_q}"
        )
    if heads_k % group.size and group.size % heads_k:
        raise ValueError(
            f"{op}: k's heads must be a multiple of the {group.size} ranks that exchange them, or "
            f"divide it, got {heads_k}"
        )


def to_heads(x: Tensor, group: Group, balance: Balance) -> Tensor:
    """From this rank's tokens (batch, seqlen, heads, head_dim) to those of all, with its heads.

    Packed without batch. Heads fewer than ranks are repeated.
    """
    if x.shape[-2] < group.size:
        x = x.repeat_interleave(group.size // x.shape[-2], -2)
    return _Exchange.apply(x, group, balance, True)


def to_tokens(x: Tensor, group: Group, balance: Balance) -> Tensor:
    """The inverse of `to_heads`."""
    return _Exchange.apply(x, group, balance, False)


def lse_to_tokens(lse: Tensor, group: Group, balance: Balance) -> Tensor:
    """`to_tokens` of (batch, heads, seqlen), packed (heads, total)."""
    rows = lse.transpose(-1, -2).unsqueeze(-1)
    return to_tokens(rows, group, balance).squeeze(-1).transpose(-1, -2).contiguous()


def numbers_of_all(x: Tensor, group: Group, balance: Balance) -> Tensor:
    """A number for each of this rank's tokens (..., seqlen), of all."""
    rows = gathered(x.movedim(-1, 0).contiguous(), group)
    return in_order(rows, group.size, balance).movedim(0, -1).contiguous()


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, balance: Balance, heads: bool) -> Tensor:
        ctx.group, ctx.balance, ctx.heads = group, balance, heads
        return _exchange(x, group, balance, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _Exchange.apply(grad, ctx.group, ctx.balance, not ctx.heads), None, None, None


def _exchange(x: Tensor, group: Group, balance: Balance, heads: bool) -> Tensor:
    if heads:  # rank by rank the heads that it will have
        rows = x.unflatten(-2, (group.size, -1)).movedim((-3, -4), (0, 1)).flatten(0, 1)
        rows = wait(start_exchange(rows.contiguous(), group))
        return in_order(rows, group.size, balance).movedim(0, -3)
    rows = by_rank(x.movedim(-3, 0), group.size, balance)
    rows = wait(start_exchange(rows.contiguous(), group)).unflatten(0, (group.size, -1))
    return rows.movedim((0, 1), (-3, -4)).flatten(-3, -2)
