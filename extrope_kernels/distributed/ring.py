"""Context parallelism in a ring: keys and values go round, the next ones while these are used.

Every rank merges what its queries see of each other's keys, exactly; the backward of a block takes
the log-sum-exp of all, and gradients of keys go round with the keys. Blocks give float32, which is
summed and rounded once, so that 16-bit results are as near as those of one device. A few heads go
round after the others: what is under way, and what is summed in float32, is of those alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
from .derivatives import first_only
from .layout import Balance
from .rows import RopeTensors, Run, apart, joined, parts_of, runs


class Plan(NamedTuple):
    """All of a call but its tensors."""

    call: BlockCall
    group: Group
    balance: Balance


def attend(plan: Plan, q: Tensor, k: Tensor, v: Tensor, rope: RopeTensors) -> tuple[Tensor, Tensor]:
    """out and lse of this rank's queries, from its own tokens of q, k and v; not packed."""
    call = replace(plan.call, options={**plan.call.options, "float32_results": True})
    return _Ring.apply(plan._replace(call=call), q, k, v, *rope)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor | None):
        rope = RopeTensors(*tensors)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)
        for part in parts_of(q, k):
            rows = (q[:, :, part.q], k[:, :, part.k], v[:, :, part.k])
            _forward_of_part(plan, *rows, rope.of_heads(part.q), out[:, :, part.q], lse[:, part.q])
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        return out, lse

    @staticmethod
    @first_only
    def backward(ctx: Any, saved: tuple[Any, ...], dout: Tensor | None, dlse: Tensor | None):
        q, k, v, out, lse, *tensors = saved
        rope = RopeTensors(*tensors)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for part in parts_of(q, k):
            given = (
                dout[:, :, part.q],
                None if dlse is None else dlse[:, part.q],
                *(x[:, :, heads] for x, heads in ((q, part.q), (k, part.k), (v, part.k))),
                out[:, :, part.q],
                lse[:, part.q],
            )
            dkv = _backward_of_part(ctx.plan, given, rope, dq[:, :, part.q])
            dkeys, dvalues = apart(dkv, k, v)
            dk[:, :, part.k].copy_(dkeys)
            dv[:, :, part.k].copy_(dvalues)
            del dkv, dkeys, dvalues
        dsinks = None
        if ctx.needs_input_grad[6]:
            dsinks = grad_of_sinks(rope.sinks, dout, dlse, out, lse)
        return None, dq, dk, dv, None, None, dsinks, None


def _forward_of_part(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, rope: RopeTensors, out: Tensor, lse: Tensor
) -> None:
    """Write out and lse of some heads, merged in float32."""
    so_far = out if out.dtype == lse.dtype else torch.empty_like(out, dtype=lse.dtype)
    for step, keys, values in _round(plan, k, v):
        for here, there in _pairs(plan, step, q.shape[1]):
            rows = (q[:, here.rows], keys[:, there.rows], values[:, there.rows])
            found = block_forward(plan.call, *rows, *_rope_args(rope, here, there))
            outs, lses = [so_far[:, here.rows], found[0]], [lse[..., here.rows], found[1]]
            if here.is_same(there):
                outs[0].copy_(outs[1])
                lses[0].copy_(lses[1])
            else:
                merge_attention(outs, lses, inplace=True)
            del found, outs, lses  # before the next one is made
    if so_far is not out:
        out.copy_(so_far)


def _round(plan: Plan, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The keys and values of one rank after the other, this rank's first, by step.

    The next ones are under way meanwhile; those before have been let go, so that two are held.
    """
    coming = joined(k, v)
    for step in range(plan.group.size):
        rows = wait(coming) if step else coming
        if step + 1 < plan.group.size:
            coming = start_shift(rows, plan.group)
        yield step, *apart(rows, k, v)


def _pairs(plan: Plan, step: int, tokens: int) -> Iterator[tuple[Run, Run]]:
    """This rank's queries with the keys that are here in a step, run by run: those that meet.

    A run with itself comes first: that has a key for every query, and the sinks.
    """
    group, call = plan.group, plan.call
    source = group._replace(rank=(group.rank - step) % group.size)
    for here in runs(tokens, group, plan.balance):
        for there in reversed(runs(tokens, source, plan.balance)):
            if there.start > here.start:
                continue
            queries = here.within(here.start, call.queries_end(there.stop))
            keys = there.within(call.first_key(here.start), there.stop)
            if queries.stop > queries.start and keys.stop > keys.start:
                yield queries, keys


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
        rope.sinks if here.is_same(there) and not backward else None,
        None if scale is None else scale[..., here.rows].contiguous(),
        *starts,
    )


def _backward_of_part(plan: Plan, given: tuple[Any, ...], rope: RopeTensors, dq: Tensor) -> Tensor:
    """Write dq of some heads; return the gradient of their keys and values, `joined`.

    given: dout, dlse, q, k, v, out and lse of these heads.
    """
    _, _, q, k, v, _, lse = given
    so_far = dq if dq.dtype == lse.dtype else torch.empty_like(dq, dtype=lse.dtype)
    so_far.zero_()
    # What ranks have found so far for the keys that are here goes with them, a step behind.
    shape = (k.shape[1], k.shape[0], k.shape[2], k.shape[3] + v.shape[3])
    going = k.new_zeros(shape, dtype=lse.dtype)
    for step, keys, values in _round(plan, k, v):
        for here, there in _pairs(plan, step, q.shape[1]):
            found = _backward_of_pair(plan, (here, there), given, (keys, values), rope)
            so_far[:, here.rows] += found[0]
            going = wait(going)  # has come while the first pair was computed
            dkeys, dvalues = apart(going, k, v)
            dkeys[:, there.rows] += found[1]
            dvalues[:, there.rows] += found[2]
            del found  # before the next one is made
        going = start_shift(wait(going), plan.group)
    if so_far is not dq:
        dq.copy_(so_far)
    return wait(going)


def _backward_of_pair(
    plan: Plan,
    pair: tuple[Run, Run],
    given: tuple[Any, ...],
    keys_values: tuple[Tensor, Tensor],
    rope: RopeTensors,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a run of keys adds to dq of a run of queries, and they to the gradients of the keys."""
    here, there = pair
    dout, dlse, q, _, _, out, lse = given
    return block_backward(
        plan.call,
        dout[:, here.rows],
        None if dlse is None else dlse[..., here.rows].contiguous(),
        q[:, here.rows],
        *(x[:, there.rows] for x in keys_values),
        out[:, here.rows],
        lse[..., here.rows].contiguous(),
        *_rope_args(rope, here, there, backward=True),
    )
