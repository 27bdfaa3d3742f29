"""The fused step in plain PyTorch: norm, rotation and an indexed write, each by itself."""

from __future__ import annotations

from torch import Tensor

from ....scores import UNROTATED
from ..._shared.fp8 import quantize
from ..norm import rms_norm, rope_norm_fwd
from .arguments import Append
from .checks import check, check_values


def rope_append(*tensors: Tensor | None, **options) -> Tensor:
    """Same arguments and results as `torch.ops.extrope.rope_append`."""
    call = Append(*tensors, **options)
    check("rope_append", call)
    check_values("rope_append", call)
    q, k = _rotated(call)
    written, block, slot = call.rows()
    at = block[written], slot[written]
    shape = (call.batch, call.seqlen)
    for cache, x, scale in zip((call.k_cache, call.v_cache), (k, call.v), call.scales):
        rows = x.reshape(*shape, *x.shape[-2:])[written]
        cache.index_put_(at, rows if scale is None else quantize(rows, scale))
    return call.k.new_empty(0) if q is None else q


def _rotated(call: Append) -> tuple[Tensor | None, Tensor]:
    if call.rotates_q:
        return _rotate(call, call.q, call.token_positions())
    q = None if call.q is None else _norm(call.q, call.q_norm_weight, call)
    if call.map is None or call.map == UNROTATED:
        return q, _norm(call.k, call.k_norm_weight, call)
    return q, _rotate(call, None, call.map(call.token_positions()))[1]


def _norm(x: Tensor, weight: Tensor | None, call: Append) -> Tensor:
    return rms_norm(x, weight, call.norm_eps).to(x.dtype) if weight is not None else x.clone()


def _rotate(call: Append, q: Tensor | None, positions: Tensor) -> tuple[Tensor | None, Tensor]:
    """q, if it is to be rotated, and k."""
    options = {
        "norm_eps": call.norm_eps,
        "attention_factor": call.attention_factor,
        "interleaved": call.interleaved,
        "decay_origin": call.decay_origin,
    }
    decay, tensors = call.log_decay, (q, call.k, call.q_norm_weight, call.k_norm_weight)
    if q is None:  # k in its place, which decays the other way
        tensors = (call.k, None, call.k_norm_weight, None)
        decay = None if decay is None else -decay
    rope_args = (call.inv_freq, positions, call.cu_seqlens, decay, call.axes)
    by_slots = call.packed and call.cu_seqlens is None
    if by_slots:
        tensors = (*(x if x is None else x[None] for x in tensors[:2]), *tensors[2:])
    found = rope_norm_fwd(*tensors, *rope_args, **options)
    found = tuple(x[0] for x in found if x.dim() == 4) if by_slots else found
    return (None, found[0]) if q is None else found
