"""Gradients of frequencies, computed from those of q and k.

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

from .._math.pairs import cross
from .._math.positions import sequence_of_token
from .._torch.autograd import in_func_transform
from .._torch.dtensor import replicated, whole
from .call import AttentionCall
from .places import centered_places

Backward = Callable[[AttentionCall], tuple[Tensor, Tensor, Tensor]]


def backward_with_frequencies(
    backward: Backward, q: Tensor, k: Tensor, call: AttentionCall
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return dq, dk and dv in the dtypes of q and k, and dinv_freq.

    backward(call): dq, dk and dv for a call with fewer regions, in float32.
    """
    regions = call.regions
    wide = call._replace(float32_results=True)
    every = found = backward(wide)
    by_region = []
    for r in range(len(regions)):
        rest = (torch.zeros_like(found[0]), torch.zeros_like(found[1]))
        if r + 1 < len(regions):
            rest = backward(wide._replace(score=replace(call.score, regions=regions[r + 1 :])))
        by_region.append((found[0] - rest[0], found[1] - rest[1]))
        found = rest
    dtypes = (q.dtype, k.dtype, k.dtype)
    rounded = every if call.float32_results else (x.to(t) for x, t in zip(every, dtypes))
    # Of DTensors every rank takes all tokens: it has all frequencies.
    call = call._replace(**dict(zip(call._fields, whole(call.tensors))))
    of_freq = _of_frequencies([whole(x) for x in by_region], *whole((q, k)), call)
    return tuple(rounded), *replicated(q, (of_freq,))


def _of_frequencies(
    by_region: list[tuple[Tensor, Tensor]], q: Tensor, k: Tensor, call: AttentionCall
) -> Tensor:
    gradients = [(_of_angle(q, dq, call), _of_angle(k, dk, call)) for dq, dk in by_region]
    at = centered_places(q, k, call)

    def total(inv_freq: Tensor) -> Tensor:
        """Return the sum of all angles times their gradients."""
        own = call._replace(inv_freq=inv_freq)
        of_regions = (
            (_angle(place.q, own, q) * of_q).sum() + (_angle(place.k, own, k) * of_k).sum()
            for place, (of_q, of_k) in zip(at, gradients)
        )
        return sum(of_regions)

    return _gradient(total, call.inv_freq.double()).to(call.inv_freq.dtype)


def _gradient(function: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    """Return the gradient; a derivative of it reaches the op's backward, which has none."""
    if in_func_transform() or torch.compiler.is_compiling():  # elsewhere it imports the compiler
        value, backward = torch.func.vjp(function, leaf)
        return backward(torch.ones_like(value))[0]
    leaf = leaf.detach().requires_grad_()
    with torch.enable_grad():
        value = function(leaf)
    return torch.autograd.grad(value, leaf, create_graph=torch.is_grad_enabled())[0]


def _of_angle(x: Tensor, dx: Tensor, call: AttentionCall) -> Tensor:
    """Return the gradient of x's rotation angles: (..., seqlen, heads_k or 1, pairs) float64."""
    heads = call.inv_freq.shape[-2] if call.inv_freq.dim() == 3 else 1
    found = cross(x, dx, call.pair_dims, per_head=True).double()
    return found.unflatten(-2, (heads, -1)).sum(-2)


def _angle(place: Tensor, call: AttentionCall, x: Tensor) -> Tensor:
    """Return places times frequencies: (..., seqlen, heads_k or 1, pairs)."""
    # By pair (pairs, 1 or batch, seqlen).
    place = place[..., None, None] if place.dim() < 3 else place.movedim(0, -1).unsqueeze(-2)
    inv_freq = call.inv_freq
    if inv_freq.dim() < 3:
        inv_freq = inv_freq.unsqueeze(-2)
    if inv_freq.dim() == 2:
        return place * inv_freq
    if call.cu_seqlens is None:
        return place * inv_freq.unsqueeze(1)
    sequence = sequence_of_token(call.cu_seqlens, x.shape[0])
    return place * (inv_freq[sequence] if inv_freq.shape[0] > 1 else inv_freq)
