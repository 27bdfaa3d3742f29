"""The ops `decode` and `append`: schemas, fakes, and who runs them.

They know regions and position maps, never a score method. Both run what is best on the tensors'
device (csrc/cpu/decode on a CPU, Triton on a GPU), `decode_triton` and `append_triton` the Triton
kernels alone.
"""

from __future__ import annotations

import functools

import torch

from .._shared.attention_call import SCHEMA, lse_shape
from .._shared.attention_checks import check_head_dim
from .._shared.autograd import refuse_backward, refuse_recording
from .._shared.dtypes import accumulator
from .._shared.library import library, load_on_first_use, ops
from . import reference
from .arguments import parse, parse_append
from .checks import check_append, check_decode, check_values

_CACHE = (
    "Tensor inv_freq, Tensor cache_seqlens, Tensor? block_table=None, "
    "Tensor? cache_leftpad=None, Tensor? log_decay=None"
)
_SCALES = "Tensor? k_scale=None, Tensor? v_scale=None"  # of a cache in float8_e4m3fn
# With k and v, these are written into the cache first.
_DECODE = (
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
    f"{_CACHE}, Tensor? sinks=None, Tensor? query_scale=None, Tensor? cu_seqlens_q=None, "
    f"{_SCALES}, *, {SCHEMA}) -> (Tensor out, Tensor lse)"
)
# stored: the map that keys are rotated by.
_APPEND = (
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
    f"{_CACHE}, {_SCALES}, *, float[] stored, bool interleaved=False) -> ()"
)


def _written(tensors):
    """Of those of `decode`: the caches, where tokens are appended."""
    return () if tensors[3] is None else tensors[1:3]


def _decode_fake(q, k_cache, v_cache, k, v, *rope_args, **options):
    check_decode("decode", q, k, v, *parse(q, k_cache, v_cache, k, v, *rope_args, **options))
    lse = q.new_empty(lse_shape(q), dtype=accumulator(q.dtype))
    return q.new_empty((*q.shape[:-1], v_cache.shape[-1])), lse


def _append_fake(k_cache, v_cache, k, v, *rope_args, **options):
    check_append("append", k, v, *parse_append(k_cache, v_cache, k, v, *rope_args, **options))


def _decode(implementation, *tensors, **options):
    if implementation == "triton" and _triton().PLANNED:
        return _triton().run(_decode_launches, tensors, options)
    parts = _checked_decode(implementation, tensors, options)
    check_values("decode", parts[3], parts[4].cu_seqlens, len(parts[0]))
    return _module(implementation).decode(*parts)


def _decode_launches(tensors, options):
    return _triton().launches_of_decode(*_checked_decode("triton", tensors, options))


def _checked_decode(implementation, tensors, options):
    cache, call = parse(*tensors, **options)
    q, k, v = tensors[0], tensors[3], tensors[4]
    check_decode("decode", q, k, v, cache, call)
    if implementation == "triton":
        check_head_dim("decode", q)
        check_head_dim("decode", cache.v)
    return q, k, v, cache, call


def _append(implementation, *tensors, **options):
    if implementation == "triton" and _triton().PLANNED:
        return _triton().run(_append_launches, tensors, options)
    parts = _checked_append(implementation, tensors, options)
    check_values("append", parts[2])
    return _module(implementation).append(*parts)


def _append_launches(tensors, options):
    return _triton().launches_of_append(*_checked_append("triton", tensors, options))


def _checked_append(implementation, tensors, options):
    cache, call = parse_append(*tensors, **options)
    k, v = tensors[2:4]
    check_append("append", k, v, cache, call)
    if implementation == "triton":
        check_head_dim("append", k)
        check_head_dim("append", v)
    return k, v, cache, call


def _module(implementation: str):
    """What computes."""
    return reference if implementation == "reference" else _triton()


@functools.cache
def _triton():
    """Imported when first needed: Triton may not be installed."""
    from .triton import launch

    return launch


def _define() -> None:
    kernels = {
        "decode": (_DECODE, _decode_fake, _decode),
        "append": (_APPEND, _append_fake, _append),
    }
    for suffix, keys in {"": (), "_triton": ("CPU", "CUDA")}.items():
        for op, (schema, fake, kernel) in kernels.items():
            library.define(op + suffix + schema, tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.register_fake(f"{library.ns}::{op}{suffix}", fake, lib=library)
            for key in keys:  # on a CPU: the interpreter
                library.impl(op + suffix, functools.partial(kernel, "triton"), key)
        decode = getattr(ops, f"decode{suffix}").default
        refuse_backward(library, decode, "decode: is for inference and has no gradient", _written)
        append = getattr(ops, f"append{suffix}").default
        refuse_recording(library, append, "append: is for inference and has no gradient")
    for op, (_, _, kernel) in kernels.items():  # the CUDA library has none
        library.impl(op, functools.partial(kernel, "triton"), "CUDA")
    reference_of = {op: functools.partial(kernels[op][2], "reference") for op in kernels}
    load_on_first_use({"cpu": reference_of})


_define()
