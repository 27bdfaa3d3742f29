"""The yardsticks: a copy, and causal attention as plain as Triton has it, forward and backward.

No regions, packing, tails or strides: what a tile of the same size costs when nothing is asked of
it but the products and the softmax. head_dim is padded to a power of two.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def copy_kernel(source, target, SIZE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index))


@triton.jit
def _rows(base, head, first, SEQLEN: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Pointers to rows of a (heads, SEQLEN, DIM) tensor, and which lanes are there."""
    LANES: tl.constexpr = triton.next_power_of_2(DIM)
    row = tl.arange(0, SIZE)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    start = base + (tl.cast(head, tl.int64) * SEQLEN + first) * DIM
    return start + row * DIM + lane, lane < DIM


@triton.jit
def _load(base, head, first, SEQLEN: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr):
    pointers, mask = _rows(base, head, first, SEQLEN, SIZE, DIM)
    if triton.next_power_of_2(DIM) == DIM:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=mask, other=0.0)
    return rows


@triton.jit
def _store(base, rows, head, first, SEQLEN: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr):
    pointers, mask = _rows(base, head, first, SEQLEN, SIZE, DIM)
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dot(x, y, acc):
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _attend(
    state, q, k, v, head, first, begin, end, factor,
    MASKED: tl.constexpr, SEQLEN: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    acc, peak, total = state
    for at in tl.range(begin, end, KEYS):
        k_rows = _load(k, head, at, SEQLEN, KEYS, DIM)
        logits = tl.dot(q, tl.trans(k_rows), input_precision="ieee") * factor
        if MASKED:
            seen = (first + tl.arange(0, QUERIES))[:, None] >= (at + tl.arange(0, KEYS))[None, :]
            logits = tl.where(seen, logits, -1e30)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        v_rows = _load(v, head, at, SEQLEN, KEYS, DIM)
        acc = _dot(weights.to(v_rows.dtype), v_rows, acc * shrink[:, None])
        peak = new_peak
    return acc, peak, total


@triton.jit
def forward_kernel(
    q, k, v, out, lse, factor, group,
    SEQLEN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = triton.next_power_of_2(DIM)
    head = tl.program_id(1)
    first = tl.program_id(0) * QUERIES
    q_rows = _load(q, head, first, SEQLEN, QUERIES, DIM)
    peak = tl.full((QUERIES,), -1e30, tl.float32)
    state = tl.zeros((QUERIES, LANES), tl.float32), peak, tl.zeros((QUERIES,), tl.float32)
    full = first // KEYS * KEYS
    state = _attend(
        state, q_rows, k, v, head // group, first, 0, full, factor,
        False, SEQLEN, QUERIES, KEYS, DIM,
    )  # fmt: skip
    state = _attend(
        state, q_rows, k, v, head // group, first, full, first + QUERIES, factor,
        True, SEQLEN, QUERIES, KEYS, DIM,
    )  # fmt: skip
    acc, peak, total = state
    _store(out, acc / total[:, None], head, first, SEQLEN, QUERIES, DIM)
    rows = tl.cast(head, tl.int64) * SEQLEN + first + tl.arange(0, QUERIES)
    tl.store(lse + rows, peak + tl.log2(total))


@triton.jit
def _weights(
    x, y, factor, lse, row, key, MASKED: tl.constexpr
):  # x @ y.T as weights; row, key, lse broadcast along either axis
    weights = tl.exp2(tl.dot(x, tl.trans(y), input_precision="ieee") * factor - lse)
    if MASKED:
        weights = tl.where(row >= key, weights, 0.0)
    return weights


@triton.jit
def _dq(
    grad, q, dout, sums, deltas, k, v, head, first, begin, end, factor,
    MASKED: tl.constexpr, SEQLEN: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = (first + tl.arange(0, QUERIES))[:, None]
    for at in tl.range(begin, end, KEYS):
        k_rows = _load(k, head, at, SEQLEN, KEYS, DIM)
        key = (at + tl.arange(0, KEYS))[None, :]
        weights = _weights(q, k_rows, factor, sums[:, None], row, key, MASKED)
        v_rows = _load(v, head, at, SEQLEN, KEYS, DIM)
        products = tl.dot(dout, tl.trans(v_rows), input_precision="ieee")
        d_logits = weights * (products - deltas[:, None])
        grad = _dot(d_logits.to(k_rows.dtype), k_rows, grad)
    return grad


@triton.jit
def dq_kernel(
    q, k, v, dout, lse, delta, dq, factor, group,
    SEQLEN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = triton.next_power_of_2(DIM)
    head = tl.program_id(1)
    first = tl.program_id(0) * QUERIES
    q_rows = _load(q, head, first, SEQLEN, QUERIES, DIM)
    douts = _load(dout, head, first, SEQLEN, QUERIES, DIM)
    rows = tl.cast(head, tl.int64) * SEQLEN + first + tl.arange(0, QUERIES)
    sums = tl.load(lse + rows)
    deltas = tl.load(delta + rows)
    grad = tl.zeros((QUERIES, LANES), tl.float32)
    full = first // KEYS * KEYS
    grad = _dq(
        grad, q_rows, douts, sums, deltas, k, v, head // group, first, 0, full, factor,
        False, SEQLEN, QUERIES, KEYS, DIM,
    )  # fmt: skip
    grad = _dq(
        grad, q_rows, douts, sums, deltas, k, v, head // group, first, full, first + QUERIES,
        factor, True, SEQLEN, QUERIES, KEYS, DIM,
    )  # fmt: skip
    _store(dq, grad, head, first, SEQLEN, QUERIES, DIM)


@triton.jit
def _dkv(
    dk, dv, k, v, q, dout, lse, delta, head, first, begin, end, factor,
    MASKED: tl.constexpr, SEQLEN: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    key = (first + tl.arange(0, KEYS))[:, None]
    base = tl.cast(head, tl.int64) * SEQLEN
    for at in tl.range(begin, end, QUERIES):
        q_rows = _load(q, head, at, SEQLEN, QUERIES, DIM)
        index = at + tl.arange(0, QUERIES)
        sums = tl.load(lse + base + index)
        deltas = tl.load(delta + base + index)
        weights = _weights(k, q_rows, factor, sums[None, :], index[None, :], key, MASKED)
        douts = _load(dout, head, at, SEQLEN, QUERIES, DIM)
        dv = _dot(weights.to(douts.dtype), douts, dv)
        products = tl.dot(v, tl.trans(douts), input_precision="ieee")
        d_logits = weights * (products - deltas[None, :])
        dk = _dot(d_logits.to(q_rows.dtype), q_rows, dk)
    return dk, dv


@triton.jit
def dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, factor, group,
    SEQLEN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = triton.next_power_of_2(DIM)
    head = tl.program_id(1)
    first = tl.program_id(0) * KEYS
    k_rows = _load(k, head, first, SEQLEN, KEYS, DIM)
    v_rows = _load(v, head, first, SEQLEN, KEYS, DIM)
    dk_rows = tl.zeros((KEYS, LANES), tl.float32)
    dv_rows = tl.zeros((KEYS, LANES), tl.float32)
    begin = first // QUERIES * QUERIES
    full = tl.cdiv(first + KEYS, QUERIES) * QUERIES
    for head_q in tl.range(head * group, head * group + group):
        dk_rows, dv_rows = _dkv(
            dk_rows, dv_rows, k_rows, v_rows, q, dout, lse, delta, head_q, first, begin, full,
            factor, True, SEQLEN, QUERIES, KEYS, DIM,
        )  # fmt: skip
        dk_rows, dv_rows = _dkv(
            dk_rows, dv_rows, k_rows, v_rows, q, dout, lse, delta, head_q, first, full, SEQLEN,
            factor, False, SEQLEN, QUERIES, KEYS, DIM,
        )  # fmt: skip
    _store(dk, dk_rows, head, first, SEQLEN, KEYS, DIM)
    _store(dv, dv_rows, head, first, SEQLEN, KEYS, DIM)
