"""The kernels of a sweep: gather the state of each part of a sequence, chain them, sweep the parts.

All parts run at once but for the chain, which only adds the parts' states up. Tokens are visited in
chunks. Powers of the decay are those of distances within a part, so none overflows.
"""

import triton
import triton.language as tl

from .rows import (
    add_keys,
    first_token,
    load_numbers,
    load_rows,
    place,
    product,
    row_pointers,
    token_steps,
)

# What changes from call to call must not make Triton compile again.
RUN_TIME_SCALARS = ("parts", "heads", "num_sequences", "search_steps", "seqlen")


@triton.jit
def _first_head(head, of, heads):
    """The first of the heads `of` a tensor that belong to `head` of `heads`."""
    return (head * of) // heads


@triton.jit
def _log2_decay(log2_decay, head):
    if log2_decay is None:  # noqa: SIM108  (a conditional expression compiles both sides)
        rate = 0.0
    else:
        rate = tl.load(log2_decay + head)
    return rate


@triton.jit
def _load_state(pointer, slot, first, TILE: tl.constexpr):
    """(score_lanes, value_lanes) of a state (score_dim, value_dim), from value lane `first` on."""
    row = tl.arange(0, TILE.score_lanes)
    lane = first + tl.arange(0, TILE.value_lanes)
    base = pointer + tl.cast(slot, tl.int64) * (TILE.score_dim * TILE.value_dim)
    inside = (row < TILE.score_dim)[:, None] & (lane < TILE.value_dim)[None, :]
    return base + (row[:, None] * TILE.value_dim + lane[None, :]), inside


@triton.jit
def _vector(pointer, slot, first, DIM: tl.constexpr, LANES: tl.constexpr):
    lane = first + tl.arange(0, LANES)
    return pointer + tl.cast(slot, tl.int64) * DIM + lane, lane < DIM


@triton.jit
def _no_state(TILE: tl.constexpr):
    state = tl.zeros((TILE.score_lanes, TILE.value_lanes), tl.float32)
    key_sum = tl.zeros((TILE.score_lanes,), tl.float32)
    return state, key_sum, tl.zeros((TILE.value_lanes,), tl.float32)


@triton.jit
def _load_states(states, slot, first, TILE: tl.constexpr):
    pointers, inside = _load_state(states[0], slot, first, TILE)
    state = tl.load(pointers, mask=inside, other=0.0)
    _, key_sum, extra_sum = _no_state(TILE)
    if TILE.key_sum:
        pointers, inside = _vector(states[1], slot, 0, TILE.score_dim, TILE.score_lanes)
        key_sum = tl.load(pointers, mask=inside, other=0.0)
    if TILE.extra:
        pointers, inside = _vector(states[2], slot, first, TILE.value_dim, TILE.value_lanes)
        extra_sum = tl.load(pointers, mask=inside, other=0.0)
    return state, key_sum, extra_sum


@triton.jit
def _store_states(states, slot, first, state, key_sum, extra_sum, TILE: tl.constexpr):
    pointers, inside = _load_state(states[0], slot, first, TILE)
    tl.store(pointers, state, mask=inside)
    if TILE.key_sum:  # noqa: SIM102  (known when compiled; the other, when it runs)
        if first == 0:  # the other programs of this state have the same
            sums, there = _vector(states[1], slot, 0, TILE.score_dim, TILE.score_lanes)
            tl.store(sums, key_sum, mask=there)
    if TILE.extra:
        extras, within = _vector(states[2], slot, first, TILE.value_dim, TILE.value_lanes)
        tl.store(extras, extra_sum, mask=within)


@triton.jit
def _load_keys(
    y, w, y_scale, y_extra, batch, head, token, live, lane, seqlen, TILE: tl.constexpr
):  # fmt: skip
    """A chunk's rows of y and of w, its scales and its extras."""
    y_rows = load_rows(
        y, batch, head, token, live, 0, TILE.score_dim, TILE.score_lanes, TILE.phi_scores, TILE
    )
    w_rows = load_rows(
        w, batch, head, token, live, lane, TILE.value_dim, TILE.value_lanes, not TILE.phi_scores,
        TILE,
    )  # fmt: skip
    scale = load_numbers(y_scale, batch, head, token, live, seqlen, TILE)
    return y_rows, w_rows, scale, load_numbers(y_extra, batch, head, token, live, seqlen, TILE)


@triton.jit
def _weights(position, end, count, rate, scale):
    """By how much the keys of a chunk have decayed at its last token; 0 past the end."""
    age = count - 1 - tl.arange(0, position.shape[0])
    return tl.where(position < end, tl.exp2(tl.maximum(age, 0) * rate) * scale, 0.0)


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def gather_kernel(
    y, w, y_scale, y_extra, log2_decay, states, cu_seqlens, part_starts,
    num_sequences, search_steps, parts, heads, seqlen,
    TILE: tl.constexpr,
):  # fmt: skip
    """Axis 0: parts, then states' heads, then the batch; axis 1: value lanes."""
    rest, slot, begin, length, start, end = place(
        parts, cu_seqlens, part_starts, num_sequences, search_steps, seqlen, TILE
    )
    batch, head = rest // heads, rest % heads
    lane = tl.program_id(1) * TILE.value_lanes
    rate = _log2_decay(log2_decay, head)
    first_y = _first_head(head, y.heads, heads)
    state, key_sum, extra_sum = _no_state(TILE)
    for chunk in tl.range(start, end, TILE.chunk):
        position = chunk + tl.arange(0, TILE.chunk)
        token = first_token(begin, length, chunk, TILE)
        live = position < end
        count = tl.minimum(end - chunk, TILE.chunk)
        shrink = tl.exp2(count * rate)
        state, key_sum, extra_sum = state * shrink, key_sum * shrink, extra_sum * shrink
        for head_y in tl.range(first_y, first_y + tl.maximum(y.heads // heads, 1)):
            y_rows, w_rows, scale, extra = _load_keys(
                y, w, y_scale, y_extra, batch, head_y, token, live, lane, seqlen, TILE
            )
            weights = _weights(position, end, count, rate, scale)
            state, key_sum, extra_sum = add_keys(
                state, key_sum, extra_sum, y_rows, w_rows, weights, extra, TILE
            )
    at = (batch * parts + slot) * heads + head
    _store_states(states, at, lane, state, key_sum, extra_sum, TILE)


# Whether 16 divides the size decides how wide the accesses are.
@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def chain_kernel(
    states, first_state, log2_decay, part_starts, parts, heads, size,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Turn each part's own state into the one that it starts from, of `size` numbers.

    Axis 0: states' heads, then sequences; axis 1: blocks of numbers.
    """
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = number < size
    begin = sequence * parts
    end = begin + parts
    if part_starts is not None:
        begin = tl.load(part_starts + sequence)
        end = tl.load(part_starts + sequence + 1)
    shrink = tl.exp2(TILE.part * _log2_decay(log2_decay, head))
    running = tl.zeros((BLOCK,), tl.float32)
    if first_state is not None:
        at = tl.cast(sequence * heads + head, tl.int64) * size
        running = tl.load(first_state + at + number, mask=inside, other=0.0)
    for part in tl.range(begin, end):
        pointers = states + tl.cast(part * heads + head, tl.int64) * size + number
        own = tl.load(pointers, mask=inside, other=0.0)
        if TILE.causal:
            tl.store(pointers, running, mask=inside)
            running = running * shrink + own
        else:
            running += own
    if not TILE.causal:
        for part in tl.range(begin, end):
            pointers = states + tl.cast(part * heads + head, tl.int64) * size + number
            tl.store(pointers, running, mask=inside)


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def sweep_kernel(
    x, y, w, out, gate, x_scale, x_extra, y_scale, y_extra, den, log2_decay,
    states, last_states, cu_seqlens, part_starts,
    num_sequences, search_steps, parts, heads, seqlen,
    TILE: tl.constexpr,
):  # fmt: skip
    """Axis 0: parts, then heads of out, then the batch; axis 1: value lanes."""
    CHUNK: tl.constexpr = TILE.chunk
    rest, slot, begin, length, start, end = place(
        parts, cu_seqlens, part_starts, num_sequences, search_steps, seqlen, TILE
    )
    batch, head_out = rest // out.heads, rest % out.heads
    head = head_out * heads // out.heads
    head_x = head_out * x.heads // out.heads
    first_y = _first_head(head, y.heads, heads)
    lane = tl.program_id(1) * TILE.value_lanes
    rate = _log2_decay(log2_decay, head)
    state, key_sum, extra_sum = _no_state(TILE)
    if states is not None:
        at = (batch * parts + slot) * heads + head
        state, key_sum, extra_sum = _load_states(states, at, lane, TILE)
    row = tl.arange(0, CHUNK)
    distance = row[:, None] - row[None, :]
    decays = tl.where(distance >= 0, tl.exp2(tl.maximum(distance, 0) * rate), 0.0)
    for chunk in tl.range(start, end, CHUNK):
        position = chunk + row
        token = first_token(begin, length, chunk, TILE)
        live = position < end
        x_rows = load_rows(
            x, batch, head_x, token, live, 0, TILE.score_dim, TILE.score_lanes,
            TILE.phi_scores, TILE,
        )  # fmt: skip
        extra_x = load_numbers(x_extra, batch, head_x, token, live, seqlen, TILE)
        sums = product(x_rows, state.to(x_rows.dtype))
        x_sum = tl.sum(x_rows.to(tl.float32), 1)
        if TILE.phi_scores:
            sums += TILE.eps * tl.sum(state, 0)[None, :]
        if TILE.extra:
            sums += extra_x[:, None] * extra_sum[None, :]
        total = tl.zeros((CHUNK,), tl.float32)
        if TILE.normalize:
            total = tl.sum(x_rows.to(tl.float32) * key_sum[None, :], 1)
            total += TILE.eps * tl.sum(key_sum, 0)
        if TILE.causal:
            count = tl.minimum(end - chunk, CHUNK)
            faded = tl.exp2((row + 1) * rate)
            sums *= faded[:, None]
            total *= faded
            shrink = tl.exp2(count * rate)
            state, key_sum, extra_sum = state * shrink, key_sum * shrink, extra_sum * shrink
            for head_y in tl.range(first_y, first_y + tl.maximum(y.heads // heads, 1)):
                y_rows, w_rows, scale, extra_y = _load_keys(
                    y, w, y_scale, y_extra, batch, head_y, token, live, lane, seqlen, TILE
                )
                if TILE.x_twice:
                    x_rows = load_rows(
                        x, batch, head_x, token, live, 0, TILE.score_dim, TILE.score_lanes,
                        TILE.phi_scores, TILE,
                    )  # fmt: skip
                scores = product(x_rows, tl.trans(y_rows))
                if TILE.phi_scores:
                    y_sum = tl.sum(y_rows.to(tl.float32), 1)
                    more = x_sum[:, None] + y_sum[None, :] + TILE.eps * TILE.score_dim
                    scores += TILE.eps * more
                if TILE.extra:
                    scores += extra_x[:, None] * extra_y[None, :]
                # A select instead would keep NaN out of rows that do not see it, and spill.
                scores *= decays * scale[None, :]
                sums += product(scores.to(w_rows.dtype), w_rows)
                if TILE.normalize:
                    total += tl.sum(scores, 1)
                if not TILE.phi_scores:
                    sums += TILE.eps * tl.sum(scores, 1)[:, None]
                weights = _weights(position, end, count, rate, scale)
                state, key_sum, extra_sum = add_keys(
                    state, key_sum, extra_sum, y_rows, w_rows, weights, extra_y, TILE
                )
        if TILE.normalize:
            sums /= total[:, None]
            if lane == 0:  # the other programs of this row have the same
                row_of_head = (tl.cast(batch, tl.int64) * x.heads + head_x) * seqlen
                tl.store(den + row_of_head + token + token_steps(TILE), total, mask=live)
        else:
            sums *= load_numbers(x_scale, batch, head_x, token, live, seqlen, TILE)[:, None]
        if gate.pointer is not None:
            head_gate = head_out * gate.heads // out.heads
            gates = load_rows(
                gate, batch, head_gate, token, live, lane, TILE.value_dim, TILE.value_lanes,
                False, TILE,
            )  # fmt: skip
            sums = tl.where(gates <= 0, 0.0, sums)
        to = row_pointers(out, batch, head_out, token, lane, TILE.value_lanes, TILE)
        inside = live[:, None] & (lane + tl.arange(0, TILE.value_lanes) < TILE.value_dim)[None, :]
        tl.store(to, sums.to(out.pointer.dtype.element_ty), mask=inside)
    if last_states is not None:  # noqa: SIM102  (as above)
        if (end == length) & (head_out == head * (out.heads // heads)):
            _store_states(last_states, batch * heads + head, lane, state, key_sum, extra_sum, TILE)
