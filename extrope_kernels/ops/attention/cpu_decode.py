"""Attention over a key/value cache with the compiled kernels for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared import backends as _backends
from .frames import Call
from .kvcache_arguments import KVCache
from .kvcache_reference import append

__all__ = ["append", "decode", "missing"]

# Registered by csrc/cpu/attention_decode.cpp.
_library = torch.library.Library("extrope", "FRAGMENT")
_library.define(
    "cpu_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor inv_freq, Tensor cache_seqlens, "
    "Tensor? block_table, Tensor? cache_leftpad, int appended, int window, float factor, "
    "bool grouped, float scale, float log_n, float amplitude, bool interleaved) "
    "-> (Tensor, Tensor)"
)


def missing() -> str | None:
    """None when the compiled kernels are loaded, else the reason."""
    return _backends.missing("cpu")


def decode(q: Tensor, cache: KVCache, call: Call) -> tuple[Tensor, Tensor]:
    """Same arguments and results as in `kvcache_reference`; float32, bfloat16 and float16."""
    return torch.ops.extrope.cpu_decode(
        q,
        cache.k,
        cache.v,
        call.inv_freq,
        cache.seqlens,
        cache.block_table,
        cache.leftpad,
        cache.appended,
        call.score.window,
        call.score.factor,
        call.score.grouped,
        call.softmax_scale or q.shape[-1] ** -0.5,
        call.log_n or 0.0,
        call.attention_factor**2,
        call.interleaved,
    )
