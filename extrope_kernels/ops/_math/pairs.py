"""The two dims of each pair that rotates, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import accumulator


def split_pairs(
    x: Tensor, rotary_dim: int, interleaved: bool, rotary_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Split the rotated dims of x into the two dims of every pair: (..., rotary_dim / 2) each."""
    dims = x[..., rotary_offset : rotary_offset + rotary_dim]
    if interleaved:
        return dims[..., 0::2], dims[..., 1::2]
    return dims[..., : rotary_dim // 2], dims[..., rotary_dim // 2 :]


def join_pairs(a: Tensor, b: Tensor, interleaved: bool) -> Tensor:
    """Join the dims of pairs, (..., rotary_dim): the inverse of `split_pairs`."""
    if interleaved:
        return torch.stack((a, b), dim=-1).flatten(-2)
    return torch.cat((a, b), dim=-1)


def with_rotated(x: Tensor, dims: Tensor, rotary_offset: int = 0) -> Tensor:
    """Return x with these dims, (..., rotary_dim), rounded, in the place of its rotated ones."""
    end = rotary_offset + dims.shape[-1]
    return torch.cat((x[..., :rotary_offset], dims.to(x.dtype), x[..., end:]), dim=-1)


def cross(
    x: Tensor,
    y: Tensor,
    rotary_dim: int,
    interleaved: bool,
    rotary_offset: int,
    per_head: bool,
) -> Tensor:
    """Return x_a y_b - x_b y_a of every pair, the derivative along the angle.

    If y is the gradient of a rotation's input x, this is the gradient of its angle: (batch, seqlen,
    heads or 1, rotary_dim / 2), float32 or 64. Heads that share their frequencies are summed.
    """
    wide = accumulator(x.dtype)
    layout = (rotary_dim, interleaved, rotary_offset)
    xa, xb = split_pairs(x.to(wide), *layout)
    ya, yb = split_pairs(y.to(wide), *layout)
    product = xa * yb - xb * ya
    return product if per_head else product.sum(2, keepdim=True)
