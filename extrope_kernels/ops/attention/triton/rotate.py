"""The kernels that rotate raw rows into the frames of all regions, and gradients back out of them.

A program has a few tokens of q, or of k, and a share of their heads: it finds where the tokens are
and their cosines and sines once.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..._shared.triton.pairs import load_parts, of_pairs, rotate, store_parts, widened
from ..._shared.triton.position_maps import CONSTANT, log_n_scale, map_cos_sin
from ..._shared.triton.tokens import rows, sequence_of

RUN_TIME_SCALARS = (
    *("num_sequences", "search_steps", "q_tiles", "tiles", "heads_q", "heads_k"),
    *("seqlen_q", "seqlen_k", "query_scale_stride", "first_k_tile"),
)


class RotateTile(NamedTuple):
    """What a kernel is compiled for, beside types and alignment."""

    tokens: int  # per program
    half: int  # pairs of dims that rotate
    pairs: int  # half, rounded up to a power of two
    rest: int  # dims after the rotated ones
    rest_dims: int  # rest, rounded up; 1 if none
    align: int  # elements; divides all strides
    interleaved: bool
    freq_per_token: bool  # packed sequences with frequencies of their own
    q_maps: tuple[int, ...]  # their kinds
    k_maps: tuple[int, ...]
    stored: int  # of keys as they come


@triton.jit
def _place(
    tile, batch, shift, start, start_stride, seqlen, inv_freq, freq_stride, cu_seqlens,
    num_sequences, search_steps, TILE: tl.constexpr,
):  # fmt: skip
    """A tile's tokens, which of them are there, their positions, and frequencies.

    shift: of positions, where sequences are not packed; start: None, or more of it by sequence.
    """
    TOKENS: tl.constexpr = TILE.tokens
    PAIRS: tl.constexpr = TILE.pairs
    token = tile * TOKENS + tl.arange(0, TOKENS)
    valid = token < seqlen
    if cu_seqlens is None:
        position = token + shift
        if start is not None:
            position += tl.load(start + batch * start_stride)
        freq = of_pairs(inv_freq + tl.cast(batch, tl.int64) * freq_stride, TILE)
    else:
        sequence = sequence_of(token, cu_seqlens, num_sequences, search_steps)
        position = token - tl.load(cu_seqlens + sequence)
        if start is not None:
            position += tl.load(start + sequence * start_stride)
        if TILE.freq_per_token:
            pair = tl.arange(0, PAIRS)
            mask = valid[:, None] & (pair < TILE.half)[None, :]
            at = inv_freq + (sequence.to(tl.int64) * freq_stride)[:, None] + pair[None, :]
            freq = tl.load(at, mask=mask, other=0.0)
        else:
            freq = of_pairs(inv_freq, TILE)
    return token, valid, position, freq


@triton.jit
def _cos_sin_of_frames(
    position, freq, decay, amplitude, maps, origin, MAPS: tl.constexpr, ORIGIN: tl.constexpr
):
    """(cos, sin) of each map, times the amplitude; the first once more where there are fewer."""
    cos, sin = map_cos_sin(position, freq, decay, maps[0], origin, MAPS[0], ORIGIN)
    first = (cos * amplitude, sin * amplitude)
    second = first
    third = first
    if len(MAPS) > 1:
        cos, sin = map_cos_sin(position, freq, decay, maps[1], origin, MAPS[1], ORIGIN)
        second = (cos * amplitude, sin * amplitude)
    if len(MAPS) > 2:
        cos, sin = map_cos_sin(position, freq, decay, maps[2], origin, MAPS[2], ORIGIN)
        third = (cos * amplitude, sin * amplitude)
    return first, second, third


@triton.jit
def _pointers(x, strides, batch, token, head, TILE: tl.constexpr):
    return rows(x, batch, token, head, strides[0], strides[1], strides[2], TILE)


@triton.jit
def _in_frame(frames, strides, n, batch, token, head, TILE: tl.constexpr):
    x = frames + tl.cast(n, tl.int64) * strides[0] * TILE.align
    return rows(x, batch, token, head, strides[1], strides[2], strides[3], TILE)


@triton.jit
def _rotate_head(
    x, strides, frames, frame_strides, head, batch, token, valid, cos_sin, scale,
    COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write one head of x into COUNT frames."""
    parts = widened(load_parts(_pointers(x, strides, batch, token, head, TILE), valid, TILE))
    for n in tl.static_range(COUNT):
        rotated = rotate(parts, cos_sin[n][0], cos_sin[n][1], scale)
        out = _in_frame(frames, frame_strides, n, batch, token, head, TILE)
        store_parts(out, rotated, valid, TILE)


@triton.jit
def _unrotate_head(
    x, strides, frames, frame_strides, head, batch, token, valid, cos_sin, scale,
    COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum one head of COUNT frames, float32, into x."""
    at = _in_frame(frames, frame_strides, 0, batch, token, head, TILE)
    parts = load_parts(at, valid, TILE)
    first, second, rest = rotate(parts, cos_sin[0][0], -cos_sin[0][1], scale)
    for n in tl.static_range(1, COUNT):
        at = _in_frame(frames, frame_strides, n, batch, token, head, TILE)
        parts = load_parts(at, valid, TILE)
        more = rotate(parts, cos_sin[n][0], -cos_sin[n][1], scale)
        first += more[0]
        second += more[1]
        rest += more[2]
    out = _pointers(x, strides, batch, token, head, TILE)
    store_parts(out, (first, second, rest), valid, TILE)


@triton.jit
def _rotate_tokens(
    x, strides, frames, frame_strides, tile, batch, heads, shift, start, start_stride, seqlen,
    inv_freq, freq_stride, decay, cu_seqlens, num_sequences, search_steps, amplitude, per_log_n,
    token_scale, token_scale_stride, maps, origin,
    MAPS: tl.constexpr, ORIGIN: tl.constexpr, INVERSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """This program's tokens and heads of q, or of k.

    token_scale: None, or what each token is multiplied by.
    """
    COUNT: tl.constexpr = len(MAPS)
    token, valid, position, freq = _place(
        tile, batch, shift, start, start_stride, seqlen, inv_freq, freq_stride, cu_seqlens,
        num_sequences, search_steps, TILE,
    )  # fmt: skip
    scale = log_n_scale(position, per_log_n)
    if token_scale is not None:
        at = token_scale + batch * token_scale_stride + token
        scale *= tl.load(at, mask=valid, other=0.0)[:, None]
    cos_sin = _cos_sin_of_frames(
        position, freq, decay, amplitude * scale, maps, origin, MAPS, ORIGIN
    )
    share = tl.cdiv(heads, tl.num_programs(1))
    begin = tl.program_id(1) * share
    for head in range(begin, tl.minimum(begin + share, heads)):
        if INVERSE:
            _unrotate_head(
                x, strides, frames, frame_strides, head, batch, token, valid, cos_sin, scale,
                COUNT, TILE,
            )  # fmt: skip
        else:
            _rotate_head(
                x, strides, frames, frame_strides, head, batch, token, valid, cos_sin, scale,
                COUNT, TILE,
            )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def rotate_kernel(
    q, k, q_frames, k_frames, inv_freq, log_decay, cu_seqlens, q_start, k_start, query_scale,
    q_strides, k_strides, q_frame_strides, k_frame_strides, freq_stride, query_scale_stride,
    start_strides, num_sequences, search_steps, q_tiles, first_k_tile, tiles, heads_q, heads_k,
    seqlen_q, seqlen_k, amplitude, per_log_n,
    q0_modulus: tl.float64, q0_factor: tl.float64, q0_offset: tl.float64, q0_cap: tl.float64,
    q1_modulus: tl.float64, q1_factor: tl.float64, q1_offset: tl.float64, q1_cap: tl.float64,
    q2_modulus: tl.float64, q2_factor: tl.float64, q2_offset: tl.float64, q2_cap: tl.float64,
    k0_modulus: tl.float64, k0_factor: tl.float64, k0_offset: tl.float64, k0_cap: tl.float64,
    k1_modulus: tl.float64, k1_factor: tl.float64, k1_offset: tl.float64, k1_cap: tl.float64,
    k2_modulus: tl.float64, k2_factor: tl.float64, k2_offset: tl.float64, k2_cap: tl.float64,
    stored_modulus: tl.float64, stored_factor: tl.float64, stored_offset: tl.float64,
    stored_cap: tl.float64,
    INVERSE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Axis 0: tiles of tokens of q, then of k, and the batch; axis 1: shares of the heads.

    Without maps of a side, nothing of it is read or written. INVERSE: the frames hold gradients,
    float32, to be summed into those of q and k.
    """
    Q_MAPS: tl.constexpr = TILE.q_maps
    K_MAPS: tl.constexpr = TILE.k_maps
    STORED: tl.constexpr = TILE.stored
    q_maps = (
        (q0_modulus, q0_factor, q0_offset, q0_cap),
        (q1_modulus, q1_factor, q1_offset, q1_cap),
        (q2_modulus, q2_factor, q2_offset, q2_cap),
    )
    k_maps = (
        (k0_modulus, k0_factor, k0_offset, k0_cap),
        (k1_modulus, k1_factor, k1_offset, k1_cap),
        (k2_modulus, k2_factor, k2_offset, k2_cap),
    )
    stored = (stored_modulus, stored_factor, stored_offset, stored_cap)
    q_begin = k_start
    q_begin_stride = None
    k_begin_stride = None
    shift = seqlen_k - seqlen_q
    if k_start is not None:
        k_begin_stride = start_strides[1]
        q_begin_stride = k_begin_stride
    if q_start is not None:
        q_begin = q_start
        q_begin_stride = start_strides[0]
        shift = 0
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    decay = None
    minus_decay = None
    if log_decay is not None:
        decay = of_pairs(log_decay, TILE).to(tl.float64)
        minus_decay = -decay
    k_tile = tile - q_tiles
    if first_k_tile is not None:
        k_tile += first_k_tile
    # Two conditions: only the first one is the compiler's.
    if len(Q_MAPS) > 0:  # noqa: SIM102
        if tile < q_tiles:
            _rotate_tokens(
                q, q_strides, q_frames, q_frame_strides, tile, batch, heads_q,
                shift, q_begin, q_begin_stride, seqlen_q, inv_freq, freq_stride, decay,
                cu_seqlens, num_sequences, search_steps, amplitude, per_log_n,
                query_scale, query_scale_stride, q_maps, stored, Q_MAPS, CONSTANT, INVERSE, TILE,
            )  # fmt: skip
    if len(K_MAPS) > 0:  # noqa: SIM102
        if tile >= q_tiles:
            _rotate_tokens(
                k, k_strides, k_frames, k_frame_strides, k_tile, batch, heads_k,
                0, k_start, k_begin_stride, seqlen_k, inv_freq, freq_stride, minus_decay,
                cu_seqlens, num_sequences, search_steps, 1.0, None,
                None, None, k_maps, stored, K_MAPS, STORED, INVERSE, TILE,
            )  # fmt: skip
