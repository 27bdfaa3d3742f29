"""Gradients of frequencies, divisors and offsets of pairs, computed from those of q and k.

The kernels return dq and dk, summed over regions. The gradient of a pair's angle is the cross
product of a raw row and its gradient, if that comes from one region. So the backward runs again
without the first region, then without the first two, and so on: the difference of two runs is the
gradient from one region.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .._shared.pairs import cross
from .._shared.positions import sequence_of_token
from .call import AttentionCall
from .rotation import places

Backward = Callable[[AttentionCall], tuple[Tensor, Tensor, Tensor]]


def backward_with_frequencies(
    backward: Backward, q: Tensor, k: Tensor, call: AttentionCall
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor | None]:
    """Return dq, dk and dv in the dtypes of q and k, dinv_freq, and dpair_maps or None.

    backward(call): dq, dk and dv for a call with fewer regions, in float32.
    """
    regions = call.regions
    wide = call._replace(float32_results=True)
    whole = found = backward(wide)
    by_region = []
    for r in range(len(regions)):
        rest = (torch.zeros_like(found[0]), torch.zeros_like(found[1]))
        if r + 1 < len(regions):
            rest = backward(wide._replace(score=replace(call.score, regions=regions[r + 1 :])))
        by_region.append((found[0] - rest[0], found[1] - rest[1]))
        found = rest
    dtypes = (q.dtype, k.dtype, k.dtype)
    rounded = whole if call.float32_results else (x.to(t) for x, t in zip(whole, dtypes))
    return tuple(rounded), *_of_angles(by_region, q, k, call)


def _of_angles(
    by_region: list[tuple[Tensor, Tensor]], q: Tensor, k: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor | None]:
    inv_freq = call.inv_freq.detach().double().requires_grad_()
    maps = None if call.pair_maps is None else call.pair_maps.detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float64, device=q.device)
    with torch.enable_grad():
        own = call._replace(inv_freq=inv_freq, pair_maps=maps)
        for (dq, dk), place in zip(by_region, places(q, k, own)):
            for x, dx, at in ((q, dq, place.q), (k, dk, place.k)):
                gradient = _of_angle(x, dx, call)
                total = total + (_angle(at, own, x) * gradient).sum()
    leaves = [inv_freq] if maps is None else [inv_freq, maps]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]
    return found[0].to(call.inv_freq.dtype), None if maps is None else found[1]


def _of_angle(x: Tensor, dx: Tensor, call: AttentionCall) -> Tensor:
    """Return the gradient of x's rotation angles: (..., seqlen, heads_k or 1, pairs) float64."""
    heads = max(
        call.inv_freq.shape[-2] if call.inv_freq.dim() == 3 else 1,
        1 if call.pair_maps is None else call.pair_maps.shape[-2],
    )
    found = cross(x, dx, 2 * call.inv_freq.shape[-1], call.interleaved, per_head=True).double()
    return found.unflatten(-2, (heads, -1)).sum(-2)


def _angle(place: Tensor, call: AttentionCall, x: Tensor) -> Tensor:
    """Return places times frequencies: (..., seqlen, heads_k or 1, pairs)."""
    if place.dim() <= x.dim() - 2:
        place = place[..., None, None]
    inv_freq = call.inv_freq
    if inv_freq.dim() < 3:
        inv_freq = inv_freq.unsqueeze(-2)
    if inv_freq.dim() == 2:
        return place * inv_freq
    if call.cu_seqlens is None:
        return place * inv_freq.unsqueeze(1)
    sequence = sequence_of_token(call.cu_seqlens, x.shape[0])
    return place * (inv_freq[sequence] if inv_freq.shape[0] > 1 else inv_freq)
