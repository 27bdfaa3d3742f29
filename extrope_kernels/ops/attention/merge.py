"""The exact merge of attention over disjoint sets of keys: PyTorch, or Triton on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._tables import specs
from .._tables.checks import meet, memory_of, overlaps_itself, refuse_flags, share_bytes
from .._tables.specs import ANY, FLOATS, LIKE, ROWS, Spec
from .._torch.autograd import (
    contiguous_rows,
    empty_rows,
    in_forward_mode,
    in_func_transform,
    refuse_recording,
)
from .._torch.library import library, missing, ops

OP = "merge_attention"
INPLACE = f"{OP}: inplace=True is for inference, got tensors that require grad"
Tensors = tuple[Tensor, ...]


def merge_attention(
    outs: Sequence[Tensor] | Tensor,
    lses: Sequence[Tensor] | Tensor,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys into attention over all of them, exactly.

    Each softmax is weighted by its share of the joint one, exp(lse - joint lse). Arithmetic is in
    float32, or in float64 if any input is, and out is rounded once.

    outs: n >= 1 tensors (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim), of
        one dtype; or one tensor (n, batch, seqlen, heads, head_dim). Packed ones come in a list:
        stacked, they look like one result of a batch.
    lses: the n log-sum-exps of the logits, natural log, (batch, heads, seqlen) or packed
        (heads, total), float32 or float64. -inf marks a row without keys; its out is ignored. A
        sink belongs to one of the sets: pass it to one call only.
    inplace: write out and lse over outs[0] and lses[0], to merge results as they arrive. outs[0]
        may be float32 with 16-bit others, so that only the end rounds. Rows without keys must then
        hold finite values, and there is no gradient.

    Returns: out like outs[0], and lse like lses[0]. A row without keys in any set gets out 0 (in
        place: keeps outs[0]) and lse -inf. Differentiable to any order in outs and lses.
    Raises: ValueError or TypeError that names the argument.
    """
    outs, lses = _tensors("outs", outs, 5), _tensors("lses", lses, 4)
    refuse_flags(OP, inplace=inplace)
    check(outs, lses, inplace)
    if not inplace:
        return (ops.merge_fwd if _by_triton(outs, lses) else merge_fwd)(outs, lses)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*outs, *lses)):
        raise ValueError(INPLACE)
    # Inductor fuses PyTorch's operations into one kernel, and may drop a clone that an op writes.
    if _by_triton(outs, lses) and not torch.compiler.is_compiling() and _has_rows(outs[0]):
        ops.merge_inplace(outs[0], lses[0], outs[1:], lses[1:])
    else:
        merge_inplace(outs[0], lses[0], outs[1:], lses[1:])
    return outs[0], lses[0]


def _by_triton(outs: Tensors, lses: Tensors) -> bool:
    """Return False for DTensors, and eagerly in torch.func's transforms: they need PyTorch's."""
    if not all(type(x) is Tensor and x.is_cuda for x in (*outs, *lses)):
        return False
    if missing("triton", "cuda"):
        return False
    return torch.compiler.is_compiling() or not (in_func_transform() or in_forward_mode())


def _has_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] <= 1


# -------------------------------------------------------------------------------------------------
# Checks


def check(outs: Sequence[Tensor], lses: Sequence[Tensor], inplace: bool) -> None:
    """Raise ValueError or TypeError for anything that cannot be merged."""
    for name, tensors in (("outs", outs), ("lses", lses)):
        if not all(isinstance(x, Tensor) for x in tensors):
            raise _not_tensors(name, tensors)
    if not outs:
        raise ValueError(f"{OP}: outs must hold at least one tensor, got none")
    if len(lses) != len(outs):
        raise ValueError(
            f"{OP}: lses must hold one tensor for each of the {len(outs)} outs, got {len(lses)}"
        )
    first, packed = outs[0], outs[0].dim() == 3
    of_out = "total heads head_dim" if packed else "batch seqlen heads head_dim"
    of_lse = "heads total" if packed else "batch heads seqlen"
    narrower = (torch.bfloat16, torch.float16) if inplace else ()
    table = []
    for i in range(len(outs)):
        table.append(Spec(f"outs[{i}]", of_out, (LIKE, *narrower) if i else ROWS, strides=ANY))
    for i in range(len(lses)):
        table.append(Spec(f"lses[{i}]", of_lse, (lses[0].dtype,) if i else FLOATS, strides=ANY))
    tensors = (*outs, *lses)
    specs.check(OP, table, tensors)
    if not inplace or torch.compiler.is_compiling():  # sizes may be symbols, addresses are unknown
        return
    if overlaps_itself(first) or overlaps_itself(lses[0]):
        raise ValueError(f"{OP}: outs[0] and lses[0] must not be expanded to be written to")
    memory = [memory_of(x) for x in tensors]
    for written in (0, len(outs)):
        for i, x in enumerate(tensors):
            near = i != written and meet(memory[written], memory[i])
            if near and share_bytes(tensors[written], x):
                names = f"{table[written].name} and {table[i].name}"
                raise ValueError(f"{OP}: {names} must not share memory to be written to")


def _tensors(name: str, value: object, stacked_dims: int) -> Tensors:
    if isinstance(value, Tensor):
        if value.dim() != stacked_dims:
            raise ValueError(
                f"{OP}: {name} must be a sequence of tensors, or those of batches stacked into "
                f"{stacked_dims} dimensions, got one tensor of {value.dim()}"
            )
        return value.unbind(0)
    if isinstance(value, Sequence):
        return tuple(value)
    raise _not_tensors(name, value)


def _not_tensors(name: str, value: object) -> TypeError:
    return TypeError(
        f"{OP}: {name} must be a sequence of Tensors or a stacked Tensor, "
        f"got {type(value).__name__}"
    )


# -------------------------------------------------------------------------------------------------
# PyTorch's operations


def merge_fwd(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute `torch.ops.extrope.merge_fwd`; differentiable to any order."""
    stacked, absent, shares = _shares(outs, lses)
    weighted = [
        out.masked_fill(_per_row(no_key), 0.0) * _per_row(share)
        for out, share, no_key in zip(outs, shares, absent)
    ]
    out = functools.reduce(torch.add, weighted).to(outs[0].dtype)
    lse = torch.logsumexp(stacked, dim=0).masked_fill(absent.all(0), -torch.inf)
    return out, lse.to(lses[0].dtype)


def merge_inplace(out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Compute `torch.ops.extrope.merge_inplace`; round after the last set."""
    wide = _arithmetic(out, lse)
    merged, joint = out.to(wide), lse.to(wide)
    for other, its_lse in zip(outs, lses):
        its_lse = its_lse.to(wide)
        joint = torch.logaddexp(joint, its_lse)
        share = torch.exp(its_lse - joint.masked_fill(joint == -torch.inf, 0.0))
        merged.lerp_(other.to(wide), _per_row(share))
    out.copy_(merged)
    lse.copy_(joint)


def _shares(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensors:
    """Return stacked lses (finite if no set has keys), rows without keys, and softmax shares."""
    wide = _arithmetic(outs[0], lses[0])
    stacked = torch.stack([lse.to(wide) for lse in lses])
    absent = stacked == -torch.inf
    stacked = stacked.masked_fill(absent.all(0), 0.0)
    return stacked, absent, torch.softmax(stacked, dim=0)


def _arithmetic(out: Tensor, lse: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(out.dtype, torch.float32), lse.dtype)


def _per_row(x: Tensor) -> Tensor:
    """View (..., heads, seqlen) as out's (..., seqlen, heads, 1)."""
    return x.transpose(-1, -2).unsqueeze(-1)


# -------------------------------------------------------------------------------------------------
# The ops: Triton's kernel on a GPU, with derivatives by PyTorch


def _fwd_gpu(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    from .triton import merge

    check(outs, lses, inplace=False)
    return merge.merge_fwd([contiguous_rows(x) for x in outs], lses)


def _inplace_gpu(out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    from .triton import merge

    check((out, *outs), (lse, *lses), inplace=True)
    merge.merge_inplace(out, lse, [contiguous_rows(x) for x in outs], lses)


def _fwd_cpu(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    check(outs, lses, inplace=False)
    out, lse = merge_fwd(outs, lses)
    return empty_rows(outs[0]).copy_(out), lse.contiguous()  # the fake's strides


def _inplace_cpu(out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    check((out, *outs), (lse, *lses), inplace=True)
    merge_inplace(out, lse, outs, lses)


def _fwd_fake(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    check(outs, lses, inplace=False)
    return empty_rows(outs[0]), lses[0].new_empty(lses[0].shape)


def _inplace_fake(out, lse, outs, lses) -> None:
    check((out, *outs), (lse, *lses), inplace=True)


def _save(ctx, inputs, output) -> None:
    outs, lses = inputs
    ctx.count = len(outs)
    ctx.save_for_backward(*outs, *lses)


def _backward(ctx, dout: Tensor, dlse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return gradients of outs and lses; 0 for rows without keys."""
    outs, lses = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    _, absent, shares = _shares(outs, lses)
    dout, dlse = dout.to(shares.dtype), dlse.to(shares.dtype)
    kept = [out.masked_fill(_per_row(no_key), 0.0) for out, no_key in zip(outs, absent)]
    # Not vecdot: autocast would round it.
    dots = [(out.to(dout.dtype) * dout).sum(-1).transpose(-1, -2) for out in kept]
    of_shares = torch.stack(dots)
    dlses = shares * (dlse + of_shares - (shares * of_shares).sum(0))
    dlses = dlses.masked_fill(absent, 0.0).to(lses[0].dtype)
    douts = [
        (dout * _per_row(share)).masked_fill(_per_row(no_key), 0.0).to(out.dtype)
        for out, share, no_key in zip(outs, shares, absent)
    ]
    return douts, list(dlses)


def _define() -> None:
    tags = (torch.Tag.needs_fixed_stride_order,)
    of_first = "Tensor(a!) out, Tensor(b!) lse, "  # the first set is overwritten
    library.define("merge_fwd(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)", tags=tags)
    library.define(f"merge_inplace({of_first}Tensor[] outs, Tensor[] lses) -> ()", tags=tags)
    torch.library.register_fake(f"{library.ns}::merge_fwd", _fwd_fake, lib=library)
    torch.library.register_fake(f"{library.ns}::merge_inplace", _inplace_fake, lib=library)
    torch.library.register_autograd(
        f"{library.ns}::merge_fwd", _backward, setup_context=_save, lib=library
    )
    refuse_recording(library, ops.merge_inplace.default, INPLACE)
    library.impl("merge_fwd", _fwd_gpu, "CUDA")
    library.impl("merge_inplace", _inplace_gpu, "CUDA")
    library.impl("merge_fwd", _fwd_cpu, "CPU")
    library.impl("merge_inplace", _inplace_cpu, "CPU")


_define()
