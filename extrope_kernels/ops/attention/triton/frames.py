"""Plans of the rotation: from raw q and k into the frames of regions, and gradients back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
from torch import Tensor

from ....scores import PositionMap, Region
from ..._shared.triton.launch import VECTOR_BYTES, Plan, alignment, strides_of
from ..._shared.triton.position_maps import kind_of, map_arguments, side_arguments
from ..call import AttentionCall
from .rotate import RotateTile, rotate_kernel

THREADS = 128  # each with 16 bytes of first dims, and of second dims
# Positions that q_start and k_start give: how far a query may see, and blocks may reach, so that
# int32 never overflows.
FARTHEST = 2**29
# Heads are spread over programs until about this many run; more would only repeat the sincos.
PROGRAMS = 1024


def row_strides(x: Tensor, align: int) -> tuple[int, ...]:
    """By batch, seq and head, in groups of `align` elements."""
    return tuple(n // align for n in (*(0,) * (4 - x.dim()), *strides_of(x)[:-1]))


def frame_strides(x: Tensor, align: int) -> tuple[int, ...]:
    """Of contiguous frames of x: from one to the next, then as row_strides."""
    seq, heads, dim = x.shape[-3:]
    return tuple(n // align for n in (x.numel(), seq * heads * dim, heads * dim, dim))


def alignment_of(*tensors: Tensor) -> int:
    """Elements, up to 16 bytes, that divide the strides of these and of frames of such rows."""
    strides = (n for x in tensors for n in (*strides_of(x)[:-1], x.shape[-1]))
    of_tokens = (n for x in tensors for n in (strides_of(x)[-3], x.shape[-2] * x.shape[-1]))
    return alignment(tensors[0].itemsize, strides, of_tokens)


def placed(call: AttentionCall) -> bool:
    """Are positions of their own given, which only the device knows?"""
    return call.q_start is not None or call.k_start is not None


def regions_of(k: Tensor, call: AttentionCall) -> list[Region]:
    """Those that may hold keys."""
    return call.trimmed(FARTHEST if placed(call) else k.shape[-3])


def unseen_keys(q: Tensor, k: Tensor, call: AttentionCall) -> int:
    """How many of the first keys lie before every query's sliding window, where that is known."""
    if call.sliding_window is None or call.cu_seqlens is not None or placed(call):
        return 0
    return min(max(0, k.shape[-3] - q.shape[-3] + 1 - call.sliding_window), k.shape[-3])


def start_strides(call: AttentionCall) -> tuple[int, int] | None:
    """From one sequence's start to the next, of queries and of keys."""
    if not placed(call):
        return None
    return tuple(0 if x is None or len(x) == 1 else 1 for x in (call.q_start, call.k_start))


def query_scale_stride(call: AttentionCall) -> int | None:
    """From one sequence to the next; the tensor is contiguous."""
    scale = call.query_scale
    if scale is None:
        return None
    return scale.shape[1] if scale.dim() == 2 else 0


def frequency_stride(call: AttentionCall) -> int:
    return strides_of(call.inv_freq)[0] if call.inv_freq.dim() == 2 else 0


def per_log_n(call: AttentionCall) -> float | None:
    return None if call.log_n is None else 1 / math.log(call.log_n)


def key_maps(k: Tensor, call: AttentionCall) -> list[PositionMap]:
    """The maps that keys have to be rotated to: not the one they come in, and each once."""
    maps = [region.k_map for region in regions_of(k, call)]
    return list(dict.fromkeys(x for x in maps if x != call.stored))


def rotation(
    q: Tensor,
    k: Tensor,
    q_maps: Sequence[PositionMap],
    k_maps: Sequence[PositionMap],
    call: AttentionCall,
    inverse: bool = False,
    unseen: int = 0,
) -> Plan | None:
    """Takes q, k and their frames, contiguous, one for each map; None where there is nothing to do.

    inverse: takes contiguous gradients of q and k, to be written, and those of frames, in float32.
    unseen: so many of the first keys need not be written.
    """
    tile = _tile(q, k, q_maps, k_maps, call)
    seqlen_q, heads_q, _ = q.shape[-3:]
    seqlen_k, heads_k, _ = k.shape[-3:]
    batch = k.shape[0] if call.cu_seqlens is None else 1
    q_tiles = triton.cdiv(seqlen_q, tile.tokens) if q_maps else 0
    left_out = unseen // tile.tokens
    tiles = q_tiles + (triton.cdiv(seqlen_k, tile.tokens) - left_out if k_maps else 0)
    heads = max(heads_q if q_maps else 0, heads_k if k_maps else 0)
    if tiles * batch * heads == 0:
        return None
    sequences = 0 if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    frames_of_q, frames_of_k = (frame_strides(x, tile.align) for x in (q, k))
    return Plan(
        rotate_kernel,
        (tiles * batch, max(1, min(heads, PROGRAMS // (tiles * batch)))),
        q,
        q_strides=frames_of_q[1:] if inverse else row_strides(q, tile.align),
        k_strides=frames_of_k[1:] if inverse else row_strides(k, tile.align),
        q_frame_strides=frames_of_q,
        k_frame_strides=frames_of_k,
        freq_stride=frequency_stride(call),
        query_scale_stride=query_scale_stride(call) if q_maps else None,
        start_strides=start_strides(call),
        num_sequences=sequences,
        search_steps=sequences.bit_length(),
        q_tiles=q_tiles,
        first_k_tile=left_out or None,
        tiles=tiles,
        heads_q=heads_q,
        heads_k=heads_k,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        amplitude=call.attention_factor**2,
        per_log_n=per_log_n(call),
        **side_arguments("q", q_maps),
        **side_arguments("k", k_maps),
        **map_arguments("stored", call.stored),
        INVERSE=inverse,
        TILE=tile,
        num_warps=THREADS // 32,
    )


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
        half=half,
        pairs=pairs,
        rest=rest,
        rest_dims=triton.next_power_of_2(max(rest, 1)),
        align=alignment_of(q, k),
        interleaved=call.interleaved,
        freq_per_token=call.cu_seqlens is not None and call.inv_freq.shape[:-1].numel() > 1,
        q_maps=tuple(map(kind_of, q_maps)),
        k_maps=tuple(map(kind_of, k_maps)),
        stored=kind_of(call.stored),
    )
