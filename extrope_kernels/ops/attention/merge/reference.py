"""The merge in plain PyTorch: the oracle of all tests, and what runs where there is no kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Shares(NamedTuple):
    """Of the joint softmax, and what they are made of; each with one tensor a set, stacked."""

    lses: Tensor  # finite in rows without keys in any set, which nothing reads
    absent: Tensor  # rows without keys in a set
    weights: Tensor


def shares_of(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Shares:
    """Computed in float32, or in float64 where any input is."""
    wide = torch.promote_types(torch.promote_types(outs[0].dtype, torch.float32), lses[0].dtype)
    stacked = torch.stack([lse.to(wide) for lse in lses])
    absent = stacked == -torch.inf
    stacked = stacked.masked_fill(absent.all(0), 0.0)
    return Shares(stacked, absent, torch.softmax(stacked, dim=0))


def merge_fwd(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `torch.ops.extrope.merge_fwd`; any derivatives."""
    shares = shares_of(outs, lses)
    weighted = [
        out.masked_fill(per_row(no_key), 0.0) * per_row(weight)
        for out, weight, no_key in zip(outs, shares.weights, shares.absent)
    ]
    out = functools.reduce(torch.add, weighted).to(outs[0].dtype)
    lse = torch.logsumexp(shares.lses, dim=0)
    return out, lse.masked_fill(shares.absent.all(0), -torch.inf).to(lses[0].dtype)


def merge_inplace(out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Same arguments as `torch.ops.extrope.merge_inplace`; rounds set by set."""
    for other, its_lse in zip(outs, lses):
        joint = torch.logaddexp(lse, its_lse)
        share = torch.exp(its_lse - joint.masked_fill(joint == -torch.inf, 0.0))
        out.lerp_(other.to(out.dtype), per_row(share).to(out.dtype))
        lse.copy_(joint)


def per_row(x: Tensor) -> Tensor:
    """(..., heads, seqlen) as out's (..., seqlen, heads, 1)."""
    return x.transpose(-1, -2).unsqueeze(-1)
