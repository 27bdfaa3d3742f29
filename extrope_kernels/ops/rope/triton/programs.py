"""How many programs a rotation is, on what each works, and what tells them where tokens are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import triton
from torch import Tensor

from ..._shared.triton.launch import VECTOR_BYTES, alignment, strides_of
from ..rotation import Rotation

# Below this many tokens a program takes as few as it can: latency counts, not bandwidth.
FEW_TOKENS = 512
# Heads are spread over programs until about this many warps run: 32 bytes per thread then keep
# 30 KB of loads in flight on each multiprocessor of an H100. More would only repeat the sincos.
TARGET_WARPS = 4096


class Programs(NamedTuple):
    """Of one launch."""

    tokens: int  # per program
    warps: int
    tiles: int  # of tokens
    shares: int  # of heads


def programs_of(
    x: Tensor, pairs: int, heads: int, *, may_be_few: bool = True, width: int | None = None
) -> Programs:
    """Few different ones, so that little is compiled.

    x: (batch, seqlen, heads, head_dim); pairs: of a head, a power of two; heads: to be spread over
    programs; width: pairs for which there are registers, pairs by default.
    """
    count = x.shape[0] * x.shape[1]
    if count < FEW_TOKENS and may_be_few:
        tokens, warps = max(1, 64 // pairs), 1
    else:  # 128 threads, each with one vector of first dims and one of second dims
        tokens, warps = max(1, 128 * VECTOR_BYTES // x.itemsize // (width or pairs)), 4
    tiles = triton.cdiv(count, tokens)
    return Programs(tokens, warps, tiles, min(heads, max(1, TARGET_WARPS // (warps * tiles))))


def alignment_of(tensors: Iterable[Tensor]) -> int:
    """Elements of a vector at most, by which all strides of (batch, seqlen, heads, head_dim) can
    be divided.
    """
    tensors = tuple(tensors)
    strides = [strides_of(x) for x in tensors]
    several = (n for each in strides for n in each[:3])
    return alignment(tensors[0].itemsize, several, (each[1] for each in strides))


def rotation_arguments(rotation: Rotation) -> dict[str, int | float]:
    """What every rotating kernel is told of a rotation, by its parameters."""
    positions, cu_seqlens = rotation.positions, rotation.cu_seqlens
    position_strides = (0, 0, 0) if positions is None else strides_of(positions)
    if rotation.axes is None:
        position_strides = (0, *position_strides, 0)[:3]
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    freq_sequence, freq_head = strides_of(rotation.inv_freq)[:2]
    return {
        "freq_sequence": freq_sequence,
        "freq_head": freq_head,
        "position_axis": position_strides[0],
        "position_batch": position_strides[1],
        "position_seq": position_strides[2],
        "num_axes": 0 if rotation.axes is None else positions.shape[0],
        "num_sequences": sequences,
        "search_steps": sequences.bit_length(),
        "decay_origin": rotation.decay_origin,
        "amplitude": rotation.amplitude,
    }
