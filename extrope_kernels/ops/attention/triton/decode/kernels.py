"""The kernel of attention over a key/value cache, its keys split over programs."""

import triton
import triton.language as tl

from ...._shared.triton.fp8 import widened_codes
from ...._shared.triton.pairs import load_parts, of_pairs, rotate, widened
from ...._shared.triton.position_maps import log_n_scale, map_cos_sin
from ...._shared.triton.softmax import capped
from .cache import first_key, length_of, slot_rows, tokens_of
from .results import NONE, finish
from .schedule import place_of

LOG2_E = tl.constexpr(1.4426950408889634)

# What changes from call to call must not make Triton compile again. Each is a parameter of its own,
# since Triton takes no notice of this list for the numbers within a tuple.
RUN_TIME_SCALARS = (
    *("q_batch", "q_token", "q_head", "k_block", "k_slot", "k_row", "v_block", "v_slot", "v_row"),
    *("table_batch", "page_size", "capacity", "freq_batch", "batch", "slots", "least_blocks"),
    *("counters", "seqlen_q", "appended", "start_0", "start_1", "start_2", "granularity"),
    *("sliding_window", "scale_batch", "scale_token"),
)


@triton.jit
def _as_operand(parts, like):
    """Float32 parts in the type that products take."""
    return parts[0].to(like), parts[1].to(like), parts[2].to(like)


@triton.jit
def _widened_codes(parts, like, TILE: tl.constexpr):
    """Parts of keys in fp8, short of their scale."""
    first = widened_codes(parts[0], like, TILE.codes)
    second = widened_codes(parts[1], like, TILE.codes)
    rest = first
    if TILE.rest > 0:
        rest = widened_codes(parts[2], like, TILE.codes)
    return first, second, rest


@triton.jit
def _dots(q, k, TILE: tl.constexpr):
    result = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    result = tl.dot(q[1], tl.trans(k[1]), result, input_precision="ieee")
    if TILE.rest > 0:
        result = tl.dot(q[2], tl.trans(k[2]), result, input_precision="ieee")
    return result


@triton.jit
def _attend(
    state, q, k_plane, v_plane, table, sequence, head, pad, begin, end, low, high,
    freq, decay, k_map, stored, k_scale, softcap,
    MAP: tl.constexpr, ROTATES: tl.constexpr, LOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the keys [begin, end) of one region to (row_max, row_sum, weighted values).

    Of several tokens, row i sees only those from low[i], if LOW, to high[i].
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    DIMS: tl.constexpr = TILE.dims_v
    STORED: tl.constexpr = TILE.stored
    OPERAND: tl.constexpr = q[0].dtype
    row_max, row_sum, acc = state
    for first in tl.range(begin, end, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        valid = j < end
        slot = pad + j
        rows = slot_rows(k_plane, table, sequence, head, slot, valid, TILE)
        k = load_parts(rows, valid, TILE)
        if TILE.codes:
            k = _widened_codes(k, tl.float32 if ROTATES else OPERAND, TILE)
        if ROTATES:
            cos, sin = map_cos_sin(j, freq, decay, k_map, stored, MAP, STORED)
            k = rotate(widened(k), cos, sin, 1.0)
        logits = _dots(q, _as_operand(k, OPERAND), TILE)
        if TILE.codes:  # not of q: float16 has no small numbers
            logits *= k_scale
        if TILE.softcap:
            logits = capped(logits, softcap)
        seen = valid[None, :]
        if TILE.several_tokens:
            seen = seen & (j[None, :] < high[:, None])
            if LOW:
                seen = seen & (j[None, :] >= low[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        weights = tl.exp2(logits - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        dim = tl.arange(0, DIMS)
        rows = slot_rows(v_plane, table, sequence, head, slot, valid, TILE)
        mask = valid[:, None] & (dim < TILE.head_dim_v)[None, :]
        v = tl.load(rows[:, None] + dim[None, :], mask=mask, other=0.0)
        if TILE.codes:
            v = widened_codes(v, OPERAND, TILE.codes)
        v = v.to(OPERAND)
        acc = tl.dot(weights.to(OPERAND), v, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def decode_kernel(
    q, k_cache, v_cache, inv_freq, seqlens, block_table, leftpad, log_decay, sinks, query_scale,
    cu_seqlens, k_scale, v_scale, out, lse, scratch,
    q_batch, q_token, q_head, k_block, k_slot, k_row, v_block, v_slot, v_row,
    table_batch, page_size, capacity, freq_batch, batch, slots, least_blocks,
    counters, heads_q, seqlen_q, group, appended, start_0, start_1, start_2, granularity,
    sliding_window, scale_batch, scale_token, softmax_scale, amplitude, per_log_n, softcap,
    q0_modulus: tl.float64, q0_factor: tl.float64, q0_offset: tl.float64, q0_cap: tl.float64,
    q1_modulus: tl.float64, q1_factor: tl.float64, q1_offset: tl.float64, q1_cap: tl.float64,
    q2_modulus: tl.float64, q2_factor: tl.float64, q2_offset: tl.float64, q2_cap: tl.float64,
    k0_modulus: tl.float64, k0_factor: tl.float64, k0_offset: tl.float64, k0_cap: tl.float64,
    k1_modulus: tl.float64, k1_factor: tl.float64, k1_offset: tl.float64, k1_cap: tl.float64,
    k2_modulus: tl.float64, k2_factor: tl.float64, k2_offset: tl.float64, k2_cap: tl.float64,
    stored_modulus: tl.float64, stored_factor: tl.float64, stored_offset: tl.float64,
    stored_cap: tl.float64,
    TILE: tl.constexpr,
):  # fmt: skip
    """Axis 0: slots of the schedule, then blocks of a head's query rows; axis 1: heads of k.

    A row is a token and one of the `group` heads that share the head of k. The last program to
    finish of those that share a sequence merges what they found. scratch: (batch, heads_k, blocks
    of rows) int32, zero, filled up to 4 * counters; then float32 (slots, heads_k, rows, head_dim_v)
    and (slots, heads_k, rows). Of packed queries, seqlen_q counts those of all sequences, appended
    is 1 where all are written, a slot has one block of rows, and counters are (heads_k, slots).
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    DIMS: tl.constexpr = TILE.dims_v
    OPERAND: tl.constexpr = tl.float32 if TILE.widen else q.dtype.element_ty
    Q_MAPS: tl.constexpr = TILE.q_maps
    K_MAPS: tl.constexpr = TILE.k_maps
    RAW: tl.constexpr = TILE.raw
    ROTATES: tl.constexpr = TILE.rotates_keys
    REGIONS: tl.constexpr = len(Q_MAPS)
    q_maps = (
        (q0_modulus, q0_factor, q0_offset, q0_cap),
        (q1_modulus, q1_factor, q1_offset, q1_cap),
        (q2_modulus, q2_factor, q2_offset, q2_cap),
    )
    k_maps = (
        (k0_modulus, k0_factor, k0_offset, k0_cap),
        (k1_modulus, k1_factor, k1_offset, k1_cap),
        (k2_modulus, k2_factor, k2_offset, k2_cap),
    )
    stored = (stored_modulus, stored_factor, stored_offset, stored_cap)
    bounds = ((start_0, start_1, start_2), granularity, sliding_window)
    queries = (cu_seqlens, seqlen_q, group)
    lengths = (batch, seqlens, leftpad, appended, capacity)
    slot, block, share = place_of(slots, least_blocks, lengths, queries, bounds, TILE)
    sequence, split, splits = share
    head = tl.program_id(1)
    exists = sequence < batch
    first_token, total = 0, seqlen_q
    if TILE.packed:
        first_token, seqlen_q = tokens_of(sequence, batch, queries)
        appended *= seqlen_q
    pad, length = length_of(sequence, exists, seqlens, leftpad, appended, capacity, TILE)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = seqlen_q * group
    if not TILE.packed:
        rows = tl.where(exists, rows, 0)
    valid = row < rows
    token = row // group
    head_q = head * group + row % group
    position = length - seqlen_q + token
    top = length - seqlen_q + block * BLOCK_M // group
    last_row = tl.minimum(block * BLOCK_M + BLOCK_M, seqlen_q * group) - 1
    bottom = length - seqlen_q + last_row // group

    pairs = tl.minimum(sequence, batch - 1).to(tl.int64) * freq_batch
    freq = of_pairs(inv_freq + pairs, TILE)
    decay = None
    minus_decay = None
    if log_decay is not None:
        decay = of_pairs(log_decay, TILE).to(tl.float64)
        minus_decay = -decay
    sequence_64, token_64 = tl.cast(sequence, tl.int64), (first_token + token).to(tl.int64)
    offset = sequence_64 * q_batch + token_64 * q_token
    q_rows = q + (offset + head_q.to(tl.int64) * q_head) * TILE.align
    scale = log_n_scale(position, per_log_n) * (softmax_scale * LOG2_E)
    if TILE.query_scale:
        places = query_scale + sequence_64 * scale_batch + token_64 * scale_token
        scale *= tl.load(places, mask=valid, other=1.0)[:, None]

    least = first_key(top, bounds, 0, TILE)
    keys = tl.where(exists, tl.maximum(bottom + 1 - least, 0), 0)
    each = tl.cdiv(tl.cdiv(keys, splits), BLOCK_N) * BLOCK_N
    begin = least + split * each
    end = tl.minimum(begin + each, least + keys)
    k_plane = (k_cache, k_block, k_slot, k_row)
    v_plane = (v_cache, v_block, v_slot, v_row)
    table = (block_table, table_batch, page_size)
    of_k = None
    if TILE.codes:
        of_k = tl.load(k_scale + head)
    state = (
        tl.full((BLOCK_M,), NONE, tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, DIMS), tl.float32),
    )
    # Near keys first: what rotates them is then no longer in registers while far ones are added.
    for r in tl.static_range(REGIONS - 1, -1, -1):
        if r + 1 < REGIONS:
            # Or q would be loaded once, and stay in registers while the regions before are added.
            tl.debug_barrier()
        cos, sin = map_cos_sin(position, freq, decay, q_maps[r], stored, Q_MAPS[r], RAW)
        raw = widened(load_parts(q_rows, valid, TILE))
        of_region = rotate(raw, cos * (amplitude * scale), sin * (amplitude * scale), scale)
        low = first_key(position, bounds, r, TILE)
        high = first_key(position, bounds, r + 1, TILE)
        from_key = begin
        if r > 0:
            from_key = tl.maximum(begin, first_key(top, bounds, r, TILE))
        to_key = end
        if r + 1 < REGIONS:
            to_key = tl.minimum(end, first_key(bottom, bounds, r + 1, TILE))
        state = _attend(
            state, _as_operand(of_region, OPERAND), k_plane, v_plane, table, sequence, head, pad,
            from_key, to_key, low, high,
            freq, minus_decay, k_maps[r], stored, of_k, softcap, K_MAPS[r], ROTATES[r],
            r > 0 or not TILE.from_first_key, TILE,
        )  # fmt: skip
    if TILE.codes:
        state = (state[0], state[1], state[2] * tl.load(v_scale + head))
    packed = (batch, first_token, total)
    result = (out, lse, sinks, sequence, head, seqlen_q, heads_q, group, packed)
    finish(state, result, (slot, split, splits, slots, block), scratch, counters, valid, TILE)
