"""Rotate raw keys and queries once to the positions of every region, and gradients back.

A program has a few tokens of q or of k, and a share of their heads. It computes the tokens'
positions, cosines and sines once. Rotated copies are contiguous: (batch, seqlen, copies, heads,
head_dim).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....scores import UNROTATED, PositionMap
from ..._shared.triton.launch import VECTOR_BYTES
from ..._shared.triton.pairs import load_parts, of_pairs, store_parts, widened
from ..._shared.triton.pairs import rotate as rotate_parts
from ..._shared.triton.tokens import rows, sequence_of
from ..call import AttentionCall
from .device import (
    Launch,
    alignment_of,
    freqs_of,
    groups_of,
    key_maps,
    launch_for,
    log_n_scale,
    map_of,
    nth_cos_sin,
    regions_of,
    rope_heads_of,
    sequence_stride,
    sequences_of,
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
    rope_heads: tuple[int, int]  # see `rope_heads_of`
    pairs: int  # half, rounded up to a power of two
    rest: int  # dims after the rotated ones
    rest_dims: int  # rest, rounded up; 1 if none
    align: int  # elements; divides all strides
    interleaved: bool
    freq_per_token: bool  # each packed sequence has its own frequencies
    q_maps: tuple[tuple, ...]  # one per copy, see `map_of`
    k_maps: tuple[tuple, ...]
    stored: tuple | None  # the map by which keys already come rotated; None: raw
    amplitude: float  # multiplies queries
    per_log_n: float


@triton.jit
def _place(
    tile, batch, shift, start, start_stride, seqlen, freq_batch, cu_seqlens, num_sequences,
    search_steps, TILE: tl.constexpr,
):  # fmt: skip
    """Return a tile's tokens, a mask of the valid ones, positions, and the frequencies' offset.

    shift: added to positions of sequences that are not packed. start: None, or a further shift by
    sequence.
    """
    TOKENS: tl.constexpr = TILE.tokens
    token = tile * TOKENS + tl.arange(0, TOKENS)
    valid = token < seqlen
    if cu_seqlens is None:
        position = token + shift
        if start is not None:
            position += tl.load(start + batch * start_stride)
        of_freq = tl.cast(batch, tl.int64) * freq_batch
    else:
        sequence = sequence_of(token, cu_seqlens, num_sequences, search_steps)
        position = token - tl.load(cu_seqlens + sequence)
        if start is not None:
            position += tl.load(start + sequence * start_stride)
        of_freq = 0
        if TILE.freq_per_token:
            of_freq = sequence.to(tl.int64) * freq_batch
    return token, valid, position, of_freq


@triton.jit
def _freq_of(place, inv_freq, head_k, TILE: tl.constexpr):
    """Return a head's frequencies in the layout of `map_cos_sin`; place: from `_place`."""
    _, valid, _, of_freq = place
    inv_freq = freqs_of(inv_freq, head_k, TILE)
    if TILE.freq_per_token:
        pair = tl.arange(0, TILE.pairs)
        mask = valid[:, None] & (pair < TILE.half)[None, :]
        freq = tl.load(inv_freq + of_freq[:, None] + pair[None, :], mask=mask, other=0.0)
    else:
        freq = of_pairs(inv_freq + of_freq, TILE)
    return freq


@triton.jit
def _finite(x):
    """Replace what is not finite by 0."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _cos_sin(
    position, freq, maps, scale, decay, MAPS: tl.constexpr, ORIGIN: tl.constexpr,
    AMPLITUDE: tl.constexpr, INVERSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return cosine and sine for every copy, with all factors of a token."""
    cos_sin = ()
    for n in tl.static_range(len(MAPS)):
        cos, sin = nth_cos_sin(position, freq, decay, maps, n, MAPS, ORIGIN, TILE)
        if INVERSE and decay is not None:
            # Outside of a region the amplitude may overflow, and gradients are 0: not NaN.
            cos, sin = _finite(cos), _finite(sin)
        cos_sin = cos_sin + ((cos * (AMPLITUDE * scale), sin * (AMPLITUDE * scale)),)  # noqa: RUF005
    return cos_sin


@triton.jit
def _rotate_head(
    x, batch_stride, seq_stride, head_stride, copies, head, batch, token, seqlen, valid, cos_sin,
    scale, COPIES: tl.constexpr, HEADS: tl.constexpr, INVERSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rotate one head of x into its copies; INVERSE: sum float32 copies, rotated back, into x."""
    HEAD: tl.constexpr = TILE.head_dim // TILE.align
    SEQ: tl.constexpr = COPIES * HEADS * HEAD
    own = rows(x, batch, token, head, batch_stride, seq_stride, head_stride, TILE)
    copy_batch = tl.cast(seqlen, tl.int64) * SEQ
    at = rows(copies, batch, token, head, copy_batch, SEQ, HEAD, TILE)
    if INVERSE:
        cos, sin = cos_sin[0]
        first, second, rest = rotate_parts(load_parts(at, valid, TILE), cos, -sin, scale)
        for n in tl.static_range(1, COPIES):
            cos, sin = cos_sin[n]
            parts = load_parts(at + n * HEADS * TILE.head_dim, valid, TILE)
            more = rotate_parts(parts, cos, -sin, scale)
            first += more[0]
            second += more[1]
            rest += more[2]
        store_parts(own, (first, second, rest), valid, TILE)
    else:
        parts = widened(load_parts(own, valid, TILE))
        for n in tl.static_range(COPIES):
            cos, sin = cos_sin[n]
            rotated = rotate_parts(parts, cos, sin, scale)
            store_parts(at + n * HEADS * TILE.head_dim, rotated, valid, TILE)


@triton.jit
def _rotate_tokens(
    x, batch_stride, seq_stride, head_stride, copies, tile, batch, shift, start, start_stride,
    seqlen, inv_freq, freq_batch, decay, pair_maps, cu_seqlens, num_sequences, search_steps,
    token_scale, scale_batch, MAPS: tl.constexpr, ORIGIN: tl.constexpr, AMPLITUDE: tl.constexpr,
    PER_LOG_N: tl.constexpr, HEADS: tl.constexpr, INVERSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rotate this program's tokens and heads of q or of k.

    token_scale: None, or a factor for each token.
    """
    COPIES: tl.constexpr = len(MAPS)
    BY_HEAD: tl.constexpr = TILE.rope_heads[0] > 1 or TILE.rope_heads[1] > 1
    place = _place(
        tile, batch, shift, start, start_stride, seqlen, freq_batch, cu_seqlens, num_sequences,
        search_steps, TILE,
    )  # fmt: skip
    token, valid, position, _ = place
    pair = tl.arange(0, TILE.pairs)
    if not BY_HEAD:
        freq = _freq_of(place, inv_freq, 0, TILE)
    scale = log_n_scale(position, PER_LOG_N)
    if token_scale is not None:
        at = token_scale + batch * scale_batch + token
        scale *= tl.load(at, mask=valid, other=0.0)[:, None]
    if not BY_HEAD:
        maps = (pair_maps, pair, 0)
        cos_sin = _cos_sin(
            position, freq, maps, scale, decay, MAPS, ORIGIN, AMPLITUDE, INVERSE, TILE
        )
    share = tl.cdiv(HEADS, tl.num_programs(1))
    begin = tl.program_id(1) * share
    for head in range(begin, tl.minimum(begin + share, HEADS)):
        if BY_HEAD:
            head_k = head // (HEADS // TILE.heads_k)
            freq = _freq_of(place, inv_freq, head_k, TILE)
            maps = (pair_maps, pair, head_k)
            cos_sin = _cos_sin(
                position, freq, maps, scale, decay, MAPS, ORIGIN, AMPLITUDE, INVERSE, TILE
            )
        _rotate_head(
            x, batch_stride, seq_stride, head_stride, copies, head, batch, token, seqlen, valid,
            cos_sin, scale, COPIES, HEADS, INVERSE, TILE,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *("q_batch", "q_seq", "q_head", "k_batch", "k_seq", "k_head", "freq_batch", "scale_batch"),
        *("q_start_stride", "k_start_stride", "num_sequences", "search_steps", "shift", "q_tiles"),
        *("first_k_tile", "tiles", "seqlen_q", "seqlen_k"),
    ]
)
def rotate_kernel(
    q, k, q_rotated, k_rotated, inv_freq, log_decay, pair_maps, cu_seqlens, q_start, k_start,
    query_scale, q_batch, q_seq, q_head, k_batch, k_seq, k_head, freq_batch, scale_batch,
    q_start_stride, k_start_stride, num_sequences, search_steps, shift, q_tiles, first_k_tile,
    tiles, seqlen_q, seqlen_k, INVERSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rotate a tile. Axis 0: tiles of tokens of q, then of k, and the batch; axis 1: heads' shares.

    A side without maps is neither read nor written. INVERSE: the copies hold float32 gradients,
    and their sums are the gradients of q and k. shift: from a query's index to its position.
    """
    Q_MAPS: tl.constexpr = TILE.q_maps
    K_MAPS: tl.constexpr = TILE.k_maps
    STORED: tl.constexpr = TILE.stored
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    decay = None
    minus_decay = None
    if log_decay is not None:
        decay = of_pairs(log_decay, TILE).to(tl.float64)
        minus_decay = -decay
    # Two nested conditions: only the first is known to the compiler.
    if len(Q_MAPS) > 0:  # noqa: SIM102
        if tile < q_tiles:
            _rotate_tokens(
                q, q_batch, q_seq, q_head, q_rotated, tile, batch, shift, q_start, q_start_stride,
                seqlen_q, inv_freq, freq_batch, decay, pair_maps, cu_seqlens, num_sequences,
                search_steps, query_scale, scale_batch, Q_MAPS, None, TILE.amplitude,
                TILE.per_log_n, TILE.heads_q, INVERSE, TILE,
            )  # fmt: skip
    if len(K_MAPS) > 0:  # noqa: SIM102
        if tile >= q_tiles:
            k_tile = tile - q_tiles + first_k_tile
            _rotate_tokens(
                k, k_batch, k_seq, k_head, k_rotated, k_tile, batch, 0, k_start, k_start_stride,
                seqlen_k, inv_freq, freq_batch, minus_decay, pair_maps, cu_seqlens, num_sequences,
                search_steps, None, 0, K_MAPS, STORED, 1.0, 0.0, TILE.heads_k, INVERSE, TILE,
            )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# The launch


class Rotation(NamedTuple):
    """A launch, and the numbers of copies of q and k."""

    launch: Launch
    q_copies: int
    k_copies: int


def rotated_keys(q: Tensor, k: Tensor, call: AttentionCall) -> Tensor | None:
    """Rotate keys for every region; None if all regions see the given keys."""
    rotation = launch_for(_build_launch, (q, k), call, "keys")
    if rotation.k_copies == 0:
        return None
    copies = _copies(k, rotation.k_copies, k.dtype)
    _launch(rotation, q, k, None, copies, call)
    return copies


def rotated(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Rotate queries for every region, and keys for regions that do not see the given ones."""
    rotation = launch_for(_build_launch, (q, k), call, "both")
    copies = _copies(q, rotation.q_copies, q.dtype), _copies(k, rotation.k_copies, k.dtype)
    _launch(rotation, q, k, *copies, call)
    return copies


def gradients_of_copies(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Allocate float32 gradients of the queries and keys of every region."""
    regions = len(regions_of(k, call))
    return _copies(q, regions, torch.float32), _copies(k, regions, torch.float32)


def rotate_back(
    dq: Tensor, dk: Tensor, dq_copies: Tensor, dk_copies: Tensor, call: AttentionCall
) -> None:
    """Write the gradients of q and k: sums of their copies' gradients, each rotated back."""
    _launch(
        launch_for(_build_launch, (dq, dk), call, "gradients"), dq, dk, dq_copies, dk_copies, call
    )


def _copies(x: Tensor, copies: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-2], copies, *x.shape[-2:]), dtype=dtype)


def _launch(
    rotation: Rotation,
    q: Tensor,
    k: Tensor,
    q_copies: Tensor | None,
    k_copies: Tensor | None,
    call: AttentionCall,
) -> None:
    launch = rotation.launch
    if math.prod(launch.grid) > 0:
        rotate_kernel[launch.grid](
            q, k, q_copies, k_copies, call.inv_freq, call.log_decay, call.pair_maps,
            call.cu_seqlens, call.k_start if call.q_start is None else call.q_start, call.k_start,
            call.query_scale, *launch.sizes, **launch.options,
        )  # fmt: skip


def _build_launch(q: Tensor, k: Tensor, call: AttentionCall, wanted: str) -> Rotation:
    """Build the launch.

    wanted: "keys", those that differ from the given ones; "both", all queries and these keys;
    "gradients", from all copies.
    """
    regions, unseen = regions_of(k, call), 0
    q_maps = () if wanted == "keys" else tuple(region.q_map for region in regions)
    k_maps = key_maps(k, call)
    if wanted == "gradients":
        k_maps = [region.k_map for region in regions]
    placed = (call.cu_seqlens, call.q_start, call.k_start) != (None, None, None)
    if wanted == "keys" and call.sliding_window is not None and not placed:
        # The number of first keys that lie before every query's window.
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
        *groups_of(q, tile.align), *groups_of(k, tile.align), sequence_stride(call.inv_freq, 2),
        sequence_stride(call.query_scale, 2),
        sequence_stride(call.k_start if call.q_start is None else call.q_start, 1),
        sequence_stride(call.k_start, 1), *sequences_of(call),
        seqlen_k - seqlen_q if call.q_start is None else 0,
        q_tiles, first_k_tile, tiles, seqlen_q, seqlen_k,
    )  # fmt: skip
    options = {"num_warps": THREADS // 32, "enable_fp_fusion": True, "TILE": tile}
    options["INVERSE"] = wanted == "gradients"
    launch = Launch((tiles * batch, shares), sizes, options)
    return Rotation(launch, len(q_maps), len(k_maps))


def _tile(
    q: Tensor,
    k: Tensor,
    q_maps: Sequence[PositionMap],
    k_maps: Sequence[PositionMap],
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
        rope_heads=rope_heads_of(call),
        pairs=pairs,
        rest=rest,
        rest_dims=triton.next_power_of_2(max(rest, 1)),
        align=alignment_of(q, k),
        interleaved=call.interleaved,
        freq_per_token=call.cu_seqlens is not None and sequence_stride(call.inv_freq, 2) > 0,
        q_maps=tuple(map(map_of, q_maps)),
        k_maps=tuple(map(map_of, k_maps)),
        stored=None if call.stored == UNROTATED else map_of(call.stored),
        amplitude=call.attention_factor**2,
        per_log_n=0.0 if call.log_n is None else 1 / math.log(call.log_n),
    )
