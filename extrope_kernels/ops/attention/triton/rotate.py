"""Rotate queries and keys once to the positions of their maps, and gradients back.

Rows come raw, or rotated by a map already (Q_STORED, STORED). Keys have a copy for each map
that regions differ in, gradients one for each region.

A program has a few tokens of q or of k, and a share of their heads. It computes the tokens'
positions, cosines and sines once. Rotated copies are contiguous: (batch, seqlen, copies, heads,
head_dim).

The kernel runs in both directions. Forward, it writes a copy of a row x for each map:
copy_c = scale * R_c @ x, where R_c rotates to the positions of map c. Backward, it reads gradients
of all copies, and writes their sum, each rotated back: dx = sum over c of scale * R_c.T @ dcopy_c.

Names: T is TOKENS, P is TILE.pairs: pairs of dims, rounded up to a power of two. A row is in three
parts: its pairs' first dims and second dims, (T, P), and the dims that do not rotate, (T,
rest_dims). load_parts loads them, widened makes them float32, store_parts rounds and stores them.
rotate_parts(parts, cos, sin, scale) rotates them: (a * cos - b * sin, b * cos + a * sin, rest *
scale). of_pairs loads one number for each pair, (1, P). sequence_of(token, cu_seqlens, ..) finds
packed tokens' sequences, (T,).

cos_sin_of_map(position, freq, decay, pair_maps, pair, MAP, FROM, HALF) returns cosines and sines of
freq * (MAP(position) - FROM(position)), exact in fixed point, times exp(decay * (MAP(position) -
FROM(position))): float32, (T, P), or (1, P) if no token differs. FROM None counts as 0. A map by
pair has a divisor and an offset for each pair, in pair_maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....scores.base import PlainMap
from ..._math.triton.launch import VECTOR_BYTES, Launch, strides_by_name
from ..._math.triton.pairs import load_parts, of_pairs, rotate_parts, store_parts, widened
from ..._math.triton.tokens import sequence_of
from ..call import AttentionCall
from .device import (
    alignment_of,
    freq_heads_of,
    key_maps,
    regions_of,
    sequence_numbers,
    sequence_stride,
)
from .maps import (
    cos_sin_of_map,
    map_of,
    not_finite,
    nth_map,
    stored_map,
)

THREADS = 128  # each has 16 bytes of first dims and 16 of second dims
# Heads are spread over about this many programs; more would only repeat cosines and sines.
PROGRAMS = 1024


class RotateTile(NamedTuple):
    """The constants of the compiled kernel, besides types and alignment of pointers."""

    tokens: int  # per program
    heads_q: int
    heads_k: int
    head_dim: int
    half: int  # pairs of dims that rotate
    freq_heads: int  # heads of k with frequencies of their own; 1: all share
    pairs: int  # half, rounded up to a power of two
    rotary_offset: int  # the first dim of the first pair
    rest: int  # dims before and after the rotated ones
    rest_dims: int  # rest, rounded up; 1 if none
    align: int  # elements; divides all strides
    interleaved: bool  # a pair's two dims are neighbours; else rotated dims i and half + i
    freq_per_token: bool  # each packed sequence has its own frequencies
    q_maps: tuple[tuple, ...]  # one per copy, see `map_of`
    k_maps: tuple[tuple, ...]
    attention_factor_sq: float  # multiplies queries, for both sides


# -------------------------------------------------------------------------------------------------
# The kernel


class SharedRope(NamedTuple):
    """What rotates both sides, and packed sequences."""

    inv_freq: tl.tensor  # (sequences or 1, freq_heads, half)
    freq_stride: tl.tensor  # between sequences; 0: they share
    pair_maps: tl.tensor  # (rows, 2: divisors and offsets, half) float64, or None
    cu_seqlens: tl.tensor  # (num_sequences + 1,), or None
    num_sequences: tl.tensor
    search_steps: tl.tensor  # of a binary search for one


class Side(NamedTuple):
    """Queries or keys."""

    x: tl.tensor  # (batch, seqlen, heads, head_dim)
    stride_batch: tl.tensor  # divided by TILE.align
    stride_seq: tl.tensor
    stride_head: tl.tensor
    copies: tl.tensor  # (batch, seqlen, maps, heads, head_dim), contiguous
    seqlen: tl.tensor  # the total if packed
    shift: tl.tensor  # from a token's index to its position, if not packed
    start: tl.tensor  # (sequences or 1,) int32: a further shift; or None
    start_stride: tl.tensor
    decay: tl.tensor  # (1, P) float64, or None: xPos
    scale: tl.tensor  # (batch or 1, seqlen) float32: factors of tokens; or None
    scale_stride: tl.tensor


@triton.jit
def _cos_sin_of_copies(
    position, freq_offset, valid, head_k, factor, decay, rope, MAPS: tl.constexpr,
    FROM: tl.constexpr, BACKWARD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return ((cos, sin), ...) for every copy, times `factor`: (T, P) float32 each.

    FROM: the map by which rows already come rotated, or None. freq_offset: of the sequence's
    frequencies, one for all tokens, or (T,) with freq_per_token.
    """
    HALF: tl.constexpr = TILE.half
    pair = tl.arange(0, TILE.pairs)
    inv_freq = rope.inv_freq
    if TILE.freq_heads > 1:
        inv_freq += head_k * HALF
    if TILE.freq_per_token:
        mask = valid[:, None] & (pair < HALF)[None, :]
        freq_ptr = inv_freq + freq_offset[:, None] + pair[None, :]
        freq = tl.load(freq_ptr, mask=mask, other=0.0)  # (T, P)
    else:
        freq = of_pairs(inv_freq + freq_offset, TILE)  # (1, P)
    cos_sin = ()
    for c in tl.static_range(len(MAPS)):
        cos, sin = cos_sin_of_map(
            position, freq, decay, rope.pair_maps, pair, nth_map(MAPS, c), FROM, HALF
        )
        if BACKWARD:
            if decay is not None:
                # Outside of a region the amplitude may overflow. Gradients are 0 there: not NaN.
                # Forward such a copy may be infinite: attention loads only keys that a row sees.
                cos = tl.where(tl.abs(cos) < float("inf"), cos, 0.0)
                sin = tl.where(tl.abs(sin) < float("inf"), sin, 0.0)
        else:  # the gradients of rows that see a key have the NaN of the copies
            cos += not_finite(freq)
        cos_sin = cos_sin + ((cos * factor, sin * factor),)  # noqa: RUF005
    return cos_sin


@triton.jit
def _rotate_tokens(
    side, rope, tile, batch,  # tile: of TOKENS tokens
    MAPS: tl.constexpr, FROM: tl.constexpr,  # rows come rotated by FROM, or raw (None)
    FACTOR: tl.constexpr, HEADS: tl.constexpr, BACKWARD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rotate this program's tokens and heads of x into its copies; BACKWARD: their sum into x."""
    TOKENS: tl.constexpr = TILE.tokens
    COPIES: tl.constexpr = len(MAPS)
    HEAD_DIM: tl.constexpr = TILE.head_dim
    BY_HEAD: tl.constexpr = TILE.freq_heads > 1

    # Tokens, their positions and where their sequence's frequencies begin.
    token = tile * TOKENS + tl.arange(0, TOKENS)  # (T,)
    valid = token < side.seqlen
    if rope.cu_seqlens is None:
        position = token + side.shift
        if side.start is not None:
            position += tl.load(side.start + batch * side.start_stride)
        freq_offset = batch * rope.freq_stride
    else:
        sequence = sequence_of(token, rope.cu_seqlens, rope.num_sequences, rope.search_steps)
        position = token - tl.load(rope.cu_seqlens + sequence)
        if side.start is not None:
            position += tl.load(side.start + sequence * side.start_stride)
        freq_offset = 0
        if TILE.freq_per_token:
            freq_offset = sequence.to(tl.int64) * rope.freq_stride

    # Factors of a token: dims that do not rotate get `scale`, the others FACTOR * scale.
    scale = 1.0
    if side.scale is not None:
        scale_ptr = side.scale + batch * side.scale_stride + token
        scale = tl.load(scale_ptr, mask=valid, other=0.0)[:, None]  # (T, 1)
    if not BY_HEAD:  # cosines and sines serve all heads
        cos_sin = _cos_sin_of_copies(
            position, freq_offset, valid, 0, FACTOR * scale, side.decay, rope, MAPS, FROM, BACKWARD,
            TILE,
        )  # fmt: skip

    # Pointers to dim 0 of head 0. The factor `align` shows the compiler that rows begin at
    # multiples of it, so that it moves 16 bytes at a time.
    row_offset = batch * side.stride_batch + token * tl.cast(side.stride_seq, tl.int64)
    copy_index = (batch * side.seqlen + token) * COPIES  # (T,) int64, as batch is
    share = tl.cdiv(HEADS, tl.num_programs(1))
    begin = tl.program_id(1) * share
    for head in range(begin, tl.minimum(begin + share, HEADS)):
        if BY_HEAD:
            head_k = head // (HEADS // TILE.heads_k)
            cos_sin = _cos_sin_of_copies(
                position, freq_offset, valid, head_k, FACTOR * scale, side.decay, rope, MAPS, FROM,
                BACKWARD, TILE,
            )  # fmt: skip
        head_offset = tl.cast(head, tl.int64) * side.stride_head
        x_rows = side.x + (row_offset + head_offset) * TILE.align  # (T,)
        copy_rows = side.copies + (copy_index * HEADS + head) * HEAD_DIM  # (T,): of copy 0
        if BACKWARD:
            for c in tl.static_range(COPIES):
                parts = load_parts(copy_rows + c * HEADS * HEAD_DIM, valid, TILE)
                cos, sin = cos_sin[c]
                a, b, rest = rotate_parts(parts, cos, -sin, scale)  # by minus the angle
                if c == 0:
                    dx_a, dx_b, dx_rest = a, b, rest
                else:
                    dx_a += a
                    dx_b += b
                    dx_rest += rest
            store_parts(x_rows, (dx_a, dx_b, dx_rest), valid, TILE)
        else:
            parts = widened(load_parts(x_rows, valid, TILE))
            for c in tl.static_range(COPIES):
                cos, sin = cos_sin[c]
                rotated = rotate_parts(parts, cos, sin, scale)
                store_parts(copy_rows + c * HEADS * HEAD_DIM, rotated, valid, TILE)


@triton.jit
def rotate_kernel(
    q, k,  # (batch, seqlen, heads, head_dim), or (1, total, heads, head_dim) if packed
    q_copies, k_copies,  # (batch, seqlen, copies, heads, head_dim), contiguous; None without maps
    inv_freq, log_decay,  # (sequences or 1, freq_heads, half) float; (half,) or None: xPos
    pair_maps,  # (rows, 2: divisors and offsets, half) float64, or None
    cu_seqlens, q_start, k_start,  # (sequences + 1,), (sequences or 1,), ... int32, or None
    query_scale,  # (batch or 1, seqlen_q) float32, or None
    q_stride_batch, q_stride_seq, q_stride_head,  # divided by TILE.align
    k_stride_batch, k_stride_seq, k_stride_head,
    freq_stride, scale_stride, q_start_stride, k_start_stride,  # between sequences; 0: they share
    num_sequences, search_steps,  # packed sequences, and steps of a binary search for one
    q_tiles, first_k_tile, tiles,  # tiles of q; first tiles of k to skip; those in the grid
    seqlen_q, seqlen_k,  # the totals if packed
    BACKWARD: tl.constexpr,  # the copies hold float32 gradients, and q and k get their sums
    Q_STORED: tl.constexpr,  # the map by which queries already come rotated; None: raw
    STORED: tl.constexpr,  # that of keys
    TILE: tl.constexpr,
):  # fmt: skip
    """Rotate a tile. Axis 0: tiles of tokens of q, then of k, and the batch; axis 1: heads' shares.

    A side without maps is neither read nor written.
    """
    Q_MAPS: tl.constexpr = TILE.q_maps
    K_MAPS: tl.constexpr = TILE.k_maps
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    # By xPos, query i and key j have amplitudes exp(i * decay) and exp(-j * decay).
    q_decay = None
    k_decay = None
    if log_decay is not None:
        q_decay = of_pairs(log_decay, TILE).to(tl.float64)  # (1, P)
        k_decay = -q_decay
    rope = SharedRope(inv_freq, freq_stride, pair_maps, cu_seqlens, num_sequences, search_steps)
    if q_start is None:  # both sides end together
        q_shift, q_start, q_start_stride = seqlen_k - seqlen_q, k_start, k_start_stride
    else:
        q_shift = 0
    # Two nested conditions: only the first is known to the compiler.
    if len(Q_MAPS) > 0:  # noqa: SIM102
        if tile < q_tiles:
            side = Side(
                q, q_stride_batch, q_stride_seq, q_stride_head, q_copies, seqlen_q, q_shift,
                q_start, q_start_stride, q_decay, query_scale, scale_stride,
            )  # fmt: skip
            _rotate_tokens(
                side, rope, tile, batch, Q_MAPS, FROM=Q_STORED, FACTOR=TILE.attention_factor_sq,
                HEADS=TILE.heads_q, BACKWARD=BACKWARD, TILE=TILE,
            )  # fmt: skip
    if len(K_MAPS) > 0:  # noqa: SIM102
        if tile >= q_tiles:
            side = Side(
                k, k_stride_batch, k_stride_seq, k_stride_head, k_copies, seqlen_k, 0,
                k_start, k_start_stride, k_decay, None, 0,
            )  # fmt: skip
            _rotate_tokens(
                side, rope, tile - q_tiles + first_k_tile, batch, K_MAPS, FROM=STORED, FACTOR=1.0,
                HEADS=TILE.heads_k, BACKWARD=BACKWARD, TILE=TILE,
            )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# The launch


class RotateLaunch(NamedTuple):
    """A launch, and the numbers of copies of q and k."""

    launch: Launch
    num_q_copies: int
    num_k_copies: int


def rotate(
    rotation: RotateLaunch, q: Tensor, k: Tensor, call: AttentionCall
) -> tuple[Tensor | None, Tensor | None]:
    """Return rotated copies of q and of k, None if there are none."""
    q_copies = _empty_copies(q, rotation.num_q_copies, q.dtype)
    k_copies = _empty_copies(k, rotation.num_k_copies, k.dtype)
    _launch(rotation, q, k, q_copies, k_copies, call)
    return q_copies, k_copies


def gradients_of_copies(
    rotation: RotateLaunch, q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Allocate what `rotate_back` reads: float32 gradients of the copies of every region."""
    return (
        _empty_copies(q, rotation.num_q_copies, torch.float32),
        _empty_copies(k, rotation.num_k_copies, torch.float32),
    )


def rotate_back(
    rotation: RotateLaunch,
    dq: Tensor,
    dk: Tensor,
    dq_copies: Tensor | None,
    dk_copies: Tensor | None,
    call: AttentionCall,
) -> None:
    """Write the gradients of q and k: sums of their copies' gradients, each rotated back."""
    _launch(rotation, dq, dk, dq_copies, dk_copies, call)


def _empty_copies(x: Tensor, copies: int, dtype: torch.dtype) -> Tensor | None:
    return x.new_empty((*x.shape[:-2], copies, *x.shape[-2:]), dtype=dtype) if copies else None


def _launch(
    rotation: RotateLaunch,
    q: Tensor,
    k: Tensor,
    q_copies: Tensor | None,
    k_copies: Tensor | None,
    call: AttentionCall,
) -> None:
    rotation.launch.run(
        q=q, k=k, q_copies=q_copies, k_copies=k_copies, inv_freq=call.inv_freq,
        log_decay=call.log_decay, pair_maps=call.pair_maps, cu_seqlens=call.cu_seqlens,
        q_start=call.q_start, k_start=call.k_start, query_scale=call.query_scale,
    )  # fmt: skip


def rotation_of_keys(q: Tensor, k: Tensor, call: AttentionCall) -> RotateLaunch:
    """Build the forward's: a copy of keys for each map but that of the given keys."""
    unseen = 0
    placed = (call.cu_seqlens, call.q_start, call.k_start) != (None, None, None)
    if call.sliding_window is not None and not placed:
        # The number of first keys that lie before every query's window. The forward never loads
        # these; the gradients of keys load every key.
        unseen = min(max(0, k.shape[-3] - q.shape[-3] + 1 - call.sliding_window), k.shape[-3])
    return _build(q, k, call, (), key_maps(k, call), unseen=unseen)


def rotation_of_both(q: Tensor, k: Tensor, call: AttentionCall) -> RotateLaunch:
    """Build the backward's first: queries of every region too."""
    q_maps = [region.q_map for region in regions_of(k, call)]
    return _build(q, k, call, q_maps, key_maps(k, call))


def rotation_of_gradients(dq: Tensor, dk: Tensor, call: AttentionCall) -> RotateLaunch:
    """Build the backward's last, of the gradients of a copy for each region."""
    regions = regions_of(dk, call)
    q_maps, k_maps = [x.q_map for x in regions], [x.k_map for x in regions]
    return _build(dq, dk, call, q_maps, k_maps, backward=True)


def _build(
    q: Tensor,
    k: Tensor,
    call: AttentionCall,
    q_maps: Sequence[PlainMap],
    k_maps: Sequence[PlainMap],
    *,
    unseen: int = 0,
    backward: bool = False,
) -> RotateLaunch:
    """Build the launch for these maps; unseen: how many first keys to leave out."""
    tile = _tile(q, k, q_maps, k_maps, call)
    seqlen_q, seqlen_k = q.shape[-3], k.shape[-3]
    batch = k.shape[0] if call.cu_seqlens is None else 1
    q_tiles = triton.cdiv(seqlen_q, tile.tokens) if q_maps else 0
    first_k_tile = unseen // tile.tokens
    tiles = q_tiles + (triton.cdiv(seqlen_k, tile.tokens) - first_k_tile if k_maps else 0)
    heads = max(tile.heads_q if q_maps else 0, tile.heads_k if k_maps else 0)
    shares = min(heads, max(1, PROGRAMS // max(tiles * batch, 1)))
    launch = Launch(
        rotate_kernel,
        (tiles * batch, shares),
        numbers={
            **strides_by_name("q", q, tile.align),
            **strides_by_name("k", k, tile.align),
            "freq_stride": sequence_stride(call.inv_freq, dims=2),
            "scale_stride": sequence_stride(call.query_scale, dims=2),
            "q_tiles": q_tiles,
            "first_k_tile": first_k_tile,
            "tiles": tiles,
            **sequence_numbers(q, k, call),
        },
        constants={
            "BACKWARD": backward,
            "Q_STORED": stored_map(call.q_stored),
            "STORED": stored_map(call.stored),
            "TILE": tile,
        },
        options={"num_warps": THREADS // 32, "enable_fp_fusion": True},
    )
    return RotateLaunch(launch, len(q_maps), len(k_maps))


def _tile(
    q: Tensor,
    k: Tensor,
    q_maps: Sequence[PlainMap],
    k_maps: Sequence[PlainMap],
    call: AttentionCall,
) -> RotateTile:
    half = call.inv_freq.shape[-1]
    pairs, rest = triton.next_power_of_2(half), q.shape[-1] - 2 * half
    return RotateTile(
        tokens=max(1, THREADS * VECTOR_BYTES // q.itemsize // pairs),
        heads_q=q.shape[-2],
        heads_k=k.shape[-2],
        head_dim=q.shape[-1],
        half=half,
        freq_heads=freq_heads_of(call),
        pairs=pairs,
        rotary_offset=call.rotary_offset,
        rest=rest,
        rest_dims=triton.next_power_of_2(max(rest, 1)),
        align=alignment_of(q, k),  # divides all strides; Triton itself looks at pointers
        interleaved=call.interleaved,
        freq_per_token=call.cu_seqlens is not None and sequence_stride(call.inv_freq, dims=2) > 0,
        q_maps=tuple(map(map_of, q_maps)),
        k_maps=tuple(map(map_of, k_maps)),
        attention_factor_sq=call.attention_factor**2,
    )
