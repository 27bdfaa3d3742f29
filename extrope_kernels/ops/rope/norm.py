"""RMSNorm before the rotation in plain PyTorch: the oracle of the ops `rope_norm_*`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._math.dtypes import accumulator
from .call import check_norm, check_saved, refuse_expanded, refuse_shared, resolve
from .reference import rotate


def rope_norm_fwd(
    q: Tensor,
    k: Tensor | None,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    *rope_args: Tensor | None,
    norm_eps: float = 1e-6,
    **options,
) -> tuple[Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_norm_fwd`."""
    tensors, rotation = resolve(q, k, *rope_args, adjoint=False, **options)
    weights = (q_norm_weight, k_norm_weight)
    check_norm(q, k, *weights, norm_eps)
    normed = [rms_norm(x, weight, norm_eps) for x, weight in zip(tensors, weights)]
    rotated = [out.to(q.dtype) for out in rotate(normed, rotation)]
    return rotated[0].view_as(q), rotated[1].view_as(k) if k is not None else q.new_empty(0)


def rope_norm_bwd(
    grad_q: Tensor,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    *rope_args: Tensor | None,
    norm_eps: float = 1e-6,
    **options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_norm_bwd`."""
    tensors, rotation = resolve(grad_q, grad_k, *rope_args, adjoint=True, **options)
    weights = (q_norm_weight, k_norm_weight)
    check_norm(grad_q, grad_k, *weights, norm_eps)
    check_saved(grad_q, grad_k, q, k, packed=rotation.cu_seqlens is not None)
    wide = accumulator(grad_q.dtype)
    saved = [x.view_as(grad) for x, grad in zip((q, k), tensors)]
    normed_grads = rotate([grad.to(wide) for grad in tensors], rotation)
    found = [
        _rms_norm_grads(grad, x, weight, norm_eps)
        for grad, x, weight in zip(normed_grads, saved, weights)
    ]
    dx = [grad.to(q.dtype).view_as(x) for (grad, _), x in zip(found, (q, k))]
    if k is None:
        return dx[0], q.new_empty(0), found[0][1], _none(q)
    return *dx, found[0][1], found[1][1]


def rope_norm_inplace(q: Tensor, k: Tensor | None, *others: Tensor | None, **options) -> None:
    """Compute `torch.ops.extrope.rope_norm_inplace`."""
    refuse_expanded(q, k)
    refuse_shared(q, k)
    for x, out in zip((q, k), rope_norm_fwd(q, k, *others, **options)):
        if x is not None:
            x.copy_(out)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide x by its root mean square, times the weight, in float32 (64 for float64).

    x: (batch, seqlen, heads, head_dim). A weight of (head_dim,) norms each head, one of
    (heads * head_dim,) all heads together.
    """
    wide = x.to(accumulator(x.dtype))
    if weight is None:
        return wide
    rows = _rows(wide, weight)
    return (rows * _inverse_rms(rows, eps) * weight.to(wide.dtype)).view(x.shape)


def _rms_norm_grads(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rms_norm's x and weight, in float32 (64)."""
    if weight is None:
        return grad, _none(x)
    rows, grad = _rows(x.to(grad.dtype), weight), _rows(grad, weight)
    scale = _inverse_rms(rows, eps)
    normal, weighted = rows * scale, grad * weight.to(grad.dtype)
    dx = scale * (weighted - normal * (normal * weighted).mean(-1, keepdim=True))
    return dx.view(x.shape), (grad * normal).flatten(0, -2).sum(0)


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    return x if weight.shape[0] == x.shape[-1] else x.flatten(-2)


def _inverse_rms(rows: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)


def _none(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=accumulator(x.dtype))
