"""Permutations of the dims of heads: the authors' draw, and their cycles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MOST = 2**16  # heads of a model, and dims of one: more is a mistake that would fill the memory


def head_permutations(heads: int, head_dim: int, *, seed: int = 0xDEADBEEFDEADBEEF) -> Tensor:
    """Draw one random permutation a head, as PermuteFormer's authors do.

    A torch CPU generator with `seed` gives one randperm(head_dim) a head, in order
    (https://arxiv.org/abs/2109.02377, https://github.com/cpcp1998/PermuteFormer).

    Returns: (heads, head_dim) int64 on the CPU.
    """
    for name, value in (("heads", heads), ("head_dim", head_dim), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"head_permutations: {name} must be an int, got {type(value).__name__}")
        if name == "seed":
            if not -(2**63) <= value < 2**64:
                raise ValueError(f"head_permutations: seed must fit 64 bits, got {value}")
        elif not 1 <= value <= _MOST:
            raise ValueError(f"head_permutations: {name} must be 1 to {_MOST}, got {value}")
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(head_dim, generator=generator) for _ in range(heads)])


class Cycles(NamedTuple):
    """The cycles of permutations, each (heads, head_dim) int64.

    pi^p(c) = flat[start[c] + (index[c] + p) mod length[c]]: exact for any p.
    """

    start: Tensor  # where in flat the cycle of dim c starts
    length: Tensor  # of that cycle
    index: Tensor  # where in its cycle dim c is
    flat: Tensor  # the dims, cycle after cycle, each in the order of its permutation


def cycles(permutations: Tensor) -> Cycles:
    """Decompose (heads, head_dim) permutations on their device, without a host sync.

    A cycle starts at its least dim. Every dim looks for it ahead, twice as far each round.
    """
    head_dim = permutations.shape[-1]
    dim = torch.arange(head_dim, device=permutations.device).expand_as(permutations)
    # The least dim seen so far and the steps to it, in one number; steps stay below 2 * head_dim.
    seen, ahead = dim * (2 * head_dim), permutations
    for doubling in range((head_dim - 1).bit_length()):
        seen = torch.minimum(seen, seen.gather(-1, ahead) + 2**doubling)
        ahead = ahead.gather(-1, ahead)
    least, steps = seen // (2 * head_dim), seen % (2 * head_dim)
    length = 1 + steps.gather(-1, permutations.gather(-1, least))
    index = (length - steps) % length
    lengths = torch.where(least == dim, length, 0)
    start = (lengths.cumsum(-1) - lengths).gather(-1, least)
    return Cycles(start, length, index, torch.empty_like(dim).scatter(-1, start + index, dim))


def check_bijective(permutations: Tensor) -> None:
    """Raise ValueError when a row does not hold every dim once, where a look costs no sync.

    That is: on the CPU, and not while a graph is traced.
    """
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or permutations.device.type != "cpu" or type(permutations) is not Tensor:
        return
    dim = permutations.shape[-1]
    wrong = (permutations.sort(-1).values != torch.arange(dim, device="cpu")).any(-1)
    if wrong.any():
        raise ValueError(
            f"permute: permutations must hold 0 to {dim - 1} once in every row, "
            f"row {wrong.nonzero()[0].item()} does not"
        )
