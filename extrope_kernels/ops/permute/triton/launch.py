"""From PyTorch tensors to the launches of the kernels."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..._shared.triton.launch import VECTOR_BYTES, alignment, strides_of
from ..power import Power
from .kernel import Operand, Tile, cycles_kernel, permute_kernel

WARPS = 4
# Nothing is computed, so only the size of an element matters: fewer kernels to compile.
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def permute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], power: Power) -> None:
    """Permute q (and k) by `power`: one launch for both, after one that finds the cycles.

    inputs, outputs: one or two (batch, seqlen, heads, head_dim) tensors, contiguous in the last
    dimension; no output overlaps an input.
    """
    batch, seqlen = inputs[0].shape[:2]
    if batch * seqlen * max(x.shape[2] for x in inputs) == 0:
        return
    table, positions, cu_seqlens = power.permutations, power.positions, power.cu_seqlens
    head_dim, sequences = table.shape[1], 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tile = _tile(inputs, outputs, power)
    operands = [_operand(x, out, len(table), tile.align) for x, out in zip(inputs, outputs)]
    position_strides = (0, 0) if positions is None else (*strides_of(positions), 0)[:2]
    grid = (triton.cdiv(batch * seqlen, tile.block_m), len(table))
    with torch.cuda.device_of(inputs[0]):
        cycles = torch.empty(len(table), 4, head_dim, dtype=torch.int32, device=table.device)
        rounds = (head_dim - 1).bit_length()
        cycles_kernel[(len(table),)](
            table,
            table.stride(0),
            cycles,
            head_dim,
            BLOCK_D=tile.block_d,
            ROUNDS=rounds,
            num_warps=1,
        )
        permute_kernel[grid](
            operands[0],
            operands[1] if len(operands) == 2 else None,
            cycles,
            positions,
            *position_strides,
            power.offset,
            cu_seqlens,
            sequences,
            sequences.bit_length(),
            batch * seqlen,
            seqlen,
            TILE=tile,
            num_warps=WARPS,
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


def _operand(source: Tensor, target: Tensor, permutations: int, align: int) -> Operand:
    strides = [stride // align for x in (source, target) for stride in strides_of(x)[:3]]
    word = WORDS[source.itemsize]
    return Operand(source.view(word), target.view(word), *strides, source.shape[2] // permutations)
