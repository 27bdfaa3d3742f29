"""The op `rope_append_triton`: checked and planned once for each layout of its arguments."""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from ....scores import PositionMap
from ..._shared.dtypes import FP8, as_bits
from ..._shared.triton.launch import INTERPRETED, Plan, chip_of, layouts_of, planned, strides_of
from ..append import Append, check, check_values
from ..rotation import Rotation, resolve
from .append_kernel import AppendTile, rope_append_kernel
from .launch import operand_of
from .programs import alignment_of, programs_of, rotation_arguments


def rope_append(*tensors: Tensor | None, **options) -> Tensor:
    """Same arguments and results as `torch.ops.extrope.rope_append`."""
    numbers = [tuple(n) if isinstance(n, list) else n for n in options.values()]
    key = (chip_of(tensors[1]), *options, *numbers, layouts_of(*tensors))
    launch, by_axis = planned(_plan, key, tensors, options)
    if INTERPRETED:  # where looking costs nothing
        check_values("rope_append", Append(*tensors, **options))
    q, k, v, k_cache, v_cache, *others, axes, k_scale, v_scale = (*tensors, *[None] * 10)[:18]
    axes = axes if by_axis else None
    if k_scale is not None:
        k_cache, v_cache = as_bits(k_cache), as_bits(v_cache)
    out = k.new_empty(0) if q is None else torch.empty_like(q)
    if launch is not None:
        to = (None if q is None else out, k_cache, v_cache)
        launch(q, k, v, *to, *others, axes, k_scale, v_scale)
    return out


def _plan(tensors: tuple[Tensor | None, ...], options: dict) -> tuple[Plan | None, bool]:
    """The launch, where there is one, and whether every pair reads the position of its axis."""
    call = Append(*tensors, **options)
    check("rope_append", call)
    if call.batch * call.seqlen == 0:
        return None, False
    q, k, v = (x[None] if call.packed and x is not None else x for x in (call.q, call.k, call.v))
    rotation = _rotation(call, q, k)
    tile, grid, warps = _tile(call, q, k, v, rotation)
    of_q = None if q is None else operand_of(q, torch.empty_like(q), q, 1.0, tile.align)
    slots, table, position_map = call.slot_mapping, call.block_table, call.map or PositionMap()
    slot_strides = (0, 0) if slots is None else strides_of(slots.view(call.batch, call.seqlen))
    launch = Plan(
        rope_append_kernel,
        grid,
        k,
        of_q=of_q,
        of_k=operand_of(k, call.k_cache, k, -1.0, tile.align),
        of_v=operand_of(v, call.v_cache, v, 1.0, tile.align),
        slot_batch=slot_strides[0],
        slot_seq=slot_strides[1],
        table_batch=0 if table is None else table.stride(0),
        pages=call.k_cache.shape[0],
        page_size=call.k_cache.shape[1],
        capacity=call.capacity,
        **rotation_arguments(rotation),
        eps=float(call.norm_eps),
        modulus=float(position_map.modulus),
        divisor=float(position_map.divisor),
        floor=float(position_map.floor),
        map_offset=float(position_map.offset),
        cap=float(position_map.cap),
        tokens=call.batch * call.seqlen,
        seqlen=call.seqlen,
        TILE=tile,
        num_warps=warps,
    )
    return launch, rotation.axes is not None


def _rotation(call: Append, q: Tensor | None, k: Tensor) -> Rotation:
    """By `positions`, or by those that follow the slots in use."""
    behind = call.positions is None
    inv_freq, cu_seqlens = call.inv_freq, call.cu_seqlens
    if inv_freq is None:  # of which the kernel reads nothing
        inv_freq = torch.empty(max(k.shape[-1] // 2, 1), device=k.device)
    packed = cu_seqlens is not None
    _, rotation = resolve(
        k[0] if packed else k,
        None,
        inv_freq,
        None if behind else call.positions,
        cu_seqlens,
        call.log_decay,
        call.axes,
        adjoint=False,
        attention_factor=call.attention_factor,
        interleaved=call.interleaved,
        decay_origin=call.decay_origin,
    )
    if not (behind and call.inv_freq is not None):
        return rotation
    return dataclasses.replace(
        rotation, positions=call.cache_seqlens, positions_are_offsets=True, axes=None
    )


def _tile(
    call: Append, q: Tensor | None, k: Tensor, v: Tensor, rotation: Rotation
) -> tuple[AppendTile, tuple[int, int], int]:
    half, head_dim, head_dim_v = rotation.inv_freq.shape[-1], k.shape[3], v.shape[3]
    pairs, rest = triton.next_power_of_2(half), head_dim - 2 * half
    heads = max(x.shape[2] for x in (q, k) if x is not None)
    programs = programs_of(k, pairs, heads)
    outputs = [] if q is None else [q, torch.empty_like(q)]
    tensors = (k, v, call.k_cache, call.v_cache, *outputs)
    weights = (call.q_norm_weight, call.k_norm_weight)
    together = [w is not None and w.shape[0] != head_dim for w in weights]
    tile = AppendTile(
        tokens=programs.tokens,
        half=half,
        pairs=pairs,
        rest=rest,
        rest_dims=triton.next_power_of_2(max(rest, 1)),
        head_dim_v=head_dim_v,
        dims_v=triton.next_power_of_2(head_dim_v),
        align=alignment_of(tensors),
        interleaved=rotation.interleaved,
        wide=k.dtype == torch.float64,
        per_head=rotation.per_head,
        positions_are_offsets=rotation.positions_are_offsets,
        rotates_q=call.rotates_q,
        rotates_k=call.inv_freq is not None,
        maps=call.map is not None,
        q_together=together[0],
        k_together=together[1],
        by_slots=call.slot_mapping is not None,
        paged=call.block_table is not None,
        fp8=call.k_cache.dtype == FP8,
    )
    return tile, (programs.tiles, programs.shares), programs.warps
