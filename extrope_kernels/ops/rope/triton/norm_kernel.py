"""The kernels that norm and rotate tiles of tokens of q and k, forward and backward."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..._shared.triton.pairs import store_parts
from ..._shared.triton.tokens import rows
from .norm_forward import norm_rotate_heads
from .norm_rows import head_angles, load_head, load_weights, row_sum, store_sums
from .positions import token_positions

RUN_TIME_SCALARS = (
    *("freq_sequence", "freq_head", "position_batch", "position_seq", "offset", "num_axes"),
    *("position_axis", "num_sequences", "search_steps", "tokens", "seqlen"),
)


class NormTile(NamedTuple):
    """What a kernel is compiled for, beside types and alignment; as Tile where names agree."""

    two_operands: bool
    tokens: int
    half: int
    pairs: int
    rest: int  # dims after the rotated ones
    rest_dims: int  # rest, rounded up to a power of two
    align: int
    interleaved: bool
    wide: bool
    per_head: bool
    positions_are_offsets: bool
    q_together: bool  # the mean square is that of all heads of a token
    k_together: bool


@triton.jit
def _head(x, of, batch, seq, head, valid, TILE: tl.constexpr):
    row = rows(x, batch, seq, head, of.source_batch, of.source_seq, of.source_head, TILE)
    return load_head(row, valid, TILE)


@triton.jit
def _saved_head(x, of, batch, seq, head, valid, TILE: tl.constexpr):
    row = rows(x, batch, seq, head, of.saved_batch, of.saved_seq, of.saved_head, TILE)
    return load_head(row, valid, TILE)


@triton.jit
def _weighted(grads, cos, sin, wa, wb, wrest):
    """The gradients rotated back, and these times the weights."""
    a = grads[0] * cos - grads[1] * sin
    b = grads[1] * cos + grads[0] * sin
    return a, b, grads[2], a * wa, b * wb, grads[2] * wrest


@triton.jit
def _backward(
    grad, out, saved, weight, parts, of, tokens, by, eps,
    TOGETHER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradients of one tensor, and this program's part of those of its weights."""
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    TOKENS: tl.constexpr = TILE.tokens
    DIMS: tl.constexpr = 2 * TILE.half + TILE.rest
    batch, seq, valid = tokens
    zero = tl.cast(0, tl.int64)
    cos, sin = head_angles(by, zero, of.decay_sign, valid, TILE)
    eps = tl.full((1, 1), eps, WIDE)
    squares = tl.zeros((TOKENS, 1), WIDE)
    products = tl.zeros((TOKENS, 1), WIDE)
    count = tl.cast(of.heads * DIMS if TOGETHER else DIMS, WIDE)
    wa, wb, wrest = load_weights(weight, zero, False, TILE)
    if TOGETHER:
        for head in range(0, of.heads):
            head = tl.cast(head, tl.int64)
            if TILE.per_head:
                cos, sin = head_angles(by, head, of.decay_sign, valid, TILE)
            wa, wb, wrest = load_weights(weight, head, True, TILE)
            grads = _head(grad, of, batch, seq, head, valid, TILE)
            a, b, rest = _saved_head(saved, of, batch, seq, head, valid, TILE)
            ga, gb, grest, ua, ub, urest = _weighted(grads, cos, sin, wa, wb, wrest)
            squares += row_sum(a * a, b * b, rest * rest, TILE)
            products += row_sum(a * ua, b * ub, rest * urest, TILE)
    PAIRS: tl.constexpr = TILE.pairs
    REST: tl.constexpr = TILE.rest_dims
    sum_a = tl.zeros((TOKENS, PAIRS), WIDE)
    sum_b = sum_a
    sum_rest = tl.zeros((TOKENS, REST), WIDE)
    for head in range(0, of.heads):
        head = tl.cast(head, tl.int64)
        if TILE.per_head:
            cos, sin = head_angles(by, head, of.decay_sign, valid, TILE)
        # Beside dims that pass unrotated there are not registers enough to hold the weights.
        if TOGETHER or TILE.rest > 0:
            wa, wb, wrest = load_weights(weight, head, TOGETHER, TILE)
        grads = _head(grad, of, batch, seq, head, valid, TILE)
        a, b, rest = _saved_head(saved, of, batch, seq, head, valid, TILE)
        ga, gb, grest, ua, ub, urest = _weighted(grads, cos, sin, wa, wb, wrest)
        if not TOGETHER:
            squares = row_sum(a * a, b * b, rest * rest, TILE)
            products = row_sum(a * ua, b * ub, rest * urest, TILE)
        scale = 1.0 / tl.sqrt(squares / count + eps)
        mean = products * scale / count
        a, b, rest = a * scale, b * scale, rest * scale
        target = rows(out, batch, seq, head, of.target_batch, of.target_seq, of.target_head, TILE)
        da, db, drest = (
            scale * (ua - a * mean),
            scale * (ub - b * mean),
            scale * (urest - rest * mean),
        )
        store_parts(target, (da, db, drest), valid, TILE)
        # Where not valid, gradients are 0; x is too, but its scale may be infinite.
        ga, gb = tl.where(valid[:, None], ga * a, 0.0), tl.where(valid[:, None], gb * b, 0.0)
        if TOGETHER:
            store_sums(
                parts + head * DIMS, ga, gb, tl.where(valid[:, None], grest * rest, 0.0), TILE
            )
        else:
            sum_a += ga
            sum_b += gb
            if TILE.rest > 0:
                sum_rest += tl.where(valid[:, None], grest * rest, 0.0)
    if not TOGETHER:
        store_sums(parts, sum_a, sum_b, sum_rest, TILE)


@triton.jit
def _one_tensor(
    x, out, saved, weight, parts, dims, of, tokens, by, eps,
    TOGETHER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """q, or k: backward where there are parts."""
    if parts is not None:
        parts += tl.program_id(0).to(tl.int64) * dims
        _backward(x, out, saved, weight, parts, of, tokens, by, eps, TOGETHER, TILE)
    else:
        batch, seq, valid = tokens
        target = rows(out, batch, seq, 0, of.target_batch, of.target_seq, 0, TILE)
        norm_rotate_heads(x, weight, of, tokens, target, valid, by, eps, None, TOGETHER, True, TILE)


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def norm_rotate_kernel(
    q,
    k,
    q_out,
    k_out,
    q_saved,
    k_saved,
    q_weight,
    k_weight,
    q_parts,
    k_parts,
    inv_freq,
    positions,
    axes,
    cu_seqlens,
    log_decay,
    offset,
    of_q,
    of_k,
    q_dims,
    k_dims,
    freq_sequence,
    freq_head,
    position_axis,
    position_batch,
    position_seq,
    num_axes,
    num_sequences,
    search_steps,
    decay_origin: tl.float64,
    amplitude: tl.float64,
    eps: tl.float64,
    direction,
    tokens,
    seqlen,
    TILE: tl.constexpr,
):
    """Axis 0: tiles of tokens, counted through batch and seqlen; axis 1: shares of the heads.

    With q_saved it is a backward, whose programs have all heads, and write a row each of
    (programs, q_dims) q_parts: sums for the gradients of the weights.
    """
    first = tl.program_id(0).to(tokens.dtype) * TILE.tokens
    valid = tl.arange(0, TILE.tokens) < tokens - first
    token = first + tl.arange(0, TILE.tokens)
    batch = (token // seqlen).to(tl.int64)
    seq = (token % seqlen).to(tl.int64)
    sequence, position = token_positions(
        positions, axes, cu_seqlens, offset, position_axis, position_batch, position_seq, num_axes,
        num_sequences, search_steps, batch, seq, valid, TILE,
    )  # fmt: skip
    far = position - decay_origin
    freqs = inv_freq + (sequence * freq_sequence)[:, None] + tl.arange(0, TILE.pairs)[None, :]
    by = (freqs, freq_head, position, far, log_decay, amplitude, direction)
    where = (batch, seq, valid)
    _one_tensor(
        q, q_out, q_saved, q_weight, q_parts, q_dims, of_q, where, by, eps, TILE.q_together, TILE
    )
    if TILE.two_operands:
        _one_tensor(
            k, k_out, k_saved, k_weight, k_parts, k_dims, of_k, where, by, eps, TILE.k_together,
            TILE,
        )  # fmt: skip
