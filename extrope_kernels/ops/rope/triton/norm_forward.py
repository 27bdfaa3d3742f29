"""Device function that norms and rotates heads of a tile of tokens, wherever they are written."""

import triton
import triton.language as tl

from ..._shared.triton.fp8 import parts_of_codes
from ..._shared.triton.pairs import store_parts
from ..._shared.triton.tokens import rows
from .norm_rows import head_angles, load_head, load_weights, row_sum


@triton.jit
def norm_rotate_heads(
    x, weight, of, tokens, target, written, by, eps, scales,
    TOGETHER: tl.constexpr, ROTATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """This program's heads of one tensor, as its place on axis 1 of the grid says.

    tokens: (batch, seq, valid); target: pointers to head 0 of each token, stored to where written;
    by: (frequencies, their stride of heads, position, far, log_decay, amplitude, direction);
    scales: of the heads where the target is in fp8, else None.
    """
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    TOKENS: tl.constexpr = TILE.tokens
    DIMS: tl.constexpr = 2 * TILE.half + TILE.rest
    batch, seq, valid = tokens
    share = tl.cdiv(of.heads, tl.num_programs(1))
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, of.heads)
    # As a tensor: the interpreter takes its scalars through float32.
    eps = tl.full((1, 1), eps, WIDE)
    scale = tl.full((TOKENS, 1), 1.0, WIDE)
    if TOGETHER:
        squares = tl.zeros((TOKENS, 1), WIDE)
        for head in range(0, of.heads):
            row = rows(x, batch, seq, head, of.source_batch, of.source_seq, of.source_head, TILE)
            a, b, rest = load_head(row, valid, TILE)
            squares += row_sum(a * a, b * b, rest * rest, TILE)
        scale = 1.0 / tl.sqrt(squares / tl.cast(of.heads * DIMS, WIDE) + eps)
    zero = tl.cast(0, tl.int64)
    if ROTATES:
        cos, sin = head_angles(by, zero, of.decay_sign, valid, TILE)
    if weight is not None:
        wa, wb, wrest = load_weights(weight, zero, False, TILE)
    for head in range(first, last):
        head = tl.cast(head, tl.int64)
        if ROTATES and TILE.per_head:
            cos, sin = head_angles(by, head, of.decay_sign, valid, TILE)
        row = rows(x, batch, seq, head, of.source_batch, of.source_seq, of.source_head, TILE)
        a, b, rest = load_head(row, valid, TILE)
        if weight is not None:
            if TOGETHER:
                wa, wb, wrest = load_weights(weight, head, True, TILE)
            else:
                mean = row_sum(a * a, b * b, rest * rest, TILE) / DIMS
                scale = 1.0 / tl.sqrt(mean + eps)
            a, b, rest = a * scale * wa, b * scale * wb, rest * scale * wrest
        if ROTATES:
            a, b = a * cos - b * sin, b * cos + a * sin
        parts = (a, b, rest)
        if scales is not None:
            parts = parts_of_codes(parts, tl.load(scales + head), x.dtype.element_ty, TILE)
        store_parts(target + head * of.target_head * TILE.align, parts, written, TILE)
