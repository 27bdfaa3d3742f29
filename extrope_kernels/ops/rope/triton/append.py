"""The append in Triton: norm, rotation and the write of keys and values in one launch."""

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

CACHE_NUMBERS = ("slot_batch", "slot_seq", "table_batch", "pages", "page_size", "capacity")


class Cache(NamedTuple):
    """The tensors that place tokens in the cache, and fp8 scales; None if not given."""

    seqlens: Tensor | None
    block_table: Tensor | None
    slot_mapping: Tensor | None
    leftpad: Tensor | None
    k_scale: Tensor | None
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


@triton.jit
def _number(x):
    return tl.full((1, 1), x, tl.float64)  # a plain number is a float32


@triton.jit
def _stored(position, MAP: tl.constexpr):
    """Return a key's stored position by a PositionMap: (TOKENS, 1 or PAIRS) float64."""
    if MAP.modulus > 0:
        whole = tl.floor(position / _number(MAP.modulus))
        position -= whole * _number(MAP.modulus)
    if MAP.divisor != 1:
        position = position / _number(MAP.divisor)
    if MAP.floor:
        position = tl.floor(position)
    return tl.minimum(position + _number(MAP.offset), _number(MAP.cap))


@triton.jit
def _slots_behind(cache, cu_seqlens, sequence, tokens, table_batch, pages, page_size, capacity):
    """Return each token's block, its slot after those in use, and the mask of those written."""
    slot, valid = tokens[1], tokens[2]
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence)
        valid = valid & (slot >= begin) & (slot < tl.load(cu_seqlens + sequence + 1))
        slot -= begin
    slot += tl.load(cache.seqlens + sequence, mask=valid, other=-1)
    valid = valid & (slot >= 0) & (slot < capacity)
    block = sequence.to(tl.int64)
    if cache.block_table is not None:
        # In 64 bits, a GPU calls a function for every division.
        slot = slot.to(tl.int32)
        page = cache.block_table + sequence * table_batch + slot // page_size
        block = tl.load(page, mask=valid, other=-1).to(tl.int64)
        valid = valid & (block >= 0) & (block < pages)
        slot = slot % page_size
    return block, slot.to(tl.int64), valid


@triton.jit
def _slots_given(slot_mapping, tokens, slot_batch, slot_seq, pages, page_size):
    at = slot_mapping + tokens[0] * slot_batch + tokens[1] * slot_seq
    slot = tl.load(at, mask=tokens[2], other=-1).to(tl.int64)
    block = slot // page_size
    return block, slot % page_size, tokens[2] & (slot >= 0) & (block < pages)


@triton.jit
def _copy_values(
    v, v_cache, v_scale, tokens, to, STEP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    first, last = program_heads(TILE.heads_k)
    for head in range(first, last):
        at, target = head_rows(v, tokens, head, TILE), head_rows(v_cache, to, head, TILE)
        if v_scale is not None:
            scale = tl.load(v_scale + head)
            quantize_rows(at, target, scale, to[2], STEP.head_dim_v, STEP.dims_v)
        else:
            copy_rows(at, target, to[2], STEP.head_dim_v, STEP.dims_v)


@triton.jit(do_not_specialize=(*POSITION_NUMBERS, *CACHE_NUMBERS))
def rope_append_kernel(
    heads, q_weight, k_weight, cache, rope,
    count, seqlen, position_axis, position_batch, position_seq, num_sequences, search_steps,
    decay_origin: tl.float64, amplitude: tl.float64,
    slot_batch, slot_seq, table_batch, pages, page_size, capacity,
    STEP: tl.constexpr, STORED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Norm, rotate and append: axis 0 is tiles of tokens, axis 1 shares of the heads.

    cache: a Cache; rope: a Rope. The caches are (blocks, slots, heads, head_dim); without
    block_table a sequence is a block. STORED: the PositionMap by which a score method stores keys,
    or None.
    """
    q, k, q_out, v, k_cache, v_cache = heads
    tokens = program_tokens(count, seqlen, TILE)
    sequence, position = token_positions(
        tokens, rope, 0, position_axis, position_batch, position_seq, num_sequences, search_steps,
        TILE,
    )  # fmt: skip
    if TILE.positions_are_offsets and cache.leftpad is not None:
        pad = tl.load(cache.leftpad + sequence, mask=tokens[2], other=0)
        position -= pad.to(tl.float64)[:, None]
    if STORED is not None:
        position = _stored(position, STORED)
    far = position - decay_origin
    angles = (rope.inv_freq, sequence, position, far, rope.log_decay, amplitude)
    if cache.slot_mapping is not None:
        to = _slots_given(cache.slot_mapping, tokens, slot_batch, slot_seq, pages, page_size)
    else:
        to = _slots_behind(
            cache, rope.cu_seqlens, sequence, tokens, table_batch, pages, page_size, capacity
        )  # fmt: skip
    if q is not None:
        norm_rotate_heads(
            q, q_weight, q_out, tokens, tokens, angles, None, TILE.heads_q, 1.0, STEP.q_together,
            STEP.rotates_q, STEP.eps, TILE,
        )  # fmt: skip
    norm_rotate_heads(
        k, k_weight, k_cache, tokens, to, angles, cache.k_scale, TILE.heads_k, -1.0,
        STEP.k_together, STEP.rotates_k, STEP.eps, TILE,
    )  # fmt: skip
    _copy_values(v, v_cache, cache.v_scale, tokens, to, STEP, TILE)


# -------------------------------------------------------------------------------------------------
# The op


def rope_append(*tensors: Tensor | None, **options) -> Tensor:
    """Compute `torch.ops.extrope.rope_append`."""
    (
        q, k, v, k_cache, v_cache, q_weight, k_weight, inv_freq, seqlens, block_table, slot_mapping,
        cu_seqlens, leftpad, positions, log_decay, axes, k_scale, v_scale,
    ) = (*tensors, *[None] * 10)[:18]  # fmt: skip
    numbers = (tuple(x) if isinstance(x, list) else x for x in options.values())
    prepared = cached_by_layout(
        _build_launch, (*options, *numbers, layout_key(*tensors)), tensors, options
    )
    if INTERPRETED:  # reading values costs nothing then
        check_values("rope_append", Append(*tensors, **options))
    out = k.new_empty(0) if q is None else torch.empty_like(q)
    if prepared is not None:
        if k_scale is not None:
            k_cache, v_cache = as_bits(k_cache), as_bits(v_cache)
        heads = (q, k, None if q is None else out, v, k_cache, v_cache)
        cache = Cache(seqlens, block_table, slot_mapping, leftpad, k_scale, v_scale)
        behind = seqlens if positions is None else positions
        rope = Rope(inv_freq, None if inv_freq is None else behind, cu_seqlens, log_decay, axes)
        launch(rope_append_kernel, prepared, heads, q_weight, k_weight, cache, rope)
    return out


def _build_launch(tensors: tuple[Tensor | None, ...], options: dict) -> Launch | None:
    """Check the call, then build its launch; None if there is nothing to append."""
    call = Append(*tensors, **options)
    check("rope_append", call)
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
    weights = (call.q_norm_weight, call.k_norm_weight)
    together = [w is not None and w.shape[0] != k.shape[3] for w in weights]
    slots, table = call.slot_mapping, call.block_table
    by, numbers = launch_constants(_rotation(call, k))
    numbers += (0, 0) if slots is None else strides_of(slots.view(call.batch, call.seqlen))
    numbers += (0 if table is None else table.stride(0), *call.k_cache.shape[:2], call.capacity)
    rotates = (call.rotates_q, call.inv_freq is not None)
    dims_v = (v.shape[3], next_power_of_2(v.shape[3]))
    step = Step(*dims_v, *together, *rotates, float(call.norm_eps))
    stored = None if call.map == SAME else call.map
    heads = (q, k, out, v, call.k_cache, call.v_cache)
    return settle(heads, by, numbers, STEP=step, STORED=stored)


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
