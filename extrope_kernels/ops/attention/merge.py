"""Merge attention over disjoint sets of keys, exactly."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._shared.attention_call import lse_shape
from .._shared.checks import refuse_flags


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
    refuse_flags("merge_attention", inplace=inplace)
    _check(outs, lses, inplace)
    if inplace:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*outs, *lses)):
            raise ValueError(
                "merge_attention: inplace=True is for inference, got tensors that require grad"
            )
        return _merged_in_place(outs, lses)
    wide = torch.promote_types(torch.promote_types(outs[0].dtype, torch.float32), lses[0].dtype)
    stacked = torch.stack([lse.to(wide) for lse in lses])
    absent = stacked == -torch.inf
    empty = absent.all(0)
    # An empty row gets finite numbers here, which nothing reads but which keep gradients finite.
    stacked = stacked.masked_fill(empty, 0.0)
    weighted = [
        out.masked_fill(_per_row(no_key), 0.0) * _per_row(weight)
        for out, weight, no_key in zip(outs, torch.softmax(stacked, dim=0), absent)
    ]
    out = functools.reduce(torch.add, weighted).to(outs[0].dtype)
    lse = torch.logsumexp(stacked, dim=0)
    return out, lse.masked_fill(empty, -torch.inf).to(lses[0].dtype)


def _merged_in_place(outs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    for out, lse in zip(outs[1:], lses[1:]):
        joint = torch.logaddexp(lses[0], lse)
        share = torch.exp(lse - joint.masked_fill(joint == -torch.inf, 0.0))
        outs[0].lerp_(out.to(outs[0].dtype), _per_row(share).to(outs[0].dtype))
        lses[0].copy_(joint)
    return outs[0], lses[0]


def _per_row(x: Tensor) -> Tensor:
    """(..., heads, seqlen) as out's (..., seqlen, heads, 1)."""
    return x.transpose(-1, -2).unsqueeze(-1)


def _tensors(name: str, value: object) -> tuple[Tensor, ...]:
    if isinstance(value, Tensor):
        if value.dim() == 0:
            raise ValueError(f"merge_attention: {name} must be stacked tensors, got a scalar")
        return value.unbind(0)
    if not isinstance(value, Sequence) or not all(isinstance(x, Tensor) for x in value):
        raise TypeError(
            f"merge_attention: {name} must be a sequence of Tensors or a stacked Tensor, "
            f"got {type(value).__name__}"
        )
    return tuple(value)


def _check(outs: tuple[Tensor, ...], lses: tuple[Tensor, ...], inplace: bool) -> None:
    if not outs:
        raise ValueError("merge_attention: outs must hold at least one tensor, got none")
    if len(lses) != len(outs):
        raise ValueError(
            f"merge_attention: lses must hold one tensor for each of the {len(outs)} outs, "
            f"got {len(lses)}"
        )
    first = outs[0]
    if first.dim() not in (3, 4):
        raise ValueError(
            "merge_attention: outs must be (batch, seqlen, heads, head_dim), or packed "
            f"(total, heads, head_dim), got shape {tuple(first.shape)}"
        )
    if not first.dtype.is_floating_point:
        raise ValueError(f"merge_attention: outs must be floating point, got {first.dtype}")
    if lses[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"merge_attention: lses must be float32 or float64, got {lses[0].dtype}")
    for name, tensors, shape in (("outs", outs, first.shape), ("lses", lses, lse_shape(first))):
        for i, x in enumerate(tensors):
            narrower = inplace and name == "outs" and x.dtype in (torch.bfloat16, torch.float16)
            dtype = x.dtype if narrower else tensors[0].dtype
            _check_like(f"{name}[{i}]", x, tuple(shape), dtype, first.device)


def _check_like(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"merge_attention: {name} must have shape {shape}, got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"merge_attention: {name} must be {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"merge_attention: {name} must be on {device}, got {x.device}")
