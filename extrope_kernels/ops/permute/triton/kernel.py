"""The kernels: the cycles of the permutations, and the gather by their powers."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..._shared.triton.tokens import rows, sequence_of

RUN_TIME_SCALARS = (
    *("position_batch", "position_seq", "offset", "num_sequences", "search_steps"),
    *("tokens", "seqlen"),
)


class Operand(NamedTuple):
    """One of q and k, as integers. Strides count groups of Tile.align elements."""

    source: Tensor
    target: Tensor
    source_batch: int
    source_seq: int
    source_head: int
    target_batch: int
    target_seq: int
    target_head: int
    group: int  # heads that share a permutation


class Tile(NamedTuple):
    """What a kernel is compiled for, beside types and alignment.

    Before Triton 3.8 a field is a constexpr only once it is bound to a name that is one.
    """

    two_operands: bool  # k too
    block_m: int  # tokens of a program
    head_dim: int
    block_d: int  # head_dim, rounded up to a power of two
    align: int  # elements; divides all strides
    positions_are_offsets: bool
    inverse: bool


@triton.jit
def cycles_kernel(
    permutations, permutation_row, cycles, head_dim, BLOCK_D: tl.constexpr, ROUNDS: tl.constexpr
):
    """A program a permutation: (4, head_dim) start, length, index and flat, as in permutations.py.

    Any contents of `permutations` keep within bounds.
    """
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    valid = dim < head_dim
    step = tl.load(permutations + row * permutation_row + dim, mask=valid, other=0)
    step = tl.minimum(tl.maximum(step, 0), head_dim - 1).to(tl.int32)
    step = tl.where(valid, step, dim)
    # The least dim so far and the steps to it, in one number.
    seen = dim * (2 * BLOCK_D)
    ahead = step
    for doubling in tl.static_range(ROUNDS):
        seen = tl.minimum(seen, tl.gather(seen, ahead, 0) + (1 << doubling))
        ahead = tl.gather(ahead, ahead, 0)
    least = seen // (2 * BLOCK_D)
    steps = seen % (2 * BLOCK_D)
    length = 1 + tl.gather(steps, tl.gather(step, least, 0), 0)
    index = tl.where(steps == 0, 0, length - steps)
    lengths = tl.where(least == dim, length, 0)
    start = tl.gather(tl.cumsum(lengths, 0) - lengths, least, 0)
    here = cycles + row * 4 * head_dim
    tl.store(here + dim, start, mask=valid)
    tl.store(here + head_dim + dim, length, mask=valid)
    tl.store(here + 2 * head_dim + dim, index, mask=valid)
    at = tl.minimum(tl.maximum(start + index, 0), head_dim - 1)
    tl.store(here + 3 * head_dim + at, dim, mask=valid)


@triton.jit
def _modulo(position, length, valid):
    """position mod length in [0, length), int32; in 64 bits only where a position needs them."""
    furthest = tl.max(tl.where(valid[:, None], tl.abs(position), 0))
    if (furthest >= 2147483648) | (furthest < 0):  # the least int64 is its own absolute value
        rest = (position % length.to(tl.int64)).to(tl.int32)
    else:
        rest = position.to(tl.int32) % length
    return tl.where(rest < 0, rest + length, rest)


@triton.jit
def _sources(cycles, position, valid, TILE: tl.constexpr):
    """(block_m, block_d) the dims that dims take at these positions."""
    BLOCK_D: tl.constexpr = TILE.block_d
    HEAD_DIM: tl.constexpr = TILE.head_dim
    dim = tl.arange(0, BLOCK_D)
    here = cycles + tl.program_id(1).to(tl.int64) * 4 * HEAD_DIM
    inside = dim < HEAD_DIM
    start = tl.load(here + dim, mask=inside, other=0)[None, :]
    length = tl.load(here + HEAD_DIM + dim, mask=inside, other=1)[None, :]
    index = tl.load(here + 2 * HEAD_DIM + dim, mask=inside, other=0)[None, :]
    steps = _modulo(position[:, None], length, valid)
    index = index + length - steps if TILE.inverse else index + steps
    index = tl.where(index >= length, index - length, index)
    at = tl.minimum(tl.maximum(start + index, 0), HEAD_DIM - 1)
    source = tl.load(here + 3 * HEAD_DIM + at)
    return tl.minimum(tl.maximum(source, 0), HEAD_DIM - 1)


@triton.jit
def _move(x, head, batch, seq, valid, source, TILE: tl.constexpr):
    """Fetch one head of a block of tokens. Dims are fetched one by one, from few lines of memory:
    tl.gather from whole rows would take twice the instructions, for its shuffles.
    """
    BLOCK_D: tl.constexpr = TILE.block_d
    dim = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (dim < TILE.head_dim)[None, :]
    from_ = rows(x.source, batch, seq, head, x.source_batch, x.source_seq, x.source_head, TILE)
    to = rows(x.target, batch, seq, head, x.target_batch, x.target_seq, x.target_head, TILE)
    tl.store(to[:, None] + dim[None, :], tl.load(from_[:, None] + source, mask=mask), mask=mask)


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def permute_kernel(
    q,
    k,
    cycles,
    positions,
    position_batch,
    position_seq,
    offset,
    cu_seqlens,
    num_sequences,
    search_steps,
    tokens,
    seqlen,
    TILE: tl.constexpr,
):
    """Axis 0: blocks of tokens, counted through batch and seqlen; axis 1: permutations."""
    BLOCK_M: tl.constexpr = TILE.block_m
    first = tl.program_id(0).to(tokens.dtype) * BLOCK_M
    valid = tl.arange(0, BLOCK_M) < tokens - first
    token = first + tl.arange(0, BLOCK_M)
    batch = (token // seqlen).to(tl.int64)
    seq = (token % seqlen).to(tl.int64)
    sequence = batch
    position = seq
    if cu_seqlens is not None:
        sequence = sequence_of(seq, cu_seqlens, num_sequences, search_steps)
        position = seq - tl.load(cu_seqlens + sequence)
    if TILE.positions_are_offsets:
        start = tl.load(positions + sequence * position_batch, mask=valid, other=0)
        position += start.to(tl.int64)
    elif positions is not None:
        at = positions + batch * position_batch + seq * position_seq
        position = tl.load(at, mask=valid, other=0).to(tl.int64)
    position += tl.cast(offset, tl.int64)

    source = _sources(cycles, position, valid, TILE)
    row = tl.program_id(1).to(tl.int64)
    for i in range(q.group):
        _move(q, row * q.group + i, batch, seq, valid, source, TILE)
    if TILE.two_operands:
        for i in range(k.group):
            _move(k, row * k.group + i, batch, seq, valid, source, TILE)
