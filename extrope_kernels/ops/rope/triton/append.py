"""The write into a key/value cache in Triton: norm, rotation, keys and values in one launch.

`rope_append_kvcache` launches it by its op. A decode step launches it before it attends
(ops/attention/triton/decode.py), without q and norm.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ....scores.base import SAME
from ..._shared.dtypes import as_bits
from ..._shared.layouts import cached_by_layout, layout_key
from ..._shared.triton.fp8 import quantize_rows
from ..._shared.triton.launch import INTERPRETED, Launch, strides_of
from ..._shared.triton.pairs import copy_rows
from ..append_checks import Append, check, check_values
from ..rotation import Rotation, resolve
from .device import (
    CALL_NUMBERS,
    Rope,
    Rows,
    build_launch,
    decayed,
    launch_constants,
    load_positions,
    program_heads,
    program_tokens,
    stride_names,
)
from .norm import norm_rotate

# These change from call to call too.
CACHE_NUMBERS = (
    *("k_cache_stride_block", "k_cache_stride_slot", "k_cache_stride_head"),
    *("v_cache_stride_block", "v_cache_stride_slot", "v_cache_stride_head"),
    *("slot_mapping_stride_batch", "slot_mapping_stride_seq", "block_table_stride"),
    *("num_blocks", "page_size", "capacity", "num_counters"),
)


class Slots(NamedTuple):
    """The tensors that give new tokens their slots, and fp8 scales; None if not given."""

    cache_seqlens: Tensor | None  # (sequences,): slots in use, left padding included
    block_table: Tensor | None  # (sequences, pages of a sequence)
    slot_mapping: Tensor | None  # (batch, seqlen): page * page_size + slot, or -1
    leftpad: Tensor | None  # (sequences,): the slot of position 0
    k_scale: Tensor | None  # (heads_k,)
    v_scale: Tensor | None


class Step(NamedTuple):
    """Constants of the kernel, beside its Tile."""

    head_dim_v: int
    dims_v: int  # head_dim_v, rounded up to a power of two
    q_together: bool  # the mean square is over all heads of a token
    k_together: bool
    rotates_q: bool
    rotates_k: bool
    eps: float
    by_pair: bool  # pair_maps has the divisors and offsets by which keys are stored
    map_row: int  # their row
    map_heads: int  # heads of k with their own; 1: all share them


@triton.jit
def _number(x):
    return tl.full((1, 1), x, tl.float64)  # a plain number is a float32


@triton.jit
def _stored_positions(
    position, pair_maps_ptr, MAP: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Map positions (TOKENS, 1) to those at which keys are stored: (TOKENS, 1 or PAIRS) float64.

    MAP: a PositionMap. pair_maps: (rows, 2, map_heads, half) float64; with STEP.by_pair, its
    divisors and offsets take the place of the map's.
    """
    if MAP.modulus > 0:
        whole = tl.floor(position / _number(MAP.modulus))
        position -= whole * _number(MAP.modulus)
    if STEP.by_pair:
        OFFSETS: tl.constexpr = STEP.map_heads * TILE.half  # they follow the divisors of all heads
        pair = tl.arange(0, TILE.pairs)
        divisor_ptrs = pair_maps_ptr + STEP.map_row * 2 * OFFSETS + pair
        if STEP.map_heads > 1:
            divisor_ptrs += tl.program_id(1) * TILE.half  # a program then has one head
        mask = pair < TILE.half
        divisor = tl.load(divisor_ptrs, mask=mask, other=1.0)[None, :]  # (1, PAIRS)
        offset = tl.load(divisor_ptrs + OFFSETS, mask=mask, other=0.0)[None, :]
        position = position / divisor  # (TOKENS, PAIRS)
        if MAP.floor:
            position = tl.floor(position)
        position += offset
    else:
        if MAP.divisor != 1:
            position = position / _number(MAP.divisor)
        if MAP.floor:
            position = tl.floor(position)
        position = tl.minimum(position + _number(MAP.offset), _number(MAP.cap))
    return position


@triton.jit(
    do_not_specialize=(*CALL_NUMBERS, *CACHE_NUMBERS, *stride_names("q", "k", "q_out", "v"))
)
def rope_append_kernel(
    q_ptr, k_ptr, q_out_ptr, v_ptr, k_cache_ptr, v_cache_ptr, q_weight_ptr, k_weight_ptr,
    cache_seqlens_ptr, block_table_ptr, slot_mapping_ptr, leftpad_ptr, k_scale_ptr, v_scale_ptr,
    inv_freq_ptr, positions_ptr, cu_seqlens_ptr, log_decay_ptr, axes_ptr,
    pair_maps_ptr, counters_ptr,
    q_stride_batch, q_stride_seq, q_stride_head,
    k_stride_batch, k_stride_seq, k_stride_head,
    q_out_stride_batch, q_out_stride_seq, q_out_stride_head,
    v_stride_batch, v_stride_seq, v_stride_head,
    k_cache_stride_block, k_cache_stride_slot, k_cache_stride_head,
    v_cache_stride_block, v_cache_stride_slot, v_cache_stride_head,
    count, seqlen,  # tokens: count = batch * seqlen
    positions_stride_axis, positions_stride_batch, positions_stride_seq,
    num_sequences, search_steps,  # of cu_seqlens; steps of a binary search in it
    decay_origin: tl.float64, amplitude: tl.float64,
    slot_mapping_stride_batch, slot_mapping_stride_seq, block_table_stride,
    num_blocks, page_size, capacity,  # of the caches; slots of a block, and of a sequence
    num_counters,
    STEP: tl.constexpr, STORED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Norm, rotate and write: axis 0 is tiles of tokens, axis 1 shares of the heads.

    Strides of q, k, ..., v_cache count groups of TILE.align elements.

    q, k, q_out, v: (batch, seqlen, heads, head_dim); q and q_out may be None.
    k_cache, v_cache: (blocks, slots, heads, head_dim). A block is a page of page_size slots, or
        without block_table and slot_mapping a sequence.
    q_weight, k_weight: as in norm_rotate.
    cache_seqlens, ..., v_scale: see Slots. inv_freq, ..., axes: see rotate_kernel.
    STORED: the PositionMap by which a score method stores keys, or None; pair_maps: as in
        _stored_positions.
    counters: float32, of which num_counters become 0, or None. The launch that attends counts
        there; this one comes before it anyway.
    """
    ALIGN: tl.constexpr = TILE.align
    if counters_ptr is not None:
        programs = tl.num_programs(0) * tl.num_programs(1)
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        for n in tl.range(program, num_counters, programs):
            tl.store(counters_ptr + n, 0.0)

    # sequence (TOKENS,), position (TOKENS, 1), or with axes (TOKENS, PAIRS); float64
    batch, seq, valid = program_tokens(count, seqlen, TILE)  # (TOKENS,): int64, int64, mask
    sequence, position = load_positions(
        batch, seq, valid, positions_ptr, cu_seqlens_ptr, axes_ptr, 0, positions_stride_axis,
        positions_stride_batch, positions_stride_seq, num_sequences, search_steps, TILE,
    )  # fmt: skip
    if TILE.positions_are_offsets and leftpad_ptr is not None:
        pad = tl.load(leftpad_ptr + sequence, mask=valid, other=0)
        position -= pad.to(tl.float64)[:, None]
    if STORED is not None:
        position = _stored_positions(position, pair_maps_ptr, STORED, STEP, TILE)

    # Slots, each in a block of the caches: (TOKENS,). Tokens without one are not written.
    if slot_mapping_ptr is not None:
        at = batch * slot_mapping_stride_batch + seq * slot_mapping_stride_seq
        slot = tl.load(slot_mapping_ptr + at, mask=valid, other=-1).to(tl.int64)
        block = slot // page_size
        written = valid & (slot >= 0) & (block < num_blocks)
        slot = slot % page_size
    else:
        slot = seq
        written = valid
        if cu_seqlens_ptr is not None:  # tokens after the last boundary belong to no sequence
            begin = tl.load(cu_seqlens_ptr + sequence)
            written = written & (seq >= begin) & (seq < tl.load(cu_seqlens_ptr + sequence + 1))
            slot = seq - begin
        slot += tl.load(cache_seqlens_ptr + sequence, mask=written, other=-1)
        written = written & (slot >= 0) & (slot < capacity)
        block = sequence.to(tl.int64)
        if block_table_ptr is not None:
            slot = slot.to(tl.int32)  # in 64 bits, a GPU calls a function for every division
            page_ptr = block_table_ptr + sequence * block_table_stride + slot // page_size
            block = tl.load(page_ptr, mask=written, other=-1).to(tl.int64)
            written = written & (block >= 0) & (block < num_blocks)
            slot = slot % page_size
    slot = slot.to(tl.int64)

    # q, keys, then values: what rotates first, since values need no more of its registers.
    distance = position - decay_origin
    if q_ptr is not None:
        q_out_row = batch * q_out_stride_batch + seq * q_out_stride_seq
        norm_rotate(
            Rows(q_ptr, batch * q_stride_batch + seq * q_stride_seq, q_stride_head), valid,
            q_weight_ptr, Rows(q_out_ptr, q_out_row, q_out_stride_head), valid, None,
            inv_freq_ptr, sequence, position,
            decayed(amplitude, distance, log_decay_ptr, TILE.decay_sign, TILE),
            TILE.heads_q, STEP.q_together, STEP.rotates_q, STEP.eps, TILE,
        )  # fmt: skip
    k_cache_row = block * k_cache_stride_block + slot * k_cache_stride_slot
    norm_rotate(
        Rows(k_ptr, batch * k_stride_batch + seq * k_stride_seq, k_stride_head), valid,
        k_weight_ptr, Rows(k_cache_ptr, k_cache_row, k_cache_stride_head), written, k_scale_ptr,
        inv_freq_ptr, sequence, position,
        decayed(amplitude, distance, log_decay_ptr, -TILE.decay_sign, TILE),
        TILE.heads_k, STEP.k_together, STEP.rotates_k, STEP.eps, TILE,
    )  # fmt: skip
    v_row = batch * v_stride_batch + seq * v_stride_seq
    v_cache_row = block * v_cache_stride_block + slot * v_cache_stride_slot
    first, last = program_heads(TILE.heads_k)
    for head in range(first, last):
        head = tl.cast(head, tl.int64)  # head * stride may pass 32 bits
        # Times ALIGN, from groups to elements: so the compiler knows that rows are aligned.
        v_at = (v_row + head * v_stride_head) * ALIGN
        v_cache_at = (v_cache_row + head * v_cache_stride_head) * ALIGN
        rows, to = v_ptr + v_at, v_cache_ptr + v_cache_at
        if v_scale_ptr is not None:
            v_scale = tl.load(v_scale_ptr + head)
            quantize_rows(rows, to, v_scale, written, STEP.head_dim_v, STEP.dims_v)
        else:
            copy_rows(rows, to, written, STEP.head_dim_v, STEP.dims_v)


# -------------------------------------------------------------------------------------------------
# The launch


def build_append(call: Append, pair_maps: Tensor | None = None, num_counters: int = 0) -> Launch:
    """Build the launch for a checked call.

    pair_maps: contiguous, for keys that `call.stored` stores by pair; q is None then.
    """
    if call.k.shape[-1] < 2 or call.v.shape[-1] < 1:
        raise NotImplementedError(
            "rope_append: Triton's kernel needs a head_dim of at least 2, and of v at least 1, "
            f"got {call.k.shape[-1]} and {call.v.shape[-1]}"
        )
    out = None if call.q is None else torch.empty_like(call.q)  # for its strides
    heads = (call.q, call.k, out, call.v)
    q, k, out, v = (x[None] if call.packed and x is not None else x for x in heads)
    constants, numbers = launch_constants(_rotation(call, k))
    mapping, table, stored = call.slot_mapping, call.block_table, call.map
    by_pair = stored is not None and stored.row is not None
    weights = (call.q_norm_weight, call.k_norm_weight)
    together = [w is not None and w.shape[0] != k.shape[3] for w in weights]
    step = Step(
        head_dim_v=v.shape[3],
        dims_v=next_power_of_2(v.shape[3]),
        q_together=together[0],
        k_together=together[1],
        rotates_q=call.rotates_q,
        rotates_k=call.inv_freq is not None,
        eps=float(call.norm_eps),
        by_pair=by_pair,
        map_row=stored.row if by_pair else 0,
        map_heads=1,
    )
    numbers += (
        *((0, 0) if mapping is None else strides_of(mapping.view(call.batch, call.seqlen))),
        0 if table is None else table.stride(0),
        *call.k_cache.shape[:2],
        call.capacity,
        num_counters,
    )
    tensors = (q, k, out, v, call.k_cache, call.v_cache)
    stored = None if stored == SAME else stored
    kernel = rope_append_kernel
    launch = build_launch(kernel, tensors, constants, numbers, STEP=step, STORED=stored)
    if step.map_heads > 1:  # a program for each head
        launch.grid = (launch.grid[0], step.map_heads)
    return launch


def _rotation(call: Append, k: Tensor) -> Rotation:
    """Return the Rotation by `positions`, or by those that follow the slots in use."""
    inv_freq, positions = call.inv_freq, call.positions
    if inv_freq is None:  # the kernel then reads none of it
        inv_freq = k.new_empty(max(k.shape[-1] // 2, 1), dtype=torch.float32)
        positions = None
    cu_seqlens = call.cu_seqlens
    if cu_seqlens is not None and INTERPRETED:  # a rotation has no padding; its ends are checked
        cu_seqlens = torch.cat((cu_seqlens[:-1], cu_seqlens.new_tensor([call.seqlen])))
    rope = Rope(inv_freq, positions, cu_seqlens, call.log_decay, call.axes)
    names = ("attention_factor", "interleaved", "rotary_offset", "decay_origin")
    options = {name: getattr(call, name) for name in names}
    if call.inv_freq is None:  # then all dims are copied
        options["rotary_offset"] = 0
    x = k if call.cu_seqlens is None else k[0]
    _, rotation = resolve(x, None, *rope, adjoint=False, **options)
    if call.positions is None and call.inv_freq is not None:
        behind = {"positions": call.cache_seqlens, "positions_are_offsets": True, "axes": None}
        rotation = dataclasses.replace(rotation, **behind)
    return rotation


# -------------------------------------------------------------------------------------------------
# The op


def rope_append(*tensors: Tensor | None, **options) -> Tensor:
    """Compute `torch.ops.extrope.rope_append`."""
    numbers = (tuple(x) if isinstance(x, list) else x for x in options.values())
    key = (*options, *numbers, layout_key(*tensors))
    launch = cached_by_layout(_build_launch, key, tensors, options)
    call = Append(*tensors, **options)
    if INTERPRETED:  # reading values costs nothing then
        check_values("rope_append", call)
    q_out = None if call.q is None else torch.empty_like(call.q)
    k_cache, v_cache = call.k_cache, call.v_cache
    if call.k_scale is not None:
        k_cache, v_cache = as_bits(k_cache), as_bits(v_cache)
    positions = None
    if call.inv_freq is not None:  # else nothing rotates
        positions = call.cache_seqlens if call.positions is None else call.positions
    slots = Slots(
        call.cache_seqlens,
        call.block_table,
        call.slot_mapping,
        call.cache_leftpad,
        *call.scales,
    )
    rope = Rope(call.inv_freq, positions, call.cu_seqlens, call.log_decay, call.axes)
    heads = (call.q, call.k, q_out, call.v, k_cache, v_cache)
    weights = (call.q_norm_weight, call.k_norm_weight)
    launch((*heads, *weights, *slots, *rope, None, None))
    return call.k.new_empty(0) if q_out is None else q_out


def _build_launch(tensors: tuple[Tensor | None, ...], options: dict) -> Launch:
    """Check the call, then build its launch."""
    call = Append(*tensors, **options)
    check("rope_append", call)
    return build_append(call)
