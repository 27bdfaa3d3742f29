"""Shared by the rotation's kernels: tokens, positions, angles, and the launch.

Shapes in comments are TILE's: TOKENS and PAIRS (`tokens` and `pairs` of a Tile).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ..._math.triton.exp import exp
from ..._math.triton.launch import VECTOR_BYTES, Launch, chip_of, strides_by_name, strides_of
from ..._math.triton.pairs import load_parts
from ..._math.triton.sincos import add_quarters, cos_sin_polynomials, cos_sin_polynomials_wide
from ..._math.triton.tokens import sequence_of
from ..._torch.autograd import empty_rows
from ..call import Rotation

# Below this many tokens a program takes as few as possible: latency counts, not bandwidth.
FEW_TOKENS = 512
# Heads are spread over programs until about this many warps run. 32 bytes per thread then keep
# 30 KB of loads in flight on each multiprocessor of an H100; more would only repeat cosines.
TARGET_WARPS = 4096


class Tile(NamedTuple):
    """Constants of every kernel, beside dtypes."""

    tokens: int  # of a program
    pairs: int  # half, rounded up to a power of two
    rest: int  # dims beside the rotated ones, as far as they are copied
    rest_dims: int  # rest, rounded up to a power of two; 1 if none
    align: int  # elements of a group, in which strides count: at most 16 bytes, see `build_launch`
    heads_q: int
    heads_k: int
    wide: bool  # float64 throughout, instead of float32 after the angles
    half: int  # pairs of dims that rotate
    interleaved: bool  # pairs are dims (2i, 2i + 1), not (i, i + half)
    conjugate: bool  # rotates by minus the angle
    inv_freq_stride_sequence: int
    inv_freq_stride_head: int
    per_head: bool  # heads have frequencies of their own
    num_axes: int  # of the positions, where every pair reads its own
    positions_are_offsets: bool  # one for each sequence
    decay_sign: float  # of q; k has the other
    rotary_offset: int  # the first dim of the first pair


# -------------------------------------------------------------------------------------------------
# Tokens and their positions


@triton.jit
def program_tokens(count, seqlen, TILE: tl.constexpr):
    """Return this program's tokens, counted through batch and seqlen: batch, seq, valid.

    All (TOKENS,). batch and seq are int64, so that their products with strides are.
    """
    first = tl.program_id(0).to(count.dtype) * TILE.tokens
    valid = tl.arange(0, TILE.tokens) < count - first
    token = first + tl.arange(0, TILE.tokens)
    return (token // seqlen).to(tl.int64), (token % seqlen).to(tl.int64), valid


@triton.jit
def program_heads(HEADS: tl.constexpr):
    """Return the first and the last + 1 of this program's share of the heads."""
    share = tl.cdiv(HEADS, tl.num_programs(1))
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, HEADS)


@triton.jit
def load_positions(
    batch, seq, valid, positions_ptr, cu_seqlens_ptr, axes_ptr, offset,
    positions_stride_axis, positions_stride_batch, positions_stride_seq, num_sequences,
    search_steps, TILE: tl.constexpr,
):  # fmt: skip
    """Return sequence (TOKENS,) int64 and position (TOKENS, 1 or PAIRS) float64, plus offset.

    batch, seq, valid: from program_tokens; packed if there are cu_seqlens, with a batch of 0.
    positions: None for the index in the sequence; or those of tokens, (batch or 1, seqlen); or, if
        TILE.positions_are_offsets, of each sequence's first token; or, with axes, (num_axes,
        batch or 1, seqlen), of which pair i reads row axes[i].
    """
    sequence = batch
    position = seq.to(tl.float64)
    if cu_seqlens_ptr is not None:
        sequence = sequence_of(seq, cu_seqlens_ptr, num_sequences, search_steps)
        position = (seq - tl.load(cu_seqlens_ptr + sequence)).to(tl.float64)
    if TILE.positions_are_offsets:
        start_ptr = positions_ptr + sequence * positions_stride_batch
        position += tl.load(start_ptr, mask=valid, other=0).to(tl.float64)
    elif positions_ptr is not None:
        token_ptr = positions_ptr + batch * positions_stride_batch + seq * positions_stride_seq
        if TILE.num_axes == 0:
            position = tl.load(token_ptr, mask=valid, other=0).to(tl.float64)
    position = position[:, None]  # (TOKENS, 1)
    if TILE.num_axes > 0:
        pair = tl.arange(0, TILE.pairs)
        axis = tl.load(axes_ptr + pair, mask=pair < TILE.half, other=0)
        # Clamped: no value may read out of bounds, and the host does not wait to check them.
        axis = tl.minimum(tl.maximum(axis, 0), TILE.num_axes - 1).to(tl.int64)
        pair_ptr = token_ptr[:, None] + (axis * positions_stride_axis)[None, :]
        mask = valid[:, None] & (pair < TILE.half)[None, :]
        position = tl.load(pair_ptr, mask=mask, other=0).to(tl.float64)  # (TOKENS, PAIRS)
    return sequence, position + tl.cast(offset, tl.float64)


# -------------------------------------------------------------------------------------------------
# Angles


@triton.jit
def _cos_sin(angle, TILE: tl.constexpr):
    """Return cosine and sine of float64 angles below 2**29 * pi/2, to float32 or wide accuracy."""
    TWO_OVER_PI: tl.constexpr = 0.6366197723675814
    # Adding 1.5 * 2**52 rounds a float64 to an integer and leaves that integer in its low bits.
    TO_INTEGER: tl.constexpr = 6755399441055744.0
    # pi/2 = FIRST + SECOND + THIRD. The first two have 24 significant bits: their products with a
    # count of quarter circles below 2**29 are exact in float64, with or without an fma.
    FIRST: tl.constexpr = 1.570796251296997
    SECOND: tl.constexpr = 7.549789415861596e-08
    THIRD: tl.constexpr = 5.390302858158119e-15
    shifted = angle * TWO_OVER_PI + TO_INTEGER
    quarters = shifted - TO_INTEGER
    rest = (angle - quarters * FIRST) - quarters * SECOND
    rest = rest - quarters * THIRD
    quadrant = shifted.to(tl.int64, bitcast=True).to(tl.int32)
    if TILE.wide:
        cos, sin = cos_sin_polynomials_wide(rest)
    else:
        cos, sin = cos_sin_polynomials(rest.to(tl.float32))
    return add_quarters(cos, sin, quadrant)


@triton.jit
def cos_sin_of_head(inv_freq_ptr, sequence, position, head, valid, TILE: tl.constexpr):
    """Return the cosines and sines by which a head rotates, without amplitude: (TOKENS, PAIRS).

    inv_freq: (sequences or 1, heads or 1, half) float; a stride is 0 where there is 1.
    sequence, position: from load_positions.
    """
    pair = tl.arange(0, TILE.pairs)
    mask = valid[:, None] & (pair < TILE.half)[None, :]
    freq_ptrs = inv_freq_ptr + (sequence * TILE.inv_freq_stride_sequence)[:, None] + pair[None, :]
    head_offset = tl.cast(head, tl.int64) * TILE.inv_freq_stride_head
    freq = tl.load(freq_ptrs + head_offset, mask=mask, other=0.0)
    cos, sin = _cos_sin(position * freq.to(tl.float64), TILE)
    if TILE.conjugate:
        sin = -sin  # a backward or an inverse call, but not the backward of an inverse
    return cos, sin


@triton.jit
def scaled_cos_sin_of_head(
    inv_freq_ptr, sequence, position, amplitude, head, valid, TILE: tl.constexpr
):  # fmt: skip
    """Return the same, times an amplitude from `decayed`: (TOKENS, PAIRS)."""
    cos, sin = cos_sin_of_head(inv_freq_ptr, sequence, position, head, valid, TILE)
    return cos * amplitude, sin * amplitude


@triton.jit
def decayed(amplitude, distance, log_decay_ptr, SIGN: tl.constexpr, TILE: tl.constexpr):
    """Return amplitude * exp(SIGN * distance * log_decay), by which xPos scales the pairs.

    (TOKENS, PAIRS) in the kernel's dtype; (1, 1) without log_decay. distance: of the positions from
    the one where nothing decays.
    """
    factor = tl.full((1, 1), amplitude, tl.float64)
    if log_decay_ptr is not None:
        pair = tl.arange(0, TILE.pairs)
        rate = tl.load(log_decay_ptr + pair, mask=pair < TILE.half, other=0.0).to(tl.float64)
        # The sign first: products shared by q and k would stay in registers while q is rotated.
        exponent = distance * SIGN * rate[None, :]
        factor = factor * (tl.exp(exponent) if TILE.wide else exp(exponent))
    return factor.to(tl.float64 if TILE.wide else tl.float32)


# -------------------------------------------------------------------------------------------------
# Rows: the head_dim elements of a token and head


class TileRows(NamedTuple):
    """The rows of a tile of tokens in a (batch, seqlen, heads, head_dim) tensor."""

    ptr: tl.tensor  # or None: no such tensor
    row: tl.tensor  # (TOKENS,) int64: where those of head 0 begin, in groups of TILE.align elements
    stride_head: tl.tensor  # in such groups


@triton.jit
def rows_of_head(x, head, TILE: tl.constexpr):
    """Return pointers to dim 0 of the rows of a head: (TOKENS,)."""
    # Times align last, from groups to elements: so the compiler knows that rows are aligned. The
    # head is int64, since its product with a stride may pass 32 bits.
    return x.ptr + (x.row + tl.cast(head, tl.int64) * x.stride_head) * TILE.align


@triton.jit
def load_head(row_ptrs, valid, TILE: tl.constexpr):
    """Load (TOKENS,) rows as load_parts does, in the dtype that the kernel computes in."""
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    a, b, rest = load_parts(row_ptrs, valid, TILE)
    return a.to(WIDE), b.to(WIDE), rest.to(WIDE)


# -------------------------------------------------------------------------------------------------
# The launch


def build_launch(
    kernel: Any,
    tensors: Mapping[str, Tensor | None],
    tile: dict[str, Any],
    numbers: dict[str, float],
    *,
    caches: Mapping[str, Tensor] | None = None,
    constants: dict[str, Any] | None = None,
    per_call: tuple[str, ...] = (),
    one_program: bool = False,
    small_tiles: bool = True,
    pairs_in_registers: int = 0,
    copies_rest: bool = True,
    maxnreg: int | None = None,
) -> Launch:
    """Work out the launch on q, k and others, by their names in the kernel: q_ptr, k_ptr, ...

    tensors: (batch, seqlen, heads, head_dim), (total, heads, head_dim) if packed, or None.
    caches: (blocks, slots, heads, head_dim).

    Tiles and grids take few different values, so little is compiled. The launch's numbers are the
    strides of each tensor and cache by its name, count = batch * seqlen, seqlen, and `numbers`.

    Strides count groups of as many elements as divide them all, Tile.align. A kernel multiplies by
    it last: that shows the compiler that rows begin at such multiples, so it loads 16 bytes at a
    time, and saves registers.

    tile, numbers: from `rotation_numbers`.
    constants, per_call: as in Launch; constants without TILE.
    one_program: a program takes all heads.
    small_tiles: a program may take few tokens.
    pairs_in_registers: the pairs of a head that the tile is sized by, if not Tile.pairs.
    maxnreg: the most registers of a thread; AMD's compiler knows no such limit.
    """
    q, k, caches = tensors["q_ptr"], tensors["k_ptr"], caches or {}
    x, heads_q, heads_k = k if q is None else q, *(0 if x is None else x.shape[-2] for x in (q, k))
    batch, seqlen, _, head_dim = x.shape if x.dim() == 4 else (1, *x.shape)
    count, heads = batch * seqlen, max(heads_q, heads_k)
    chip = chip_of(x)  # raises if something is missing
    half = tile["half"]
    pairs, rest = next_power_of_2(half), head_dim - 2 * half if copies_rest else 0
    if count < FEW_TOKENS and small_tiles:
        tokens, warps = max(1, 64 // pairs), 1
    else:  # 128 threads, each with one vector of first dims and one of second dims
        vectors = 128 * VECTOR_BYTES // x.itemsize
        tokens, warps = max(1, vectors // (pairs_in_registers or pairs)), 4
    tiles = triton.cdiv(count, tokens) if heads else 0
    shares = min(1 if one_program else heads, max(1, TARGET_WARPS // max(warps * tiles, 1)))
    # Elements, up to 16 bytes, that divide all strides.
    given = (y for y in (*tensors.values(), *caches.values()) if y is not None)
    align = math.gcd(VECTOR_BYTES // x.itemsize, *(n for y in given for n in strides_of(y)[:-1]))
    strides: dict[str, int] = {}
    for name, y in tensors.items():
        strides |= strides_by_name(name.removesuffix("_ptr"), y, align)
    for name, y in caches.items():
        strides |= strides_by_name(name.removesuffix("_ptr"), y, align, ("block", "slot", "head"))
    sizes = Tile(
        tokens=tokens,
        pairs=pairs,
        rest=rest,
        rest_dims=next_power_of_2(max(rest, 1)),
        align=align,
        heads_q=heads_q,
        heads_k=heads_k,
        wide=x.dtype == torch.float64,
        **tile,
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if maxnreg is not None and isinstance(chip, int):  # a chip of NVIDIA's
        options["maxnreg"] = maxnreg
    return Launch(
        kernel,
        (tiles, shares),
        numbers={**strides, "count": count, "seqlen": seqlen, **numbers},
        constants={**(constants or {}), "TILE": sizes},
        options=options,
        per_call=per_call,
    )


def rotation_numbers(rotation: Rotation) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the fields of Tile that follow from a rotation, and its numbers in a launch."""
    positions, axes = rotation.positions, rotation.axes
    by_axis = by_batch = by_token = 0
    if rotation.positions_are_offsets:  # (sequences,)
        (by_batch,) = strides_of(positions)
    elif axes is not None:  # (axes, batch or 1, seqlen)
        by_axis, by_batch, by_token = strides_of(positions)
    elif positions is not None:  # (batch or 1, seqlen)
        by_batch, by_token = strides_of(positions)
    sequences = 0 if rotation.cu_seqlens is None else rotation.cu_seqlens.shape[0] - 1
    inv_freq_stride_sequence, inv_freq_stride_head, _ = strides_of(rotation.inv_freq)
    tile = {
        "half": rotation.inv_freq.shape[-1],
        "interleaved": rotation.interleaved,
        "conjugate": rotation.conjugate,
        "inv_freq_stride_sequence": inv_freq_stride_sequence,
        "inv_freq_stride_head": inv_freq_stride_head,
        "per_head": rotation.per_head,
        "num_axes": 0 if axes is None else positions.shape[0],
        "positions_are_offsets": rotation.positions_are_offsets,
        "decay_sign": 1.0 if rotation.log_decay is None else rotation.decay_signs[0],
        "rotary_offset": rotation.rotary_offset,
    }
    numbers = {
        "positions_stride_axis": by_axis,
        "positions_stride_batch": by_batch,
        "positions_stride_seq": by_token,
        "num_sequences": sequences,
        "search_steps": sequences.bit_length(),
        "decay_origin": rotation.decay_origin,
        "amplitude": rotation.amplitude,
    }
    return tile, numbers


def empty_outputs(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Allocate outputs like q and k."""
    return empty_rows(q), None if k is None else empty_rows(k)
