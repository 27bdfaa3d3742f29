"""From PyTorch tensors to launches of the kernels over a key/value cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

from ....scores import UNROTATED
from ....scores.base import FIRST_KEY
from ..._shared.attention_call import AttentionCall, lse_shape
from ..._shared.fp8 import FP8
from ..._shared.triton.fp8 import kind_of_cache
from ..._shared.triton.launch import (
    INTERPRETED,
    VECTOR_BYTES,
    Plan,
    chip_of,
    layouts_of,
    planned,
    strides_of,
)
from ..._shared.triton.position_maps import kind_of, map_arguments
from ..arguments import KVCache
from .append import append_kernel
from .cache import CacheTile
from .configs import Config, config
from .grid import grid_of
from .kernels import decode_kernel
from .launches import AppendLaunches, DecodeLaunches

Options = dict[str, Any]
PLANNED = not INTERPRETED  # that takes long anyhow, and its callers look at values
LEAST_DIMS = 16  # of a product, and rows of one
MOST_REGIONS = 3
COUNTERS = 4  # at once, so that the partial results behind them stay aligned
MERGED = 4096  # numbers that a program merges at once: 16 to 32 registers a thread


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


def launches_of_decode(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> DecodeLaunches:
    """The launches of `decode`, for these layouts and options."""
    results = (*q.shape[:-1], cache.v.shape[3]), lse_shape(q)  # the shapes of out and lse
    if call.cu_seqlens is not None:  # as one sequence; whose tokens they are, the device knows
        q, k, v = (None if x is None else x[None] for x in (q, k, v))
    if q.numel() == 0:
        append_only = None if k is None else _append_plan(k, v, cache, call, 0)
        return DecodeLaunches(append_only, None, *results)
    _, seqlen_q, heads_q, head_dim = q.shape
    heads_k = cache.k.shape[2]
    group = heads_q // heads_k
    batch = cache.seqlens.shape[0]
    # Of packed queries a sequence has as many tokens, on average.
    usual = seqlen_q if call.cu_seqlens is None else triton.cdiv(seqlen_q, batch)
    chosen = _config(q, cache, group * usual)
    grid = grid_of(q, cache, call, chosen)
    tile = _decode_tile(q, cache, call, chosen, grid.splits)
    counters = triton.cdiv(q.shape[0] * heads_k * grid.counters, COUNTERS) * COUNTERS
    writes = cache.appended if call.cu_seqlens is None else int(k is not None)
    plan = Plan(
        decode_kernel,
        (grid.slots * grid.row_blocks, heads_k),
        q,
        *_planes(tile, q, cache.k, cache.v),
        *_sizes(cache, call),
        *(batch, grid.slots, grid.least_blocks, counters // COUNTERS),
        *(heads_q, seqlen_q, group, writes),
        *_starts(cache, call),
        *_scale_strides(call),
        call.scale(head_dim),
        float(call.attention_factor) ** 2,
        None if call.log_n is None else 1.0 / math.log(call.log_n),
        call.softcap * math.log2(math.e) if tile.softcap else None,
        *_map_numbers(call).values(),
        tile,
        num_warps=chosen.warps,
        # A page's number is loaded as long before its keys as these before their use.
        num_stages=2 * chosen.stages - 1 if tile.paged else chosen.stages,
        maxnreg=chosen.maxnreg,
    )
    before = None if k is None else _append_plan(k, v, cache, call, grid.counters * tile.splits)
    if not tile.splits:
        return DecodeLaunches(before, plan, *results)
    partials = grid.slots * heads_k * grid.rows * (tile.head_dim_v + 1)
    return DecodeLaunches(before, plan, *results, counters + partials, counters)


def launches_of_append(k: Tensor, v: Tensor, cache: KVCache, call: AttentionCall) -> AppendLaunches:
    """The launch of `append`."""
    return AppendLaunches(_append_plan(k, v, cache, call, 0))


def _append_plan(
    k: Tensor, v: Tensor, cache: KVCache, call: AttentionCall, counters: int
) -> Plan | None:
    """counters: how many become 0 for every sequence and head, of packed tokens for every head."""
    batch, new, heads_k, _ = k.shape
    if k.numel() == 0:
        return None
    block_n, sequences, search_steps = 1 if new == 1 else 16, None, None
    if call.cu_seqlens is not None:
        sequences = cache.seqlens.shape[0]
        search_steps = sequences.bit_length()
    own_freq = sequences is not None and call.inv_freq.dim() == 2
    fields = {"block_n": block_n, "splits": counters > 0, "freq_of_token": own_freq}
    tile = _tile(k, cache, call, (k, v), **fields)
    # A row is moved in two halves and the rest: 16 bytes of each a thread, where there are so many.
    vectors = block_n * tile.half * k.itemsize // VECTOR_BYTES
    numbers = map_arguments([], [], call.stored)
    return Plan(
        append_kernel,
        (triton.cdiv(new, block_n), heads_k, batch),
        k,
        *_planes(tile, k, v, cache.k, cache.v),
        *_sizes(cache, call),
        *(new, counters, sequences, search_steps, cache.k.shape[0]),
        *(number for name, number in numbers.items() if name.startswith("stored")),
        tile,
        num_warps=1 if new == 1 else 4 if vectors >= 128 else 2,
    )


def _config(q: Tensor, cache: KVCache, rows: int) -> Config:
    """rows: of queries that share a head of k."""
    head_dim = max(q.shape[3], cache.v.shape[3])
    suffix = "_fp8" if cache.k.dtype == FP8 else ""
    for kernel in ("one_token", "chunk"):
        chosen = config(kernel + suffix, head_dim, q.itemsize, chip_of(q))
        if rows <= chosen.block_m:
            break
    return chosen


def _tile(
    x: Tensor,
    cache: KVCache,
    call: AttentionCall,
    others: tuple[Tensor, ...],
    *,
    block_m: int = LEAST_DIMS,
    **fields,
) -> CacheTile:
    """others: the rows that the kernel reads, beside those of the cache."""
    head_dim, half = cache.k.shape[3], call.inv_freq.shape[-1]
    rest = head_dim - 2 * half
    strides = (n for x in (cache.k, cache.v, *others) for n in strides_of(x)[:3])
    return CacheTile(
        block_m=block_m,
        head_dim=head_dim,
        dims=_power_of_two(head_dim),
        head_dim_v=cache.v.shape[3],
        dims_v=_power_of_two(cache.v.shape[3]),
        half=half,
        pairs=_power_of_two(half),
        rest=rest,
        rest_dims=_power_of_two(rest) if rest else 1,
        align=math.gcd(VECTOR_BYTES // min(x.itemsize, cache.k.itemsize), *strides),
        interleaved=call.interleaved,
        stored=kind_of(call.stored),
        raw=kind_of(UNROTATED),
        paged=cache.block_table is not None,
        padded=cache.leftpad is not None,
        packed=call.cu_seqlens is not None,
        codes=kind_of_cache(cache.k.dtype == FP8, chip_of(x)),
        **fields,
    )


def _decode_tile(
    q: Tensor, cache: KVCache, call: AttentionCall, chosen: Config, splits: bool
) -> CacheTile:
    regions, group = call.regions, q.shape[2] // cache.k.shape[2]
    several = q.shape[1] > 1 or call.cu_seqlens is not None
    # The number of tokens compiles nothing anew, that of heads may.
    rows = chosen.block_m if several else min(chosen.block_m, triton.next_power_of_2(group))
    at_once = MERGED // (rows * _power_of_two(cache.v.shape[3]))
    return _tile(
        q,
        cache,
        call,
        (q,),
        block_m=chosen.block_m,
        block_n=chosen.block_n,
        q_maps=tuple(kind_of(region.q_map) for region in regions),
        k_maps=tuple(kind_of(region.k_map) for region in regions),
        rotates_keys=tuple(region.k_map != call.stored for region in regions),
        from_first_key=call.starts[0] == FIRST_KEY and call.sliding_window is None,
        several_tokens=several,
        splits=splits,
        merge_rows=rows if splits else 0,
        merge_splits=max(1, at_once) if splits else 0,
        sinks=call.sinks is not None,
        softcap=call.softcap != 0,
        sliding_window=call.sliding_window is not None,
        query_scale=call.query_scale is not None,
        widen=chip_of(q) is None,
    )


def _starts(cache: KVCache, call: AttentionCall) -> list[int | None]:
    """Of the regions, the granularity and the window; no larger than the cache: int32 never
    overflows.
    """
    most, window = max(cache.capacity, 1), call.sliding_window
    starts = [max(-most, min(start, most)) for start in call.starts]
    starts += [0] * (MOST_REGIONS - len(starts))
    return [*starts, min(call.granularity, most), None if window is None else min(window, most)]


def _scale_strides(call: AttentionCall) -> tuple[int, ...] | tuple[None, None]:
    """Of the sequences and the tokens of query_scale."""
    scale = call.query_scale
    if scale is None:
        return None, None
    return strides_of(scale) if scale.dim() == 2 else (0, *strides_of(scale))


def _map_numbers(call: AttentionCall) -> dict[str, float]:
    regions = call.regions
    return map_arguments([r.q_map for r in regions], [r.k_map for r in regions], call.stored)


def _others(cache: KVCache, call: AttentionCall) -> tuple[Tensor | None, ...]:
    """The tensors of an op that follow k and v."""
    where = (cache.seqlens, cache.block_table, cache.leftpad)
    return (call.inv_freq, *where, call.log_decay)


def _sizes(cache: KVCache, call: AttentionCall) -> tuple[int, int, int, int]:
    """The block table's stride, the slots of a page, those of a sequence; inv_freq's stride."""
    table, freq = cache.block_table, call.inv_freq
    per_sequence = strides_of(freq)[0] if freq.dim() == 2 else 0
    table_batch = 0 if table is None else table.stride(0)
    return table_batch, cache.k.shape[1], cache.capacity, per_sequence


def _planes(tile: CacheTile, *several: Tensor) -> list[int]:
    """The strides of the first three dimensions of each, as kernels count them."""
    return [n // tile.align for x in several for n in strides_of(x)[:3]]


def _power_of_two(n: int) -> int:
    return max(LEAST_DIMS, triton.next_power_of_2(n))
