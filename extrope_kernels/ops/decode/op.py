"""The op of attention over a cache: schema, fake, and the backend for each device.

`decode` runs csrc/cpu/decode on a CPU and Triton on a GPU. Ops with a suffix run that backend only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._math.dtypes import accumulator
from .._tables import specs
from .._torch.autograd import note_writes, refuse_backward
from .._torch.library import define, library, ops
from ..attention.call import (
    CALL,
    OPTIONS,
    TENSORS,
    AttentionCall,
    Q,
    check_dims,
    check_options,
    check_values_of_pairs,
    lse_shape,
    read_call,
)
from ..attention.op import MODULES, Step, by_reference, call_op
from ..cache.call import KVCache, check_cache, check_new, check_slots, refuse_aliases
from . import reference

# cu_seqlens_q is the call's cu_seqlens; the cache decides q_start and k_start. k and v, if given,
# are written into the cache first.
_OF_CALL = [x.argument for x in TENSORS if x.name not in ("q_start", "k_start")]
_NUM_OF_CALL = len(_OF_CALL)
_SCHEMA = (
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
    f"{', '.join(_OF_CALL).replace('cu_seqlens', 'cu_seqlens_q')}, "
    "Tensor cache_seqlens, Tensor? block_table, Tensor? cache_leftpad, Tensor? k_scale, "
    f"Tensor? v_scale, *, {', '.join(OPTIONS.values())}) -> (Tensor out, Tensor lse)"
)
_CALL = tuple(field.spec for field in CALL)
_QUERIES = (Q, _CALL[0]._replace(name="cu_seqlens_q"))


def decode(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: KVCache,
    call: AttentionCall,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Write k and v into a cache, then attend over it; return out and lse.

    Refuses wrong calls before anything is written.
    """
    if by_reference(q, backend):
        check_decode("decode", q, k, v, cache, call)
        _check_call((q, k, v, cache), call, False, True)
        return reference.decode(q, k, v, cache, call)
    args = (q, cache.k, cache.v, k, v, *call.tensors[:_NUM_OF_CALL], *cache.tensors)
    found = call_op("decode", backend, args, call.options)
    if k is not None and not torch.compiler.is_compiling():
        note_writes(cache.k, cache.v)
    return found


def _read(given):
    """Return q, k, v and the cache, and the call's tensors, of the op's arguments."""
    q, k_cache, v_cache, k, v, *others = given
    of_call, of_cache = others[:_NUM_OF_CALL], others[_NUM_OF_CALL:]
    cache = KVCache.of(k_cache, v_cache, *of_cache, new=k, cu_seqlens=of_call[1])
    return (q, k, v, cache), of_call


def check_decode(
    op: str, q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> None:
    """Check a call with a cache; k and v are written into it first."""
    if (k is None) != (v is None):
        given = "v" if k is None else "k"
        raise ValueError(f"{op}: k and v must be given together, got {given} alone")
    packed, like, sizes = call.cu_seqlens is not None, ("q", q), {}
    table = specs.for_rows(_QUERIES, packed, "cu_seqlens_q")
    specs.check(op, table, (q, call.cu_seqlens), sizes)
    check_cache(op, cache, sizes, like, packed)
    heads_q, heads_k = sizes["heads_q"][0], sizes["heads_k"][0]
    if heads_k == 0 or heads_q % heads_k:
        raise ValueError(f"{op}: k_cache's heads must divide q's {heads_q} heads, got {heads_k}")
    if k is not None:
        new = sizes if packed else sizes | {"seqlen": sizes["seqlen_q"]}
        check_new(op, k, v, cache, new, like, packed)
    tensors = [getattr(call, field.name) for field in CALL]
    found = specs.check(op, specs.for_rows(_CALL, packed), tensors, sizes, like)
    check_options(op, call, found["pairs"], found["head_dim"])
    _check_decay(op, cache, call)


def _check_decay(op: str, cache: KVCache, call: AttentionCall) -> None:
    """Refuse XPOS if a region that this cache can have sees keys by another map than the stored.

    Keys are rotated on as they are read, but keep the amplitudes with which they were written.
    """
    others = [x.k_map for x in call.regions if x.k_map != call.stored]
    if call.log_decay is None or not others:
        return  # before a graph would be bound to a capacity
    if any(region.k_map in others for region in call.trimmed(cache.capacity)):
        raise ValueError(
            f"{op}: log_decay (XPOS) needs keys that are stored as every region sees them, by "
            f"{call.stored}, got {others[0]}"
        )


def _check(args, call, fused):
    check_decode("decode", *args, call)
    if fused:
        check_dims("decode", call, args[0], args[-1].v)


def _check_call(args, call, fused, has_values):
    q, k, v, cache = args
    if k is not None:
        # The reference reads rows before it writes; Triton's first launch writes before the second
        # reads q, and no launch knows which slots another program has written.
        refuse_aliases("decode", cache, **({"q": q, "k": k, "v": v} if fused else {}))
    if has_values:
        check_slots("decode", cache, call.cu_seqlens, len(q))
        check_values_of_pairs("decode", call)


def _fake(*given, **options):
    (q, k, v, cache), of_call = _read(given)
    if k is not None and cache.k is cache.v:  # the kernel tells of other views of one cache
        raise ValueError("decode: k_cache and v_cache must be two tensors to be written to")
    check_decode("decode", q, k, v, cache, read_call(of_call, options))
    lse = q.new_empty(lse_shape(q), dtype=accumulator(q.dtype))
    return q.new_empty((*q.shape[:-1], cache.v.shape[-1])), lse


def _written(given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the caches if decode appends to them, else nothing."""
    _, k_cache, v_cache, k, *_ = given
    return () if k is None else (k_cache, v_cache)


_DECODE = Step("decode", _read, _check, _check_call)
KERNELS = {name: MODULES[name].kernel(__package__, _DECODE) for name in ("reference", "triton")}


def _define() -> None:
    refused = "decode: is for inference and has no gradient"
    for suffix in define("decode", _SCHEMA, _fake, KERNELS):
        refuse_backward(library, getattr(ops, f"decode{suffix}").default, refused, _written)


_define()
