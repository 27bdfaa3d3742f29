"""The op `permute_fwd_triton`: checked and planned once for each layout of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._shared.triton.launch import INTERPRETED, chip_of, layouts_of, planned
from ..permutations import check_bijective
from ..power import resolve
from .launch import PermuteLaunches, launches_of


def permute_fwd(
    q: Tensor,
    k: Tensor | None,
    permutations: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    offset: int = 0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `torch.ops.extrope.permute_fwd`."""
    tensors = (permutations, positions, cu_seqlens)
    inputs = (q,) if k is None else (q, k)
    outputs = [torch.empty_like(x) for x in inputs]
    fits_32_bits = -(2**31) <= offset < 2**31
    key = (chip_of(q), layouts_of(q, k, *tensors), inverse, fits_32_bits)
    launches = planned(_launches, key, inputs, outputs, tensors, inverse)
    if INTERPRETED:  # where looking costs nothing
        check_bijective(permutations)
    if launches is not None:
        launches(inputs, outputs, *tensors, offset)
    return outputs[0], q.new_empty(0) if k is None else outputs[1]


def _launches(
    inputs: tuple[Tensor, ...],
    outputs: list[Tensor],
    tensors: tuple[Tensor, ...],
    inverse: bool,
) -> PermuteLaunches | None:
    inputs, power = resolve(*(*inputs, None)[:2], *tensors, inverse=inverse)
    return launches_of(inputs, [x.view(like.shape) for x, like in zip(outputs, inputs)], power)
