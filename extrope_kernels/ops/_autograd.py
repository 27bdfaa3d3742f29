"""How ops get their derivatives: Autograd kernels that are registered by hand.

What torch.library.register_autograd makes refuses torch.func.grad and takes three times as long a
call.
"""

from __future__ import annotations

import torch
from torch._functorch.utils import enable_single_level_autograd_function


def register_backward(library, op, save, backward) -> None:
    """Make `op` differentiable: an Autograd kernel that records `backward` where it has to.

    save(ctx, args, options, outputs) runs after the forward; args are the positional arguments
    that were given, trailing defaults left out. backward(ctx, *grads) returns gradients for as
    many of them as have one.
    """
    kernel = _autograd_kernel(op, save, backward)
    library.impl(op.name(), kernel, "Autograd", with_keyset=True)


def _autograd_kernel(op, save, backward):
    """It derives from _SingleLevelFunction, which records on the one level of autograd that is
    being dispatched; torch.func's other levels come by themselves, as for PyTorch's own ops.
    """

    def below(keyset, args, options):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    class Recorded(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx, keyset, options, *args):
            if torch._C._are_functorch_transforms_active():
                # Recorded.apply has switched gradients off, for torch.func's outer levels too.
                with torch.enable_grad():
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
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if not torch._C._are_functorch_transforms_active():
                return Recorded.apply(keyset, options, *args)
            with enable_single_level_autograd_function():
                return Recorded.apply(keyset, options, *args)
        return below(keyset, args, options)

    return kernel
