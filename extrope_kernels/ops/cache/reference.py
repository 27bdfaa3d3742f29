"""The append to a key/value cache in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._math.dtypes import quantize
from ..rope.reference import rope_fwd
from .call import Append, check, check_values, read_append, refuse_aliases


def rope_append(*tensors: Tensor | None, **options) -> Tensor:
    """Compute `torch.ops.extrope.rope_append`."""
    call = read_append(*tensors, **options)
    check("rope_append", call)
    check_values("rope_append", call)
    refuse_aliases("rope_append", call.cache)
    q, k = _rotated(call)
    written, block, slot = call.rows()
    cache = call.cache
    written = written & (block >= 0) & (block < cache.k.shape[0])  # a GPU's are not checked
    at = block[written], slot[written]
    # Indexing copies: a view of a slot that is written is read before.
    rows = [x.reshape(call.batch, call.seqlen, *x.shape[-2:])[written] for x in (k, call.v)]
    for to, x, scale in zip((cache.k, cache.v), rows, cache.scales):
        to.index_put_(at, x if scale is None else quantize(x, scale))
    return call.k.new_empty(0) if q is None else q


def _rotated(call: Append) -> tuple[Tensor | None, Tensor]:
    """Rotate k, and q if it is given."""
    q, k, rope = call.q, call.k, call.rope
    if rope.inv_freq is None:
        return None, k
    positions = call.token_positions()
    if call.stored is not None:
        # Here a position is mapped once, in float64, and may be a fraction. Attention maps whole
        # ones in its loops, in integers: they are exact and, on a GPU, faster than float64.
        # test_attention_maps_positions_as_append_does holds both to the same keys.
        positions = call.stored(positions)
    cu_seqlens = rope.cu_seqlens
    if cu_seqlens is not None:  # padding is rotated like the last sequence
        cu_seqlens = torch.cat((cu_seqlens[:-1], cu_seqlens.new_tensor([call.seqlen])))
    # Without q, k takes its place, and decays the other way.
    decay = rope.log_decay if q is not None or rope.log_decay is None else -rope.log_decay
    tensors = (k, None) if q is None else (q, k)
    by_slots = call.packed and cu_seqlens is None
    if by_slots:
        tensors = tuple(x if x is None else x[None] for x in tensors)
    found = rope_fwd(*tensors, rope.inv_freq, positions, cu_seqlens, decay, **call.options)
    found = tuple(x[0] for x in found if x.dim() == 4) if by_slots else found
    return (None, found[0]) if q is None else found
