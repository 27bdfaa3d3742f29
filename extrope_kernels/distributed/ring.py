"""Context parallelism in a ring: the next keys and values travel while these are used.

Every rank merges the results over each other rank's keys, exactly. The backward of a block takes
the log-sum-exp over all keys, and gradients of keys travel with the keys. Blocks give float32,
which is summed and rounded once: 16-bit results are as near as those of one device. A few heads
travel at a time: only those are held twice and summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops import attention
from ..ops.attention import AttentionCall, merge_attention
from .blocks import Plan, Run, apart, joined, parts_of, runs
from .collectives import start_shift, wait


def forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and lse of this rank's queries, from its own tokens of q, k and v; not packed."""
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)
    for heads, of_keys in parts_of(q, k):
        rows = (q[:, :, heads], k[:, :, of_keys], v[:, :, of_keys])
        own = plan._replace(call=plan.call.of_heads(heads))
        _forward_of_heads(own, *rows, out[:, :, heads], lse[:, heads])
    return out, lse


def backward(
    plan: Plan,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of this rank's tokens."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for heads, of_keys in parts_of(q, k):
        keys, values = k[:, :, of_keys], v[:, :, of_keys]
        dkv = _backward_of_heads(
            plan,
            dout[:, :, heads],
            None if dlse is None else dlse[:, heads],
            q[:, :, heads],
            keys,
            values,
            out[:, :, heads],
            lse[:, heads],
            dq[:, :, heads],
        )
        dkeys, dvalues = apart(dkv, keys, values)
        dk[:, :, of_keys].copy_(dkeys)
        dv[:, :, of_keys].copy_(dvalues)
        del dkv, dkeys, dvalues  # before the next ones are made
    return dq, dk, dv


def _forward_of_heads(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Write out and lse, merged in float32."""
    so_far = out if out.dtype == lse.dtype else torch.empty_like(out, dtype=lse.dtype)
    for step, keys, values in _round(plan, k, v):
        for here, there in _pairs(plan, step, q.shape[1]):
            first = here.is_same(there)
            rows = (q[:, here.rows], keys[:, there.rows], values[:, there.rows])
            call = _call_of(plan, here, there, sinks=first)
            found = attention.forward(*rows, call, plan.backend)
            outs, lses = [so_far[:, here.rows], found[0]], [lse[..., here.rows], found[1]]
            if first:
                outs[0].copy_(outs[1])
                lses[0].copy_(lses[1])
            else:
                merge_attention(outs, lses, inplace=True)
            del found, outs, lses  # before the next ones are made
    if so_far is not out:
        out.copy_(so_far)


def _backward_of_heads(
    plan: Plan,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
) -> Tensor:
    """Write dq; return the gradient of these keys and values, `joined`."""
    so_far = dq if dq.dtype == lse.dtype else torch.empty_like(dq, dtype=lse.dtype)
    so_far.zero_()
    # The gradients that earlier ranks summed for the present keys travel a step behind them.
    shape = (k.shape[1], k.shape[0], k.shape[2], k.shape[3] + v.shape[3])
    going = k.new_zeros(shape, dtype=lse.dtype)
    for step, keys, values in _round(plan, k, v):
        for here, there in _pairs(plan, step, q.shape[1]):
            found = attention.backward(
                dout[:, here.rows],
                None if dlse is None else dlse[..., here.rows].contiguous(),
                q[:, here.rows],
                keys[:, there.rows],
                values[:, there.rows],
                out[:, here.rows],
                lse[..., here.rows].contiguous(),
                _call_of(plan, here, there, sinks=False),  # lse includes them
                plan.backend,
            )
            so_far[:, here.rows] += found[0]
            going = wait(going)  # it came while the first pair was computed
            dkeys, dvalues = apart(going, k, v)
            dkeys[:, there.rows] += found[1]
            dvalues[:, there.rows] += found[2]
            del found  # before the next one is made
        going = start_shift(wait(going), plan.group)
    if so_far is not dq:
        dq.copy_(so_far)
    return wait(going)


def _round(plan: Plan, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the keys and values of one rank after the other, this rank's first, step by step.

    The next ones travel meanwhile, and those before have been freed: two are held.
    """
    coming = joined(k, v)
    for step in range(plan.group.size):
        rows = wait(coming) if step else coming
        if step + 1 < plan.group.size:
            coming = start_shift(rows, plan.group)
        yield step, *apart(rows, k, v)


def _pairs(plan: Plan, step: int, tokens: int) -> Iterator[tuple[Run, Run]]:
    """Pair this rank's queries with a step's keys, run by run, where queries see keys.

    A run paired with itself comes first, whole: its result is the first of each row, even of one
    without keys, and has the sinks.
    """
    group, call = plan.group, plan.call
    source = group._replace(rank=(group.rank - step) % group.size)
    for here in runs(tokens, group, plan.balance):
        for there in reversed(runs(tokens, source, plan.balance)):
            if there.start > here.start:
                continue
            queries, keys = here, there
            if not here.is_same(there):
                queries = here.within(here.start, call.queries_end(there.stop))
                keys = there.within(call.first_key(here.start), there.stop)
            if queries.stop > queries.start and keys.stop > keys.start:
                yield queries, keys


def _call_of(plan: Plan, here: Run, there: Run, sinks: bool) -> AttentionCall:
    """Return the call of a run of queries over a run of keys."""
    call, scale = plan.call, plan.call.query_scale
    device = call.inv_freq.device
    q_start, k_start = (
        torch.full((1,), x.start, dtype=torch.int32, device=device) for x in (here, there)
    )
    return call._replace(
        sinks=call.sinks if sinks else None,
        query_scale=None if scale is None else scale[..., here.rows].contiguous(),
        q_start=q_start,
        k_start=k_start,
        float32_results=True,
    )
