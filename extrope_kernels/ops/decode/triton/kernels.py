"""The kernels of attention over a key/value cache: split over keys, then merged; and the append."""

import triton
import triton.language as tl

from ..._shared.triton.pairs import load_parts, of_pairs, rotate, store_parts, widened
from ..._shared.triton.position_maps import log_n_scale, map_cos_sin
from .cache import length_of, slot_rows

NONE = tl.constexpr(-1e30)  # below any logit, and finite: differences of two are not NaN
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# What changes from call to call must not make Triton compile again. Each is a parameter of its own,
# since Triton takes no notice of this list for the numbers within a tuple.
RUN_TIME_SCALARS = (
    *("table_batch", "page_size", "capacity", "seqlen_q", "splits", "appended"),
    *("start_0", "start_1", "start_2", "granularity"),
)


@triton.jit
def _as_operand(parts, like):
    """Float32 parts in the type that products take."""
    return parts[0].to(like), parts[1].to(like), parts[2].to(like)


@triton.jit
def _dots(q, k, TILE: tl.constexpr):
    result = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    result = tl.dot(q[1], tl.trans(k[1]), result, input_precision="ieee")
    if TILE.rest > 0:
        result = tl.dot(q[2], tl.trans(k[2]), result, input_precision="ieee")
    return result


@triton.jit
def _first_key(position, starts, granularity, REGION: tl.constexpr, REGIONS: tl.constexpr):
    """First key that queries at `position` see in REGION; for REGION = REGIONS, the end of all."""
    key = position + 1
    if REGION < REGIONS:
        key = tl.minimum(key, position // granularity * granularity + starts[REGION])
    return tl.maximum(key, 0)


@triton.jit
def _attend(
    state, q, cache, batch, head, pad, table_batch, page_size, begin, end, low, high,
    freq, decay, k_map, stored, MAP: tl.constexpr, ROTATES: tl.constexpr, LOW: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Add the keys [begin, end) of one region to (row_max, row_sum, weighted values).

    Of several tokens, row i sees only those from low[i], if LOW, to high[i].
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    DIMS: tl.constexpr = TILE.dims
    STORED: tl.constexpr = TILE.stored
    OPERAND: tl.constexpr = q[0].dtype
    row_max, row_sum, acc = state
    for first in tl.range(begin, end, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        valid = j < end
        slot = pad + j
        rows = slot_rows(cache.k, cache, batch, head, slot, valid, table_batch, page_size, TILE)
        k = load_parts(rows, valid, TILE)
        if ROTATES:
            cos, sin = map_cos_sin(j, freq, decay, k_map, stored, MAP, STORED)
            k = rotate(widened(k), cos, sin, 1.0)
        logits = _dots(q, _as_operand(k, OPERAND), TILE)
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
        rows = slot_rows(cache.v, cache, batch, head, slot, valid, table_batch, page_size, TILE)
        mask = valid[:, None] & (dim < TILE.head_dim)[None, :]
        v = tl.load(rows[:, None] + dim[None, :], mask=mask, other=0.0).to(OPERAND)
        acc = tl.dot(weights.to(OPERAND), v, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def decode_kernel(
    q, cache, partial_out, partial_lse, table_batch, page_size, capacity,
    inv_freq, freq_batch, log_decay, heads_q, seqlen_q, group, splits, appended,
    start_0, start_1, start_2, granularity, softmax_scale, amplitude, per_log_n,
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
    """Axis 0: splits of the keys, then blocks of a head's query rows; axis 1: heads of k; 2: batch.

    A row is a token and one of the `group` heads that share the head of k. partial_out: (splits,
    batch, seqlen_q, heads_q, head_dim) float32, normalised; partial_lse: (splits, batch, seqlen_q,
    heads_q), base 2, NONE without keys.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    DIMS: tl.constexpr = TILE.dims
    OPERAND: tl.constexpr = tl.float32 if TILE.widen else q.pointer.dtype.element_ty
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
    starts = (start_0, start_1, start_2)
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    head = tl.program_id(1)
    batch = tl.program_id(2)
    pad, length = length_of(cache, batch, appended, capacity)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < seqlen_q * group
    token = row // group
    head_q = head * group + row % group
    position = length - seqlen_q + token
    top = length - seqlen_q + block * BLOCK_M // group
    last_row = tl.minimum(block * BLOCK_M + BLOCK_M, seqlen_q * group) - 1
    bottom = length - seqlen_q + last_row // group

    freq = of_pairs(inv_freq + tl.cast(batch, tl.int64) * freq_batch, TILE)
    decay = None
    minus_decay = None
    if log_decay is not None:
        decay = of_pairs(log_decay, TILE).to(tl.float64)
        minus_decay = -decay
    offset = tl.cast(batch, tl.int64) * q.block + token.to(tl.int64) * q.slot
    rows = q.pointer + (offset + head_q.to(tl.int64) * q.head) * TILE.align
    scale = log_n_scale(position, per_log_n) * (softmax_scale * LOG2_E)

    least = _first_key(top, starts, granularity, 0, REGIONS)
    each = tl.cdiv(tl.cdiv(tl.maximum(bottom + 1 - least, 0), splits), BLOCK_N) * BLOCK_N
    begin = least + split * each
    end = tl.minimum(begin + each, bottom + 1)
    state = (
        tl.full((BLOCK_M,), NONE, tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, DIMS), tl.float32),
    )
    # Near keys first: what rotates them is then no longer in registers while far ones are added.
    for r in tl.static_range(REGIONS - 1, -1, -1):
        cos, sin = map_cos_sin(position, freq, decay, q_maps[r], stored, Q_MAPS[r], RAW)
        raw = widened(load_parts(rows, valid, TILE))
        of_region = rotate(raw, cos * (amplitude * scale), sin * (amplitude * scale), scale)
        low = _first_key(position, starts, granularity, r, REGIONS)
        high = _first_key(position, starts, granularity, r + 1, REGIONS)
        from_key = begin
        if r > 0:
            from_key = tl.maximum(begin, _first_key(top, starts, granularity, r, REGIONS))
        to_key = end
        if r + 1 < REGIONS:
            to_key = tl.minimum(end, _first_key(bottom, starts, granularity, r + 1, REGIONS))
        state = _attend(
            state, _as_operand(of_region, OPERAND), cache, batch, head, pad, table_batch,
            page_size, from_key, to_key, low, high,
            freq, minus_decay, k_maps[r], stored, K_MAPS[r], ROTATES[r],
            r > 0 or not TILE.from_first_key, TILE,
        )  # fmt: skip
    row_max, row_sum, acc = state

    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    place = tl.cast(split, tl.int64) * tl.num_programs(2) + batch
    place = (place * seqlen_q + token) * heads_q + head_q
    tl.store(partial_lse + place, tl.where(empty, NONE, row_max + tl.log2(row_sum)), mask=valid)
    dim = tl.arange(0, DIMS)
    mask = valid[:, None] & (dim < TILE.head_dim)[None, :]
    pointers = partial_out + place[:, None] * TILE.head_dim + dim[None, :]
    tl.store(pointers, acc / row_sum[:, None], mask=mask)


@triton.jit(do_not_specialize=("splits", "seqlen_q"))
def merge_kernel(partial_out, partial_lse, out, lse, splits, seqlen_q, heads_q, TILE: tl.constexpr):
    """Axis 0: batch x seqlen_q x heads_q. One row from what its splits found."""
    SPLITS: tl.constexpr = TILE.block_n
    DIMS: tl.constexpr = TILE.dims
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    dim = tl.arange(0, DIMS)
    row_max = NONE
    row_sum = 0.0
    acc = tl.zeros((DIMS,), tl.float32)
    for first in tl.range(0, splits, SPLITS):
        split = (first + tl.arange(0, SPLITS)).to(tl.int64)
        valid = split < splits
        of_split = tl.load(partial_lse + split * rows + row, mask=valid, other=NONE)
        new_max = tl.maximum(row_max, tl.max(of_split, 0))
        # Splits without keys hold zeros, but count: not when there is no key at all.
        weights = tl.where(of_split > NONE, tl.exp2(of_split - new_max), 0.0)
        rescale = tl.exp2(row_max - new_max)
        pointers = partial_out + (split * rows + row)[:, None] * TILE.head_dim + dim[None, :]
        mask = valid[:, None] & (dim < TILE.head_dim)[None, :]
        part = tl.load(pointers, mask=mask, other=0.0)
        acc = acc * rescale + tl.sum(part * weights[:, None], 0)
        row_sum = row_sum * rescale + tl.sum(weights, 0)
        row_max = new_max
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    value = (acc / row_sum).to(out.dtype.element_ty)
    tl.store(out + row * TILE.head_dim + dim, value, mask=dim < TILE.head_dim)
    # The grid's number is 32 bits wide: no function call for a division of 64.
    head = tl.program_id(0) % heads_q
    token = tl.program_id(0) // heads_q % seqlen_q
    batch = tl.program_id(0) // heads_q // seqlen_q
    natural = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    tl.store(lse + (batch * heads_q + head) * seqlen_q + token, natural)


@triton.jit(do_not_specialize=("table_batch", "page_size", "capacity", "new"))
def append_kernel(
    k, v, cache, table_batch, page_size, capacity, inv_freq, freq_batch, log_decay, new,
    stored_modulus: tl.float64, stored_factor: tl.float64, stored_offset: tl.float64,
    stored_cap: tl.float64,
    TILE: tl.constexpr,
):  # fmt: skip
    """Axis 0: blocks of new tokens; axis 1: heads of k; axis 2: batch."""
    BLOCK_N: tl.constexpr = TILE.block_n
    STORED: tl.constexpr = TILE.stored
    RAW: tl.constexpr = TILE.raw
    head = tl.program_id(1)
    batch = tl.program_id(2)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(cache.seqlens + batch) + token
    valid = (token < new) & (slot >= 0) & (slot < capacity)
    position = slot
    if cache.leftpad is not None:
        position -= tl.load(cache.leftpad + batch)

    offset = tl.cast(batch, tl.int64) * k.block + token.to(tl.int64) * k.slot
    rows = k.pointer + (offset + tl.cast(head, tl.int64) * k.head) * TILE.align
    out = slot_rows(cache.k, cache, batch, head, slot, valid, table_batch, page_size, TILE)
    if STORED == RAW:
        _copy(rows, out, valid, TILE)
    else:
        freq = of_pairs(inv_freq + tl.cast(batch, tl.int64) * freq_batch, TILE)
        decay = None
        if log_decay is not None:
            decay = -of_pairs(log_decay, TILE).to(tl.float64)
        stored = (stored_modulus, stored_factor, stored_offset, stored_cap)
        cos, sin = map_cos_sin(position, freq, decay, stored, stored, STORED, RAW)
        parts = rotate(widened(load_parts(rows, valid, TILE)), cos, sin, 1.0)
        store_parts(out, parts, valid, TILE)
    offset = tl.cast(batch, tl.int64) * v.block + token.to(tl.int64) * v.slot
    rows = v.pointer + (offset + tl.cast(head, tl.int64) * v.head) * TILE.align
    out = slot_rows(cache.v, cache, batch, head, slot, valid, table_batch, page_size, TILE)
    _copy(rows, out, valid, TILE)


@triton.jit
def _copy(rows, out, valid, TILE: tl.constexpr):
    DIMS: tl.constexpr = TILE.dims
    dim = tl.arange(0, DIMS)[None, :]
    mask = valid[:, None] & (dim < TILE.head_dim)
    tl.store(out[:, None] + dim, tl.load(rows[:, None] + dim, mask=mask), mask=mask)
