"""Sweeps on the CPU, by the compiled kernels (csrc/cpu/permuteformer.cpp).

The two core ops have no fake and no gradient of their own: the public ops wrap them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _ext
from .sweep import Sweep, Swept

_library = torch.library.Library("extrope", "FRAGMENT")
_library.define(
    "linear_sweep(Tensor x, Tensor y, Tensor w, Tensor? x_scale, Tensor? x_extra, Tensor? y_scale, "
    "Tensor? y_extra, Tensor? gate, Tensor? decay, Tensor? cu_seqlens, Tensor? first_state, "
    "Tensor? first_sum, Tensor? permutations, Tensor? positions, int offset, int heads, "
    "bool phi_scores, bool causal, bool reverse, bool normalize, bool out_is_float, "
    "bool keep_state) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define("row_dots(Tensor x, Tensor y, bool packed) -> Tensor")


def sweep(
    x: Tensor,
    y: Tensor,
    w: Tensor,
    by: Sweep,
    permutations: Tensor | None = None,
    positions: Tensor | None = None,
    offset: int = 0,
) -> Swept:
    """See sweep.py; float32, bfloat16 or float16, accumulated in float32.

    With permutations x and y are permuted first, as by `permute`.
    """
    _load()
    return Swept(
        *torch.ops.extrope.linear_sweep(
            x, y, w, by.x_scale, by.x_extra, by.y_scale, by.y_extra, by.gate,
            None if by.decay is None else by.decay.float().contiguous(),
            by.cu_seqlens, by.first_state, by.first_sum, permutations, positions, offset, by.heads,
            by.phi_scores, by.causal, by.reverse, by.normalize, by.out_is_float, by.keep_state,
        )
    )  # fmt: skip


def row_dots(x: Tensor, y: Tensor, packed: bool) -> Tensor:
    """<x, y> over the last dimension, (batch, heads, seqlen) or (heads, total), float32."""
    _load()
    return torch.ops.extrope.row_dots(x, y, packed)


def _load() -> None:
    if (reason := _ext.load("cpu")) is not None:
        raise RuntimeError(f"linear_attn: the CPU library cannot be used: {reason}")
