"""The write into a key/value cache in Triton: rotation, keys and values in one launch.

`rope_append_kvcache` launches it by its op. A decode step launches it before it attends
(ops/decode/triton/decode.py), without q.

rotation.py has the rotation without a cache, and the names of both. copy_rows copies rows that do
not rotate. Without positions of its own a call has an offset for each sequence: its slots in use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ....scores.base import SAME, PositionMap
from ..._math.dtypes import FP8, as_bits
from ..._math.triton.launch import INTERPRETED, Launch
from ..._math.triton.pairs import copy_rows, store_parts
from ..._torch.autograd import empty_rows
from ..._torch.layouts import cached_by_layout, layout_key
from ...rope.call import RopeTensors, rotation_of
from ...rope.triton.device import (
    TileRows,
    build_launch,
    decayed,
    load_head,
    load_positions,
    program_heads,
    program_tokens,
    rotation_numbers,
    rows_of_head,
    scaled_cos_sin_of_head,
)
from ..call import Append, KVCache, check, check_values, read_append, refuse_aliases
from .fp8 import parts_of_codes, quantize_rows


class AppendModel(NamedTuple):
    """Constants of the kernel, beside its Tile."""

    head_dim_v: int
    dims_v: int  # head_dim_v, rounded up to a power of two
    rotates: bool  # q and k, else they are copied
    stored: PositionMap | None  # the map by which a score method stores keys; None: the identity


@triton.jit
def _stored_positions(position, STEP: tl.constexpr):
    """Map positions by STEP.stored, a PositionMap, to those of stored keys: (TOKENS, 1) float64."""
    # Triton 3.6 takes no tuple out of STEP as an argument. A plain number would be a float32.
    if STEP.stored.modulus > 0:
        modulus = tl.full((1, 1), STEP.stored.modulus, tl.float64)
        position -= tl.floor(position / modulus) * modulus
    if STEP.stored.divisor != 1:
        position = position / tl.full((1, 1), STEP.stored.divisor, tl.float64)
    if STEP.stored.floor:
        position = tl.floor(position)
    position += tl.full((1, 1), STEP.stored.offset, tl.float64)
    return tl.minimum(position, tl.full((1, 1), STEP.stored.cap, tl.float64))


@triton.jit
def _write_heads(
    x, valid, out, written, scale_ptr, inv_freq_ptr, sequence, position, amplitude,
    HEADS: tl.constexpr, ROTATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rotate this program's share of the heads of x into out.

    x, out: TileRows, rows_of_head(x, head, TILE): pointers to dim 0 of the head's rows, (TOKENS,).
    valid, written: (TOKENS,), the rows that exist in x, and those that out takes.
    scale_ptr: (HEADS,) if out is a cache in fp8, else None.
    sequence, position: (TOKENS,) and (TOKENS, 1) float64; amplitude: from `decayed`.
    """
    if ROTATES and not TILE.per_head:
        cos, sin = scaled_cos_sin_of_head(
            inv_freq_ptr, sequence, position, amplitude, 0, valid, TILE
        )
    first, last = program_heads(HEADS)
    for head in range(first, last):
        if ROTATES and TILE.per_head:
            cos, sin = scaled_cos_sin_of_head(
                inv_freq_ptr, sequence, position, amplitude, head, valid, TILE
            )
        # Both dims of each pair, (TOKENS, PAIRS), and those that do not rotate.
        a, b, rest = load_head(rows_of_head(x, head, TILE), valid, TILE)
        if ROTATES:
            a, b = a * cos - b * sin, b * cos + a * sin
        parts = (a, b, rest)
        if scale_ptr is not None:  # fp8 of parts / scale, rounded to x's dtype first
            scale = tl.load(scale_ptr + head)
            dtype: tl.constexpr = x.ptr.dtype.element_ty
            parts = parts_of_codes(parts, scale, dtype, TILE)
        store_parts(rows_of_head(out, head, TILE), parts, written, TILE)  # rounds once


@triton.jit
def rope_append_kernel(
    q_ptr, k_ptr, q_out_ptr, v_ptr,  # (batch, seqlen, heads, head_dim); q and q_out may be None
    # (blocks, slots, heads, head_dim): a block is a page of page_size slots, or without block_table
    # and slot_mapping a sequence
    k_cache_ptr, v_cache_ptr,
    cache_seqlens_ptr,  # (sequences,): slots in use, left padding included
    block_table_ptr,  # (sequences, pages of a sequence), or None
    slot_mapping_ptr,  # (batch, seqlen), contiguous: page * page_size + slot, -1 for none; or None
    leftpad_ptr,  # (sequences,): the slot of position 0, or None
    k_scale_ptr, v_scale_ptr,  # (heads_k,) for a cache in fp8, or None
    inv_freq_ptr,  # (sequences or 1, heads or 1, half)
    positions_ptr,  # (batch or 1, seqlen), or cache_seqlens with TILE.positions_are_offsets
    cu_seqlens_ptr, log_decay_ptr,  # (sequences + 1,) if packed; (half,): xPos; or None
    counters_ptr,  # float32, of which num_counters become 0, or None: the launch that attends
    # counts there, and this one comes before it anyway
    q_stride_batch, q_stride_seq, q_stride_head,  # all strides in groups of TILE.align elements
    k_stride_batch, k_stride_seq, k_stride_head,
    q_out_stride_batch, q_out_stride_seq, q_out_stride_head,
    v_stride_batch, v_stride_seq, v_stride_head,
    k_cache_stride_block, k_cache_stride_slot, k_cache_stride_head,
    v_cache_stride_block, v_cache_stride_slot, v_cache_stride_head,
    count, seqlen,  # tokens: count = batch * seqlen
    positions_stride_batch, positions_stride_seq,
    num_sequences, search_steps,  # of cu_seqlens; steps of a binary search in it
    decay_origin: tl.float64,  # the position at which log_decay changes nothing
    amplitude: tl.float64,  # of all tokens and pairs
    block_table_stride,
    num_blocks, page_size, capacity,  # of the caches; slots of a block, and of a sequence
    num_counters,
    STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rotate and write: axis 0 is tiles of tokens, axis 1 shares of the heads.

    The numbers are no named tuples: Triton specialises those, whatever do_not_specialize says.
    """
    if counters_ptr is not None:
        programs = tl.num_programs(0) * tl.num_programs(1)
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        for n in tl.range(program, num_counters, programs):
            tl.store(counters_ptr + n, 0.0)

    # sequence (TOKENS,), position (TOKENS, 1) float64
    batch, seq, valid = program_tokens(count, seqlen, TILE)  # (TOKENS,): int64, int64, mask
    sequence, position = load_positions(  # without axes, None and their stride 0; offset 0
        batch, seq, valid, positions_ptr, cu_seqlens_ptr, None, 0, 0, positions_stride_batch,
        positions_stride_seq, num_sequences, search_steps, TILE,
    )  # fmt: skip
    if TILE.positions_are_offsets and leftpad_ptr is not None:
        pad = tl.load(leftpad_ptr + sequence, mask=valid, other=0)
        position -= pad.to(tl.float64)[:, None]
    if STEP.stored is not None:
        position = _stored_positions(position, STEP)

    # Slots, each in a block of the caches: (TOKENS,). Tokens without one are not written.
    if slot_mapping_ptr is not None:
        at = batch * seqlen + seq
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
        _write_heads(
            TileRows(q_ptr, batch * q_stride_batch + seq * q_stride_seq, q_stride_head), valid,
            TileRows(q_out_ptr, q_out_row, q_out_stride_head), valid, None,
            inv_freq_ptr, sequence, position,
            decayed(amplitude, distance, log_decay_ptr, TILE.decay_sign, TILE),
            TILE.heads_q, STEP.rotates, TILE,
        )  # fmt: skip
    k_cache_row = block * k_cache_stride_block + slot * k_cache_stride_slot
    _write_heads(
        TileRows(k_ptr, batch * k_stride_batch + seq * k_stride_seq, k_stride_head), valid,
        TileRows(k_cache_ptr, k_cache_row, k_cache_stride_head), written, k_scale_ptr,
        inv_freq_ptr, sequence, position,
        decayed(amplitude, distance, log_decay_ptr, -TILE.decay_sign, TILE),
        TILE.heads_k, STEP.rotates, TILE,
    )  # fmt: skip
    v_row = batch * v_stride_batch + seq * v_stride_seq
    v_cache_row = block * v_cache_stride_block + slot * v_cache_stride_slot
    first, last = program_heads(TILE.heads_k)
    for head in range(first, last):
        rows = rows_of_head(TileRows(v_ptr, v_row, v_stride_head), head, TILE)
        to = rows_of_head(TileRows(v_cache_ptr, v_cache_row, v_cache_stride_head), head, TILE)
        if v_scale_ptr is not None:
            v_scale = tl.load(v_scale_ptr + head)
            quantize_rows(rows, to, v_scale, written, STEP.head_dim_v, STEP.dims_v)
        else:
            copy_rows(rows, to, written, STEP.head_dim_v, STEP.dims_v)


# -------------------------------------------------------------------------------------------------
# The launch


def build_append(call: Append, num_counters: int = 0) -> Launch:
    """Build the launch for a checked call."""
    cache, rope, head_dim_v = call.cache, call.rope, call.v.shape[-1]
    if call.k.shape[-1] < 2 or call.v.shape[-1] < 1:
        raise NotImplementedError(
            "rope_append: Triton's kernel needs a head_dim of at least 2, and of v at least 1, "
            f"got {call.k.shape[-1]} and {head_dim_v}"
        )
    shape, rotates = torch.Size((call.batch, call.seqlen)), rope.inv_freq is not None
    if rotates:
        rotation = rotation_of(rope, shape, **call.options)
        if rope.positions is None:
            rotation = replace(rotation, positions=cache.seqlens, positions_are_offsets=True)
    else:  # all dims are copied, as if they were pairs
        pairs = call.k.new_empty(max(call.k.shape[-1] // 2, 1))
        rotation = rotation_of(RopeTensors(pairs, cu_seqlens=rope.cu_seqlens), shape)
    tile, numbers = rotation_numbers(rotation)
    del numbers["positions_stride_axis"]  # no axes here
    stored = None if call.stored == SAME else call.stored
    step = AppendModel(head_dim_v, next_power_of_2(head_dim_v), rotates, stored)
    return build_launch(
        rope_append_kernel,
        {
            "q_ptr": call.q,
            "k_ptr": call.k,
            "q_out_ptr": None if call.q is None else empty_rows(call.q),  # for its strides
            "v_ptr": call.v,
        },
        tile,
        {
            **numbers,
            "block_table_stride": 0 if cache.block_table is None else cache.block_table.stride(0),
            "num_blocks": cache.k.shape[0],
            "page_size": cache.k.shape[1],
            "capacity": cache.capacity,
            "num_counters": num_counters,
        },
        caches={"k_cache_ptr": cache.k, "v_cache_ptr": cache.v},
        constants={"STEP": step},
    )


def launch_append(
    launch: Launch,
    cache: KVCache,
    k: Tensor,
    v: Tensor,
    *,
    q: Tensor | None = None,
    q_out: Tensor | None = None,
    counters: Tensor | None = None,
    inv_freq: Tensor | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> None:
    """Launch what `build_append` made for tensors of these layouts.

    positions: of tokens, or with frequencies the slots in use: cache.seqlens.
    """
    fp8 = cache.k.dtype == FP8
    launch.run(
        q_ptr=q,
        k_ptr=k,
        q_out_ptr=q_out,
        v_ptr=v,
        k_cache_ptr=as_bits(cache.k) if fp8 else cache.k,
        v_cache_ptr=as_bits(cache.v) if fp8 else cache.v,
        cache_seqlens_ptr=cache.seqlens,
        block_table_ptr=cache.block_table,
        slot_mapping_ptr=None if cache.slot_mapping is None else cache.slot_mapping.contiguous(),
        leftpad_ptr=cache.leftpad,
        k_scale_ptr=cache.scales.k,
        v_scale_ptr=cache.scales.v,
        inv_freq_ptr=inv_freq,
        positions_ptr=positions,
        cu_seqlens_ptr=cu_seqlens,
        log_decay_ptr=log_decay,
        counters_ptr=counters,
    )


# -------------------------------------------------------------------------------------------------
# The op


def rope_append(*tensors: Tensor | None, **options) -> Tensor:
    """Compute `torch.ops.extrope.rope_append`."""
    numbers = (tuple(x) if isinstance(x, list) else x for x in options.values())
    key = (*options, *numbers, layout_key(*tensors))
    launch = cached_by_layout(_build_launch, key, tensors, options)
    call = read_append(*tensors, **options)
    refuse_aliases("rope_append", call.cache, q=call.q, k=call.k, v=call.v)
    if INTERPRETED:  # reading values costs nothing then
        check_values("rope_append", call)
    rope = call.rope
    q_out = None if call.q is None else empty_rows(call.q)
    rope_args = {"cu_seqlens": rope.cu_seqlens}
    if rope.inv_freq is not None:
        rope_args["inv_freq"], rope_args["log_decay"] = rope.inv_freq, rope.log_decay
        rope_args["positions"] = call.cache.seqlens if rope.positions is None else rope.positions
    launch_append(launch, call.cache, call.k, call.v, q=call.q, q_out=q_out, **rope_args)
    return call.k.new_empty(0) if q_out is None else q_out


def _build_launch(tensors: tuple[Tensor | None, ...], options: dict) -> Launch:
    """Check the call, then build its launch."""
    call = read_append(*tensors, **options)
    check("rope_append", call)
    return build_append(call)
