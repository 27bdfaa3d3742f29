"""The public function of the merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._shared.autograd import call_unrecorded, contiguous_rows, in_forward_mode, note_writes
from ..._shared.checks import REFUSALS, raise_as_value_error, refuse_flags
from ..._shared.library import ops
from . import reference
from .checks import INPLACE, OP, check, not_tensors

Tensors = tuple[Tensor, ...]


def merge_attention(
    outs: Sequence[Tensor] | Tensor,
    lses: Sequence[Tensor] | Tensor,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from attention over each of them.

    Each softmax is weighted by its share of the joint one, exp(lse - joint lse). Arithmetic is in
    float32, or in float64 where any input is, and out is rounded once.

    outs: n >= 1 tensors (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim), of
        one floating dtype; or one tensor with the n of them stacked in front.
    lses: the n log-sum-exps of the logits, natural log, (batch, heads, seqlen) or packed
        (heads, total), float32 or float64. -inf marks a row without keys, whose out, whatever it
        holds, does not count. A sink belongs to one of the sets: give it to one call alone.
    inplace: write out and lse over outs[0] and lses[0], for results that come one after the other:
        no other memory of out's size is used. outs[0] may be float32 where the others are 16-bit,
        so that nothing is rounded on the way. What a row without keys holds has to be finite
        then, and there is no gradient.

    Returns: out like outs[0], and lse like lses[0]. A row without keys in any set gets out 0 and
        lse -inf, in place what outs[0] held. Differentiable to any order in outs and lses.
    Raises: ValueError or TypeError that names the argument.
    """
    outs, lses = _tensors("outs", outs), _tensors("lses", lses)
    if type(inplace) is not bool:
        refuse_flags(OP, inplace=inplace)
    # Of what follows in place, Inductor makes one kernel; of an op, it may lose a clone that the op
    # writes to. torch.func's transforms are those of PyTorch's operations.
    compiling = torch.compiler.is_compiling()
    by_torch = inplace if compiling else torch._C._are_functorch_transforms_active()
    if by_torch or not _has_kernel(outs, lses):
        check(outs, lses, inplace)
        return _by_torch(outs, lses, inplace)
    if compiling:
        return ops.merge_fwd([contiguous_rows(x) for x in outs], lses)
    try:
        return _inplace(outs, lses) if inplace else _out_of_place(outs, lses)
    except REFUSALS as error:
        check(outs, lses, inplace)
        raise_as_value_error(error, OP)
        raise


def _has_kernel(outs: Tensors, lses: Tensors) -> bool:
    """Not for other devices and classes, such as DTensors; nor for what is to be refused."""
    for x in outs:
        if type(x) is not Tensor or x.dim() < 3:
            return False
    for x in lses:
        if type(x) is not Tensor:
            return False
    return len(outs) > 0 and (outs[0].is_cpu or outs[0].is_cuda)


def _out_of_place(outs: Tensors, lses: Tensors) -> tuple[Tensor, Tensor]:
    rows = [contiguous_rows(x) for x in outs]
    if _wants_grad(outs, lses):
        return ops.merge_fwd(rows, lses)
    return call_unrecorded(ops.merge_fwd, (rows, lses), {})


def _inplace(outs: Tensors, lses: Tensors) -> tuple[Tensor, Tensor]:
    out, lse = outs[0], lses[0]
    if in_forward_mode() or (out.stride(-1) != 1 and out.shape[-1] > 1):
        check(outs, lses, inplace=True)
        return _by_torch(outs, lses, inplace=True)
    if _wants_grad(outs, lses):
        raise ValueError(INPLACE)
    rows = [contiguous_rows(x) for x in outs[1:]]
    call_unrecorded(ops.merge_inplace, (out, lse, rows, lses[1:]), {})
    note_writes(out, lse)
    return out, lse


def _by_torch(outs: Tensors, lses: Tensors, inplace: bool) -> tuple[Tensor, Tensor]:
    if not inplace:
        return reference.merge_fwd(outs, lses)
    if _wants_grad(outs, lses):
        raise ValueError(INPLACE)
    reference.merge_inplace(outs[0], lses[0], outs[1:], lses[1:])
    return outs[0], lses[0]


def _wants_grad(outs: Tensors, lses: Tensors) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (*outs, *lses))


def _tensors(name: str, value: object) -> Tensors:
    if isinstance(value, Tensor):
        if value.dim() == 0:
            raise ValueError(f"{OP}: {name} must be stacked tensors, got a scalar")
        return value.unbind(0)
    if isinstance(value, (list, tuple, Sequence)):
        return tuple(value)
    raise not_tensors(name, value)
