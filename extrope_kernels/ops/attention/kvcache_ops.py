"""The ops of attention over a key/value cache: schemas, fakes, and who runs them.

`rerope_attn_decode` and `rerope_attn_append` run what is best on the tensors' device,
`rerope_attn_decode_triton` and `rerope_attn_append_triton` the Triton kernels alone.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import cpu_decode, kvcache_reference
from .arguments import check_head_dim
from .autograd import refuse_backward
from .frames import Call
from .kvcache_arguments import NAME, KVCache, check, check_lengths, check_new
from .regions import ReRope

_PLACE = (
    "Tensor inv_freq, Tensor cache_seqlens, Tensor? block_table=None, Tensor? cache_leftpad=None, "
    "*, SymInt window, float? factor=None, bool grouped=False, bool interleaved=False"
)
_DECODE = (
    f"(Tensor q, Tensor k_cache, Tensor v_cache, {_PLACE}, float? softmax_scale=None, "
    "float? log_n=None, float attention_factor=1.0, SymInt appended=0) -> (Tensor out, Tensor lse)"
)
_APPEND = f"(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, {_PLACE}) -> ()"

_library = torch.library.Library("extrope", "FRAGMENT")


def parse(
    k_cache,
    v_cache,
    inv_freq,
    cache_seqlens,
    block_table=None,
    cache_leftpad=None,
    *,
    window,
    factor=None,
    grouped=False,
    appended=0,
    **options,
) -> tuple[KVCache, Call]:
    """The classes that implementations take, from an op's arguments."""
    score = ReRope(window, math.inf if factor is None else factor, grouped)
    cache = KVCache(k_cache, v_cache, cache_seqlens, block_table, cache_leftpad, appended)
    return cache, Call(score, inv_freq, keys_stored=True, **options)


def _decode_fake(q, k_cache, v_cache, *by, **options):
    check(q, *parse(k_cache, v_cache, *by, **options))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, seqlen_q, heads_q, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads_q, seqlen_q), dtype=wide)


def _append_fake(k_cache, v_cache, k, v, *by, **options):
    check_new(k, v, *parse(k_cache, v_cache, *by, **options))


def decode(implementation, q, k_cache, v_cache, *by, **options):
    """`rerope_attn_decode` by a named implementation."""
    cache, call = parse(k_cache, v_cache, *by, **options)
    check(q, cache, call)
    if q.device.type == "cpu":
        check_lengths(cache)
    return _pick(implementation, q).decode(q, cache, call)


def append(implementation, k_cache, v_cache, k, v, *by, **options):
    """`rerope_attn_append` by a named implementation."""
    cache, call = parse(k_cache, v_cache, *by, appended=k.shape[1], **options)
    check_new(k, v, cache, call)
    if k.device.type == "cpu":
        check_lengths(cache)
    _pick(implementation, k).append(cache, k, v, call)


def _pick(implementation: str, x: Tensor):
    """The module that runs: float64 and a CPU without the compiled library go to the oracle."""
    if implementation == "reference":
        return kvcache_reference
    if implementation == "cpu" and (x.dtype == torch.float64 or cpu_decode.missing()):
        return kvcache_reference
    check_head_dim(NAME, x)
    if implementation == "triton":
        from .triton import launch_decode

        return launch_decode
    return cpu_decode


def _define() -> None:
    by_suffix = {
        "": {"CPU": "cpu", "CUDA": "triton"},
        "_triton": {"CPU": "triton", "CUDA": "triton"},  # on a CPU: the interpreter
    }
    for suffix, implementations in by_suffix.items():
        for op, schema, fake, kernel in (
            (f"rerope_attn_decode{suffix}", _DECODE, _decode_fake, decode),
            (f"rerope_attn_append{suffix}", _APPEND, _append_fake, append),
        ):
            _library.define(op + schema, tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.register_fake(f"extrope::{op}", fake, lib=_library)
            for key, implementation in implementations.items():
                _library.impl(op, functools.partial(kernel, implementation), key)
        decode_op = getattr(torch.ops.extrope, f"rerope_attn_decode{suffix}").default
        refuse_backward(_library, decode_op, f"{NAME} is for inference and has no gradient")


_define()
