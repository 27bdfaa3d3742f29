"""From PyTorch tensors to one launch of the kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..._shared.triton.launch import Plan, strides_of
from ..rotation import Rotation
from .kernel import Operand, Tile, rotate_kernel
from .programs import alignment_of, programs_of, rotation_arguments

# Where every head has its own frequencies, a limit that no kernel reaches: left to itself, ptxas
# spills to fit one more block.
MOST_REGISTERS = 128


def rotate(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor] | None,
    angle_grad: Tensor | None,
    rotation: Rotation,
) -> None:
    """Rotate q (and k) by `rotation` in one launch.

    inputs, outputs, saved: one or two (batch, seqlen, heads, head_dim) tensors, contiguous in the
    last dimension; outputs may be the inputs. angle_grad: contiguous (batch, seqlen, heads or 1,
    rotary_dim / 2) float32 (float64 for float64 tensors), filled with the gradient of the angles
    where `inputs` are the gradients of a rotation's results and `saved` its inputs.
    """
    launch = plan(inputs, outputs, saved, angle_grad, rotation)
    if launch is None:
        if angle_grad is not None:
            angle_grad.zero_()
        return
    tensors = [x for xs in (inputs, outputs, saved or (None,)) for x in (*xs, None)[:2]]
    by = (rotation.inv_freq, rotation.positions, rotation.axes, rotation.cu_seqlens)
    launch(*tensors, angle_grad, *by, rotation.log_decay, rotation.offset)


def plan(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor] | None,
    angle_grad: Tensor | None,
    rotation: Rotation,
) -> Plan | None:
    """The launch for tensors of these layouts, to be called with q, k, their outputs, what is
    saved of them, angle_grad, inv_freq, positions, axes, cu_seqlens, log_decay and the offset; None
    where there is nothing to rotate.
    """
    batch, seqlen = inputs[0].shape[:2]
    if batch * seqlen * max(x.shape[2] for x in inputs) == 0:
        return None
    tile, grid, warps = _tile(inputs, outputs, saved, angle_grad is not None, rotation)
    operands = [
        operand_of(x, out, saved[i] if saved else x, rotation.decay_signs[i], tile.align)
        for i, (x, out) in enumerate(zip(inputs, outputs, strict=True))
    ]
    return Plan(
        rotate_kernel,
        grid,
        inputs[0],
        of_q=operands[0],
        of_k=operands[1] if len(operands) == 2 else None,
        angle_heads=angle_grad.shape[2] if angle_grad is not None else 0,
        **rotation_arguments(rotation),
        direction=-1.0 if rotation.conjugate else 1.0,
        tokens=batch * seqlen,
        seqlen=seqlen,
        TILE=tile,
        num_warps=warps,
        maxnreg=MOST_REGISTERS if tile.per_head and torch.version.hip is None else None,
    )


def _tile(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor] | None,
    with_angle_grad: bool,
    rotation: Rotation,
) -> tuple[Tile, tuple[int, int], int]:
    """Tile, grid and warps per program: few different ones, so that little is compiled."""
    half, head_dim = rotation.inv_freq.shape[-1], inputs[0].shape[3]
    pairs = triton.next_power_of_2(half)
    # Sums over the heads stay in one program: no atomics, the same bits in every run.
    sum_heads = with_angle_grad and not rotation.per_head
    heads = 1 if sum_heads else max(x.shape[2] for x in inputs)
    programs = programs_of(inputs[0], pairs, heads, may_be_few=not sum_heads)
    moved = any(x.data_ptr() != out.data_ptr() for x, out in zip(inputs, outputs, strict=True))
    tail = head_dim - 2 * half if moved else 0
    tile = Tile(
        two_operands=len(inputs) == 2,
        tokens=programs.tokens,
        half=half,
        pairs=pairs,
        tail=tail,
        padded_tail=triton.next_power_of_2(max(tail, 1)),
        align=alignment_of((*inputs, *outputs, *(saved or ()))),
        interleaved=rotation.interleaved,
        wide=inputs[0].dtype == torch.float64,
        per_head=rotation.per_head,
        positions_are_offsets=rotation.positions_are_offsets,
    )
    return tile, (programs.tiles, programs.shares), programs.warps


def operand_of(
    source: Tensor, target: Tensor, saved: Tensor, decay_sign: float, align: int
) -> Operand:
    strides = [stride // align for x in (source, target, saved) for stride in strides_of(x)[:3]]
    return Operand(*strides, source.shape[2], decay_sign)
