"""The pairs of dims that rotate together: shared by the reference and the autograd formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.dtypes import accumulator


def split_pairs(x: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two dims of every pair of x: (..., rotary_dim / 2) each."""
    dims = x[..., :rotary_dim]
    if interleaved:
        return dims[..., 0::2], dims[..., 1::2]
    return dims[..., : rotary_dim // 2], dims[..., rotary_dim // 2 :]


def join_pairs(a: Tensor, b: Tensor, interleaved: bool) -> Tensor:
    """The inverse of `split_pairs`: (..., rotary_dim)."""
    if interleaved:
        return torch.stack((a, b), dim=-1).flatten(-2)
    return torch.cat((a, b), dim=-1)


def cross(x: Tensor, y: Tensor, rotary_dim: int, interleaved: bool, per_head: bool) -> Tensor:
    """x_a y_b - x_b y_a of every pair: (batch, seqlen, heads or 1, rotary_dim / 2), float32 or 64.

    The derivative along the angle: when y is the gradient of a rotation's input x, this is the
    gradient of its angle. Heads that share their frequencies are summed.
    """
    wide = accumulator(x.dtype)
    xa, xb = split_pairs(x.to(wide), rotary_dim, interleaved)
    ya, yb = split_pairs(y.to(wide), rotary_dim, interleaved)
    product = xa * yb - xb * ya
    return product if per_head else product.sum(2, keepdim=True)
