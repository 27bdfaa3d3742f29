"""The ops `rope_*_triton`: checked and planned once for each layout of their arguments."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._shared.dtypes import accumulator
from ..._shared.triton.launch import Plan, chip_of, layouts_of, planned
from ..checks import refuse_overlap
from ..rotation import resolve
from .launch import plan


class _Call(NamedTuple):
    launch: Plan | None  # where there is anything to rotate
    by_axis: bool  # every pair reads the position of its axis
    angles: tuple[int, ...]  # shape of their gradient


def rope_fwd(
    q: Tensor, k: Tensor | None, *rope_args: Tensor | None, **options
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `torch.ops.extrope.rope_fwd`."""
    out_q, out_k = like(q, q), like(k, q)
    tensors = (q, k, out_q, out_k if k is not None else None, None, None)
    _launch(False, tensors, None, *rope_args, **options)
    return out_q, out_k


def rope_inplace(q: Tensor, k: Tensor | None, *rope_args: Tensor | None, **options) -> None:
    """Same arguments as `torch.ops.extrope.rope_inplace`."""
    _launch(False, (q, k, q, k, None, None), None, *rope_args, **options)


def rope_bwd(
    grad_q: Tensor,
    grad_k: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    *rope_args: Tensor | None,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same arguments and results as `torch.ops.extrope.rope_bwd`."""
    dq, dk = like(grad_q, grad_q), like(grad_k, grad_q)
    tensors = (grad_q, grad_k, dq, dk if grad_k is not None else None, q, k)
    angle_grad = _launch(True, tensors, q, *rope_args, **options)
    if angle_grad is None:
        angle_grad = grad_q.new_empty(0, dtype=accumulator(grad_q.dtype))
    return dq, dk, angle_grad


def like(x: Tensor | None, q: Tensor) -> Tensor:
    return q.new_empty(0) if x is None else torch.empty_like(x)


def _launch(
    adjoint: bool,
    tensors: tuple[Tensor | None, ...],
    saved: Tensor | None,
    inv_freq: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log_decay: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    offset: int = 0,
    **options,
) -> Tensor | None:
    """Rotate tensors (q, k, their outputs, what is saved of them); return the angles' gradient."""
    q, k, out_q, *_ = tensors
    rope_args = (inv_freq, positions, cu_seqlens, log_decay, axes)
    key = (
        adjoint,
        chip_of(q),
        out_q is q,
        layouts_of(q, k, tensors[4], tensors[5], *rope_args),
        -(2**31) <= offset < 2**31,
        tuple(options.items()),
    )
    call = planned(_plan, key, adjoint, tensors, rope_args, options)
    angle_grad = None
    if saved is not None:
        angle_grad = q.new_empty(call.angles, dtype=accumulator(q.dtype))
    if call.launch is not None:
        axes = axes if call.by_axis else None
        call.launch(*tensors, angle_grad, inv_freq, positions, axes, cu_seqlens, log_decay, offset)
    elif angle_grad is not None:
        angle_grad.zero_()
    return angle_grad


def _plan(adjoint: bool, tensors, rope_args, options: dict[str, Hashable]) -> _Call:
    q, k, out_q, out_k, saved_q, saved_k = tensors
    inputs, rotation = resolve(q, k, *rope_args, adjoint=adjoint, **options)
    if out_q is q:
        refuse_overlap(q, k)
        outputs = inputs
    else:
        outputs = [x.view(*like.shape) for x, like in zip((out_q, out_k), inputs)]
    saved = None
    if saved_q is not None:
        saved = [x.view_as(like) for x, like in zip((saved_q, saved_k), inputs)]
    batch, seqlen, heads, _ = inputs[0].shape
    angles = (batch, seqlen, heads if rotation.per_head else 1, rotation.rotary_dim // 2)
    angle_grad = None if saved is None else q.new_empty(angles, dtype=accumulator(q.dtype))
    launch = plan(inputs, outputs, saved, angle_grad, rotation)
    return _Call(launch, rotation.axes is not None, angles)
