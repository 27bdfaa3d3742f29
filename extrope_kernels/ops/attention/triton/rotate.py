"""Rotate queries and keys once to the positions of their maps, and gradients back.

Queries come raw, and keys raw or rotated by a map already (STORED). Keys have a copy for each map
that regions differ in, gradients one for each region.

A program has a few tokens of q or of k, and a share of their heads. It computes the tokens'
positions, cosines and sines once. Rotated copies are contiguous: (batch, seqlen, copies, heads,
head_dim).

The kernel runs in both directions. Forward, it writes a copy of a row x for each map:
copy_c = scale * R_c @ x, where R_c rotates to the positions of map c. Backward, it reads gradients
of all copies, and writes their sum, each rotated back: dx = sum over c of scale * R_c.T @ dcopy_c.

Names: T is TOKENS, P is TILE.pairs: pairs of dims, rounded up to a power of two. load_parts loads
rows as their pairs' first dims, second dims, and the dims that do not rotate; store_parts stores
these. of_pairs loads one number for each pair, (1, P).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....scores.base import PlainMap
from ..._shared.triton.launch import VECTOR_BYTES, Launch
from ..._shared.triton.pairs import load_parts, of_pairs, store_parts, widened
from ..._shared.triton.tokens import sequence_of
from ..call import AttentionCall
from .device import (
    alignment_of,
    cos_sin_of_map,
    freq_heads_of,
    key_maps,
    map_of,
    nth_map,
    regions_of,
    sequence_stride,
    sequences_of,
    stored_map,
    strides_in_groups,
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


@triton.jit
def _cos_sin_of_copies(
    position, inv_freq, freq_offset, valid, decay, pair_maps, head_k, factor, MAPS: tl.constexpr,
    FROM: tl.constexpr, BACKWARD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return ((cos, sin), ...) for every copy, times `factor`: (T, P) float32 each.

    FROM: the map by which rows already come rotated, or None. freq_offset: of the sequence's
    frequencies, one for all tokens, or (T,) with freq_per_token.
    """
    HALF: tl.constexpr = TILE.half
    pair = tl.arange(0, TILE.pairs)
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
            position, freq, decay, pair_maps, pair, nth_map(MAPS, c), FROM, HALF
        )
        if BACKWARD and decay is not None:
            # Outside of a region the amplitude may overflow. Gradients are 0 there: not NaN.
            # Forward such a copy may be infinite: attention loads keys that some row sees, only.
            cos = tl.where(tl.abs(cos) < float("inf"), cos, 0.0)
            sin = tl.where(tl.abs(sin) < float("inf"), sin, 0.0)
        cos_sin = cos_sin + ((cos * factor, sin * factor),)  # noqa: RUF005
    return cos_sin


@triton.jit
def _rotate_tokens(
    x, stride_batch, stride_seq, stride_head,  # (batch, seqlen, HEADS, head_dim); / align
    copies,  # (batch, seqlen, len(MAPS), HEADS, head_dim), contiguous
    tile, batch, seqlen,  # tile: of TOKENS tokens
    shift,  # from a token's index to its position, if not packed
    start, start_stride,  # (sequences or 1,) int32: a further shift; or None
    inv_freq, freq_stride, decay, pair_maps, cu_seqlens, num_sequences, search_steps,
    token_scale, scale_stride,  # (batch or 1, seqlen) float32; or None
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
    valid = token < seqlen
    if cu_seqlens is None:
        position = token + shift
        if start is not None:
            position += tl.load(start + batch * start_stride)
        freq_offset = batch * freq_stride
    else:
        sequence = sequence_of(token, cu_seqlens, num_sequences, search_steps)  # (T,)
        position = token - tl.load(cu_seqlens + sequence)
        if start is not None:
            position += tl.load(start + sequence * start_stride)
        freq_offset = 0
        if TILE.freq_per_token:
            freq_offset = sequence.to(tl.int64) * freq_stride

    # Factors of a token: dims that do not rotate get `scale`, the others FACTOR * scale.
    scale = 1.0
    if token_scale is not None:
        scale_ptr = token_scale + batch * scale_stride + token
        scale = tl.load(scale_ptr, mask=valid, other=0.0)[:, None]  # (T, 1)
    if not BY_HEAD:  # cosines and sines serve all heads
        cos_sin = _cos_sin_of_copies(
            position, inv_freq, freq_offset, valid, decay, pair_maps, 0, FACTOR * scale, MAPS, FROM,
            BACKWARD, TILE,
        )  # fmt: skip

    # Pointers to dim 0 of head 0. The factor `align` shows the compiler that rows begin at
    # multiples of it, so that it moves 16 bytes at a time.
    row_offset = batch * tl.cast(stride_batch, tl.int64) + token * tl.cast(stride_seq, tl.int64)
    copy_index = (batch * seqlen + token) * COPIES  # (T,) int64, as batch is
    share = tl.cdiv(HEADS, tl.num_programs(1))
    begin = tl.program_id(1) * share
    for head in range(begin, tl.minimum(begin + share, HEADS)):
        if BY_HEAD:
            head_k = head // (HEADS // TILE.heads_k)
            cos_sin = _cos_sin_of_copies(
                position, inv_freq, freq_offset, valid, decay, pair_maps, head_k, FACTOR * scale,
                MAPS, FROM, BACKWARD, TILE,
            )  # fmt: skip
        x_rows = x + (row_offset + tl.cast(head, tl.int64) * stride_head) * TILE.align  # (T,)
        copy_rows = copies + (copy_index * HEADS + head) * HEAD_DIM  # (T,): of copy 0
        # A row's parts: first and second dims of its pairs, (T, P), and the rest, (T, rest_dims).
        if BACKWARD:
            for c in tl.static_range(COPIES):
                a, b, rest = load_parts(copy_rows + c * HEADS * HEAD_DIM, valid, TILE)
                cos, sin = cos_sin[c]
                sin = -sin  # the backward rotates by minus the angle
                back_a = a * cos - b * sin
                back_b = b * cos + a * sin
                back_rest = rest * scale
                if c == 0:
                    dx_a, dx_b, dx_rest = back_a, back_b, back_rest
                else:
                    dx_a += back_a
                    dx_b += back_b
                    dx_rest += back_rest
            store_parts(x_rows, (dx_a, dx_b, dx_rest), valid, TILE)
        else:
            a, b, rest = widened(load_parts(x_rows, valid, TILE))
            for c in tl.static_range(COPIES):
                cos, sin = cos_sin[c]
                rotated = (a * cos - b * sin, b * cos + a * sin, rest * scale)
                store_parts(copy_rows + c * HEADS * HEAD_DIM, rotated, valid, TILE)


@triton.jit(
    do_not_specialize=[
        *("q_stride_batch", "q_stride_seq", "q_stride_head"),
        *("k_stride_batch", "k_stride_seq", "k_stride_head", "freq_stride", "scale_stride"),
        *("q_start_stride", "k_start_stride", "num_sequences", "search_steps", "shift", "q_tiles"),
        *("first_k_tile", "tiles", "seqlen_q", "seqlen_k"),
    ]
)
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
    shift,  # from a query's index to its position, if not packed
    q_tiles, first_k_tile, tiles,  # tiles of q; first tiles of k to skip; those in the grid
    seqlen_q, seqlen_k,  # the totals if packed
    BACKWARD: tl.constexpr,  # the copies hold float32 gradients, and q and k get their sums
    STORED: tl.constexpr,  # the map by which keys already come rotated; None: raw
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
    # Two nested conditions: only the first is known to the compiler.
    if len(Q_MAPS) > 0:  # noqa: SIM102
        if tile < q_tiles:
            _rotate_tokens(
                q, q_stride_batch, q_stride_seq, q_stride_head, q_copies, tile, batch, seqlen_q,
                shift, q_start, q_start_stride, inv_freq, freq_stride, q_decay, pair_maps,
                cu_seqlens, num_sequences, search_steps, query_scale, scale_stride, Q_MAPS, None,
                TILE.attention_factor_sq, TILE.heads_q, BACKWARD, TILE,
            )  # fmt: skip
    if len(K_MAPS) > 0:  # noqa: SIM102
        if tile >= q_tiles:
            _rotate_tokens(
                k, k_stride_batch, k_stride_seq, k_stride_head, k_copies,
                tile - q_tiles + first_k_tile, batch, seqlen_k, 0, k_start, k_start_stride,
                inv_freq, freq_stride, k_decay, pair_maps, cu_seqlens, num_sequences, search_steps,
                None, 0, K_MAPS, STORED, 1.0, TILE.heads_k, BACKWARD, TILE,
            )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# The launch


class Rotation(NamedTuple):
    """A launch, and the numbers of copies of q and k."""

    launch: Launch
    num_q_copies: int
    num_k_copies: int


def rotate(
    rotation: Rotation, q: Tensor, k: Tensor, call: AttentionCall
) -> tuple[Tensor | None, Tensor | None]:
    """Return rotated copies of q and of k, None if there are none."""
    q_copies = _empty_copies(q, rotation.num_q_copies, q.dtype)
    k_copies = _empty_copies(k, rotation.num_k_copies, k.dtype)
    _launch(rotation, q, k, q_copies, k_copies, call)
    return q_copies, k_copies


def gradients_of_copies(
    rotation: Rotation, q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Allocate what `rotate_back` reads: float32 gradients of the copies of every region."""
    return (
        _empty_copies(q, rotation.num_q_copies, torch.float32),
        _empty_copies(k, rotation.num_k_copies, torch.float32),
    )


def rotate_back(
    rotation: Rotation,
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
    rotation: Rotation,
    q: Tensor,
    k: Tensor,
    q_copies: Tensor | None,
    k_copies: Tensor | None,
    call: AttentionCall,
) -> None:
    rotation.launch((
        q, k, q_copies, k_copies, call.inv_freq, call.log_decay, call.pair_maps, call.cu_seqlens,
        call.k_start if call.q_start is None else call.q_start, call.k_start, call.query_scale,
    ))  # fmt: skip


def build_rotation(q: Tensor, k: Tensor, call: AttentionCall, wanted: str) -> Rotation:
    """Build the launch.

    wanted: "keys", one copy for each map but that of the given keys; "both", queries of every
    region too; "gradients", from one copy for each region: then q and k are the gradients.
    """
    regions, unseen = regions_of(k, call), 0
    q_maps = () if wanted == "keys" else tuple(region.q_map for region in regions)
    k_maps = key_maps(k, call)
    if wanted == "gradients":
        k_maps = [region.k_map for region in regions]
    placed = (call.cu_seqlens, call.q_start, call.k_start) != (None, None, None)
    if wanted == "keys" and call.sliding_window is not None and not placed:
        # The number of first keys that lie before every query's window. The forward never loads
        # these; the gradients of keys load every key.
        unseen = min(max(0, k.shape[-3] - q.shape[-3] + 1 - call.sliding_window), k.shape[-3])
    tile = _tile(q, k, q_maps, k_maps, call)
    seqlen_q, seqlen_k = q.shape[-3], k.shape[-3]
    batch = k.shape[0] if call.cu_seqlens is None else 1
    q_tiles = triton.cdiv(seqlen_q, tile.tokens) if q_maps else 0
    first_k_tile = unseen // tile.tokens
    tiles = q_tiles + (triton.cdiv(seqlen_k, tile.tokens) - first_k_tile if k_maps else 0)
    heads = max(tile.heads_q if q_maps else 0, tile.heads_k if k_maps else 0)
    shares = min(heads, max(1, PROGRAMS // max(tiles * batch, 1)))
    sizes = (
        *strides_in_groups(q, tile.align), *strides_in_groups(k, tile.align),
        sequence_stride(call.inv_freq, 2), sequence_stride(call.query_scale, 2),
        sequence_stride(call.k_start if call.q_start is None else call.q_start, 1),
        sequence_stride(call.k_start, 1), *sequences_of(call),
        seqlen_k - seqlen_q if call.q_start is None else 0,
        q_tiles, first_k_tile, tiles, seqlen_q, seqlen_k,
    )  # fmt: skip
    options = {
        "BACKWARD": wanted == "gradients",
        "STORED": stored_map(call),
        "TILE": tile,
        "num_warps": THREADS // 32,
        "enable_fp_fusion": True,
    }
    launch = Launch(rotate_kernel, (tiles * batch, shares), sizes, options)
    return Rotation(launch, len(q_maps), len(k_maps))


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
        freq_per_token=call.cu_seqlens is not None and sequence_stride(call.inv_freq, 2) > 0,
        q_maps=tuple(map(map_of, q_maps)),
        k_maps=tuple(map(map_of, k_maps)),
        attention_factor_sq=call.attention_factor**2,
    )
