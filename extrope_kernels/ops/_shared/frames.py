"""The rotations of queries and keys into the frame of a region, as operations of their own."""

from __future__ import annotations

from torch import Tensor

from ...scores import UNROTATED, PositionMap
from .attention_call import AttentionCall
from .library import ops


def rotate_queries(x: Tensor, i: Tensor, call: AttentionCall, adjoint: bool = False) -> Tensor:
    """Rotate to positions i. The attention factor of both sides goes onto the queries, so that keys
    which come rotated can stay as they are.
    """
    return _rotate(x, i, call, call.log_decay, call.attention_factor**2, adjoint)


def rotate_keys(
    x: Tensor, k_map: PositionMap, j: Tensor, call: AttentionCall, adjoint: bool = False
) -> Tensor:
    """Rotate from where the keys come, call.stored, to k_map(j)."""
    if k_map == call.stored:
        return x
    decay = None if call.log_decay is None else -call.log_decay
    return _rotate(x, k_map(j) - call.stored(j), call, decay, 1.0, adjoint)


def store_keys(x: Tensor, j: Tensor, call: AttentionCall) -> Tensor:
    """Rotate raw keys to where a cache keeps them, call.stored(j)."""
    if call.stored == UNROTATED:
        return x
    decay = None if call.log_decay is None else -call.log_decay
    return _rotate(x, call.stored(j), call, decay, 1.0, adjoint=False)


def _rotate(x, position, call, log_decay, amplitude, adjoint) -> Tensor:
    rope_args = (call.inv_freq, position, call.cu_seqlens, log_decay)
    options = {"attention_factor": amplitude, "interleaved": call.interleaved}
    if adjoint:
        return ops.rope_bwd(x, None, None, None, *rope_args, **options)[0]
    return ops.rope_fwd(x, None, *rope_args, **options)[0]
