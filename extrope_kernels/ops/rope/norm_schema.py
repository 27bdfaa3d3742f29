"""The ops of the rotation with RMSNorm before it: schemas, fake kernels, gradients, kernels.

The CPU library registers its kernels for the same schemas (csrc/cpu/rope/norm_bind.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.autograd import (
    batching_rule,
    contiguous_rows,
    refuse_backward,
    refuse_recording,
    register_backward,
)
from .._shared.dtypes import accumulator
from .._shared.library import library, load_on_first_use, ops
from . import norm
from .autograd import has_shared_angles, kept_rope_args
from .checks import INPLACE, check_norm
from .rotation import resolve
from .schema import ROPE_OPTIONS, ROPE_TENSORS, like, triton_kernels

_ARGS = (
    f"Tensor? q_norm_weight, Tensor? k_norm_weight, {ROPE_TENSORS}, *, float norm_eps=1e-6, "
    f"{ROPE_OPTIONS}"
)
_FWD = f"(Tensor q, Tensor? k, {_ARGS}) -> (Tensor, Tensor)"
_BWD = (
    f"(Tensor grad_q, Tensor? grad_k, Tensor q, Tensor? k, {_ARGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_INPLACE = f"(Tensor(a!) q, Tensor(b!)? k, {_ARGS}) -> ()"
_REFERENCE = {
    "rope_norm_fwd": norm.rope_norm_fwd,
    "rope_norm_bwd": norm.rope_norm_bwd,
    "rope_norm_inplace": norm.rope_norm_inplace,
}
_TRITON = triton_kernels("norm_ops", tuple(_REFERENCE))


def _check(q, k, q_norm_weight, k_norm_weight, rope_args, adjoint, norm_eps=1e-6, **options):
    resolve(q, k, *rope_args, adjoint=adjoint, **options)
    check_norm(q, k, q_norm_weight, k_norm_weight, norm_eps)


def _fwd_fake(q, k, q_norm_weight, k_norm_weight, *rope_args, **options):
    _check(q, k, q_norm_weight, k_norm_weight, rope_args, False, **options)
    return like(q, q), like(k, q)


def _bwd_fake(grad_q, grad_k, q, k, q_norm_weight, k_norm_weight, *rope_args, **options):
    _check(grad_q, grad_k, q_norm_weight, k_norm_weight, rope_args, True, **options)
    wide = accumulator(q.dtype)
    of_weights = [
        q.new_empty(0 if weight is None else weight.shape[0], dtype=wide)
        for weight in (q_norm_weight, k_norm_weight)
    ]
    return like(grad_q, grad_q), like(grad_k, grad_q), *of_weights


def _inplace_fake(q, k, q_norm_weight, k_norm_weight, *rope_args, **options):
    _check(q, k, q_norm_weight, k_norm_weight, rope_args, False, **options)


# -------------------------------------------------------------------------------------------------
# Gradients


def _save(ctx, args, options, outputs) -> None:
    rope_args = kept_rope_args(args[4:])
    if rope_args[0].requires_grad:
        raise NotImplementedError(
            "rope: with norm weights inv_freq has no gradient; norm first, then rotate"
        )
    ctx.options = options
    ctx.save_for_backward(*args[:4], *rope_args)


def _backward_by(bwd):
    def backward(ctx, grad_q, grad_k):
        q, k, *saved = ctx.saved_tensors  # read once: a checkpoint unpacks a tensor only once
        weights = saved[:2]
        grad_k = contiguous_rows(grad_k) if k is not None else None
        dq, dk, *of_weights = bwd(contiguous_rows(grad_q), grad_k, q, k, *saved, **ctx.options)
        found = [None if w is None else dw.to(w.dtype) for w, dw in zip(weights, of_weights)]
        return dq, dk if k is not None else None, *found

    return backward


def _have_shared_angles(others: tuple[Tensor | None, ...]) -> bool:
    return has_shared_angles(others[2:])


def _define() -> None:
    for suffix in ("", "_triton"):
        for name, schema, fake in (
            ("rope_norm_fwd", _FWD, _fwd_fake),
            ("rope_norm_bwd", _BWD, _bwd_fake),
            ("rope_norm_inplace", _INPLACE, _inplace_fake),
        ):
            library.define(f"{name}{suffix}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.register_fake(f"{library.ns}::{name}{suffix}", fake, lib=library)
        fwd = getattr(ops, f"rope_norm_fwd{suffix}").default
        bwd = getattr(ops, f"rope_norm_bwd{suffix}").default
        register_backward(library, fwd, _save, _backward_by(bwd))
        refuse_backward(
            library, bwd, "rope: with norm weights there is no second derivative; norm first"
        )
        inplace = getattr(ops, f"rope_norm_inplace{suffix}").default
        refuse_recording(library, inplace, INPLACE)
        rule = batching_rule(fwd, 2, _have_shared_angles)
        torch.library.register_vmap(fwd, rule, lib=library)
        # Folded, batches would share one gradient of the weights.
        rule = batching_rule(bwd, 4, lambda others: False)
        torch.library.register_vmap(bwd, rule, lib=library)
    for name, function in _TRITON.items():
        library.impl(f"{name}_triton", function, "CUDA")
        library.impl(f"{name}_triton", function, "CPU")  # the interpreter
        library.impl(name, function, "CUDA")
    load_on_first_use({"cpu": _REFERENCE})


_define()
