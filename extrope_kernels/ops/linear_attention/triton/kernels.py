"""The kernels of a scan: the state of each part of a sequence, their passing on, and the rows.

All parts run at once but for the passing, which only adds the parts' states up. Tokens are visited
in chunks. Powers of the decay are those of distances within a part, so none overflows.
"""

import triton
import triton.language as tl

from .rows import (
    add_keys,
    first_token,
    load_numbers,
    load_rows,
    locate,
    product,
    row_pointers,
    token_steps,
)
from .states import load_states, no_state, store_states

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
def _load_keys(
    k, v, k_scale, k_extra, batch, head, token, valid, first_v, seqlen, TILE: tl.constexpr
):  # fmt: skip
    """A chunk's rows of k and of v, its scales and its extras."""
    BLOCK_D: tl.constexpr = TILE.block_d
    BLOCK_V: tl.constexpr = TILE.block_v
    PHI_SCORES: tl.constexpr = TILE.phi_scores
    k_rows = load_rows(k, batch, head, token, valid, 0, TILE.score_dim, BLOCK_D, PHI_SCORES, TILE)
    v_rows = load_rows(
        v, batch, head, token, valid, first_v, TILE.value_dim, BLOCK_V, not PHI_SCORES,
        TILE,
    )  # fmt: skip
    scale = load_numbers(k_scale, batch, head, token, valid, seqlen, TILE)
    return k_rows, v_rows, scale, load_numbers(k_extra, batch, head, token, valid, seqlen, TILE)


@triton.jit
def _weights(position, end, count, rate, scale):
    """By how much the keys of a chunk have decayed at its last token; 0 past the end."""
    age = count - 1 - tl.arange(0, position.shape[0])
    return tl.where(position < end, tl.exp2(tl.maximum(age, 0) * rate) * scale, 0.0)


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def state_kernel(
    k, v, k_scale, k_extra, log2_decay, states, cu_seqlens, part_starts,
    num_sequences, search_steps, parts, heads, seqlen,
    TILE: tl.constexpr,
):  # fmt: skip
    """Axis 0: parts, then states' heads, then the batch; axis 1: value dims."""
    CHUNK: tl.constexpr = TILE.chunk
    BLOCK_V: tl.constexpr = TILE.block_v
    rest, slot, begin, length, start, end = locate(
        parts, cu_seqlens, part_starts, num_sequences, search_steps, seqlen, TILE
    )
    batch, head = rest // heads, rest % heads
    first_v = tl.program_id(1) * BLOCK_V
    rate = _log2_decay(log2_decay, head)
    first_k = _first_head(head, k.heads, heads)
    state, key_sum, value_sum, extra_sum = no_state(TILE)
    for chunk in tl.range(start, end, CHUNK):
        position = chunk + tl.arange(0, CHUNK)
        token = first_token(begin, length, chunk, TILE)
        valid = position < end
        count = tl.minimum(end - chunk, CHUNK)
        decay = tl.exp2(count * rate)
        state, key_sum = state * decay, key_sum * decay
        value_sum, extra_sum = value_sum * decay, extra_sum * decay
        for head_k in tl.range(first_k, first_k + tl.maximum(k.heads // heads, 1)):
            k_rows, v_rows, scale, extra = _load_keys(
                k, v, k_scale, k_extra, batch, head_k, token, valid, first_v, seqlen, TILE
            )
            weights = _weights(position, end, count, rate, scale)
            state, key_sum, value_sum, extra_sum = add_keys(
                state, key_sum, value_sum, extra_sum, k_rows, v_rows, weights, extra, TILE
            )
    at = (batch * parts + slot) * heads + head
    store_states(states, at, first_v, state, key_sum, value_sum, extra_sum, TILE)


# Whether 16 divides the size decides how wide the accesses are.
@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def state_passing_kernel(
    states, first_state, log2_decay, part_starts, parts, heads, size,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Make each part's own state the one that it starts from, of `size` numbers.

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
    decay = tl.exp2(TILE.part * _log2_decay(log2_decay, head))
    running = tl.zeros((BLOCK,), tl.float32)
    if first_state is not None:
        at = tl.cast(sequence * heads + head, tl.int64) * size
        running = tl.load(first_state + at + number, mask=inside, other=0.0)
    for part in tl.range(begin, end):
        pointers = states + tl.cast(part * heads + head, tl.int64) * size + number
        own = tl.load(pointers, mask=inside, other=0.0)
        if TILE.causal:
            tl.store(pointers, running, mask=inside)
            running = running * decay + own
        else:
            running += own
    if not TILE.causal:
        for part in tl.range(begin, end):
            pointers = states + tl.cast(part * heads + head, tl.int64) * size + number
            tl.store(pointers, running, mask=inside)


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def scan_kernel(
    q, k, v, out, gate, q_scale, q_extra, k_scale, k_extra, den, log2_decay,
    states, last_states, cu_seqlens, part_starts,
    num_sequences, search_steps, parts, heads, seqlen,
    TILE: tl.constexpr,
):  # fmt: skip
    """Axis 0: parts, then heads of out, then the batch; axis 1: value dims."""
    CHUNK: tl.constexpr = TILE.chunk
    BLOCK_D: tl.constexpr = TILE.block_d
    BLOCK_V: tl.constexpr = TILE.block_v
    PHI_SCORES: tl.constexpr = TILE.phi_scores
    rest, slot, begin, length, start, end = locate(
        parts, cu_seqlens, part_starts, num_sequences, search_steps, seqlen, TILE
    )
    batch, head_out = rest // out.heads, rest % out.heads
    head = head_out * heads // out.heads
    head_q = head_out * q.heads // out.heads
    first_k = _first_head(head, k.heads, heads)
    first_v = tl.program_id(1) * BLOCK_V
    rate = _log2_decay(log2_decay, head)
    state, key_sum, value_sum, extra_sum = no_state(TILE)
    if TILE.first_state:
        at = (batch * parts + slot) * heads + head
        state, key_sum, value_sum, extra_sum = load_states(states, at, first_v, TILE)
    # Sums over the score dims: of the state as it is, and of key_sum.
    state_total, key_total = tl.sum(state, 0), tl.sum(key_sum, 0)
    row = tl.arange(0, CHUNK)
    distance = row[:, None] - row[None, :]
    decays = tl.where(distance >= 0, tl.exp2(tl.maximum(distance, 0) * rate), 0.0)
    FLOAT32: tl.constexpr = q.pointer.dtype.element_ty == tl.float32
    # Its products leave no registers for what does not change from chunk to chunk.
    for chunk in tl.range(start, end, CHUNK, disable_licm=FLOAT32):
        position = chunk + row
        token = first_token(begin, length, chunk, TILE)
        valid = position < end
        q_rows = load_rows(
            q, batch, head_q, token, valid, 0, TILE.score_dim, BLOCK_D,
            PHI_SCORES, TILE,
        )  # fmt: skip
        extra_q = load_numbers(q_extra, batch, head_q, token, valid, seqlen, TILE)
        sums = product(q_rows, state.to(q_rows.dtype))
        q_sum = tl.sum(q_rows.to(tl.float32), 1) + TILE.eps * TILE.score_dim
        if TILE.phi_scores:
            sums += TILE.eps * (state_total[None, :] + q_sum[:, None] * value_sum[None, :])
        if TILE.extra:
            sums += extra_q[:, None] * extra_sum[None, :]
        total = tl.zeros((CHUNK,), tl.float32)
        if TILE.normalize:
            total = tl.sum(q_rows.to(tl.float32) * key_sum[None, :], 1)
            total += TILE.eps * key_total
        if TILE.causal:
            count = tl.minimum(end - chunk, CHUNK)
            aged = tl.exp2((row + 1) * rate)
            sums *= aged[:, None]
            total *= aged
            decay = tl.exp2(count * rate)
            state, key_sum = state * decay, key_sum * decay
            value_sum, extra_sum = value_sum * decay, extra_sum * decay
            state_total, key_total = state_total * decay, key_total * decay
            for head_k in tl.range(first_k, first_k + tl.maximum(k.heads // heads, 1)):
                k_rows, v_rows, scale, extra_k = _load_keys(
                    k, v, k_scale, k_extra, batch, head_k, token, valid, first_v, seqlen, TILE
                )
                # Not the rows from above: those would have to stay in registers.
                q_again = load_rows(
                    q, batch, head_q, token, valid, 0, TILE.score_dim, BLOCK_D,
                    PHI_SCORES, TILE,
                )  # fmt: skip
                scores = product(q_again, tl.trans(k_rows))
                if TILE.phi_scores:
                    k_sum = tl.sum(k_rows.to(tl.float32), 1)
                    scores += TILE.eps * (q_sum[:, None] + k_sum[None, :])
                if TILE.extra:
                    scores += extra_q[:, None] * extra_k[None, :]
                # A select instead would keep NaN out of rows that do not see it, and spill.
                scores *= decays * scale[None, :]
                sums += product(scores.to(v_rows.dtype), v_rows)
                if TILE.normalize:
                    total += tl.sum(scores, 1)
                if not TILE.phi_scores:
                    sums += TILE.eps * tl.sum(scores, 1)[:, None]
                weights = _weights(position, end, count, rate, scale)
                if TILE.phi_scores:
                    of_keys = weights * k_sum
                    state_total += tl.sum(v_rows.to(tl.float32) * of_keys[:, None], 0)
                    key_total += tl.sum(of_keys + weights * (TILE.eps * TILE.score_dim), 0)
                state, key_sum, value_sum, extra_sum = add_keys(
                    state, key_sum, value_sum, extra_sum, k_rows, v_rows, weights, extra_k, TILE
                )
        if TILE.normalize:
            sums /= total[:, None]
            if first_v == 0:  # the other programs of this row have the same
                row_of_head = (tl.cast(batch, tl.int64) * q.heads + head_q) * seqlen
                tl.store(den + row_of_head + token + token_steps(TILE), total, mask=valid)
        else:
            sums *= load_numbers(q_scale, batch, head_q, token, valid, seqlen, TILE)[:, None]
        if gate.pointer is not None:
            head_gate = head_out * gate.heads // out.heads
            gates = load_rows(
                gate, batch, head_gate, token, valid, first_v, TILE.value_dim, BLOCK_V,
                False, TILE,
            )  # fmt: skip
            sums = tl.where(gates <= 0, 0.0, sums)
        to = row_pointers(out, batch, head_out, token, first_v, BLOCK_V, TILE)
        inside = valid[:, None] & (first_v + tl.arange(0, BLOCK_V) < TILE.value_dim)[None, :]
        tl.store(to, sums.to(out.pointer.dtype.element_ty), mask=inside)
    if TILE.keep_state:  # noqa: SIM102  (as above)
        if (end == length) & (head_out == head * (out.heads // heads)):
            at = batch * heads + head
            store_states(last_states, at, first_v, state, key_sum, value_sum, extra_sum, TILE)
