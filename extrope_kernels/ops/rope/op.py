"""The ops of the rotation, with and without a norm before it: schemas, fakes, gradients, kernels.

The CPU library registers kernels for the same schemas (csrc/cpu/rope/bind.cpp), the CUDA library
for those without a norm (csrc/cuda/rope/bind.cpp). `rope_*` runs the best backend for the tensors'
device, `rope_*_triton` always Triton.

Derivatives of the rotation use the rotation itself, so that they have derivatives too. R is the
rotation by the angles (amplitude included), J the rotation by pi/2 (a, b) -> (-b, a), and <x, y> a
sum over pairs that share an angle:

    rope_fwd: y = R x             dx = R^T dy              d angle = <J x, dx> = cross(x, dx)
    rope_bwd: dx = R^T dy         (the adjoint of rope_fwd, and cross(x, dx) beside it)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._math.dtypes import accumulator
from .._math.pairs import PairDims, cross, split_pairs, with_pairs
from .._math.positions import sequence_of_token
from .._torch.autograd import (
    batching_rule,
    contiguous_rows,
    empty_rows,
    refuse_backward,
    refuse_recording,
    register_backward,
)
from .._torch.dtensor import replicated, whole
from .._torch.library import define, imported_when_called, library, ops
from . import norm, reference
from .call import (
    INPLACE,
    OPTIONS,
    TENSORS,
    RopeTensors,
    check_norm,
    check_saved,
    not_differentiable,
    pair_dims_of,
    resolve,
    token_positions,
)

# An Autograd kernel sees only positional tensors, so all tensors come before the *. axes matters
# only to positions of shape (axes, batch, seqlen): others are the same on every axis.
_ROPE_TENSORS = ", ".join(["Tensor inv_freq", *(f"{x.argument}=None" for x in TENSORS[1:])])
_ROPE_OPTIONS = ", ".join(OPTIONS.values())
_ROPE_ARGS = f"{_ROPE_TENSORS}, *, {_ROPE_OPTIONS}"
_FWD = f"(Tensor q, Tensor? k, {_ROPE_ARGS}) -> (Tensor, Tensor)"
_BWD = (
    f"(Tensor grad_q, Tensor? grad_k, Tensor? q, Tensor? k, {_ROPE_ARGS}) "
    "-> (Tensor, Tensor, Tensor)"
)
_INPLACE = f"(Tensor(a!) q, Tensor(b!)? k, {_ROPE_ARGS}) -> ()"
_NORM_ARGS = (
    f"Tensor? q_norm_weight, Tensor? k_norm_weight, {_ROPE_TENSORS}, *, float norm_eps=1e-6, "
    f"{_ROPE_OPTIONS}"
)
_NORM_FWD = f"(Tensor q, Tensor? k, {_NORM_ARGS}) -> (Tensor, Tensor)"
_NORM_BWD = (
    f"(Tensor grad_q, Tensor? grad_k, Tensor q, Tensor? k, {_NORM_ARGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_NORM_INPLACE = f"(Tensor(a!) q, Tensor(b!)? k, {_NORM_ARGS}) -> ()"


# -------------------------------------------------------------------------------------------------
# Outputs, eager and fake


def like(x: Tensor | None, q: Tensor) -> Tensor:
    """Allocate an output like x; without x an empty one."""
    return q.new_empty(0) if x is None else empty_rows(x)


def _fwd_fake(q, k, *rope_args, **options):
    resolve(q, k, *rope_args, adjoint=False, **options)
    return like(q, q), like(k, q)


def _bwd_fake(grad_q, grad_k, q, k, *rope_args, **options):
    tensors, rotation = resolve(grad_q, grad_k, *rope_args, adjoint=True, **options)
    check_saved(grad_q, grad_k, q, k, packed=rotation.cu_seqlens is not None)
    return like(grad_q, grad_q), like(grad_k, grad_q), _new_angle_grad(q, tensors, rotation)


def _inplace_fake(q, k, *rope_args, **options):
    resolve(q, k, *rope_args, adjoint=False, **options)


def _new_angle_grad(saved: Tensor | None, tensors, rotation) -> Tensor:
    dtype = accumulator(tensors[0].dtype)
    if saved is None:
        return tensors[0].new_empty(0, dtype=dtype)
    batch, seqlen, heads, _ = tensors[0].shape
    shape = (batch, seqlen, heads if rotation.per_head else 1, rotation.inv_freq.shape[-1])
    return tensors[0].new_empty(shape, dtype=dtype)


def _check_norm_call(
    q, k, q_norm_weight, k_norm_weight, rope_args, adjoint, norm_eps=1e-6, **options
):
    resolve(q, k, *rope_args, adjoint=adjoint, **options)
    check_norm(q, k, q_norm_weight, k_norm_weight, norm_eps)


def _norm_fwd_fake(q, k, q_norm_weight, k_norm_weight, *rope_args, **options):
    _check_norm_call(q, k, q_norm_weight, k_norm_weight, rope_args, False, **options)
    return like(q, q), like(k, q)


def _norm_bwd_fake(grad_q, grad_k, q, k, q_norm_weight, k_norm_weight, *rope_args, **options):
    _check_norm_call(grad_q, grad_k, q_norm_weight, k_norm_weight, rope_args, True, **options)
    check_saved(grad_q, grad_k, q, k, packed=grad_q.dim() == 3)
    wide = accumulator(q.dtype)
    of_weights = [
        q.new_empty(0 if weight is None else weight.shape[0], dtype=wide)
        for weight in (q_norm_weight, k_norm_weight)
    ]
    return like(grad_q, grad_q), like(grad_k, grad_q), *of_weights


def _norm_inplace_fake(q, k, q_norm_weight, k_norm_weight, *rope_args, **options):
    _check_norm_call(q, k, q_norm_weight, k_norm_weight, rope_args, False, **options)


# -------------------------------------------------------------------------------------------------
# Gradients


def _register_gradients(library: torch.library.Library, suffix: str) -> None:
    """Give `rope_fwd{suffix}` and `rope_bwd{suffix}` their derivatives and batching rules."""
    fwd = getattr(ops, f"rope_fwd{suffix}").default
    bwd = getattr(ops, f"rope_bwd{suffix}").default
    bwd_names = [x.name for x in bwd._schema.arguments if not x.kwarg_only]

    def fwd_backward(ctx, grad_q, grad_k):
        q, k, *rope_args = ctx.saved_tensors
        grad_k = grad_k if ctx.has_k else None  # without k its result is an empty tensor
        if grad_q is None and grad_k is None:
            return None, None, None
        # Zeros made from the other gradient are a DTensor if that one is.
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
        at = pair_dims_of(rope_args[0], **ctx.options)
        grads = (dq, dk) if ctx.has_k else (dq,)
        u = [u_q, u_k][: len(grads)]
        x_bar: list[Tensor | None] = [None, None]
        wide = grad_q.dtype if q is None else w.dtype
        if q is not None:
            u = [u_t.to(wide) + _rotate_quarter(x, w, at) for u_t, x in zip(u, (q, k))]
            x_bar = [-_rotate_quarter(dx, w, at).to(dx.dtype) for dx in grads] + [None]
        u = [contiguous_rows(x) for x in u]
        g_bar = fwd(u[0], u[1] if ctx.has_k else None, *rope_args, **ctx.options)
        d_freq = None
        needs = dict(zip(bwd_names, ctx.needs_input_grad[2:]))
        if needs["inv_freq"]:
            if wide != grad_q.dtype:  # the first derivatives again, not rounded to 16 bits
                grads = [x.to(wide) for x in (grad_q, grad_k)[: len(grads)]]
                grads = bwd(*grads, *[None] * (4 - len(grads)), *rope_args, **ctx.options)[:2]
            d_freq = _frequency_grad(
                _angle_grad(u, grads, at, rope_args), grad_q, grad_k, rope_args, ctx.options
            )
        g_bar = [x.to(grad_q.dtype) for x in g_bar]
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


def kept_rope_args(rope_args) -> RopeTensors:
    """Return all for a backward; ValueError if one requires a gradient that does not exist.

    The dispatcher drops trailing defaults.
    """
    rope = RopeTensors(*rope_args)
    for name, x in (("positions", rope.positions), ("log_decay", rope.log_decay)):
        if x is not None and x.requires_grad:
            raise ValueError(not_differentiable(name))
    return rope


def _rotate_quarter(x: Tensor, w: Tensor, at: PairDims) -> Tensor:
    """Return w * J x in w's dtype; zero in the dims that do not rotate."""
    a, b = split_pairs(x.to(w.dtype), at)
    w = w.view(w.shape[1:]) if x.dim() == 3 else w
    return with_pairs(torch.zeros_like(x, dtype=w.dtype), -b * w, a * w, at)


def _angle_grad(xs, grads, at: PairDims, rope_args) -> Tensor:
    inv_freq, _, cu_seqlens = rope_args[:3]
    per_head = inv_freq.dim() == 3 and inv_freq.shape[1] > 1
    pairs = (
        zip(xs, grads) if cu_seqlens is None else ((x[None], dx[None]) for x, dx in zip(xs, grads))
    )
    return sum(cross(x, dx, at, per_head) for x, dx in pairs)


def _frequency_grad(angle_grad, grad_q, grad_k, rope_args, options) -> Tensor:
    """Turn d angle into d inv_freq: times position, summed in float64 per frequency."""
    inv_freq = rope_args[0]
    if options.get("inverse", False):
        angle_grad = -angle_grad
    # Every rank computes all from positions and boundaries, by ops that DTensor may not know.
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
    """Return True if all sequences rotate alike: then batch dimensions can be folded into one."""
    inv_freq, positions, cu_seqlens, *_ = RopeTensors(*rope_args)
    return (
        positions is None and cu_seqlens is None and (inv_freq.dim() == 1 or inv_freq.shape[0] == 1)
    )


def _save_norm(ctx, args, options, outputs) -> None:
    rope_args = kept_rope_args(args[4:])
    if rope_args[0].requires_grad:
        raise NotImplementedError(
            "rope: inv_freq must not require grad with norm weights, got one that does; "
            "norm first, then rotate"
        )
    ctx.options = options
    ctx.save_for_backward(*args[:4], *rope_args)


def _norm_backward_by(bwd):
    def backward(ctx, grad_q, grad_k):
        q, k, *saved = ctx.saved_tensors  # read once: a checkpoint unpacks a tensor only once
        weights = saved[:2]
        grad_k = contiguous_rows(grad_k) if k is not None else None
        dq, dk, *of_weights = bwd(contiguous_rows(grad_q), grad_k, q, k, *saved, **ctx.options)
        found = [None if w is None else dw.to(w.dtype) for w, dw in zip(weights, of_weights)]
        return dq, dk if k is not None else None, *found

    return backward


def _register_norm_gradients(library: torch.library.Library, suffix: str) -> None:
    fwd = getattr(ops, f"rope_norm_fwd{suffix}").default
    bwd = getattr(ops, f"rope_norm_bwd{suffix}").default
    register_backward(library, fwd, _save_norm, _norm_backward_by(bwd))
    refuse_backward(
        library, bwd, "rope: with norm weights there is no second derivative; norm first"
    )
    rule = batching_rule(fwd, 2, lambda others: has_shared_angles(others[2:]))
    torch.library.register_vmap(fwd, rule, lib=library)
    # If folded, batches would share one gradient of the weights.
    rule = batching_rule(bwd, 4, lambda others: False)
    torch.library.register_vmap(bwd, rule, lib=library)


# -------------------------------------------------------------------------------------------------
# Registration


_OPS = {
    "rope_fwd": (_FWD, _fwd_fake),
    "rope_bwd": (_BWD, _bwd_fake),
    "rope_inplace": (_INPLACE, _inplace_fake),
}
_NORM_OPS = {
    "rope_norm_fwd": (_NORM_FWD, _norm_fwd_fake),
    "rope_norm_bwd": (_NORM_BWD, _norm_bwd_fake),
    "rope_norm_inplace": (_NORM_INPLACE, _norm_inplace_fake),
}


def _define() -> None:
    for plain, module, table, libraries in (
        (reference, "rotation", _OPS, ("cpu", "cuda")),
        (norm, "norm", _NORM_OPS, ("cpu",)),
    ):
        for name, (schema, fake) in table.items():
            triton = imported_when_called(f"{__package__}.triton.{module}", name)
            kernels = {"reference": getattr(plain, name), "triton": triton}
            suffixes = define(name, schema, fake, kernels, libraries=libraries)
    for suffix in suffixes:
        _register_gradients(library, suffix)
        _register_norm_gradients(library, suffix)
        for name in ("rope_inplace", "rope_norm_inplace"):
            refuse_recording(library, getattr(ops, name + suffix).default, INPLACE)
    library.define("cpu_capability() -> int")  # see cli.CPU_CAPABILITIES


_define()
