"""The rotation in plain PyTorch, differentiable to any order: the oracle of all tests."""

from __future__ import annotations

import torch
from torch import Tensor

from .._math.dtypes import accumulator
from .._math.pairs import cross, split_pairs, with_pairs
from .._math.positions import sequence_of_token
from .call import Rotation, check_saved, refuse_expanded, refuse_shared, resolve, token_positions


def rope_fwd(
    q: Tensor, k: Tensor | None, *rope_args: Tensor | None, **options
) -> tuple[Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_fwd`."""
    tensors, rotation = resolve(q, k, *rope_args, adjoint=False, **options)
    rotated = rotate(tensors, rotation)
    return rotated[0].view_as(q), rotated[1].view_as(k) if k is not None else q.new_empty(0)


def rope_bwd(
    grad_q: Tensor,
    grad_k: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    *rope_args: Tensor | None,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_bwd`."""
    tensors, rotation = resolve(grad_q, grad_k, *rope_args, adjoint=True, **options)
    check_saved(grad_q, grad_k, q, k, packed=rotation.cu_seqlens is not None)
    grads = rotate(tensors, rotation)
    wide = accumulator(grad_q.dtype)
    angle_grad = grad_q.new_empty(0, dtype=wide)
    if q is not None:
        saved = [x.view_as(grad) for x, grad in zip((q, k), tensors)]
        unrounded = rotate([grad.to(wide) for grad in tensors], rotation)
        at = (rotation.pair_dims, rotation.per_head)
        angle_grad = sum(cross(x, dx, *at) for x, dx in zip(saved, unrounded))
    dk = grads[1].view_as(grad_k) if grad_k is not None else grad_q.new_empty(0)
    return grads[0].view_as(grad_q), dk, angle_grad


def rope_inplace(q: Tensor, k: Tensor | None, *rope_args: Tensor | None, **options) -> None:
    """Compute `torch.ops.extrope.rope_inplace`."""
    refuse_expanded(q, k)
    refuse_shared(q, k)
    for x, out in zip((q, k), rope_fwd(q, k, *rope_args, **options)):
        if x is not None:
            x.copy_(out)


def rotate(tensors: list[Tensor], rotation: Rotation) -> list[Tensor]:
    """Rotate (batch, seqlen, heads, head_dim) tensors; angles in float64, products in float32."""
    batch, seqlen = tensors[0].shape[:2]
    positions = token_positions(rotation, batch, seqlen)[:, :, None]
    inv_freq = rotation.inv_freq.double()
    if rotation.cu_seqlens is not None and inv_freq.shape[0] > 1:
        inv_freq = inv_freq[sequence_of_token(rotation.cu_seqlens, seqlen)][None]
    else:
        inv_freq = inv_freq[:, None]
    angle = positions * inv_freq  # exact below 2**29 for float32 frequencies
    if rotation.conjugate:
        angle = -angle
    rotated = []
    for x, decay_sign in zip(tensors, rotation.decay_signs):
        amplitude = rotation.amplitude
        if rotation.log_decay is not None:
            exponent = (
                decay_sign * (positions - rotation.decay_origin) * rotation.log_decay.double()
            )
            amplitude = amplitude * torch.exp(exponent)
        wide = accumulator(x.dtype)
        cos, sin = (angle.cos() * amplitude).to(wide), (angle.sin() * amplitude).to(wide)
        a, b = split_pairs(x.to(wide), rotation.pair_dims)
        rotated.append(with_pairs(x, a * cos - b * sin, b * cos + a * sin, rotation.pair_dims))
    return rotated
