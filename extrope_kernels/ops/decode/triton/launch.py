"""From PyTorch tensors to launches of the kernels over a key/value cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..._shared.attention_call import AttentionCall
from ..._shared.triton.launch import INTERPRETED, chip_of, layouts_of, planned
from ..arguments import KVCache
from .plans import launches_of_append, launches_of_decode

Options = dict[str, Any]
PLANNED = not INTERPRETED  # that takes long anyhow, and its callers look at values


def run(make: Callable[..., Any], tensors: tuple[Tensor | None, ...], options: Options) -> Any:
    """An op's arguments through make(tensors, options), its launches: made once for a layout."""
    numbers = [tuple(n) if type(n) is list else n for n in options.values()]
    key = (chip_of(tensors[0]), *options, *numbers, layouts_of(*tensors))
    return planned(make, key, tensors, options)(*tensors)


def decode(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as in `reference`; float32, bfloat16 and float16."""
    launches = launches_of_decode(q, k, v, cache, call)
    of_queries = (call.sinks, call.query_scale, call.cu_seqlens)
    others = (*_others(cache, call), *of_queries, *cache.scales)
    return launches(q, cache.k, cache.v, k, v, *others)


def append(k: Tensor, v: Tensor, cache: KVCache, call: AttentionCall) -> None:
    """Same arguments as in `reference`; what does not fit the cache is not written."""
    launch = launches_of_append(k, v, cache, call)
    launch(cache.k, cache.v, k, v, *_others(cache, call), *cache.scales)


def _others(cache: KVCache, call: AttentionCall) -> tuple[Tensor | None, ...]:
    """The tensors of an op that follow k and v."""
    where = (cache.seqlens, cache.block_table, cache.leftpad)
    return (call.inv_freq, *where, call.log_decay)
