"""The kernel that rotates tiles of tokens of q and k, and what it takes."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..._shared.triton.tokens import rows
from .angles import scaled, sincos
from .positions import token_positions

RUN_TIME_SCALARS = (
    *("angle_heads", "freq_sequence", "freq_head", "position_batch", "position_seq", "offset"),
    *("num_axes", "position_axis", "num_sequences", "search_steps", "tokens", "seqlen"),
)


class Operand(NamedTuple):
    """Where the rows of q, or of k, are. Strides count groups of Tile.align elements."""

    source_batch: int
    source_seq: int
    source_head: int
    target_batch: int
    target_seq: int
    target_head: int
    saved_batch: int
    saved_seq: int
    saved_head: int
    heads: int
    decay_sign: float


class Tile(NamedTuple):
    """What a kernel is compiled for, beside types and alignment."""

    two_operands: bool  # k too
    tokens: int  # per program
    half: int  # pairs of dims that rotate
    pairs: int  # half, rounded up to a power of two
    tail: int  # dims to copy after the rotated ones
    padded_tail: int  # tail, rounded up to a power of two
    align: int  # elements; divides all strides
    interleaved: bool
    wide: bool  # float64 throughout, instead of float32 after the angles
    per_head: bool
    positions_are_offsets: bool


@triton.jit
def _load_pairs(rows, valid, TILE: tl.constexpr):
    """(tokens, pairs) first and second dims of the pairs in these rows, widened."""
    if TILE.interleaved:
        TOKENS: tl.constexpr = TILE.tokens
        PAIRS: tl.constexpr = TILE.pairs
        dim = tl.arange(0, 2 * PAIRS)
        mask = valid[:, None] & (dim < 2 * TILE.half)[None, :]
        x = tl.load(rows[:, None] + dim[None, :], mask=mask)
        a, b = tl.split(tl.reshape(x, (TOKENS, PAIRS, 2)))
    else:
        dim = tl.arange(0, TILE.pairs)
        mask = valid[:, None] & (dim < TILE.half)[None, :]
        a = tl.load(rows[:, None] + dim[None, :], mask=mask)
        b = tl.load(rows[:, None] + (dim + TILE.half)[None, :], mask=mask)
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    return a.to(WIDE), b.to(WIDE)


@triton.jit
def _store_pairs(rows, a, b, valid, TILE: tl.constexpr):
    """Round once and store what _load_pairs loads."""
    a = a.to(rows.dtype.element_ty)
    b = b.to(rows.dtype.element_ty)
    if TILE.interleaved:
        TOKENS: tl.constexpr = TILE.tokens
        DIMS: tl.constexpr = 2 * TILE.pairs
        dim = tl.arange(0, DIMS)
        mask = valid[:, None] & (dim < 2 * TILE.half)[None, :]
        x = tl.reshape(tl.join(a, b), (TOKENS, DIMS))
        tl.store(rows[:, None] + dim[None, :], x, mask=mask)
    else:
        dim = tl.arange(0, TILE.pairs)
        mask = valid[:, None] & (dim < TILE.half)[None, :]
        tl.store(rows[:, None] + dim[None, :], a, mask=mask)
        tl.store(rows[:, None] + (dim + TILE.half)[None, :], b, mask=mask)


@triton.jit
def rotate_head(
    source, target, saved, x, head, batch, seq, valid, cos, sin, angle_grad, TILE: tl.constexpr
):
    """Rotate one head of a tile of tokens; return angle_grad plus that head's share of it."""
    source = rows(source, batch, seq, head, x.source_batch, x.source_seq, x.source_head, TILE)
    target = rows(target, batch, seq, head, x.target_batch, x.target_seq, x.target_head, TILE)
    a, b = _load_pairs(source, valid, TILE)
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    if TILE.tail > 0:
        dim = tl.arange(0, TILE.padded_tail)
        mask = valid[:, None] & (dim < TILE.tail)[None, :]
        dim += 2 * TILE.half
        tail = tl.load(source[:, None] + dim[None, :], mask=mask)
        tl.store(target[:, None] + dim[None, :], tail, mask=mask)
    _store_pairs(target, rotated_a, rotated_b, valid, TILE)
    if saved is not None:
        saved = rows(saved, batch, seq, head, x.saved_batch, x.saved_seq, x.saved_head, TILE)
        saved_a, saved_b = _load_pairs(saved, valid, TILE)
        angle_grad += saved_a * rotated_b - saved_b * rotated_a
    return angle_grad


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def rotate_kernel(
    q,
    k,
    q_out,
    k_out,
    q_saved,
    k_saved,
    angle_grad,
    inv_freq,
    positions,
    axes,
    cu_seqlens,
    log_decay,
    offset,
    of_q,
    of_k,
    angle_heads,
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
    direction,
    tokens,
    seqlen,
    TILE: tl.constexpr,
):
    """Axis 0: tiles of tokens, counted through batch and seqlen; axis 1: shares of the heads.

    The tensors and the offset come first: what else there is belongs to a layout.
    """
    # Triton 3.6 takes fields of TILE everywhere but in shapes.
    TOKENS: tl.constexpr = TILE.tokens
    PAIRS: tl.constexpr = TILE.pairs
    first = tl.program_id(0).to(tokens.dtype) * TOKENS
    valid = tl.arange(0, TOKENS) < tokens - first
    token = first + tl.arange(0, TOKENS)
    batch = (token // seqlen).to(tl.int64)
    seq = (token % seqlen).to(tl.int64)

    pair = tl.arange(0, PAIRS)
    mask = valid[:, None] & (pair < TILE.half)[None, :]
    sequence, position = token_positions(
        positions, axes, cu_seqlens, offset, position_axis, position_batch, position_seq, num_axes,
        num_sequences, search_steps, batch, seq, valid, TILE,
    )  # fmt: skip
    far = position - decay_origin

    freqs = inv_freq + (sequence * freq_sequence)[:, None] + pair[None, :]
    nothing = tl.zeros((TOKENS, PAIRS), tl.float64 if TILE.wide else tl.float32)
    grads = angle_grad
    if angle_grad is not None:
        grads += (token.to(tl.int64) * angle_heads * TILE.half)[:, None] + pair[None, :]

    q_share = tl.cdiv(of_q.heads, tl.num_programs(1))
    q_first = tl.program_id(1) * q_share
    q_last = tl.minimum(q_first + q_share, of_q.heads)
    if TILE.per_head:  # q and k then have the same heads
        for head in range(q_first, q_last):
            head = tl.cast(head, tl.int64)
            freq = tl.load(freqs + head * freq_head, mask=mask, other=0.0).to(tl.float64)
            cos, sin = sincos(position * freq, TILE)
            c, s = scaled(cos, sin, far, log_decay, of_q.decay_sign, amplitude, direction, TILE)
            grad = rotate_head(
                q, q_out, q_saved, of_q, head, batch, seq, valid, c, s, nothing, TILE
            )
            if TILE.two_operands:
                c, s = scaled(cos, sin, far, log_decay, of_k.decay_sign, amplitude, direction, TILE)
                grad = rotate_head(
                    k, k_out, k_saved, of_k, head, batch, seq, valid, c, s, grad, TILE
                )
            if angle_grad is not None:
                tl.store(grads + head * TILE.half, grad, mask=mask)
    else:
        freq = tl.load(freqs, mask=mask, other=0.0).to(tl.float64)
        cos, sin = sincos(position * freq, TILE)
        c, s = scaled(cos, sin, far, log_decay, of_q.decay_sign, amplitude, direction, TILE)
        grad = nothing
        for head in range(q_first, q_last):
            grad = rotate_head(q, q_out, q_saved, of_q, head, batch, seq, valid, c, s, grad, TILE)
        if TILE.two_operands:
            k_share = tl.cdiv(of_k.heads, tl.num_programs(1))
            k_first = tl.program_id(1) * k_share
            k_last = tl.minimum(k_first + k_share, of_k.heads)
            c, s = scaled(cos, sin, far, log_decay, of_k.decay_sign, amplitude, direction, TILE)
            for head in range(k_first, k_last):
                grad = rotate_head(
                    k, k_out, k_saved, of_k, head, batch, seq, valid, c, s, grad, TILE
                )
        if angle_grad is not None:
            tl.store(grads, grad, mask=mask)
