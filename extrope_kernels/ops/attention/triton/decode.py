"""The kernels of attention over a key/value cache: split over keys, then merged; and the append."""

import triton
import triton.language as tl

from .cache import (
    far_turns,
    frequencies,
    length_of,
    load_row_parts,
    near_turns,
    slot_rows,
    stored_turns,
    widened,
)
from .turns import turn

NONE = tl.constexpr(-1e30)  # below any logit, and finite: differences of two are not NaN
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _as_operand(row, like, scale):
    """Float32 row parts, scaled, in the type that products take."""
    return (row[0] * scale).to(like), (row[1] * scale).to(like), (row[2] * scale).to(like)


@triton.jit
def _scores(q, k, TILE: tl.constexpr):
    result = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    result = tl.dot(q[1], tl.trans(k[1]), result, input_precision="ieee")
    if TILE.rest > 0:
        result = tl.dot(q[2], tl.trans(k[2]), result, input_precision="ieee")
    return result


@triton.jit
def _attend(
    state, q_far, q_near, cache, batch, head, pad, begin, stop, position,
    fast, slow, window, group, NEAR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the keys [begin, stop) to (largest, total, sums); not NEAR: they are far of every row."""
    KEYS: tl.constexpr = TILE.keys
    largest, total, sums = state
    for first in tl.range(begin, stop, KEYS):
        j = first + tl.arange(0, KEYS)
        live = j < stop
        slot = pad + j
        rows = slot_rows(cache.k, cache, batch, head, slot, live, TILE)
        k = load_row_parts(rows, live, TILE)
        OPERAND: tl.constexpr = q_far[0].dtype
        if NEAR:
            turns = near_turns(j[:, None], fast, slow, group, TILE)
            near_k = _as_operand(turn(widened(k), turns), OPERAND, 1.0)
            scores = _scores(q_near, near_k, TILE)
            if TILE.several_tokens:  # not all of these keys are near of all rows
                far_k = (k[0].to(OPERAND), k[1].to(OPERAND), k[2].to(OPERAND))
                near = j[None, :] > position[:, None] - window
                scores = tl.where(near, scores, _scores(q_far, far_k, TILE))
        else:
            far_k = (k[0].to(OPERAND), k[1].to(OPERAND), k[2].to(OPERAND))
            scores = _scores(q_far, far_k, TILE)
        seen = live[None, :] & (j[None, :] <= position[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - top[:, None])
        kept = tl.exp2(largest - top)
        total = total * kept + tl.sum(weights, 1)
        lane = tl.arange(0, TILE.lanes)
        rows = slot_rows(cache.v, cache, batch, head, slot, live, TILE)
        mask = live[:, None] & (lane < TILE.head_dim)[None, :]
        v = tl.load(rows[:, None] + lane[None, :], mask=mask, other=0.0).to(OPERAND)
        sums = tl.dot(weights.to(OPERAND), v, sums * kept[:, None], input_precision="ieee")
        largest = top
    return largest, total, sums


@triton.jit(do_not_specialize=("seqlen_q", "splits", "appended", "window", "group_size"))
def decode_kernel(
    q,
    cache,
    sums_out,
    logs_out,
    heads_q,
    seqlen_q,
    group,
    splits,
    appended,
    window,
    slowness: tl.float64,
    group_size,
    softmax_scale,
    amplitude,
    per_log_n,
    TILE: tl.constexpr,
):
    """Axis 0: splits of the keys, then tiles of a head's query rows; axis 1: heads of k; 2: batch.

    A row is a token and one of the `group` heads that share the head of k. sums_out: (splits,
    batch, seqlen_q, heads_q, head_dim) float32, normalised; logs_out: (splits, batch, seqlen_q,
    heads_q), base 2, NONE without keys.
    """
    ROWS: tl.constexpr = TILE.rows
    KEYS: tl.constexpr = TILE.keys
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits
    head = tl.program_id(1)
    batch = tl.program_id(2)
    pad, length = length_of(cache, batch, appended)

    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < seqlen_q * group
    token = row // group
    head_q = head * group + row % group
    position = length - seqlen_q + token
    first = length - seqlen_q + tile * ROWS // group
    last_row = tl.minimum(tile * ROWS + ROWS, seqlen_q * group) - 1
    last = length - seqlen_q + last_row // group

    fast, slow = frequencies(cache, batch, slowness, TILE)
    offset = tl.cast(batch, tl.int64) * q.block + token.to(tl.int64) * q.slot
    rows = q.pointer + (offset + head_q.to(tl.int64) * q.head) * TILE.align
    raw = widened(load_row_parts(rows, live, TILE))
    scale = tl.full((ROWS,), softmax_scale * LOG2_E, tl.float32)
    if per_log_n is not None:
        scale *= tl.maximum(tl.log((tl.maximum(position, 0) + 1).to(tl.float32)) * per_log_n, 1.0)
    rotated = (raw[0] * amplitude, raw[1] * amplitude, raw[2])
    OPERAND: tl.constexpr = tl.float32 if TILE.widen else q.pointer.dtype.element_ty
    i = position[:, None]
    far_q = turn(rotated, far_turns(i, fast, slow, window, group_size, TILE))
    far_q = _as_operand(far_q, OPERAND, scale[:, None])
    near_q = far_q
    if TILE.frame != "plain":
        near_q = _as_operand(turn(rotated, i.to(tl.int64) * fast), OPERAND, scale[:, None])

    each = tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS
    begin = split * each
    end = tl.minimum(begin + each, last + 1)
    far_end = end
    if TILE.frame != "plain":
        far_end = tl.minimum(tl.maximum(first + 1 - window, begin), end)
    LANES: tl.constexpr = TILE.lanes
    state = (
        tl.full((ROWS,), NONE, tl.float32),
        tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS, LANES), tl.float32),
    )
    state = _attend(
        state, far_q, near_q, cache, batch, head, pad, begin, far_end, position,
        fast, slow, window, group_size, False, TILE,
    )  # fmt: skip
    if TILE.frame != "plain":
        state = _attend(
            state, far_q, near_q, cache, batch, head, pad, far_end, end, position,
            fast, slow, window, group_size, True, TILE,
        )  # fmt: skip
    largest, total, sums = state

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    place = tl.cast(split, tl.int64) * tl.num_programs(2) + batch
    place = (place * seqlen_q + token) * heads_q + head_q
    tl.store(logs_out + place, tl.where(empty, NONE, largest + tl.log2(total)), mask=live)
    lane = tl.arange(0, LANES)
    mask = live[:, None] & (lane < TILE.head_dim)[None, :]
    pointers = sums_out + place[:, None] * TILE.head_dim + lane[None, :]
    tl.store(pointers, sums / total[:, None], mask=mask)


@triton.jit(do_not_specialize=("splits", "seqlen_q"))
def merge_kernel(sums, logs, out, lse, splits, seqlen_q, heads_q, TILE: tl.constexpr):
    """Axis 0: batch x seqlen_q x heads_q. One row from what its splits found."""
    SPLITS: tl.constexpr = TILE.keys
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    lane = tl.arange(0, TILE.lanes)
    largest = NONE
    total = 0.0
    acc = tl.zeros((TILE.lanes,), tl.float32)
    for first in tl.range(0, splits, SPLITS):
        split = (first + tl.arange(0, SPLITS)).to(tl.int64)
        live = split < splits
        log = tl.load(logs + split * rows + row, mask=live, other=NONE)
        top = tl.maximum(largest, tl.max(log, 0))
        # Splits without keys hold zeros, but count: not when there is no key at all.
        weights = tl.where(log > NONE, tl.exp2(log - top), 0.0)
        kept = tl.exp2(largest - top)
        pointers = sums + (split * rows + row)[:, None] * TILE.head_dim + lane[None, :]
        mask = live[:, None] & (lane < TILE.head_dim)[None, :]
        part = tl.load(pointers, mask=mask, other=0.0)
        acc = acc * kept + tl.sum(part * weights[:, None], 0)
        total = total * kept + tl.sum(weights, 0)
        largest = top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    value = (acc / total).to(out.dtype.element_ty)
    tl.store(out + row * TILE.head_dim + lane, value, mask=lane < TILE.head_dim)
    # The grid's number is 32 bits wide: no function call for a division of 64.
    head = tl.program_id(0) % heads_q
    token = tl.program_id(0) // heads_q % seqlen_q
    batch = tl.program_id(0) // heads_q // seqlen_q
    log = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN_2)
    tl.store(lse + (batch * heads_q + head) * seqlen_q + token, log)


@triton.jit(do_not_specialize=("new", "group_size"))
def append_kernel(k, v, cache, new, slowness: tl.float64, group_size, TILE: tl.constexpr):
    """Axis 0: tiles of new tokens; axis 1: heads of k; axis 2: batch."""
    KEYS: tl.constexpr = TILE.keys
    head = tl.program_id(1)
    batch = tl.program_id(2)
    token = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    slot = tl.load(cache.seqlens + batch) + token
    live = (token < new) & (slot >= 0) & (slot < cache.capacity)
    position = slot
    if cache.leftpad is not None:
        position -= tl.load(cache.leftpad + batch)

    offset = tl.cast(batch, tl.int64) * k.block + token.to(tl.int64) * k.slot
    rows = k.pointer + (offset + tl.cast(head, tl.int64) * k.head) * TILE.align
    out = slot_rows(cache.k, cache, batch, head, slot, live, TILE)
    if TILE.frame == "raw":
        _copy(rows, out, live, TILE)
    else:
        fast, slow = frequencies(cache, batch, slowness, TILE)
        turns = stored_turns(position[:, None], fast, slow, group_size, TILE)
        _store_parts(out, turn(widened(load_row_parts(rows, live, TILE)), turns), live, TILE)
    offset = tl.cast(batch, tl.int64) * v.block + token.to(tl.int64) * v.slot
    rows = v.pointer + (offset + tl.cast(head, tl.int64) * v.head) * TILE.align
    _copy(rows, slot_rows(cache.v, cache, batch, head, slot, live, TILE), live, TILE)


@triton.jit
def _copy(rows, out, live, TILE: tl.constexpr):
    lane = tl.arange(0, TILE.lanes)[None, :]
    mask = live[:, None] & (lane < TILE.head_dim)
    tl.store(out[:, None] + lane, tl.load(rows[:, None] + lane, mask=mask), mask=mask)


@triton.jit
def _store_parts(rows, parts, live, TILE: tl.constexpr):
    """Round once and store what load_row_parts loads."""
    ROWS: tl.constexpr = rows.shape[0]
    PAIRS: tl.constexpr = TILE.pairs
    ELEMENT: tl.constexpr = rows.dtype.element_ty
    if TILE.interleaved:
        lane = tl.arange(0, 2 * PAIRS)
        mask = live[:, None] & (lane < 2 * TILE.half)[None, :]
        both = tl.reshape(tl.join(parts[0].to(ELEMENT), parts[1].to(ELEMENT)), (ROWS, 2 * PAIRS))
        tl.store(rows[:, None] + lane[None, :], both, mask=mask)
    else:
        lane = tl.arange(0, PAIRS)
        mask = live[:, None] & (lane < TILE.half)[None, :]
        tl.store(rows[:, None] + lane[None, :], parts[0].to(ELEMENT), mask=mask)
        tl.store(rows[:, None] + (lane + TILE.half)[None, :], parts[1].to(ELEMENT), mask=mask)
    if TILE.rest > 0:
        lane = tl.arange(0, TILE.rest_lanes)
        mask = live[:, None] & (lane < TILE.rest)[None, :]
        pointers = rows[:, None] + (lane + 2 * TILE.half)[None, :]
        tl.store(pointers, parts[2].to(ELEMENT), mask=mask)
