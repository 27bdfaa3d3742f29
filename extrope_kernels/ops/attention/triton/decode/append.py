"""The kernel that writes new keys and values into a cache."""

import triton
import triton.language as tl

from ...._shared.triton.fp8 import parts_of_codes, quantize_rows
from ...._shared.triton.pairs import copy_rows, load_parts, of_pairs, rotate, store_parts, widened
from ...._shared.triton.position_maps import map_cos_sin
from ...._shared.triton.tokens import sequence_of
from .cache import page_of, slot_rows
from .results import counters_of

RUN_TIME_SCALARS = (
    *("k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head"),
    *("k_block", "k_slot", "k_row", "v_block", "v_slot", "v_row"),
    *("table_batch", "page_size", "capacity", "freq_batch", "new", "row_blocks"),
    *("sequences", "search_steps", "pages"),
)


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def append_kernel(
    k, v, k_cache, v_cache, inv_freq, seqlens, block_table, leftpad, log_decay, cu_seqlens,
    k_scale, v_scale, scratch,
    k_batch, k_token, k_head, v_batch, v_token, v_head,
    k_block, k_slot, k_row, v_block, v_slot, v_row,
    table_batch, page_size, capacity, freq_batch, new, row_blocks, sequences, search_steps, pages,
    stored_modulus: tl.float64, stored_factor: tl.float64, stored_offset: tl.float64,
    stored_cap: tl.float64,
    TILE: tl.constexpr,
):  # fmt: skip
    """Axis 0: blocks of new tokens; axis 1: heads of k; axis 2: batch, or 1 of packed tokens.

    scratch: of the attention that follows; the (batch, heads_k, row_blocks) counters at its head
    become 0.
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    STORED: tl.constexpr = TILE.stored
    RAW: tl.constexpr = TILE.raw
    head = tl.program_id(1)
    batch = tl.program_id(2)
    if TILE.splits:
        counters = counters_of(scratch)
        mine = counters + (tl.cast(batch, tl.int64) * tl.num_programs(1) + head) * row_blocks
        for n in tl.range(tl.program_id(0), row_blocks, tl.num_programs(0)):
            tl.store(mine + n, 0)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = token < new
    sequence, place = batch, token
    if TILE.packed:
        sequence = sequence_of(token, cu_seqlens, sequences, search_steps)
        place = token - tl.load(cu_seqlens + sequence)
        exists = exists & (place >= 0) & (token < tl.load(cu_seqlens + sequence + 1))
    slot = tl.load(seqlens + sequence) + place
    valid = exists & (slot >= 0) & (slot < capacity)
    position = slot
    if TILE.padded:
        position -= tl.load(leftpad + sequence)

    table = (block_table, table_batch, page_size)
    if TILE.paged:
        page = page_of(table, sequence, slot, valid)
        valid = valid & (page >= 0) & (page < pages)
    offset = tl.cast(batch, tl.int64) * k_batch + token.to(tl.int64) * k_token
    rows = k + (offset + tl.cast(head, tl.int64) * k_head) * TILE.align
    plane = (k_cache, k_block, k_slot, k_row)
    out = slot_rows(plane, table, sequence, head, slot, valid, TILE)
    if STORED == RAW:
        if TILE.codes:
            scale = tl.load(k_scale + head)
            quantize_rows(rows, out, scale, valid, TILE.head_dim, TILE.dims)
        else:
            copy_rows(rows, out, valid, TILE.head_dim, TILE.dims)
    else:
        if TILE.freq_of_token:
            pair = tl.arange(0, TILE.pairs)[None, :]
            freqs = inv_freq + sequence.to(tl.int64)[:, None] * freq_batch + pair
            freq = tl.load(freqs, mask=pair < TILE.half, other=0.0)
        else:
            freq = of_pairs(inv_freq + tl.cast(batch, tl.int64) * freq_batch, TILE)
        decay = None
        if log_decay is not None:
            decay = -of_pairs(log_decay, TILE).to(tl.float64)
        stored = (stored_modulus, stored_factor, stored_offset, stored_cap)
        cos, sin = map_cos_sin(position, freq, decay, stored, stored, STORED, RAW)
        parts = rotate(widened(load_parts(rows, valid, TILE)), cos, sin, 1.0)
        if TILE.codes:
            parts = parts_of_codes(parts, tl.load(k_scale + head), k.dtype.element_ty, TILE)
        store_parts(out, parts, valid, TILE)
    offset = tl.cast(batch, tl.int64) * v_batch + token.to(tl.int64) * v_token
    rows = v + (offset + tl.cast(head, tl.int64) * v_head) * TILE.align
    plane = (v_cache, v_block, v_slot, v_row)
    out = slot_rows(plane, table, sequence, head, slot, valid, TILE)
    if TILE.codes:
        quantize_rows(rows, out, tl.load(v_scale + head), valid, TILE.head_dim_v, TILE.dims_v)
    else:
        copy_rows(rows, out, valid, TILE.head_dim_v, TILE.dims_v)
