"""Frequencies per head of q: one call per member of the groups that share a head of k.

Heads of one group see the same keys. If their frequencies differ, each key is rotated and read once
for every head of the group, as if keys had as many heads as queries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .call import AttentionCall

Attend = Callable[[Tensor, AttentionCall], tuple[Tensor, Tensor]]


def differ_in_group(call: AttentionCall, q: Tensor, k: Tensor) -> bool:
    """Return True if frequencies or maps are per head of q, and groups have several heads."""
    given = max(_heads(call.inv_freq, 3), _heads(call.pair_maps, 4))
    if given == 1 or given != q.shape[-2]:
        return False
    return k.shape[-2] not in (0, given) and given % k.shape[-2] == 0


def each_member(attend: Attend, q: Tensor, heads_k: int, call: AttentionCall) -> tuple:
    """Run attend(q of a member, its call) for every member of the groups; join out and lse.

    q, out: (..., heads_q, head_dim); lse: (..., heads_q, seqlen).
    """
    heads_q, group = q.shape[-2], q.shape[-2] // heads_k
    found = []
    for member in range(group):
        of_sinks = None if call.sinks is None else call.sinks[member::group].contiguous()
        of_maps = _member(call.pair_maps, member, heads_q, group)
        inv_freq = _member(call.inv_freq, member, heads_q, group)
        own = call._replace(inv_freq=inv_freq, pair_maps=of_maps, sinks=of_sinks)
        found.append(attend(q[..., member::group, :], own))
    outs, lses = zip(*found)
    return tuple(torch.stack(x, dim=-2).flatten(-3, -2) for x in (outs, lses))


def _heads(x: Tensor | None, dim: int) -> int:
    return x.shape[-2] if x is not None and x.dim() == dim else 1


def _member(x: Tensor | None, member: int, heads_q: int, group: int) -> Tensor | None:
    if x is None or x.dim() < 3 or x.shape[-2] != heads_q:
        return x
    return x[..., member::group, :]
