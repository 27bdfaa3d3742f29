"""Context parallelism by gathering keys and values, some heads at a time.

A rank's queries see a prefix of the sequence, or two in zigzag: an ordinary call for each. The next
heads are sent while the heads before are attended to. The backward gathers them again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops import attention
from .blocks import Plan, apart, blocks_of, joined, parts_of
from .collectives import start_gather, start_scatter_sum, wait
from .layout import by_rank, in_order


def forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and lse of this rank's queries, from its own tokens of q, k and v."""
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=wide)
    blocks = blocks_of(plan, q)
    for heads, rows in _of_all(plan, q, k, v):
        keys, values = apart(rows, k, v)
        for block in blocks:
            part, part_lse = attention.forward(
                block.queries(q[..., heads, :]),
                block.keys(keys),
                block.keys(values),
                block.call(plan.call, heads),
                plan.backend,
            )
            block.queries(out[..., heads, :]).copy_(part)
            block.lse(lse[..., heads, :]).copy_(part_lse)
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
    """Return dq, dk and dv of this rank's tokens; sums over blocks and ranks are rounded once."""
    dq, sums = torch.empty_like(q), []
    call = plan.call._replace(float32_results=True)
    blocks = blocks_of(plan, q)
    for heads, rows in _of_all(plan, q, k, v):
        keys, values = apart(rows, k, v)
        dkv = torch.zeros_like(rows, dtype=lse.dtype)
        dkeys, dvalues = apart(dkv, k, v)
        for block in blocks:
            found = attention.backward(
                block.queries(dout[..., heads, :]),
                None if dlse is None else block.lse(dlse[..., heads, :]).contiguous(),
                block.queries(q[..., heads, :]),
                block.keys(keys),
                block.keys(values),
                block.queries(out[..., heads, :]),
                block.lse(lse[..., heads, :]).contiguous(),
                block.call(call, heads),
                plan.backend,
            )
            block.queries(dq[..., heads, :]).copy_(found[0])
            block.keys(dkeys).add_(found[1])
            block.keys(dvalues).add_(found[2])
        if sums:
            sums[-1] = wait(sums[-1])
        sums.append(start_scatter_sum(by_rank(dkv, plan.group, plan.balance), plan.group))
    dk, dv = apart(torch.cat([*sums[:-1], wait(sums[-1])], -2), k, v)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _of_all(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Return some heads of queries, and the `joined` keys and values of all ranks they see."""
    parts = parts_of(q, k)

    def start(heads: slice) -> Tensor:
        return start_gather(joined(k[..., heads, :], v[..., heads, :]), plan.group)

    coming = start(parts[0][1])
    for n, (heads, _) in enumerate(parts):
        rows = wait(coming)
        if n + 1 < len(parts):
            coming = start(parts[n + 1][1])
        yield heads, in_order(rows, plan.group, plan.balance)
