"""Derivatives of ops, and everything else that needs private functions of PyTorch.

torch.library.register_autograd does not serve (PyTorch 2.13): torch.func.grad, vjp and jacrev raise
under it, gradients through torch.vmap come out as zeros, and tangents of forward mode are lost
without a word. So Autograd kernels are registered by hand. No other module uses a private function
of PyTorch, see tests/installation/test_import_direction.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

Function = TypeVar("Function", bound=Callable)

# -------------------------------------------------------------------------------------------------
# State around a call


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def in_func_transform() -> bool:
    """Return True inside a transform of torch.func, whose tensors may have no values to read."""
    return torch._C._are_functorch_transforms_active()


def constant_when_compiled(function: Function) -> Function:
    """Let torch.compile call the function once instead of tracing it.

    torch.compiler.assume_constant_result does the same, but imports torch._dynamo at once.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# -------------------------------------------------------------------------------------------------
# Autograd kernels


def register_backward(library, op, save, backward) -> None:
    """Make `op` differentiable: an Autograd kernel records `backward` if a gradient is needed.

    It stands in for torch.library.register_autograd; the top of this file says why.

    save(ctx, args, options, outputs) runs after the forward; args are the positional arguments as
    given, without trailing defaults. backward(ctx, *grads) returns gradients for the first of
    them, up to the last that has one.
    """
    kernel = autograd_of(op, save, backward)
    library.impl(op.name(), kernel, "Autograd", with_keyset=True)


def autograd_of(op, save, backward):
    """Make the autograd function of an op: see `register_backward`.

    It derives from _SingleLevelFunction, which records on the dispatched level of autograd only;
    torch.func's other levels come by themselves, as for PyTorch's own ops.
    """

    class Recorded(torch.autograd.function._SingleLevelFunction):
        # Compiled autograd asks every node for it, and only Function has it.
        _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

        @staticmethod
        def forward(ctx, keyset, options, *args):
            if in_func_transform():
                # Recorded.apply has switched gradients off, for torch.func's outer levels too.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    outputs = _below(op, keyset, args, options)
            else:
                outputs = _below(op, keyset, args, options)
            save(ctx, args, options, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            found = (None, None, *backward(ctx, *grads))
            return (*found, *[None] * (len(ctx.needs_input_grad) - len(found)))

    def kernel(keyset, *args, **options):
        _refuse_tangents(op, args)
        if wants_grad(args):
            if not in_func_transform():
                return Recorded.apply(keyset, options, *args)
            with enable_single_level_autograd_function():
                return Recorded.apply(keyset, options, *args)
        return _below(op, keyset, args, options)

    return kernel


def refuse_negative_views(library, op) -> None:
    """Let `op`, which writes to arguments, refuse to write to negative views (torch.Tensor.is_neg).

    PyTorch would give it copies, and fail when it brings back what was written. What the op reads
    may be one.
    """
    name, arguments = op.name().partition("::")[2], op._schema.arguments
    written = [n for n, x in enumerate(arguments) if x.alias_info and x.alias_info.is_write]

    def kernel(*args, **options):
        if any(isinstance(args[n], Tensor) and args[n].is_neg() for n in written):
            raise ValueError(f"{name}: must write to no negative view (is_neg), got one")
        return op(*map(_resolved, args), **options)

    library.impl(op.name(), kernel, "Negative")


def _resolved(x: Any) -> Any:
    """Return an argument, a tensor or a list of them among others, without negative views."""
    if isinstance(x, (list, tuple)):
        return [_resolved(one) for one in x]
    return x.resolve_neg() if isinstance(x, Tensor) else x


def refuse_recording(library, op, message: str) -> None:
    """Let `op`, which overwrites its first two arguments, refuse tensors of a graph.

    Autograd is told of the writes, so it notices if a saved tensor was overwritten.
    """

    def kernel(keyset, *args, **options):
        if wants_grad(args):
            raise RuntimeError(message)
        _refuse_tangents(op, args)
        out = _below(op, keyset, args, options)
        note_writes(*(x for x in args[:2] if x is not None))
        return out

    library.impl(op.name(), kernel, "Autograd", with_keyset=True)
    refuse_negative_views(library, op)


def refuse_backward(
    library, op, message: str, written: Callable[[tuple], tuple] | None = None
) -> None:
    """Let a gradient that flows into `op` fail with the message instead of vanishing.

    written: the arguments that the op overwrites; autograd is told, and they may require no
    gradient.
    """

    def save_nothing(ctx, args, options, outputs):
        pass

    def refuse(ctx, *grads):
        raise NotImplementedError(message)

    recorded = autograd_of(op, save_nothing, refuse)

    def kernel(keyset, *args, **options):
        targets = written(args) if written else ()
        if wants_grad(targets):
            name = op.name().partition("::")[2]
            raise ValueError(f"{name}: must write to no tensor that requires grad, got one")
        out = recorded(keyset, *args, **options)
        note_writes(*targets)
        return out

    library.impl(op.name(), kernel, "Autograd", with_keyset=True)
    if written:
        refuse_negative_views(library, op)


def call_unrecorded(
    op: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]
) -> Any:
    """Call an op without its Autograd kernel, if no gradient is wanted, outside of torch.compile.

    The Autograd kernel costs as much as rotating a token. Forward-mode derivatives are refused, and
    under torch.vmap a tensor does not say that gradients are wanted.
    """
    if torch.is_inference_mode_enabled() or in_forward_mode() or in_func_transform():
        return op(*args, **options)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **options)


def note_writes(*tensors: Tensor) -> None:
    """Tell autograd that kernels have written over these."""
    increment_version(tensors)


def wants_grad(args: tuple[Any, ...]) -> bool:
    """Return True if a call with these arguments must be recorded."""
    if not torch.is_grad_enabled():
        return False
    for x in args:  # noqa: SIM110 (a generator takes twice as long)
        if x is not None and isinstance(x, Tensor) and x.requires_grad:  # None costs less so
            return True
    return False


def _below(op, keyset, args, options):
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)


def _refuse_tangents(op, args) -> None:
    """Raise for forward-mode derivatives, which the kernels lack: they would be lost silently."""
    if not in_forward_mode():
        return
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{op.name().partition('::')[2]}: has no forward-mode derivatives (jvp, jacfwd, "
                "hessian); use reverse mode (vjp, jacrev, jacrev of jacrev)"
            )


# -------------------------------------------------------------------------------------------------
# Layouts of gradients, and torch.vmap


def contiguous_rows(x: Tensor) -> Tensor:
    """Make rows contiguous for kernels: gradients come with any strides (a sum's are all zero)."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_rows(x: Tensor) -> Tensor:
    """Allocate a tensor like x with contiguous rows: like rows that overlap it may have others."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 or x.shape[-1] <= 1 else x.new_empty(x.shape)


def batching_rule(op, tensors: int, is_shared: Callable[[tuple], bool]):
    """Register a rule for torch.vmap.

    It folds the mapped dimensions of the first `tensors` arguments, (batch, seqlen, heads,
    head_dim), into batch if is_shared(rest) lets all sequences be one batch; else it loops.
    """

    def rule(info, in_dims, *args, **options):
        size = info.batch_size
        only_these = all(dim is None for dim in in_dims[tensors:])
        if size and only_these and args[0].dim() == 5 and is_shared(args[tensors:]):
            return _fold(op, size, tensors, in_dims, args, options)
        calls = []
        for i in range(max(size, 1)):  # of none, a call with zeros tells the shapes
            picked = [x if d is None else _one_of(x, d, i) for x, d in zip(args, in_dims)]
            calls.append(op(*(x if x is None else contiguous_rows(x) for x in picked), **options))
        outputs = tuple(torch.stack(parts)[:size] for parts in zip(*calls))
        return outputs, (0,) * len(outputs)

    return rule


def _one_of(x: Tensor, dim: int, i: int) -> Tensor:
    return x.select(dim, i) if x.shape[dim] else x.sum(dim, dtype=x.dtype)


def _fold(op, size, tensors, in_dims, args, options):
    folded = []
    for x, dim in zip(args[:tensors], in_dims):
        if x is not None:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = contiguous_rows(x.flatten(0, 1))
        folded.append(x)
    outputs = op(*folded, *args[tensors:], **options)
    unfolded = tuple(x.unflatten(0, (size, -1)) if x.dim() == 4 else x for x in outputs)
    return unfolded, tuple(0 if x.dim() == 5 else None for x in unfolded)
