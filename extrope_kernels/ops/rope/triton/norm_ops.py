"""The ops `rope_norm_*_triton`: checked and planned once for each layout of their arguments."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..._shared.dtypes import accumulator
from ..._shared.triton.launch import Plan, chip_of, layouts_of, planned
from ..checks import check_norm, refuse_overlap
from ..rotation import Rotation, resolve
from .launch import operand_of
from .norm_kernel import NormTile, norm_rotate_kernel
from .ops import like
from .programs import alignment_of, programs_of, rotation_arguments

# Of a backward: left to itself, ptxas spills to fit one more block.
ALL_REGISTERS = 255
Tensors = list[Tensor]


class _Call(NamedTuple):
    launch: Plan | None  # where there is anything to rotate
    by_axis: bool  # every pair reads the position of its axis
    programs: int  # each has a row of the sums for the gradients of the weights


def rope_norm_fwd(
    q: Tensor, k: Tensor | None, *others: Tensor | None, **options
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `torch.ops.extrope.rope_norm_fwd`."""
    out_q, out_k = like(q, q), like(k, q)
    _launch((q, k, out_q, out_k if k is not None else None, None, None), *others, **options)
    return out_q, out_k


def rope_norm_inplace(q: Tensor, k: Tensor | None, *others: Tensor | None, **options) -> None:
    """Same arguments as `torch.ops.extrope.rope_norm_inplace`."""
    _launch((q, k, q, k, None, None), *others, **options)


def rope_norm_bwd(
    grad_q: Tensor,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    *others: Tensor | None,
    **options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same arguments and results as `torch.ops.extrope.rope_norm_bwd`."""
    dq, dk = like(grad_q, grad_q), like(grad_k, grad_q)
    outputs = (dq, dk if grad_k is not None else None)
    parts = _launch((grad_q, grad_k, *outputs, q, k), *others, **options)
    none = grad_q.new_empty(0, dtype=accumulator(grad_q.dtype))
    of_weights = [none.clone() if x is None else x.sum(0) for x in parts]
    return dq, dk, *of_weights


def _launch(
    tensors: tuple[Tensor | None, ...],
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    inv_freq: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log_decay: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    offset: int = 0,
    **options,
) -> tuple[Tensor | None, Tensor | None]:
    """Norm and rotate tensors (q, k, their outputs, what is saved of them).

    Returns, of a backward, the sums for the gradients of the weights: (programs, dims).
    """
    q, _, out_q, _, saved_q, _ = tensors
    weights = (q_norm_weight, k_norm_weight)
    rope_args = (inv_freq, positions, cu_seqlens, log_decay, axes)
    key = (
        chip_of(q),
        out_q is q,
        layouts_of(*tensors[:2], *tensors[4:], *weights, *rope_args),
        -(2**31) <= offset < 2**31,
        tuple(options.items()),
    )
    call = planned(_plan, key, tensors, weights, rope_args, options)
    wide = accumulator(q.dtype)
    parts = tuple(
        None
        if saved_q is None or weight is None
        else q.new_empty(call.programs, weight.shape[0], dtype=wide)
        for weight in weights
    )
    if call.launch is not None:
        axes = axes if call.by_axis else None
        by = (inv_freq, positions, axes, cu_seqlens, log_decay, offset)
        call.launch(*tensors, *weights, *parts, *by)
    return parts


def _plan(tensors, weights, rope_args, options: dict[str, Hashable]) -> _Call:
    q, k, out_q, out_k, saved_q, saved_k = tensors
    options = dict(options)
    eps = options.pop("norm_eps", 1e-6)
    backward = saved_q is not None
    inputs, rotation = resolve(q, k, *rope_args, adjoint=backward, **options)
    check_norm(q, k, *weights, eps)
    if out_q is q:
        refuse_overlap(q, k)
    outputs = [x.view(like.shape) if x is not y else like
               for x, y, like in zip((out_q, out_k), (q, k), inputs)]  # fmt: skip
    saved = inputs
    if backward:
        saved = [x.view_as(like) for x, like in zip((saved_q, saved_k), inputs)]
    batch, seqlen, _, head_dim = inputs[0].shape
    if batch * seqlen * max(x.shape[2] for x in inputs) == 0:
        return _Call(None, rotation.axes is not None, 0)
    together = [w is not None and w.shape[0] != head_dim for w in (*weights, None)][:2]
    tile, grid, warps = _tile(inputs, outputs, saved, together, backward, rotation)
    operands = [
        operand_of(x, out, kept, sign, tile.align)
        for x, out, kept, sign in zip(inputs, outputs, saved, rotation.decay_signs)
    ]
    q_dims, k_dims = (0 if w is None else w.shape[0] for w in weights)
    launch = Plan(
        norm_rotate_kernel,
        grid,
        inputs[0],
        of_q=operands[0],
        of_k=operands[1] if len(operands) == 2 else None,
        q_dims=q_dims,
        k_dims=k_dims,
        **rotation_arguments(rotation),
        eps=eps,
        direction=-1.0 if rotation.conjugate else 1.0,
        tokens=batch * seqlen,
        seqlen=seqlen,
        TILE=tile,
        num_warps=warps,
        maxnreg=ALL_REGISTERS if backward and torch.version.hip is None else None,
    )
    return _Call(launch, rotation.axes is not None, grid[0])


def _tile(
    inputs: Tensors,
    outputs: Tensors,
    saved: Tensors,
    together: list[bool],
    backward: bool,
    rotation: Rotation,
) -> tuple[NormTile, tuple[int, int], int]:
    """Tile, grid and warps of a program, as for the rotation alone."""
    half, head_dim = rotation.inv_freq.shape[-1], inputs[0].shape[3]
    pairs = triton.next_power_of_2(half)
    # The mean square of all heads is read before any of them is overwritten: by one program.
    in_place = any(x is out for x, out in zip(inputs, outputs))
    one_program = backward or (in_place and any(together))
    heads = 1 if one_program else max(x.shape[2] for x in inputs)
    # A backward would spill beside as many tokens of dims that pass, but of float32 in halves.
    spilling = backward and (rotation.interleaved or inputs[0].itemsize == 2)
    width = triton.next_power_of_2(head_dim) // 2 if spilling else pairs
    programs = programs_of(inputs[0], pairs, heads, may_be_few=not backward, width=width)
    rest = head_dim - 2 * half
    tile = NormTile(
        two_operands=len(inputs) == 2,
        tokens=programs.tokens,
        half=half,
        pairs=pairs,
        rest=rest,
        rest_dims=triton.next_power_of_2(max(rest, 1)),
        align=alignment_of((*inputs, *outputs, *saved)),
        interleaved=rotation.interleaved,
        wide=inputs[0].dtype == torch.float64,
        per_head=rotation.per_head,
        positions_are_offsets=rotation.positions_are_offsets,
        q_together=together[0],
        k_together=together[1],
    )
    return tile, (programs.tiles, programs.shares), programs.warps
