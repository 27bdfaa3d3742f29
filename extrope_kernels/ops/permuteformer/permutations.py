"""Permutations of the dims of heads: the authors' draw, cycles, and the dims of a power."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._math import positions as _positions

_MOST = 2**16  # heads of a model, and dims of one: more is a mistake that would fill memory


def head_permutations(heads: int, head_dim: int, *, seed: int = 0xDEADBEEFDEADBEEF) -> Tensor:
    """Draw one random permutation a head, as PermuteFormer's authors do.

    A torch CPU generator with `seed` gives one randperm(head_dim) a head, in order
    (https://arxiv.org/abs/2109.02377, https://github.com/cpcp1998/PermuteFormer).

    heads: of the keys, >= 1.
    head_dim: of each head, >= 1.
    seed: of the generator, 64 bits; the authors' by default.

    Returns: (heads, head_dim) int64 on the CPU.
    Raises: TypeError or ValueError that names the argument.
    """
    for name, value in (("heads", heads), ("head_dim", head_dim), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"head_permutations: {name} must be an int, got {type(value).__name__}")
        if name == "seed":
            if not -(2**63) <= value < 2**64:
                raise ValueError(f"head_permutations: seed must fit 64 bits, got {value}")
        elif not 1 <= value <= _MOST:
            raise ValueError(f"head_permutations: {name} must be 1 to {_MOST}, got {value}")
    on_cpu = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    return torch.stack([torch.randperm(head_dim, **on_cpu) for _ in range(heads)])


class Powers(NamedTuple):
    """The power of a permutation that each token takes: its position."""

    permutations: Tensor  # (rows, head_dim) int64: each serves heads / rows consecutive heads
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None
    offset: int = 0

    def of_tokens(self, shape: torch.Size) -> Tensor:
        """Return (batch or 1, seqlen) int64, wrapped at 2**63; shape: (batch, seqlen, ...)."""
        positions, cu_seqlens = self.positions, self.cu_seqlens
        sequences = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        kind = None if positions is None else _positions.position_kind(positions, shape, sequences)
        if kind == "offsets":
            positions = positions.reshape(-1)
        elif kind == "positions" and positions.dim() == 1:
            positions = positions.unsqueeze(0)
        found = _positions.token_positions(
            positions, kind == "offsets", cu_seqlens, shape[1], self.permutations.device
        )
        return found.long() + self.offset


class Cycles(NamedTuple):
    """The cycles of permutations, each written twice, so that a dim finds all powers behind it.

    pi^p(c) = twice[start[c] + p mod length[c]]: exact for any p.
    """

    length: Tensor  # (heads, head_dim) int64: of dim c's cycle
    start: Tensor  # (heads, head_dim): c's own place in the first writing of its cycle
    twice: Tensor  # (heads, 2 * head_dim): the dims, cycle after cycle in the permutation's order


def cycles(permutations: Tensor) -> Cycles:
    """Decompose (heads, head_dim) permutations on their device, without a host sync.

    A cycle starts at its least dim. Every dim looks ahead for it, twice as far each round.
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
    lengths = torch.where(least == dim, length, 0)
    start = 2 * (lengths.cumsum(-1) - lengths).gather(-1, least) + (length - steps) % length
    twice = torch.cat([dim, dim], -1)
    return Cycles(length, start, twice.scatter(-1, torch.cat([start, start + length], -1), twice))


def source_dims(found: Cycles, positions: Tensor, inverse: bool) -> Tensor:
    """Return pi^p(c) for every token, row and dim: (batch or 1, seqlen, rows, head_dim) int64."""
    length, start, twice = found
    # Modulo every length that a cycle may have: rows share the divisions.
    lengths = torch.arange(1, length.shape[-1] + 1, device=length.device)
    steps = torch.remainder(positions[:, :, None, None], lengths)
    if inverse:
        steps = lengths - steps
    shape = (*positions.shape, *length.shape)
    at = start + steps.expand(shape).gather(-1, (length - 1).expand(shape))
    return twice.expand(*positions.shape, *twice.shape).gather(-1, at)
