"""The ops `attention_fwd` and `attention_bwd`: schemas, fakes, gradients, and who runs them.

They know regions and position maps, never a score method. `attention_fwd` runs what is best on the
tensors' device (csrc/cpu/attention on a CPU, what choice.py says on a GPU), `attention_fwd_triton`
and `attention_fwd_flash_attn` that implementation alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._shared.attention_call import SCHEMA, AttentionCall, lse_shape
from .._shared.attention_checks import check_head_dim
from .._shared.autograd import contiguous_rows, refuse_backward, register_backward
from .._shared.dtypes import accumulator
from .._shared.library import library, load_on_first_use, ops
from .._shared.softmax import grad_of_sinks
from . import choice, flash_attn, reference
from .checks import check, check_boundaries

NAME = "attention"
# An Autograd kernel sees the positional tensors alone, hence all of them before the *.
_ROPE_ARGS = (
    "Tensor inv_freq, Tensor? cu_seqlens=None, Tensor? log_decay=None, Tensor? sinks=None, "
    f"Tensor? query_scale=None, Tensor? q_start=None, Tensor? k_start=None, *, {SCHEMA}, "
    "bool float32_results=False"
)
_SINKS = 6  # its index among an op's arguments
_FWD = f"(Tensor q, Tensor k, Tensor v, {_ROPE_ARGS}) -> (Tensor out, Tensor lse)"
_BWD = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_ROPE_ARGS}) -> (Tensor dq, Tensor dk, Tensor dv)"
)


def _checked(implementation: str, q: Tensor, k: Tensor, v: Tensor, rope_args, options):
    """What attends, a module or a choice among them, and the call.

    Triton checks a call where it makes the plans of its launches, once for each layout.
    """
    call = AttentionCall(*rope_args, **options)
    if implementation != "triton":
        check(NAME, q, k, v, call)
    check_boundaries(NAME, call.cu_seqlens, q)
    if implementation == "triton":
        from . import triton

        return triton, call
    if implementation == "reference":
        return reference, call
    check_head_dim(NAME, q)
    if implementation == "best":
        return choice.implementation(q, k, v, call), call
    return flash_attn, call


def _fwd_fake(q, k, v, *rope_args, **options):
    call = AttentionCall(*rope_args, **options)
    check(NAME, q, k, v, call)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=call.results_dtype(q.dtype))
    return out, q.new_empty(lse_shape(q), dtype=accumulator(q.dtype))


def _bwd_fake(dout, dlse, q, k, v, out, lse, *rope_args, **options):
    call = AttentionCall(*rope_args, **options)
    check(NAME, q, k, v, call)
    return tuple(x.new_empty(x.shape, dtype=call.results_dtype(x.dtype)) for x in (q, k, v))


def _fwd(implementation, q, k, v, *rope_args, **options):
    attends, call = _checked(implementation, q, k, v, rope_args, options)
    return attends.forward(q, k, v, call)


def _bwd(implementation, dout, dlse, q, k, v, out, lse, *rope_args, **options):
    attends, call = _checked(implementation, q, k, v, rope_args, options)
    return attends.backward(dout, dlse, q, k, v, out, lse, call)


def _register_gradient(suffix: str) -> None:
    """The derivative in q, k, v and sinks; raw tensors alone are saved."""
    fwd = getattr(ops, f"attention_fwd{suffix}").default
    bwd = getattr(ops, f"attention_bwd{suffix}").default

    def save(ctx, args, options, outputs):
        for n, x in enumerate(args[3:], start=3):
            if x is not None and x.requires_grad and n != _SINKS:
                raise ValueError(
                    f"{NAME}: {fwd._schema.arguments[n].name} has a gradient with "
                    "backend='reference' only, got a tensor that requires grad"
                )
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:3], *outputs, *args[3:])

    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *rope_args = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None
        # Those of float32_results are rounded, as they are on their way to the 16-bit op.
        out = out.to(q.dtype)
        dout = torch.zeros_like(out) if dout is None else contiguous_rows(dout.to(q.dtype))
        dlse = None if dlse is None else dlse.contiguous()
        given = (dout, dlse, q, k, v, out, lse, *rope_args)
        grads = _run_backward(bwd, given, ctx.options)
        if len(ctx.needs_input_grad) > _SINKS + 2 and ctx.needs_input_grad[_SINKS + 2]:
            sinks = rope_args[_SINKS - 3]
            grads = (*grads, None, None, None, grad_of_sinks(sinks, dout, dlse, out, lse))
        return grads

    register_backward(library, fwd, save, backward)
    only_first = "the fused kernels have first derivatives only; use backend='reference'"
    refuse_backward(library, bwd, f"{NAME}: {only_first}")


def _run_backward(bwd, given, options):
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or torch.is_grad_enabled():
        return bwd(*given, **options)
    # No second derivative to refuse: skip the Autograd kernel, which costs more than a launch.
    with torch._C._AutoDispatchBelowAutograd():
        return bwd(*given, **options)


def _define() -> None:
    kernels = {"attention_fwd": (_FWD, _fwd_fake, _fwd), "attention_bwd": (_BWD, _bwd_fake, _bwd)}
    named = {"": (), "_triton": ("CPU", "CUDA"), "_flash_attn": ("CPU", "CUDA")}
    for suffix, keys in named.items():
        for op, (schema, fake, kernel) in kernels.items():
            library.define(op + suffix + schema, tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.register_fake(f"{library.ns}::{op}{suffix}", fake, lib=library)
            for key in keys:  # on a CPU: the interpreter, and stand-ins for an engine
                library.impl(op + suffix, functools.partial(kernel, suffix[1:]), key)
        _register_gradient(suffix)
    for op, (_, _, kernel) in kernels.items():  # the CUDA library has none
        library.impl(op, functools.partial(kernel, "best"), "CUDA")
    reference_of = {op: functools.partial(kernels[op][2], "reference") for op in kernels}
    load_on_first_use({"cpu": reference_of})


_define()
