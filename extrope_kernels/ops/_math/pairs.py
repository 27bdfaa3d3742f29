"""The two dims of each pair that rotates, in PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import accumulator


class PairDims(NamedTuple):
    """Which dims of a row are pairs."""

    rotary_dim: int  # dims that rotate
    interleaved: bool  # pairs are neighbours; else (i, i + rotary_dim / 2)
    rotary_offset: int  # the first dim that rotates


def split_pairs(x: Tensor, at: PairDims) -> tuple[Tensor, Tensor]:
    """Split the rotated dims of x into the two dims of every pair: (..., rotary_dim / 2) each."""
    dims = x[..., at.rotary_offset : at.rotary_offset + at.rotary_dim]
    if at.interleaved:
        return dims[..., 0::2], dims[..., 1::2]
    return dims[..., : at.rotary_dim // 2], dims[..., at.rotary_dim // 2 :]


def with_pairs(x: Tensor, a: Tensor, b: Tensor, at: PairDims) -> Tensor:
    """Return x with these pairs, rounded, in the place of its own: the inverse of `split_pairs`."""
    dims = torch.stack((a, b), -1).flatten(-2) if at.interleaved else torch.cat((a, b), -1)
    before, after = x[..., : at.rotary_offset], x[..., at.rotary_offset + at.rotary_dim :]
    return torch.cat((before, dims.to(x.dtype), after), dim=-1)


def cross(x: Tensor, y: Tensor, at: PairDims, per_head: bool) -> Tensor:
    """Return x_a y_b - x_b y_a of every pair, the derivative along the angle.

    If y is the gradient of a rotation's input x, this is the gradient of its angle: (batch, seqlen,
    heads or 1, rotary_dim / 2), float32 or 64. Heads that share their frequencies are summed.
    """
    wide = accumulator(x.dtype)
    xa, xb = split_pairs(x.to(wide), at)
    ya, yb = split_pairs(y.to(wide), at)
    product = xa * yb - xb * ya
    return product if per_head else product.sum(2, keepdim=True)
