"""Device functions on chunks of tokens, and what a kernel is compiled for.

The feature map is relu(x) + eps. relu(x) is exact in any type, so products run on it alone and
what eps adds is added in float32: rounded to bfloat16, x + 1e-3 would be x for all x above 1/4.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..._shared.triton.tokens import sequence_of


class Rows(NamedTuple):
    """(batch, seq, heads, dim); strides in elements, that of the last dimension 1."""

    pointer: Tensor
    batch: int
    seq: int
    head: int
    heads: int


class Numbers(NamedTuple):
    """One number a row, (batch, heads, seqlen) float32, contiguous."""

    pointer: Tensor | None
    heads: int


class Tile(NamedTuple):
    """What a kernel is compiled for, beside types and alignment.

    Before Triton 3.8 a field is a constexpr only once it is bound to a name that is one.
    """

    chunk: int  # tokens
    part: int  # tokens of one program, a multiple of chunk
    score_dim: int
    block_d: int  # score_dim rounded up to a power of two
    value_dim: int
    block_v: int  # of value_dim, in one program
    eps: float  # of the feature map
    phi_scores: bool
    causal: bool
    reverse: bool
    extra: bool
    normalize: bool
    first_state: bool  # parts start from states
    keep_state: bool
    key_sum: bool  # is part of a state
    interpreted: bool


@triton.jit
def locate(parts, cu_seqlens, part_starts, num_sequences, search_steps, seqlen, TILE: tl.constexpr):
    """Axis 0 as (batch, head, slot of the state, first token of the sequence, its length, first
    and last + 1 position of this part). A program beyond the last part gets an empty one."""
    slot = tl.program_id(0) % parts
    rest = tl.program_id(0) // parts
    begin = 0
    part = slot
    if cu_seqlens is not None:
        sequence = sequence_of(slot, part_starts, num_sequences, search_steps)
        begin = tl.load(cu_seqlens + sequence)
        part = slot - tl.load(part_starts + sequence)
        idle = slot >= tl.load(part_starts + sequence + 1)
        seqlen = tl.where(idle, 0, tl.load(cu_seqlens + sequence + 1) - begin)
    first = part * TILE.part
    return rest, slot, begin, seqlen, first, tl.minimum(first + TILE.part, seqlen)


@triton.jit
def first_token(begin, seqlen, chunk, TILE: tl.constexpr):
    """Where the token that is visited at position `chunk` lies; its successors lie behind it, or
    before it if reverse."""
    return begin + seqlen - 1 - chunk if TILE.reverse else begin + chunk


@triton.jit
def token_steps(TILE: tl.constexpr):
    """(chunk,) int32: where the tokens of a chunk lie, from its first one."""
    CHUNK: tl.constexpr = TILE.chunk
    row = tl.arange(0, CHUNK)
    return -row if TILE.reverse else row


@triton.jit
def row_pointers(x, batch, head, token, first, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """(chunk, BLOCK) pointers to dims from `first` on of the tokens from `token` on."""
    # int32 suffices within a chunk: the launcher has made sure. Tiles of int64 would spill.
    base = x.pointer + (tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head)
    base += tl.cast(token, tl.int64) * x.seq + first
    steps = token_steps(TILE) * tl.cast(x.seq, tl.int32)
    return base + (steps[:, None] + tl.arange(0, BLOCK)[None, :])


@triton.jit
def load_rows(
    x, batch, head, token, valid, first, dim, BLOCK: tl.constexpr, RELU: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """(chunk, BLOCK) dims from `first` on, relu if RELU; 0 past dim and where not valid."""
    inside = valid[:, None] & (first + tl.arange(0, BLOCK) < dim)[None, :]
    rows = tl.load(row_pointers(x, batch, head, token, first, BLOCK, TILE), mask=inside, other=0.0)
    if TILE.interpreted and rows.dtype == tl.bfloat16:
        rows = rows.to(tl.float32)  # the interpreter has no bfloat16
    return _relu(rows, TILE) if RELU else rows


@triton.jit
def _relu(rows, TILE: tl.constexpr):
    """max(rows, 0), NaN where rows are. The compiler does it on operands of products, which several
    warps hold: two numbers of 16 bits at a time, or it would take more than the products."""
    if TILE.interpreted or rows.dtype == tl.float32:
        rows = tl.where(rows < 0, 0.0, rows).to(rows.dtype)
    else:
        PAIR: tl.constexpr = "bf16x2" if rows.dtype == tl.bfloat16 else "f16x2"
        rows = tl.inline_asm_elementwise(
            f"max.NaN.{PAIR} $0, $1, $2;", "=r,r,r", [rows, tl.zeros_like(rows)],
            dtype=rows.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return rows


@triton.jit
def load_numbers(x, batch, head, token, valid, seqlen_all, TILE: tl.constexpr):
    """(chunk,) float32; 1 without any."""
    if x.pointer is None:
        numbers = tl.where(valid, 1.0, 1.0)
    else:
        base = x.pointer + (tl.cast(batch, tl.int64) * x.heads + head) * seqlen_all
        numbers = tl.load(base + token + token_steps(TILE), mask=valid, other=0.0)
    return numbers


@triton.jit
def product(a, b):
    return _add_product(tl.zeros((a.shape[0], b.shape[1]), tl.float32), a, b)


@triton.jit
def _add_product(sums, a, b):
    DEPTH: tl.constexpr = a.shape[1]
    # No tensor core multiplies float32, and other units hold all of both operands in registers.
    if a.dtype == tl.float32 and DEPTH > 32:
        a = tl.permute(tl.reshape(a, (a.shape[0], 2, DEPTH // 2)), (0, 2, 1))
        b = tl.permute(tl.reshape(b, (2, DEPTH // 2, b.shape[1])), (1, 2, 0))
        first_a, last_a = tl.split(a)
        first_b, last_b = tl.split(b)
        # Each slice adds to the one before it, and waits: the compiler would load both at once,
        # and on sm_100 add both in pairs.
        sums = _add_product(sums, first_a, first_b)
        tl.debug_barrier()
        sums = _add_product(sums, last_a, last_b)
    else:
        sums = tl.dot(a, b, acc=sums, input_precision="ieee")
    return sums


@triton.jit
def add_keys(state, key_sum, value_sum, extra_sum, k, v, weights, k_extra, TILE: tl.constexpr):
    """Add a chunk's sum of weights_j f(k_j) g(v_j)^T to a state, and what goes with it.

    If phi_scores, f(k_j) is only relu(k_j): what eps adds is in value_sum, of weights_j v_j.
    """
    weighted = k.to(tl.float32) * weights[:, None]
    state += product(tl.trans(weighted.to(k.dtype)), v)
    values = v.to(tl.float32)
    if TILE.phi_scores:
        value_sum += tl.sum(values * weights[:, None], 0)
        if TILE.key_sum:
            key_sum += tl.sum(weighted, 0) + TILE.eps * tl.sum(weights, 0)
    else:
        state += TILE.eps * tl.sum(weighted, 0)[:, None]
    if TILE.extra:
        factors = weights * k_extra
        extra_sum += tl.sum(values * factors[:, None], 0)
        if not TILE.phi_scores:
            extra_sum += TILE.eps * tl.sum(factors, 0)
    return state, key_sum, value_sum, extra_sum
