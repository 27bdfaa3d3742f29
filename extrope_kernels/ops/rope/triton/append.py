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
from ..._shared.triton.launch import INTERPRETED, strides_of
from ..._shared.triton.pairs import copy_rows
from ..append_checks import Append, check, check_values
from ..rotation import Rotation, resolve
from .device import (
    POSITION_NUMBERS,
    Launch,
    Rope,
    head_rows,
    launch,
    launch_constants,
    program_heads,
    program_tokens,
    settle,
    token_positions,
)
from .norm import norm_rotate_heads

CACHE_NUMBERS = (
    *("slot_stride_batch", "slot_stride_seq", "table_stride", "pages", "page_size", "capacity"),
    "num_counters",
)


class Slots(NamedTuple):
    """The tensors that give new tokens their slots, and fp8 scales; None if not given."""

    seqlens: Tensor | None  # (sequences,): slots in use, left padding included
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
    position, pair_maps, MAP: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr
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
        at = pair_maps + STEP.map_row * 2 * OFFSETS + pair
        if STEP.map_heads > 1:
            at += tl.program_id(1) * TILE.half  # a program then has one head
        divisor = tl.load(at, mask=pair < TILE.half, other=1.0)[None, :]  # (1, PAIRS)
        offset = tl.load(at + OFFSETS, mask=pair < TILE.half, other=0.0)[None, :]
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


@triton.jit(do_not_specialize=(*POSITION_NUMBERS, *CACHE_NUMBERS))
def rope_append_kernel(
    heads, q_weight, k_weight, slots, rope, pair_maps, counters,
    count, seqlen, position_axis, position_batch, position_seq, num_sequences, search_steps,
    decay_origin: tl.float64, amplitude: tl.float64,
    slot_stride_batch, slot_stride_seq, table_stride, pages, page_size, capacity, num_counters,
    STEP: tl.constexpr, STORED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Norm, rotate and write: axis 0 is tiles of tokens, axis 1 shares of the heads.

    heads: q, k, q_out, v, k_cache and v_cache, each a pointer to (batch, seqlen, heads, head_dim)
    and three strides; without q both q and q_out are None. The caches are (blocks, slots, heads,
    head_dim): a block is a page of page_size slots, or without block_table a sequence.
    slots: a Slots; rope: a Rope. STORED: the PositionMap by which a score method stores keys, or
    None; pair_maps: as in `_stored_positions`.
    counters: None, or float32 memory whose first num_counters numbers become 0. The launch that
    attends counts there; this one comes before it anyway.
    """
    q, k, q_out, v, k_cache, v_cache = heads
    if counters is not None:
        programs = tl.num_programs(0) * tl.num_programs(1)
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        for n in tl.range(program, num_counters, programs):
            tl.store(counters + n, 0.0)

    # Positions. batch, seq, valid, sequence: (TOKENS,); position: (TOKENS, 1 or PAIRS) float64.
    tokens = program_tokens(count, seqlen, TILE)
    batch, seq, valid = tokens
    sequence, position = token_positions(
        tokens, rope, 0, position_axis, position_batch, position_seq, num_sequences, search_steps,
        TILE,
    )  # fmt: skip
    if TILE.positions_are_offsets and slots.leftpad is not None:
        pad = tl.load(slots.leftpad + sequence, mask=valid, other=0)
        position -= pad.to(tl.float64)[:, None]
    if STORED is not None:
        position = _stored_positions(position, pair_maps, STORED, STEP, TILE)

    # Slots, each in a block of the caches. Tokens without one are not written.
    if slots.slot_mapping is not None:
        at = slots.slot_mapping + batch * slot_stride_batch + seq * slot_stride_seq
        slot = tl.load(at, mask=valid, other=-1).to(tl.int64)
        block = slot // page_size
        written = valid & (slot >= 0) & (block < pages)
        slot = slot % page_size
    else:
        slot = seq
        written = valid
        if rope.cu_seqlens is not None:  # tokens after the last boundary belong to no sequence
            begin = tl.load(rope.cu_seqlens + sequence)
            written = written & (seq >= begin) & (seq < tl.load(rope.cu_seqlens + sequence + 1))
            slot = seq - begin
        slot += tl.load(slots.seqlens + sequence, mask=written, other=-1)
        written = written & (slot >= 0) & (slot < capacity)
        block = sequence.to(tl.int64)
        if slots.block_table is not None:
            slot = slot.to(tl.int32)  # in 64 bits, a GPU calls a function for every division
            page = slots.block_table + sequence * table_stride + slot // page_size
            block = tl.load(page, mask=written, other=-1).to(tl.int64)
            written = written & (block >= 0) & (block < pages)
            slot = slot % page_size
    places = (block, slot.to(tl.int64), written)  # like tokens, but in the caches

    # q, keys, then values: what rotates first, since values need no more of its registers.
    far = position - decay_origin
    angles = (rope.inv_freq, sequence, position, far, rope.log_decay, amplitude)
    if q is not None:
        norm_rotate_heads(
            q, q_weight, q_out, tokens, tokens, angles, None, TILE.heads_q, 1.0, STEP.q_together,
            STEP.rotates_q, STEP.eps, TILE,
        )  # fmt: skip
    norm_rotate_heads(
        k, k_weight, k_cache, tokens, places, angles, slots.k_scale, TILE.heads_k, -1.0,
        STEP.k_together, STEP.rotates_k, STEP.eps, TILE,
    )  # fmt: skip
    first_head, end_head = program_heads(TILE.heads_k)
    for head in range(first_head, end_head):
        at, to = head_rows(v, tokens, head, TILE), head_rows(v_cache, places, head, TILE)
        if slots.v_scale is not None:
            scale = tl.load(slots.v_scale + head)
            quantize_rows(at, to, scale, written, STEP.head_dim_v, STEP.dims_v)
        else:
            copy_rows(at, to, written, STEP.head_dim_v, STEP.dims_v)


# -------------------------------------------------------------------------------------------------
# The launch


def build_append(
    call: Append, pair_maps: Tensor | None = None, num_counters: int = 0
) -> Launch | None:
    """Build the launch for a checked call; None if there is nothing to write.

    pair_maps: contiguous, for keys that `call.stored` stores by pair; q is None then.
    """
    if call.batch * call.seqlen == 0:
        return None
    if call.k.shape[-1] < 2 or call.v.shape[-1] < 1:
        raise NotImplementedError(
            "rope_append: Triton's kernel needs a head_dim of at least 2, and of v at least 1, "
            f"got {call.k.shape[-1]} and {call.v.shape[-1]}"
        )
    out = None if call.q is None else torch.empty_like(call.q)
    heads = (call.q, call.k, out, call.v)
    q, k, out, v = (x[None] if call.packed and x is not None else x for x in heads)
    by, numbers = launch_constants(_rotation(call, k))
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
        map_heads=pair_maps.shape[-2] if by_pair else 1,
    )
    numbers += (
        *((0, 0) if mapping is None else strides_of(mapping.view(call.batch, call.seqlen))),
        0 if table is None else table.stride(0),
        *call.k_cache.shape[:2],
        call.capacity,
        num_counters,
    )
    heads = (q, k, out, v, call.k_cache, call.v_cache)
    found = settle(heads, by, numbers, STEP=step, STORED=None if stored == SAME else stored)
    if step.map_heads > 1 and found is not None:
        found = found._replace(grid=(found.grid[0], step.map_heads))
    return found


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
    names = ("attention_factor", "interleaved", "decay_origin")
    options = {name: getattr(call, name) for name in names}
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
    (
        q, k, v, k_cache, v_cache, q_weight, k_weight, inv_freq, seqlens, block_table, slot_mapping,
        cu_seqlens, leftpad, positions, log_decay, axes, k_scale, v_scale,
    ) = (*tensors, *[None] * 10)[:18]  # fmt: skip
    numbers = (tuple(x) if isinstance(x, list) else x for x in options.values())
    key = (*options, *numbers, layout_key(*tensors))
    prepared = cached_by_layout(_build_launch, key, tensors, options)
    if INTERPRETED:  # reading values costs nothing then
        check_values("rope_append", Append(*tensors, **options))
    out = k.new_empty(0) if q is None else torch.empty_like(q)
    if prepared is not None:
        if k_scale is not None:
            k_cache, v_cache = as_bits(k_cache), as_bits(v_cache)
        heads = (q, k, None if q is None else out, v, k_cache, v_cache)
        slots = Slots(seqlens, block_table, slot_mapping, leftpad, k_scale, v_scale)
        behind = seqlens if positions is None else positions
        rope = Rope(inv_freq, None if inv_freq is None else behind, cu_seqlens, log_decay, axes)
        others = (q_weight, k_weight, slots, rope, None, None)
        launch(rope_append_kernel, prepared, heads, *others)
    return out


def _build_launch(tensors: tuple[Tensor | None, ...], options: dict) -> Launch | None:
    """Check the call, then build its launch."""
    call = Append(*tensors, **options)
    check("rope_append", call)
    return build_append(call)
