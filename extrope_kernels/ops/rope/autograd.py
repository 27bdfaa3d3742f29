"""Derivatives of the rotation, written with the rotation itself, so that they can be derived again.

With R the rotation by the angles (amplitude included), J the rotation by pi/2 (a, b) -> (-b, a) and
<x, y> summed over pairs that share an angle:

    rope_fwd: y = R x             dx = R^T dy              d angle = <J x, dx> = cross(x, dx)
    rope_bwd: dx = R^T dy         (the adjoint of rope_fwd, and cross(x, dx) beside it)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.autograd import batching_rule, contiguous_rows, register_backward
from .._shared.dtensor import replicated, whole
from .._shared.library import ops
from .._shared.positions import sequence_of_token
from .checks import not_differentiable
from .pairs import cross, join_pairs, split_pairs
from .rotation import resolve, token_positions


def register(library: torch.library.Library, suffix: str) -> None:
    """Give `rope_fwd{suffix}` and `rope_bwd{suffix}` their derivatives and batching rules."""
    fwd = getattr(ops, f"rope_fwd{suffix}").default
    bwd = getattr(ops, f"rope_bwd{suffix}").default

    def fwd_backward(ctx, grad_q, grad_k):
        q, k, *rope_args = ctx.saved_tensors
        grad_k = grad_k if ctx.has_k else None  # without k there is an empty result in its place
        if grad_q is None and grad_k is None:
            return None, None, None
        # Zeros that are made from the other one are a DTensor where that is.
        grad_q = grad_k.new_zeros(ctx.shapes[0]) if grad_q is None else contiguous_rows(grad_q)
        if ctx.has_k:
            grad_k = grad_q.new_zeros(ctx.shapes[1]) if grad_k is None else contiguous_rows(grad_k)
        dq, dk, angle_grad = bwd(grad_q, grad_k, q, k, *rope_args, **ctx.options)
        d_freq = None
        if q is not None:
            d_freq = _frequency_grad(angle_grad, grad_q, grad_k, rope_args, ctx.options)
        return dq, dk if ctx.has_k else None, d_freq

    def bwd_backward(ctx, u_q, u_k, w):
        grad_q, grad_k, q, k, dq, dk, *rope_args = ctx.saved_tensors
        layout = (2 * rope_args[0].shape[-1], ctx.options.get("interleaved", False))
        grads = (dq, dk) if ctx.has_k else (dq,)
        u = [u_q, u_k][: len(grads)]
        x_bar: list[Tensor | None] = [None, None]
        if q is not None:
            u = [u_t + _rotate_quarter(x, w, *layout) for u_t, x in zip(u, (q, k))]
            x_bar = [-_rotate_quarter(dx, w, *layout) for dx in grads] + [None]
        u = [contiguous_rows(x) for x in u]
        g_bar = fwd(u[0], u[1] if ctx.has_k else None, *rope_args, **ctx.options)
        d_freq = None
        if ctx.needs_input_grad[2 + 4]:
            d_freq = _frequency_grad(
                _angle_grad(u, grads, layout, rope_args), grad_q, grad_k, rope_args, ctx.options
            )
        return g_bar[0], g_bar[1] if ctx.has_k else None, *x_bar[:2], d_freq

    register_backward(library, fwd, _save_fwd, fwd_backward)
    register_backward(library, bwd, _save_bwd, bwd_backward)
    torch.library.register_vmap(fwd, batching_rule(fwd, 2, has_shared_angles), lib=library)
    torch.library.register_vmap(bwd, batching_rule(bwd, 4, has_shared_angles), lib=library)


def _save_fwd(ctx, args, options, outputs):
    q, k, inv_freq = args[:3]
    ctx.has_k = k is not None
    ctx.shapes = (q.shape, k.shape if ctx.has_k else None)
    ctx.set_materialize_grads(False)
    _save(ctx, (q, k) if inv_freq.requires_grad else (None, None), args[2:], options)


def _save_bwd(ctx, args, options, outputs):
    ctx.has_k = args[1] is not None
    _save(ctx, (*args[:4], *outputs[:2]), args[4:], options)


def _save(ctx, tensors, rope_args, options) -> None:
    rope_args = kept_rope_args(rope_args)
    ctx.options = options
    ctx.save_for_backward(*tensors, *rope_args)


def kept_rope_args(rope_args) -> tuple[Tensor | None, ...]:
    """All of them, for a backward; ValueError for those that have no gradient but want it."""
    rope_args = _with_defaults(rope_args)
    for name, x in (("positions", rope_args[1]), ("log_decay", rope_args[3])):
        if x is not None and x.requires_grad:
            raise ValueError(not_differentiable(name))
    return rope_args


def _with_defaults(rope_args) -> tuple[Tensor | None, ...]:
    """inv_freq, positions, cu_seqlens, log_decay, axes: the dispatcher drops trailing defaults."""
    return (*rope_args, *[None] * (5 - len(rope_args)))


def _rotate_quarter(x: Tensor, w: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """w * J x in x's dtype; zero past rotary_dim."""
    a, b = split_pairs(x.to(w.dtype), rotary_dim, interleaved)
    w = w.view(w.shape[1:]) if x.dim() == 3 else w
    rotated = join_pairs(-b * w, a * w, interleaved)
    return torch.nn.functional.pad(rotated, (0, x.shape[-1] - rotary_dim)).to(x.dtype)


def _angle_grad(xs, grads, layout, rope_args) -> Tensor:
    inv_freq, _, cu_seqlens = rope_args[:3]
    per_head = inv_freq.dim() == 3 and inv_freq.shape[1] > 1
    pairs = (
        zip(xs, grads) if cu_seqlens is None else ((x[None], dx[None]) for x, dx in zip(xs, grads))
    )
    return sum(cross(x, dx, *layout, per_head) for x, dx in pairs)


def _frequency_grad(angle_grad, grad_q, grad_k, rope_args, options) -> Tensor:
    """d angle -> d inv_freq: times position, summed in float64 over what shares a frequency."""
    inv_freq = rope_args[0]
    if options.get("inverse", False):
        angle_grad = -angle_grad
    # Of positions and boundaries all is computed on every rank, by ops that DTensor may not know.
    rope_args = (inv_freq, *whole(rope_args[1:]))
    tensors, rotation = resolve(grad_q, grad_k, *rope_args, adjoint=True, **options)
    batch, seqlen = tensors[0].shape[:2]
    (positions,) = replicated(angle_grad, (token_positions(rotation, batch, seqlen),))
    by_token = angle_grad.double() * positions[:, :, None]
    if rotation.inv_freq.shape[0] == 1:
        total = by_token.sum((0, 1)).unsqueeze(0)
    elif rotation.cu_seqlens is None:
        total = by_token.sum(1)
    else:
        sequence = sequence_of_token(rotation.cu_seqlens, seqlen)
        (sequence,) = replicated(angle_grad, (sequence,))
        total = by_token.new_zeros(rotation.inv_freq.shape[0], *by_token.shape[2:])
        total = total.index_add(0, sequence, by_token[0])
    return total.to(inv_freq.dtype).view(inv_freq.shape)


def has_shared_angles(rope_args) -> bool:
    """Do all sequences rotate alike? Then any number of batch dimensions is one batch dimension."""
    inv_freq, positions, cu_seqlens = _with_defaults(rope_args)[:3]
    return (
        positions is None and cu_seqlens is None and (inv_freq.dim() == 1 or inv_freq.shape[0] == 1)
    )
