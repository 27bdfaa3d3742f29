"""Context parallelism in a ring: keys and values go round, the next ones while these are used.

Every rank merges what its queries see of each other's keys, exactly; the backward of a block takes
the log-sum-exp of all, and gradients of keys go round with the keys, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.attention import (
    BlockCall,
    block_backward,
    block_forward,
    grad_of_sinks,
    merge_attention,
)
from .collectives import Group, start_shift, wait
from .layout import Balance
from .rows import RopeTensors, Run, apart, joined, runs


class Plan(NamedTuple):
    """All of a call but its tensors."""

    call: BlockCall
    group: Group
    balance: Balance


def attend(plan: Plan, q: Tensor, k: Tensor, v: Tensor, rope: RopeTensors) -> tuple[Tensor, Tensor]:
    """out and lse of this rank's queries, from its own tokens of q, k and v; not packed."""
    return _Ring.apply(plan, q, k, v, *rope)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor | None):
        rope = RopeTensors(*tensors)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=wide)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)
        coming = joined(k, v)
        for step in range(plan.group.size):
            rows = wait(coming) if step else coming
            keys, values = apart(rows, k, v)  # lets go of those before, so that two are held
            if step + 1 < plan.group.size:
                coming = start_shift(rows, plan.group)
            for here, there in _pairs(plan, step, q.shape[1]):
                part, part_lse = block_forward(
                    plan.call,
                    q[:, here.rows],
                    keys[:, there.rows],
                    values[:, there.rows],
                    *_rope_args(rope, here, there),
                )
                so_far, lse_so_far = out[:, here.rows], lse[..., here.rows]
                if here == there:
                    so_far.copy_(part)
                    lse_so_far.copy_(part_lse)
                else:
                    merge_attention([so_far, part], [lse_so_far, part_lse], inplace=True)
        out = out.to(q.dtype)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None):
        plan, group = ctx.plan, ctx.plan.group
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        rope = RopeTensors(*tensors)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        given = (dout, dlse, q, out, lse)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        coming = joined(k, v)
        going = None
        for step in range(group.size):
            rows = wait(coming) if step else coming
            if step + 1 < group.size:
                coming = start_shift(rows, group)
            dkv = _backward_of_step(plan, step, given, apart(rows, k, v), rope, dq)
            if going is not None:  # what the ranks before have found for the same keys
                dkv += wait(going)
            going = None  # added, so that two are held
            going = start_shift(dkv, group)
            del dkv
        dk, dv = apart(wait(going), k, v)
        dsinks = None
        if ctx.needs_input_grad[6]:
            dsinks = grad_of_sinks(rope.sinks, dout, dlse, out, lse)
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, dsinks, None


def _pairs(plan: Plan, step: int, tokens: int) -> Iterator[tuple[Run, Run]]:
    """This rank's runs of queries with the runs of keys that are here in a step.

    A run with itself comes first: that has a key for every query, and the sinks.
    """
    group = plan.group
    source = group._replace(rank=(group.rank - step) % group.size)
    for here in runs(tokens, group, plan.balance):
        for there in reversed(runs(tokens, source, plan.balance)):
            size = there.rows.stop - there.rows.start
            if there.start <= here.start and plan.call.sees(here.start, there.start + size):
                yield here, there


def _rope_args(
    rope: RopeTensors, here: Run, there: Run, backward: bool = False
) -> tuple[Tensor | None, ...]:
    """As an op takes them, after q, k and v. Of a backward lse knows the sinks."""
    scale, device = rope.query_scale, rope.inv_freq.device
    starts = (torch.full((1,), x.start, dtype=torch.int32, device=device) for x in (here, there))
    return (
        rope.inv_freq,
        None,
        rope.log_decay,
        rope.sinks if here == there and not backward else None,
        None if scale is None else scale[..., here.rows].contiguous(),
        *starts,
    )


def _backward_of_step(
    plan: Plan,
    step: int,
    given: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
    keys_values: tuple[Tensor, Tensor],
    rope: RopeTensors,
    dq: Tensor,
) -> Tensor:
    """Add to dq; return the gradient of the keys and values that are here, `joined`."""
    dout, dlse, q, out, lse = given
    keys, values = keys_values
    shape = (keys.shape[1], keys.shape[0], keys.shape[2], keys.shape[3] + values.shape[3])
    dkv = keys.new_zeros(shape, dtype=lse.dtype)
    dkeys, dvalues = apart(dkv, keys, values)
    for here, there in _pairs(plan, step, q.shape[1]):
        found = block_backward(
            plan.call,
            dout[:, here.rows],
            None if dlse is None else dlse[..., here.rows].contiguous(),
            q[:, here.rows],
            keys[:, there.rows],
            values[:, there.rows],
            out[:, here.rows],
            lse[..., here.rows].contiguous(),
            *_rope_args(rope, here, there, backward=True),
        )
        dq[:, here.rows] += found[0]
        dkeys[:, there.rows] += found[1]
        dvalues[:, there.rows] += found[2]
    return dkv
