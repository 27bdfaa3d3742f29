"""First derivatives of the attention ops; the reference backend has the higher ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.autograd import register_backward


def register(library: torch.library.Library, score: str, suffix: str) -> None:
    """Give `{score}_attn_fwd{suffix}` its derivative in q, k and v; saves raw tensors only."""
    name = f"{score}_attention"
    fwd = getattr(torch.ops.extrope, f"{score}_attn_fwd{suffix}").default
    bwd = getattr(torch.ops.extrope, f"{score}_attn_bwd{suffix}").default

    def save(ctx, args, options, outputs):
        for label, x in zip(("inv_freq", "cu_seqlens", "log_decay"), args[3:]):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{name}: {label} has a gradient with backend='reference' only, "
                    "got a tensor that requires grad"
                )
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:3], *outputs, *args[3:])

    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *by = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None
        dout = torch.zeros_like(out) if dout is None else _rows(dout)
        dlse = None if dlse is None else dlse.contiguous()
        return bwd(dout, dlse, q, k, v, out, lse, *by, **ctx.options)

    register_backward(library, fwd, save, backward)
    only_first = "the fused kernels have first derivatives only; use backend='reference'"
    refuse_backward(library, bwd, f"{name}: {only_first}")


def refuse_backward(library: torch.library.Library, op, message: str) -> None:
    """Let a gradient that flows into `op` fail with the message, rather than vanish."""

    def save_nothing(ctx, args, options, outputs):
        pass

    def refuse(ctx, *grads):
        raise NotImplementedError(message)

    register_backward(library, op, save_nothing, refuse)


def _rows(x: Tensor) -> Tensor:
    """Gradients come with any strides (of a sum: all zero); the kernels want contiguous rows."""
    return x if x.stride(-1) == 1 else x.contiguous()
