"""Shared by the rotation's kernels: tokens, positions, angles, rows of heads, and the launch.

In device functions a tensor of heads is a tuple: the pointer, and its strides of batch, seq and
head in groups of TILE.align elements. Tokens are a tuple of (TOKENS,) tensors: batch, seq and the
mask of valid tokens. Shapes in comments are TILE's: TOKENS, PAIRS and REST (rest_dims).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ..._shared.triton.exp import exp
from ..._shared.triton.launch import VECTOR_BYTES, alignment, chip_of, strides_of
from ..._shared.triton.pairs import load_parts, store_parts
from ..._shared.triton.sincos import add_quarters, cos_sin_polynomials, cos_sin_polynomials_wide
from ..._shared.triton.tokens import rows, sequence_of
from ..rotation import Rotation

# Below this many tokens a program takes as few as possible: latency counts, not bandwidth.
FEW_TOKENS = 512
# Heads are spread over programs until about this many warps run. 32 bytes per thread then keep
# 30 KB of loads in flight on each multiprocessor of an H100; more would only repeat the sincos.
TARGET_WARPS = 4096
# These integers change from call to call: kernels do not specialise on them.
POSITION_NUMBERS = (
    *("count", "seqlen", "position_axis", "position_batch", "position_seq", "num_sequences"),
    "search_steps",
)


class Tile(NamedTuple):
    """Constants of every kernel, beside dtypes."""

    tokens: int  # of a program
    pairs: int  # half, rounded up to a power of two
    rest: int  # dims after the rotated ones
    rest_dims: int  # rest, rounded up to a power of two; 1 if none
    align: int  # elements, at most 16 bytes, that divide all strides
    heads_q: int
    heads_k: int
    wide: bool  # float64 throughout, instead of float32 after the angles
    half: int  # pairs of dims that rotate
    interleaved: bool
    conjugate: bool  # rotates by minus the angle
    freq_sequence: int = 0  # strides of the frequencies
    freq_head: int = 0
    per_head: bool = False  # heads have frequencies of their own
    num_axes: int = 0  # of the positions, where every pair reads its own
    positions_are_offsets: bool = False
    decay_sign: float = 1.0  # of q; k has the other


class Rope(NamedTuple):
    """The tensors that decide how far tokens rotate; all but the first may be None."""

    inv_freq: Tensor
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None
    log_decay: Tensor | None = None
    axes: Tensor | None = None


# -------------------------------------------------------------------------------------------------
# Tokens and their positions


@triton.jit
def program_tokens(count, seqlen, TILE: tl.constexpr):
    """Return this program's tokens, counted through batch and seqlen."""
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
def token_positions(
    tokens, rope, offset, position_axis, position_batch, position_seq, num_sequences, search_steps,
    TILE: tl.constexpr,
):  # fmt: skip
    """Return sequence (TOKENS,) and position (TOKENS, 1 or PAIRS) float64, in any given form."""
    batch, seq, valid = tokens
    sequence = batch
    position = seq.to(tl.float64)
    if rope.cu_seqlens is not None:
        sequence = sequence_of(seq, rope.cu_seqlens, num_sequences, search_steps)
        position = (seq - tl.load(rope.cu_seqlens + sequence)).to(tl.float64)
    if TILE.positions_are_offsets:
        start = tl.load(rope.positions + sequence * position_batch, mask=valid, other=0)
        position += start.to(tl.float64)
    elif rope.positions is not None:
        at = rope.positions + batch * position_batch + seq * position_seq
        if TILE.num_axes == 0:
            position = tl.load(at, mask=valid, other=0).to(tl.float64)
    position = position[:, None]  # (TOKENS, 1)
    if TILE.num_axes > 0:
        pair = tl.arange(0, TILE.pairs)
        axis = tl.load(rope.axes + pair, mask=pair < TILE.half, other=0)
        axis = tl.minimum(tl.maximum(axis, 0), TILE.num_axes - 1).to(tl.int64)  # clamped
        at = at[:, None] + (axis * position_axis)[None, :]
        mask = valid[:, None] & (pair < TILE.half)[None, :]
        position = tl.load(at, mask=mask, other=0).to(tl.float64)  # (TOKENS, PAIRS)
    return sequence, position + tl.cast(offset, tl.float64)


# -------------------------------------------------------------------------------------------------
# Angles


@triton.jit
def sincos(angle, TILE: tl.constexpr):
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
def head_cos_sin(angles, head, valid, TILE: tl.constexpr):
    """Return (TOKENS, PAIRS) cosines and sines of a head, or of all if they share frequencies.

    angles: (inv_freq, sequence, position, its distance from decay's origin, log_decay, amplitude).
    """
    inv_freq, sequence, position = angles[0], angles[1], angles[2]
    pair = tl.arange(0, TILE.pairs)
    at = inv_freq + (sequence * TILE.freq_sequence)[:, None] + pair[None, :] + head * TILE.freq_head
    mask = valid[:, None] & (pair < TILE.half)[None, :]
    return sincos(position * tl.load(at, mask=mask, other=0.0).to(tl.float64), TILE)


@triton.jit
def scaled(cos, sin, angles, SIGN: tl.constexpr, TILE: tl.constexpr):
    """Multiply cos and sin by the amplitude, and sin by the direction.

    SIGN: 1 for q, -1 for k, whose amplitudes change with the position in opposite directions.
    """
    far, log_decay = angles[3], angles[4]
    scale = tl.full((1, 1), angles[5], tl.float64)
    if log_decay is not None:
        pair = tl.arange(0, TILE.pairs)
        rate = tl.load(log_decay + pair, mask=pair < TILE.half, other=0.0).to(tl.float64)
        # The sign first: products shared by q and k would stay in registers while q is rotated.
        exponent = far * (SIGN * TILE.decay_sign) * rate[None, :]
        scale = scale * (tl.exp(exponent) if TILE.wide else exp(exponent))
    scale = scale.to(cos.dtype)
    return cos * scale, sin * (-scale if TILE.conjugate else scale)


# -------------------------------------------------------------------------------------------------
# Heads


@triton.jit
def head_rows(x, tokens, head, TILE: tl.constexpr):
    """Return (TOKENS,) pointers to dim 0 of a head."""
    return rows(x[0], tokens[0], tokens[1], head, x[1], x[2], x[3], TILE)


@triton.jit
def load_head(at, valid, TILE: tl.constexpr):
    """Load both dims of the pairs, (TOKENS, PAIRS), and the rest, (TOKENS, REST); widen them."""
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    a, b, rest = load_parts(at, valid, TILE)
    return a.to(WIDE), b.to(WIDE), rest.to(WIDE)


@triton.jit
def rotate_head(x, out, tokens, head, cos, sin, TILE: tl.constexpr):
    """Rotate a head of x into out; return both dims of the pairs, not yet rounded."""
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    a, b, rest = load_parts(head_rows(x, tokens, head, TILE), tokens[2], TILE)
    a, b = a.to(WIDE), b.to(WIDE)
    a, b = a * cos - b * sin, b * cos + a * sin
    store_parts(head_rows(out, tokens, head, TILE), (a, b, rest), tokens[2], TILE)
    return a, b


# -------------------------------------------------------------------------------------------------
# The launch


class Launch(NamedTuple):
    """A launch, worked out once per layout of a call's tensors."""

    grid: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]  # of the tensors of heads, in the kernels' form
    numbers: tuple[int | float, ...]  # the last arguments that are not constexpr
    options: dict[str, Any]  # constexprs, and Triton's own options


def launch(kernel: Any, prepared: Launch, tensors: Sequence[Tensor | None], *others: Any) -> None:
    """Launch on the tensors' GPU; tensors: those of heads, as given to `settle`."""
    heads = tuple([x if x is None else (x, *n) for x, n in zip(tensors, prepared.strides)])
    some = tensors[1] if tensors[0] is None else tensors[0]
    if not some.is_cuda or some.get_device() == torch.cuda.current_device():
        kernel[prepared.grid](heads, *others, *prepared.numbers, **prepared.options)
    else:
        with torch.cuda.device_of(some):
            kernel[prepared.grid](heads, *others, *prepared.numbers, **prepared.options)


def settle(
    tensors: Sequence[Tensor | None],
    by: dict[str, Any],
    numbers: tuple[int | float, ...],
    *,
    one_program: bool = False,
    may_be_few: bool = True,
    width: int = 0,
    copies_rest: bool = True,
    **options: Any,
) -> Launch | None:
    """Work out the launch on q, k and other (batch, seqlen, heads, head_dim) tensors or None.

    Tiles and grids take few different values, so little is compiled. Returns None if there is
    nothing to do.

    by, numbers: as from `launch_constants`; numbers follow count and seqlen.
    one_program: a program takes all heads.
    may_be_few: a program may take few tokens.
    width: pairs that registers hold, if not half.
    options: as in Launch.
    """
    q, k, *_ = tensors
    x, heads_q, heads_k = k if q is None else q, *(0 if x is None else x.shape[2] for x in (q, k))
    batch, seqlen, _, head_dim = x.shape
    count, spread = batch * seqlen, 1 if one_program else max(heads_q, heads_k)
    chip_of(x)  # raises if something is missing
    if count * max(heads_q, heads_k) == 0:
        return None
    pairs, rest = next_power_of_2(by["half"]), head_dim - 2 * by["half"] if copies_rest else 0
    if count < FEW_TOKENS and may_be_few:
        tokens, warps = max(1, 64 // pairs), 1
    else:  # 128 threads, each with one vector of first dims and one of second dims
        tokens, warps = max(1, 128 * VECTOR_BYTES // x.itemsize // (width or pairs)), 4
    tiles = triton.cdiv(count, tokens)
    strides = [() if x is None else strides_of(x)[:3] for x in tensors]
    of_tokens = [each[1] for each in strides if each]
    align = alignment(x.itemsize, itertools.chain(*strides), of_tokens)
    sizes = (tokens, pairs, rest, next_power_of_2(max(rest, 1)), align, heads_q, heads_k)
    options["TILE"] = Tile(*sizes, wide=x.dtype == torch.float64, **by)
    return Launch(
        (tiles, min(spread, max(1, TARGET_WARPS // (warps * tiles)))),
        tuple(tuple(n // align for n in each) for each in strides),
        (count, seqlen, *numbers),
        {**options, "num_warps": warps, "enable_fp_fusion": True},
    )


def launch_constants(rotation: Rotation) -> tuple[dict[str, Any], tuple[int | float, ...]]:
    """Return `by` and `numbers` for `settle`."""
    positions, axes = rotation.positions, rotation.axes
    strides = (0, 0, 0) if positions is None else strides_of(positions)
    if axes is None:  # no stride of axes; offsets have only a stride of sequences
        strides = (0, *strides, 0)[:3]
    sequences = 0 if rotation.cu_seqlens is None else rotation.cu_seqlens.shape[0] - 1
    freq_sequence, freq_head, _ = strides_of(rotation.inv_freq)
    by = {
        "half": rotation.inv_freq.shape[-1],
        "interleaved": rotation.interleaved,
        "conjugate": rotation.conjugate,
        "freq_sequence": freq_sequence,
        "freq_head": freq_head,
        "per_head": rotation.per_head,
        "num_axes": 0 if axes is None else positions.shape[0],
        "positions_are_offsets": rotation.positions_are_offsets,
        "decay_sign": 1.0 if rotation.log_decay is None else rotation.decay_signs[0],
    }
    found = (*strides, sequences, sequences.bit_length())
    return by, (*found, rotation.decay_origin, rotation.amplitude)


def as_inputs(tensors: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """View two tensors in the shapes of their (batch, seqlen, heads, head_dim) inputs."""
    like = (*inputs, None)
    return [x if x is None else x.view(y.shape) for x, y in zip(tensors, like)]


def empty_outputs(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Allocate outputs like q and k."""
    return torch.empty_like(q), None if k is None else torch.empty_like(k)
