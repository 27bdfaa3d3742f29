"""The permutation's powers in plain PyTorch: the oracle of all tests."""

from __future__ import annotations

import torch
from torch import Tensor

from .permutations import check_bijective, cycles
from .power import Power, resolve


def permute_fwd(
    q: Tensor, k: Tensor | None, *more: Tensor | None, **options
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `torch.ops.extrope.permute_fwd`."""
    tensors, power = resolve(q, k, *more, **options)
    check_bijective(power.permutations)
    dims = source_dims(power, tensors[0].shape[1])
    outs = []
    for x in tensors:
        of_heads = dims.repeat_interleave(x.shape[2] // dims.shape[2], 2)
        outs.append(x.gather(-1, of_heads.expand(x.shape)))
    return outs[0].view_as(q), outs[1].view_as(k) if k is not None else q.new_empty(0)


def source_dims(power: Power, seqlen: int) -> Tensor:
    """(batch or 1, seqlen, rows, head_dim) int64: pi^p(c) for every token, row and dim."""
    start, length, index, flat = cycles(power.permutations)
    positions = power.token_positions(seqlen)[:, :, None, None]
    steps = torch.remainder(positions, length)
    at = start + torch.remainder(index - steps if power.inverse else index + steps, length)
    return flat.expand(at.shape).gather(-1, at)
