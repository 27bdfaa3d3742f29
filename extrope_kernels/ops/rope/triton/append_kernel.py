"""The kernel that norms and rotates new tokens, and writes keys and values into a cache."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..._shared.triton.fp8 import quantize_rows
from ..._shared.triton.pairs import copy_rows
from ..._shared.triton.tokens import rows
from .norm_forward import norm_rotate_heads
from .positions import token_positions

RUN_TIME_SCALARS = (
    *("slot_batch", "slot_seq", "table_batch", "pages", "page_size", "capacity"),
    *("freq_sequence", "freq_head", "position_axis", "position_batch", "position_seq", "num_axes"),
    *("num_sequences", "search_steps", "tokens", "seqlen"),
)


class AppendTile(NamedTuple):
    """What a kernel is compiled for, beside types and alignment; as NormTile where names agree."""

    tokens: int
    half: int
    pairs: int
    rest: int
    rest_dims: int
    head_dim_v: int
    dims_v: int  # head_dim_v, rounded up to a power of two
    align: int
    interleaved: bool
    wide: bool
    per_head: bool
    positions_are_offsets: bool  # those that follow the slots in use
    rotates_q: bool
    rotates_k: bool
    maps: bool  # keys rotate to where a score method stores them
    q_together: bool
    k_together: bool
    by_slots: bool
    paged: bool
    fp8: bool  # the cache, whose heads have scales


@triton.jit
def _number(x):
    # The interpreter's scalars are Python's, and cast to float32 on their way.
    return tl.full((1, 1), x, tl.float64)


@triton.jit
def _mapped(position, modulus, divisor, floor, offset, cap):
    """(tokens, 1 or pairs) float64 positions by the numbers of a PositionMap."""
    modulus = _number(modulus)
    whole = tl.floor(position / tl.where(modulus > 0, modulus, 1.0))
    position = tl.where(modulus > 0, position - whole * modulus, position)
    position = position / _number(divisor)
    position = tl.where(_number(floor) > 0, tl.floor(position), position) + _number(offset)
    return tl.minimum(position, _number(cap))


@triton.jit
def _slots_behind(
    seqlens, block_table, cu_seqlens, sequence, seq, valid, table_batch, pages, page_size, capacity,
    TILE: tl.constexpr,
):  # fmt: skip
    """Which tokens are written, their blocks, and their places there: behind the slots in use."""
    slot = seq
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence)
        slot = seq - begin
        valid = valid & (slot >= 0) & (seq < tl.load(cu_seqlens + sequence + 1))
    slot += tl.load(seqlens + sequence, mask=valid, other=-1)
    valid = valid & (slot >= 0) & (slot < capacity)
    block = sequence.to(tl.int64)
    if TILE.paged:
        # In 64 bits, a GPU calls a function for every division.
        slot = slot.to(tl.int32)
        page = block_table + sequence * table_batch + slot // page_size
        block = tl.load(page, mask=valid, other=-1).to(tl.int64)
        valid = valid & (block >= 0) & (block < pages)
        slot = slot % page_size
    return valid, block, slot.to(tl.int64)


@triton.jit
def _slots_given(
    slot_mapping, batch, seq, valid, slot_batch, slot_seq, pages, page_size, TILE: tl.constexpr
):
    at = slot_mapping + batch * slot_batch + seq * slot_seq
    slot = tl.load(at, mask=valid, other=-1).to(tl.int64)
    valid = valid & (slot >= 0)
    block = slot // page_size
    return valid & (block < pages), block, slot % page_size


@triton.jit
def _copy_values(v, v_cache, v_scale, of, batch, seq, written, block, place, TILE: tl.constexpr):
    share = tl.cdiv(of.heads, tl.num_programs(1))
    first = tl.program_id(1) * share
    to = rows(v_cache, block, place, 0, of.target_batch, of.target_seq, 0, TILE)
    for head in range(first, tl.minimum(first + share, of.heads)):
        row = rows(v, batch, seq, head, of.source_batch, of.source_seq, of.source_head, TILE)
        target = to + tl.cast(head, tl.int64) * of.target_head * TILE.align
        if TILE.fp8:
            scale = tl.load(v_scale + head)
            quantize_rows(row, target, scale, written, TILE.head_dim_v, TILE.dims_v)
        else:
            copy_rows(row, target, written, TILE.head_dim_v, TILE.dims_v)


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def rope_append_kernel(
    q, k, v, q_out, k_cache, v_cache, q_weight, k_weight, inv_freq, seqlens, block_table,
    slot_mapping, cu_seqlens, leftpad, positions, log_decay, axes, k_scale, v_scale,
    of_q, of_k, of_v, slot_batch, slot_seq, table_batch, pages, page_size, capacity,
    freq_sequence, freq_head, position_axis, position_batch, position_seq, num_axes, num_sequences,
    search_steps, decay_origin: tl.float64, amplitude: tl.float64, eps: tl.float64,
    modulus: tl.float64, divisor: tl.float64, floor: tl.float64, map_offset: tl.float64,
    cap: tl.float64, tokens, seqlen,
    TILE: tl.constexpr,
):  # fmt: skip
    """Axis 0: tiles of tokens, counted through batch and seqlen; axis 1: shares of the heads.

    Of k and v, target_batch is the stride of blocks and target_seq that of slots. A sequence
    without block_table is a block.
    """
    first = tl.program_id(0).to(tokens.dtype) * TILE.tokens
    valid = tl.arange(0, TILE.tokens) < tokens - first
    token = first + tl.arange(0, TILE.tokens)
    batch = (token // seqlen).to(tl.int64)
    seq = (token % seqlen).to(tl.int64)
    given = positions
    if TILE.positions_are_offsets:
        given = seqlens
    sequence, position = token_positions(
        given, axes, cu_seqlens, 0, position_axis, position_batch, position_seq, num_axes,
        num_sequences, search_steps, batch, seq, valid, TILE,
    )  # fmt: skip
    if TILE.positions_are_offsets and leftpad is not None:
        position -= tl.load(leftpad + sequence, mask=valid, other=0).to(tl.float64)[:, None]
    if TILE.maps:
        position = _mapped(position, modulus, divisor, floor, map_offset, cap)
    far = position - decay_origin
    if TILE.rotates_k:
        freqs = inv_freq + (sequence * freq_sequence)[:, None] + tl.arange(0, TILE.pairs)[None, :]
    else:
        freqs = seq  # which nothing reads: the compiler takes no None in a tuple
    by = (freqs, freq_head, position, far, log_decay, amplitude, 1.0)
    where = (batch, seq, valid)
    if TILE.by_slots:
        written, block, place = _slots_given(
            slot_mapping, batch, seq, valid, slot_batch, slot_seq, pages, page_size, TILE
        )
    else:
        written, block, place = _slots_behind(
            seqlens, block_table, cu_seqlens, sequence, seq, valid, table_batch, pages, page_size,
            capacity, TILE,
        )  # fmt: skip
    if q is not None:
        target = rows(q_out, batch, seq, 0, of_q.target_batch, of_q.target_seq, 0, TILE)
        norm_rotate_heads(
            q, q_weight, of_q, where, target, valid, by, eps, None, TILE.q_together,
            TILE.rotates_q, TILE,
        )  # fmt: skip
    target = rows(k_cache, block, place, 0, of_k.target_batch, of_k.target_seq, 0, TILE)
    norm_rotate_heads(
        k, k_weight, of_k, where, target, written, by, eps, k_scale, TILE.k_together,
        TILE.rotates_k, TILE,
    )  # fmt: skip
    _copy_values(v, v_cache, v_scale, of_v, batch, seq, written, block, place, TILE)
