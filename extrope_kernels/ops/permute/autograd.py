"""Derivatives of the permutation: its transpose is its inverse, the same gather backwards."""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.autograd import batching_rule, contiguous_rows, register_backward
from .._shared.library import ops


def register(library: torch.library.Library, suffix: str) -> None:
    """Give `permute_fwd{suffix}` its derivative, of any order, and its batching rule."""
    fwd = getattr(ops, f"permute_fwd{suffix}").default

    def save(ctx, args, options, outputs):
        ctx.has_k = args[1] is not None
        ctx.options = {**options, "inverse": not options.get("inverse", False)}
        ctx.save_for_backward(*args[2:])

    def backward(ctx, grad_q, grad_k):
        grad_k = contiguous_rows(grad_k) if ctx.has_k else None
        dq, dk = fwd(contiguous_rows(grad_q), grad_k, *ctx.saved_tensors, **ctx.options)
        return dq, dk if ctx.has_k else None

    register_backward(library, fwd, save, backward)
    torch.library.register_vmap(fwd, batching_rule(fwd, 2, _is_shared), lib=library)


def _is_shared(tensors: tuple[Tensor | None, ...]) -> bool:
    """Do all sequences start at one position? Then they are one batch."""
    return all(x is None for x in tensors[1:])
