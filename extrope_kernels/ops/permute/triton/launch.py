"""From PyTorch tensors to the launches of the kernels, settled once for each of their layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..._shared.triton.launch import VECTOR_BYTES, Plan, alignment, strides_of
from ..power import Power
from .kernel import Operand, Tile, cycles_kernel, permute_kernel

WARPS = 4
# Nothing is computed, so only the size of an element matters: fewer kernels to compile.
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Strides = tuple[int, ...]


class PermuteLaunches(NamedTuple):
    """What a call launches, and what the kernels are told of its tensors."""

    find_cycles: Plan
    permute: Plan
    cycles: tuple[int, ...]  # shape
    word: torch.dtype
    operands: tuple[Strides, ...]  # of each of q and k: strides, and heads of a permutation
    position_strides: Strides

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        permutations: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        offset: int,
    ) -> None:
        """With tensors of the layout that it was made for."""
        cycles = torch.empty(self.cycles, dtype=torch.int32, device=permutations.device)
        self.find_cycles(permutations, permutations.stride(0), cycles)
        of = [
            Operand(x.view(self.word), out.view(self.word), *strides)
            for x, out, strides in zip(inputs, outputs, self.operands, strict=True)
        ]
        second = of[1] if len(of) == 2 else None
        self.permute(of[0], second, cycles, positions, *self.position_strides, offset, cu_seqlens)


def permute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], power: Power) -> None:
    """Permute q (and k) by `power`: one launch for both, after one that finds the cycles.

    inputs, outputs: one or two (batch, seqlen, heads, head_dim) tensors, contiguous in the last
    dimension; no output overlaps an input.
    """
    launches = launches_of(inputs, outputs, power)
    if launches is not None:
        tensors = (power.permutations, power.positions, power.cu_seqlens)
        launches(inputs, outputs, *tensors, power.offset)


def launches_of(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], power: Power
) -> PermuteLaunches | None:
    """For tensors of these layouts; None where there is nothing to permute."""
    batch, seqlen = inputs[0].shape[:2]
    if batch * seqlen * max(x.shape[2] for x in inputs) == 0:
        return None
    table, cu_seqlens = power.permutations, power.cu_seqlens
    permutations, head_dim = table.shape
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tile = _tile(inputs, outputs, power)
    positions = power.positions
    return PermuteLaunches(
        find_cycles=Plan(
            cycles_kernel,
            (permutations,),
            table,
            head_dim=head_dim,
            BLOCK_D=tile.block_d,
            ROUNDS=(head_dim - 1).bit_length(),
            num_warps=1,
        ),
        permute=Plan(
            permute_kernel,
            (triton.cdiv(batch * seqlen, tile.block_m), permutations),
            inputs[0],
            num_sequences=sequences,
            search_steps=sequences.bit_length(),
            tokens=batch * seqlen,
            seqlen=seqlen,
            TILE=tile,
            num_warps=WARPS,
        ),
        cycles=(permutations, 4, head_dim),
        word=WORDS[inputs[0].itemsize],
        operands=tuple(
            _operand(x, out, permutations, tile.align) for x, out in zip(inputs, outputs)
        ),
        position_strides=(0, 0) if positions is None else (*strides_of(positions), 0)[:2],
    )


def _tile(inputs: Sequence[Tensor], outputs: Sequence[Tensor], power: Power) -> Tile:
    head_dim, itemsize = inputs[0].shape[3], inputs[0].itemsize
    block_d = triton.next_power_of_2(head_dim)
    strides = [strides_of(x) for x in (*inputs, *outputs)]
    several = (n for each in strides for n in each[:3])
    return Tile(
        two_operands=len(inputs) == 2,
        # Two vectors of stores a thread keep its loads, which are single dims, in flight.
        block_m=max(1, 2 * WARPS * 32 * VECTOR_BYTES // itemsize // block_d),
        head_dim=head_dim,
        block_d=block_d,
        align=alignment(itemsize, several, (each[1] for each in strides)),
        positions_are_offsets=power.positions_are_offsets,
        inverse=power.inverse,
    )


def _operand(source: Tensor, target: Tensor, permutations: int, align: int) -> Strides:
    """What Operand has beside the tensors."""
    strides = (stride // align for x in (source, target) for stride in strides_of(x)[:3])
    return (*strides, source.shape[2] // permutations)
