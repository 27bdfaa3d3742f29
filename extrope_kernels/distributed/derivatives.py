"""Backwards that have no derivative of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def first_only(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A Function's backward, backward(ctx, saved tensors, *grads), whose results refuse gradients.

    PyTorch's `once_differentiable` lets those vanish where the grads are of a linear loss: what
    they also depend on, the saved tensors, it does not look at.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors  # read once: a checkpoint unpacks a tensor only once
        with torch.no_grad():
            found = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return found
        sources = [x for x in (*grads, *saved) if x is not None and x.requires_grad]
        op = ctx.plan.call.op
        return tuple(None if x is None else _Refused.apply(op, x, *sources) for x in found)

    return run


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        raise NotImplementedError(
            f"{ctx.op}: over ranks there are first derivatives only, got one taken twice"
        )
