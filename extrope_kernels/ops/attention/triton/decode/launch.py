"""From PyTorch tensors to launches of the kernels over a key/value cache."""

from __future__ import annotations

from torch import Tensor

from ...._shared.triton.launch import chip_of, layouts_of, planned
from ...call import AttentionCall, KVCache
from .plans import launches_of_decode


def decode(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as in `reference`; float32, bfloat16 and float16.

    What does not fit the cache is not written.
    """
    of_queries = (call.log_decay, call.sinks, call.query_scale, call.cu_seqlens)
    others = (call.inv_freq, cache.seqlens, cache.block_table, cache.leftpad, *of_queries)
    tensors = (q, cache.k, cache.v, k, v, *others, *cache.scales)
    numbers = tuple(call.numbers)
    key = (chip_of(q), layouts_of(*tensors), numbers)
    return planned(launches_of_decode, key, q, k, v, cache, call)(*tensors)
