"""Ulysses: ranks exchange tokens for heads, so that each attends to all tokens with some heads.

Paper: https://arxiv.org/abs/2309.14509
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import attention
from .blocks import Plan
from .collectives import Group, gathered, start_exchange, wait
from .layout import Balance, by_rank, in_order


def check_heads(op: str, heads_q: int, heads_k: int, group: Group) -> None:
    """Check that every rank gets heads of queries, and at least one whole head of keys."""
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


def attend(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return out and lse of this rank's queries, from its tokens of q, k and v. Differentiable."""
    call, group, balance = plan.call, plan.group, plan.balance
    scale, heads = call.query_scale, q.shape[-2] // group.size
    if scale is not None:
        scale = gathered(scale.movedim(-1, 0).contiguous(), group)
        scale = in_order(scale, group, balance).movedim(0, -1).contiguous()
    rows = [_to_heads(x, group, balance) for x in (q, k, v)]
    first = group.rank * heads
    call = call.of_heads(slice(first, first + heads))._replace(query_scale=scale)
    out, lse = attention.forward(*rows, call, plan.backend)
    out = _Exchange.apply(out, group, balance, False)
    if not return_lse:
        return out, None
    lse = _Exchange.apply(lse.transpose(-1, -2).unsqueeze(-1), group, balance, False)
    return out, lse.squeeze(-1).transpose(-1, -2).contiguous()


def _to_heads(x: Tensor, group: Group, balance: Balance) -> Tensor:
    """Return this rank's heads of all tokens (batch, seqlen, heads, head_dim); packed, no batch."""
    if x.shape[-2] < group.size:
        x = x.repeat_interleave(group.size // x.shape[-2], -2)
    return _Exchange.apply(x, group, balance, True)


class _Exchange(torch.autograd.Function):
    """Exchange tokens for heads, or heads for tokens: each is the other's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, balance: Balance, to_heads: bool) -> Tensor:
        ctx.group, ctx.balance, ctx.to_heads = group, balance, to_heads
        if to_heads:  # rank by rank, the heads that it will have
            rows = x.unflatten(-2, (group.size, -1)).movedim((-3, -4), (0, 1)).flatten(0, 1)
            rows = wait(start_exchange(rows.contiguous(), group))
            return in_order(rows, group, balance).movedim(0, -3)
        rows = by_rank(x.movedim(-3, 0), group, balance)
        rows = wait(start_exchange(rows.contiguous(), group)).unflatten(0, (group.size, -1))
        return rows.movedim((0, 1), (-3, -4)).flatten(-3, -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _Exchange.apply(grad, ctx.group, ctx.balance, not ctx.to_heads), None, None, None
