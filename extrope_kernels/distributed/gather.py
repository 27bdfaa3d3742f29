"""Context parallelism by gathering keys and values, some heads at a time.

A rank's queries see a prefix of the sequence, or two in zigzag: an ordinary call for each. The next
heads are under way while those before are attended to. The backward gathers them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.attention import BlockCall, block_backward, block_forward, grad_of_sinks
from .collectives import Group, start_gather, start_scatter_sum, wait
from .derivatives import first_only
from .layout import Balance, by_rank, in_order
from .rows import Block, RopeTensors, apart, joined, parts_of


class Plan(NamedTuple):
    """All of a call but its tensors."""

    call: BlockCall
    group: Group
    balance: Balance
    blocks: list[Block]


def attend(plan: Plan, q: Tensor, k: Tensor, v: Tensor, rope: RopeTensors) -> tuple[Tensor, Tensor]:
    """out and lse of this rank's queries, from its own tokens of q, k and v."""
    return _Gather.apply(plan, q, k, v, *rope)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor | None):
        rope = RopeTensors(*tensors)
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        lse = q.new_empty(
            (*q.shape[:-3], q.shape[-2], q.shape[-3]),
            dtype=torch.promote_types(q.dtype, torch.float32),
        )
        for heads, rows in _parts(plan, q, k, v):
            keys, values = apart(rows, k, v)
            for block in plan.blocks:
                part, part_lse = block_forward(
                    plan.call,
                    block.queries(q[..., heads, :]),
                    block.keys(keys),
                    block.keys(values),
                    *rope.of_block(block, heads),
                )
                block.queries(out[..., heads, :]).copy_(part)
                block.lse(lse[..., heads, :]).copy_(part_lse)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        return out, lse

    @staticmethod
    @first_only
    def backward(ctx: Any, saved: tuple[Any, ...], dout: Tensor | None, dlse: Tensor | None):
        plan = ctx.plan
        q, k, v, out, lse, *tensors = saved
        rope = RopeTensors(*tensors)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        given = (dout, dlse, q, k, v, out, lse)
        dq, sums = torch.empty_like(q), []
        for heads, rows in _parts(plan, q, k, v):
            dkv = _backward_of_part(plan, heads, rows, given, rope, dq)
            if sums:
                sums[-1] = wait(sums[-1])
            sums.append(start_scatter_sum(dkv, plan.group))
        dk, dv = apart(torch.cat([*sums[:-1], wait(sums[-1])], -2), k, v)
        dsinks = None
        if ctx.needs_input_grad[6]:
            dsinks = grad_of_sinks(rope.sinks, dout, dlse, out, lse)
        return None, dq, dk.to(k.dtype), dv.to(v.dtype), None, None, dsinks, None


def _parts(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some heads of queries, and the `joined` keys and values of all ranks that these heads see."""
    parts = parts_of(q, k)
    coming = _start(plan, parts[0].k, k, v)
    for n, part in enumerate(parts):
        rows = wait(coming)
        if n + 1 < len(parts):
            coming = _start(plan, parts[n + 1].k, k, v)
        yield part.q, in_order(rows, plan.group.size, plan.balance)


def _start(plan: Plan, heads: slice, k: Tensor, v: Tensor) -> Tensor:
    return start_gather(joined(k[..., heads, :], v[..., heads, :]), plan.group)


def _backward_of_part(
    plan: Plan,
    heads: slice,
    rows: Tensor,
    given: tuple[Tensor | None, ...],
    rope: RopeTensors,
    dq: Tensor,
) -> Tensor:
    """Write dq of these heads; return what this rank adds to the gradient of rows, by rank."""
    dout, dlse, q, k, v, out, lse = (None if x is None else x[..., heads, :] for x in given)
    keys, values = apart(rows, k, v)
    dkv = torch.zeros_like(rows, dtype=lse.dtype)
    dkeys, dvalues = apart(dkv, k, v)
    for block in plan.blocks:
        found = block_backward(
            plan.call,
            block.queries(dout),
            None if dlse is None else block.lse(dlse).contiguous(),
            block.queries(q),
            block.keys(keys),
            block.keys(values),
            block.queries(out),
            block.lse(lse).contiguous(),
            *rope.of_block(block, heads),
        )
        block.queries(dq[..., heads, :]).copy_(found[0])
        block.keys(dkeys).add_(found[1])
        block.keys(dvalues).add_(found[2])
    return by_rank(dkv, plan.group.size, plan.balance)
