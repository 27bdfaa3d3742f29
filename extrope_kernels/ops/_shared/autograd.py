"""How ops get their derivatives and batching rules: Autograd kernels that are registered by hand.

What torch.library.register_autograd makes refuses torch.func.grad and takes three times as long a
call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad


def register_backward(library, op, save, backward) -> None:
    """Make `op` differentiable: an Autograd kernel that records `backward` where it has to.

    save(ctx, args, options, outputs) runs after the forward; args are the positional arguments
    that were given, trailing defaults left out. backward(ctx, *grads) returns gradients for as
    many of them as have one.
    """
    kernel = autograd_of(op, save, backward)
    library.impl(op.name(), kernel, "Autograd", with_keyset=True)


def autograd_of(op, save, backward):
    """Records what its operations are: see `register_backward`.

    It derives from _SingleLevelFunction, which records on the one level of autograd that is
    being dispatched; torch.func's other levels come by themselves, as for PyTorch's own ops.
    """

    def below(keyset, args, options):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    class Recorded(torch.autograd.function._SingleLevelFunction):
        # Compiled autograd asks every node for one, and only Function has it.
        _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

        @staticmethod
        def forward(ctx, keyset, options, *args):
            if torch._C._are_functorch_transforms_active():
                # Recorded.apply has switched gradients off, for torch.func's outer levels too.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    outputs = below(keyset, args, options)
            else:
                outputs = below(keyset, args, options)
            save(ctx, args, options, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            found = (None, None, *backward(ctx, *grads))
            return (*found, *[None] * (len(ctx.needs_input_grad) - len(found)))

    def kernel(keyset, *args, **options):
        _refuse_tangents(op, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if not torch._C._are_functorch_transforms_active():
                return Recorded.apply(keyset, options, *args)
            with enable_single_level_autograd_function():
                return Recorded.apply(keyset, options, *args)
        return below(keyset, args, options)

    return kernel


def _refuse_tangents(op, args) -> None:
    """Of forward-mode derivatives, which the kernels do not have: they would be lost in silence."""
    if not in_forward_mode():
        return
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{op.name().partition('::')[2]}: has no forward-mode derivatives (jvp, jacfwd, "
                "hessian); use reverse mode (vjp, jacrev, jacrev of jacrev)"
            )


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether one of torch.func's transforms is under way."""
    return torch._C._are_functorch_transforms_active()


def refuse_recording(library, op, message: str) -> None:
    """Let `op`, which writes over its first two arguments, refuse tensors of a graph; and let
    autograd notice when one that it has saved has been overwritten.
    """

    def kernel(keyset, *args, **options):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise RuntimeError(message)
        _refuse_tangents(op, args)
        with torch._C._AutoDispatchBelowAutograd():
            out = op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)
        note_writes(*(x for x in args[:2] if x is not None))
        return out

    library.impl(op.name(), kernel, "Autograd", with_keyset=True)


def note_writes(*tensors: Tensor) -> None:
    """Tell autograd that kernels have written over these."""
    torch._C._increment_version(tensors)  # graph.increment_version takes twice as long


def call_unrecorded(
    op: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]
) -> Any:
    """Call an op of which no gradient is wanted, or exists, outside of torch.compile.

    Its Autograd kernel, which is left out, costs as much as rotating a token; Python's frame around
    every op, a tenth of that. Inference mode leaves it out by itself; of forward-mode derivatives
    it knows that there are none.
    """
    run = getattr(op, "_op", op)
    if torch.is_inference_mode_enabled() or in_forward_mode():
        return run(*args, **options)
    with torch._C._AutoDispatchBelowAutograd():
        return run(*args, **options)


def refuse_backward(
    library, op, message: str, written: Callable[[tuple], tuple] | None = None
) -> None:
    """Let a gradient that flows into `op` fail with the message, rather than vanish.

    written: of its arguments those that it writes over, of which autograd is told.
    """

    def save_nothing(ctx, args, options, outputs):
        pass

    def refuse(ctx, *grads):
        raise NotImplementedError(message)

    if written is None:
        return register_backward(library, op, save_nothing, refuse)
    recorded = autograd_of(op, save_nothing, refuse)

    def kernel(keyset, *args, **options):
        out = recorded(keyset, *args, **options)
        note_writes(*written(args))
        return out

    library.impl(op.name(), kernel, "Autograd", with_keyset=True)


def contiguous_rows(x: Tensor) -> Tensor:
    """Gradients come with any strides (of a sum: all zero); the kernels want contiguous rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def batching_rule(op, tensors: int, is_shared: Callable[[tuple], bool]):
    """For torch.vmap: batch dimensions of the first `tensors` arguments, (batch, seqlen, heads,
    head_dim), are folded into batch where is_shared(rest) lets all sequences be one batch; others
    loop.
    """

    def rule(info, in_dims, *args, **options):
        only_these = all(dim is None for dim in in_dims[tensors:])
        if only_these and args[0].dim() == 5 and is_shared(args[tensors:]):
            return _fold(op, info.batch_size, tensors, in_dims, args, options)
        calls = []
        for i in range(info.batch_size):
            picked = [x if d is None else x.select(d, i) for x, d in zip(args, in_dims)]
            calls.append(op(*(x if x is None else contiguous_rows(x) for x in picked), **options))
        outputs = tuple(torch.stack(parts) for parts in zip(*calls))
        return outputs, (0,) * len(outputs)

    return rule


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
