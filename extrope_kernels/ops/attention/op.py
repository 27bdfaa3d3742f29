"""The ops of attention: schemas, fakes, gradients, and the backend for each device.

They know regions and position maps, no score method. `attention_fwd` and `attention_bwd` run the
best backend for the tensors' device: csrc/cpu/attention on a CPU, Triton or the composition over
flash-attn on a GPU. Ops with a suffix run that backend only.

TENSORS and OPTIONS are an op's arguments after q, k and v; an `AttentionCall` has them as
call.tensors and call.options. cached_by_layout(make, key, *args) keeps make(*args) for each key.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._math.dtypes import accumulator
from .._tables.fields import GRAD
from .._torch.autograd import (
    call_unrecorded,
    contiguous_rows,
    refuse_backward,
    register_backward,
    wants_grad,
)
from .._torch.dtensor import replicated
from .._torch.layouts import cached_by_layout, layout_key
from .._torch.library import define, library, op_of, ops
from . import flash_attn, reference
from .call import (
    OPTIONS,
    TENSORS,
    AttentionCall,
    check_attention,
    check_dims,
    check_values,
    lse_shape,
    options_key,
    read_call,
    with_tensors,
)
from .frequency_gradients import backward_with_frequencies

_CALL = f"{', '.join(x.argument for x in TENSORS)}, *, {', '.join(OPTIONS.values())}"
_SCHEMAS = {
    "attention_fwd": f"(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor out, Tensor lse)",
    "attention_bwd": (
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_CALL}) -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
}
_DIFFERENTIABLE = {"q", "k", "v", *(x.name for x in TENSORS if GRAD in x.notes)}


# -------------------------------------------------------------------------------------------------
# From a call to the backend that computes it


def forward(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return out and lse; differentiable. Refuses wrong calls before a kernel starts."""
    if by_reference(q, backend):
        check_attention("attention", q, k, v, call)
        check_values("attention", call, len(q))  # of packed q its tokens, else not read
        return reference.forward(q, k, v, call)
    tensors = call.tensors if type(q) is Tensor else replicated(q, call.tensors)
    return call_op("attention_fwd", backend, (q, k, v, *tensors), call.options)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the contribution of these keys to dq, and of these queries to dk and dv.

    out, lse, dout, dlse: for all keys that the queries see; k and v may be a part of them.
    """
    given = (dout, dlse, q, k, v, out, lse)
    if by_reference(q, backend):
        return reference.backward(*given, call)
    op = op_of("attention_bwd", backend).default
    return op(*given, *call.tensors, **call.options)


def by_reference(q: Tensor, backend: str | None) -> bool:
    """Return True for the reference, and float64 on a CPU, which the fused kernels lack."""
    return backend == "reference" or (backend in (None, "cpu") and q.dtype == torch.float64)


def call_op(
    name: str, backend: str | None, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Call an op, or that of a named backend; without its Autograd kernel if that has no use."""
    op = op_of(name, backend).default
    if torch.compiler.is_compiling() or wants_grad(args):
        return op(*args, **options)
    return call_unrecorded(op, args, options)


# -------------------------------------------------------------------------------------------------
# From an op's arguments to a kernel


class KernelModule(NamedTuple):
    """A backend's functions, `forward` and the like, in a module of an operation's folder.

    Kernels that are launched have a function beside each, `forward_launches`, whose result is kept
    for the layouts of a call's tensors; the other takes it after the call.
    """

    module: str  # imported by the first call
    fused: bool  # has the limits of check_dims

    def kernel(self, folder: str, step: Step) -> Callable[..., Any]:
        """Return the function of an op that runs a step of the operation in `folder`."""

        @functools.cache
        def load():
            module = importlib.import_module(f"{folder}.{self.module}")
            # A compiled Triton kernel's arguments are on a GPU, or have no values.
            has_values = getattr(module, "INTERPRETED", True)
            build = getattr(module, f"{step.name}_launches", None)
            return getattr(module, step.name), build, has_values

        def run(*given, **options):
            (compute, build, has_values), (args, tensors) = load(), step.read(given)
            key = (compute, layout_key(*given), options_key(options))
            plan = (step, args, tensors, options, self.fused, build)
            fixed, launches = cached_by_layout(_plan, key, *plan)
            call = with_tensors(tensors, fixed)
            step.check_call(args, call, self.fused, has_values)
            if build is None:
                return compute(*args, call)
            return compute(*args, call, launches)

        return run


class Step(NamedTuple):
    """One kind of kernel: a forward, a backward, or a decode."""

    name: str  # of the function in a backend's module
    read: Callable  # (op's arguments) -> those of the kernel before the call, and call.tensors
    check: Callable  # (arguments, call, fused), once for the layouts of all tensors
    check_call: Callable  # (arguments, call, fused, has_values), in every call


def _plan(step, args, tensors, options, fused, build):
    """Return what of a right call its layouts and options fix: `call.fixed`, and its launches."""
    call = read_call(tensors, options)
    step.check(args, call, fused)
    return call.fixed, build(*args, call) if build else None


def _check(q, k, v, call, fused, results=()):
    check_attention("attention", q, k, v, call, results=results)
    if fused:
        check_dims("attention", call, q, v)


FORWARD = Step(
    "forward",
    lambda given: (given[:3], given[3:]),
    lambda args, call, fused: _check(*args, call, fused),
    lambda args, call, _, has_values: has_values and check_values("attention", call, len(args[0])),
)
BACKWARD = Step(  # of dout, dlse, q, k, v, out and lse
    "backward",
    lambda given: (given[:7], given[7:]),
    lambda args, call, fused: _check(*args[2:5], call, fused, results=(*args[:2], *args[5:])),
    lambda args, call, _, has_values: has_values and check_values("attention", call, len(args[2])),
)
MODULES = {
    "reference": KernelModule("reference", fused=False),
    "triton": KernelModule("triton", fused=True),
    "flash_attn": KernelModule("flash_attn", fused=True),
}
# The functions of each op, by backend.
KERNELS = {
    name: {backend: row.kernel(__package__, step) for backend, row in MODULES.items()}
    for name, step in {"attention_fwd": FORWARD, "attention_bwd": BACKWARD}.items()
}

VARIABLE = "EXTROPE_ATTENTION"
_ON_A_GPU = tuple(name for name, row in MODULES.items() if row.fused)


def selected(name: str) -> Callable[..., Any]:
    """Return the function of an op on a GPU, which selects a backend in every call."""
    return lambda *given, **options: KERNELS[name][select_backend()](*given, **options)


def select_backend() -> str:
    """Select the GPU backend of attention if none is named: Triton, or what VARIABLE names.

    Triton takes every call. The composition over flash-attn takes fewer, by functions that its
    packages keep to themselves, and no GPU has shown where it is faster.
    Raises if the environment names one that cannot run here.
    """
    name = os.environ.get(VARIABLE) or "triton"
    if name not in _ON_A_GPU:
        raise ValueError(f"attention: {VARIABLE} must be {' or '.join(_ON_A_GPU)}, got {name!r}")
    if name == "flash_attn" and (reason := flash_attn.missing()):
        raise NotImplementedError(f"attention: {VARIABLE}={name} cannot run here: {reason}")
    return name


def selection() -> str:
    """Describe the selection in a line, for `extrope info`."""
    try:
        return select_backend()
    except (ValueError, NotImplementedError) as error:
        return str(error)


# -------------------------------------------------------------------------------------------------
# Fakes and gradients


def _fwd_fake(q, k, v, *tensors, **options):
    call = read_call(tensors, options)
    check_attention("attention", q, k, v, call)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=call.results_dtype(q.dtype))
    return out, q.new_empty(lse_shape(q), dtype=accumulator(q.dtype))


def _bwd_fake(dout, dlse, q, k, v, out, lse, *tensors, **options):
    call = read_call(tensors, options)
    check_attention("attention", q, k, v, call, results=(dout, dlse, out, lse))
    return tuple(x.new_empty(x.shape, dtype=call.results_dtype(x.dtype)) for x in (q, k, v))


def _register_gradient(suffix: str) -> None:
    """Register the gradients of `attention_fwd{suffix}`; only raw tensors are saved."""
    fwd = getattr(ops, f"attention_fwd{suffix}").default
    bwd = getattr(ops, f"attention_bwd{suffix}").default

    names = [x.name for x in fwd._schema.arguments if not x.kwarg_only]

    def save(ctx, args, options, outputs):
        for name, x in zip(names, args):
            if x is not None and x.requires_grad and name not in _DIFFERENTIABLE:
                raise ValueError(
                    f"attention: {name} must not require grad, got one that does; "
                    "backend='reference' has its gradient"
                )
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:3], *outputs, *args[3:])

    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None
        # Round float32_results, as autograd does on the way to the 16-bit op.
        out = out.to(q.dtype)
        dout = torch.zeros_like(out) if dout is None else contiguous_rows(dout.to(q.dtype))
        dlse = None if dlse is None else dlse.contiguous()
        # The first two arguments that are recorded are not the op's.
        needs = dict(zip(names, ctx.needs_input_grad[2:]))
        grads: dict[str, Tensor | None] = {}
        if needs["inv_freq"]:

            def of_call(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
                return bwd(dout, dlse, q, k, v, out, lse, *call.tensors, **call.options)

            call = read_call(tensors, ctx.options)
            of_rows, grads["inv_freq"] = backward_with_frequencies(of_call, q, k, call)
        else:
            of_rows = bwd(dout, dlse, q, k, v, out, lse, *tensors, **ctx.options)
        grads |= dict(zip(("q", "k", "v"), of_rows))
        if needs["sinks"]:
            given = dict(zip(names, (q, k, v, *tensors)))
            grads["sinks"] = grad_of_sinks(given["sinks"], dout, dlse, out, lse)
        return tuple(grads.get(name) for name in names)

    register_backward(library, fwd, save, backward)
    only_first = "the fused kernels have first derivatives only; use backend='reference'"
    refuse_backward(library, bwd, f"attention: {only_first}")


def grad_of_sinks(
    sinks: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> Tensor:
    """Return the gradient of a call's sinks (heads_q,), from its outputs and their gradients.

    out, dout: (batch, seqlen_q, heads_q, head_dim), or packed (total, heads_q, head_dim); lse,
    dlse: (batch, heads_q, seqlen_q) or (heads_q, total), of all logits and the sink.
    """
    # Not vecdot: autocast, which graphs keep for their backward, would round it.
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(-1, -2)
    if dlse is not None:
        delta = delta - dlse
    # A row without keys whose sink is -inf (off) has no share: both are -inf.
    share = torch.exp((sinks[:, None] - lse).masked_fill(lse == -torch.inf, -torch.inf))
    found = -share * delta
    return found.movedim(-2, 0).flatten(1).sum(1).to(sinks.dtype)


def _define() -> None:
    fakes = {"attention_fwd": _fwd_fake, "attention_bwd": _bwd_fake}
    for name, fake in fakes.items():
        suffixes = define(name, _SCHEMAS[name], fake, KERNELS[name], on_gpu=selected(name))
    for suffix in suffixes:
        _register_gradient(suffix)


_define()
