"""From raw q and k to the frames of every region, and from gradients of these back: one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ....scores import UNROTATED, PositionMap, Region
from ..._shared.attention_call import AttentionCall
from ..._shared.triton.launch import VECTOR_BYTES, strides_of
from ..._shared.triton.position_maps import kind_of, map_arguments
from .rotate import RotateTile, rotate_kernel
from .rows import Rows

THREADS = 128  # each with 16 bytes of first dims, and of second dims
# Heads are spread over programs until about this many run; more would only repeat the sincos.
PROGRAMS = 1024


def rotate(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[list[Tensor], list[Tensor]]:
    """q and k, in their dtype, as every region that holds a key sees them.

    Regions that rotate keys alike share one tensor, and keys that come rotated so are not copied.
    """
    regions = _regions(k, call)
    k_maps = list(dict.fromkeys(r.k_map for r in regions if r.k_map != call.stored))
    q_frames = empty((len(regions), *q.shape), q.dtype, q.device).unbind()
    k_frames = empty((len(k_maps), *k.shape), k.dtype, k.device).unbind()
    _launch(q, k, q_frames, k_frames, k_maps, call, inverse=False)
    by_map = {call.stored: k, **dict(zip(k_maps, k_frames))}
    return list(q_frames), [by_map[region.k_map] for region in regions]


def unrotate(
    dq: Sequence[Tensor], dk: Sequence[Tensor], q: Tensor, k: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """The gradients of raw q and k, in their dtypes, from those of the frames, in float32."""
    of_q, of_k = (empty(x.shape, x.dtype, x.device) for x in (q, k))
    _launch(of_q, of_k, dq, dk, [r.k_map for r in _regions(k, call)], call, inverse=True)
    return of_q, of_k


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def rows_of(x: Tensor, align: int) -> Rows:
    batch, seq, head = (*(0,) * (4 - x.dim()), *strides_of(x)[:-1])
    return Rows(x, batch // align, seq // align, head // align)


def _regions(k: Tensor, call: AttentionCall) -> list[Region]:
    return call.trimmed(k.shape[-3])


def _launch(
    q: Tensor,
    k: Tensor,
    q_frames: Sequence[Tensor],
    k_frames: Sequence[Tensor],
    k_maps: list[PositionMap],
    call: AttentionCall,
    inverse: bool,
) -> None:
    q_maps = [region.q_map for region in _regions(k, call)]
    tile = _tile(q, k, [*q_frames, *k_frames], q_maps, k_maps, call)
    seqlen_q, heads_q, _ = q.shape[-3:]
    seqlen_k, heads_k, _ = k.shape[-3:]
    batch = k.shape[0] if call.cu_seqlens is None else 1
    q_tiles = triton.cdiv(seqlen_q, tile.tokens)
    tiles = q_tiles + (triton.cdiv(seqlen_k, tile.tokens) if k_maps else 0)
    if tiles * batch * heads_q == 0:
        return
    shares = max(1, min(heads_q, PROGRAMS // (tiles * batch)))
    sequences = 0 if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    with torch.cuda.device_of(q):
        rotate_kernel[(tiles * batch, shares)](
            rows_of(q, tile.align),
            rows_of(k, tile.align),
            tuple(rows_of(x, tile.align) for x in q_frames),
            tuple(rows_of(x, tile.align) for x in k_frames or [k]),
            call.inv_freq,
            strides_of(call.inv_freq)[0] if call.inv_freq.dim() == 2 else 0,
            call.log_decay,
            call.cu_seqlens,
            sequences,
            sequences.bit_length(),
            q_tiles,
            tiles,
            heads_q,
            heads_k,
            seqlen_q,
            seqlen_k,
            call.attention_factor**2,
            None if call.log_n is None else 1 / math.log(call.log_n),
            **map_arguments(q_maps, k_maps, call.stored),
            INVERSE=inverse,
            TILE=tile,
            num_warps=THREADS // 32,
            enable_fp_fusion=True,
        )


def _tile(
    q: Tensor,
    k: Tensor,
    frames: Sequence[Tensor],
    q_maps: list[PositionMap],
    k_maps: list[PositionMap],
    call: AttentionCall,
) -> RotateTile:
    half = call.inv_freq.shape[-1]
    pairs, rest = triton.next_power_of_2(half), q.shape[-1] - 2 * half
    strides = [n for x in (q, k, *frames) for n in strides_of(x)[:-1]]
    return RotateTile(
        tokens=max(1, THREADS * VECTOR_BYTES // q.itemsize // pairs),
        half=half,
        pairs=pairs,
        rest=rest,
        rest_dims=triton.next_power_of_2(max(rest, 1)),
        align=math.gcd(VECTOR_BYTES // q.itemsize, *strides),
        interleaved=call.interleaved,
        freq_per_token=call.cu_seqlens is not None and call.inv_freq.shape[:-1].numel() > 1,
        q_maps=tuple(map(kind_of, q_maps)),
        k_maps=tuple(map(kind_of, k_maps)),
        stored=kind_of(call.stored),
        raw=kind_of(UNROTATED),
    )
