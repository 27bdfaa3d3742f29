"""Derivatives of the merge, of any order, and what torch.func makes of its ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._shared.autograd import autograd_of, in_forward_mode, refuse_recording
from ..._shared.library import ops
from . import reference
from .checks import INPLACE
from .reference import per_row, shares_of


def register(library: torch.library.Library, suffix: str) -> None:
    """For `merge_fwd{suffix}` and `merge_inplace{suffix}`.

    Forward-mode derivatives and torch.func's transforms are those of PyTorch's operations.
    """
    fwd = getattr(ops, f"merge_fwd{suffix}").default
    recorded = autograd_of(_OfFlatList(fwd), _save, _backward)

    def kernel(keyset, outs, lses):
        if in_forward_mode() or torch._C._are_functorch_transforms_active():
            return reference.merge_fwd(outs, lses)
        return recorded(keyset, *outs, *lses)

    library.impl(fwd.name(), kernel, "Autograd", with_keyset=True)
    library.impl(fwd.name(), reference.merge_fwd, "FuncTorchBatched")
    inplace = getattr(ops, f"merge_inplace{suffix}").default
    refuse_recording(library, inplace, INPLACE)
    library.impl(inplace.name(), reference.merge_inplace, "FuncTorchBatched")


class _OfFlatList:
    """`merge_fwd` as autograd can look into it: outs, then lses, each an argument."""

    def __init__(self, op) -> None:
        self.op, self.name = op, op.name

    def redispatch(self, keyset, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        count = len(tensors) // 2
        return self.op.redispatch(keyset, tensors[:count], tensors[count:])


def _save(ctx, tensors, options, outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    count = len(saved) // 2
    outs, lses = saved[:count], saved[count:]
    lses_too = any(ctx.needs_input_grad[-count:])
    return _gradients(outs, lses, dout, dlse, lses_too)


def _gradients(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    dout: Tensor | None,
    dlse: Tensor | None,
    lses_too: bool,
) -> tuple[Tensor | None, ...]:
    """Of each of outs, then of each of lses; 0 for rows without keys."""
    _, absent, weights = shares_of(outs, lses)
    douts: list[Tensor | None] = [None] * len(outs)
    of_weights = torch.zeros_like(weights) if dlse is None else dlse.to(weights.dtype)
    if dout is not None:
        dout = dout.to(weights.dtype)
        douts = [
            (dout * per_row(weight)).masked_fill(per_row(no_key), 0.0).to(out.dtype)
            for out, weight, no_key in zip(outs, weights, absent)
        ]
    if not lses_too:
        return (*douts, *[None] * len(lses))
    if dout is not None:
        found = [
            torch.linalg.vecdot(out.masked_fill(per_row(no_key), 0.0).to(weights.dtype), dout)
            for out, no_key in zip(outs, absent)
        ]
        dots = torch.stack(found).transpose(-1, -2)
        of_weights = of_weights + dots - (weights * dots).sum(0)
    dlses = (weights * of_weights).masked_fill(absent, 0.0)
    return (*douts, *(x.to(lses[0].dtype) for x in dlses))
