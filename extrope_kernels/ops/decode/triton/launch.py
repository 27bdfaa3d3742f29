"""From PyTorch tensors to launches of the kernels over a key/value cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

from ....scores import UNROTATED
from ....scores.base import FIRST_KEY
from ..._shared.attention_call import AttentionCall
from ..._shared.triton.launch import (
    INTERPRETED,
    VECTOR_BYTES,
    Plan,
    chip_of,
    layouts_of,
    planned,
    processors_of,
    strides_of,
)
from ..._shared.triton.position_maps import kind_of, map_arguments
from ..arguments import KVCache
from .append import append_kernel
from .cache import CacheTile
from .configs import Config, config
from .kernels import decode_kernel
from .launches import AppendLaunches, DecodeLaunches

Options = dict[str, Any]
PLANNED = not INTERPRETED  # that takes long anyhow, and its callers look at values
LEAST_DIMS = 16  # of a product, and rows of one
LEAST_KEYS = 256  # of a split, or its start and merge show
MOST_SPLITS = 128  # of a sequence: one program merges them
MOST_REGIONS = 3
# Programs for each multiprocessor: enough loads in flight, and an even last wave.
WAVES = 2
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
    return launches(q, cache.k, cache.v, k, v, *_others(cache, call))


def append(k: Tensor, v: Tensor, cache: KVCache, call: AttentionCall) -> None:
    """Same arguments as in `reference`; what does not fit the cache is not written."""
    launches_of_append(k, v, cache, call)(cache.k, cache.v, k, v, *_others(cache, call))


def launches_of_decode(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> DecodeLaunches:
    """The launches of `decode`, for these layouts and options."""
    batch, seqlen_q, heads_q, head_dim = q.shape
    lse = (batch, heads_q, seqlen_q)
    if q.numel() == 0:
        append_only = None if k is None else _append_plan(k, v, cache, call, 0)
        return DecodeLaunches(append_only, None, lse)
    heads_k = cache.k.shape[2]
    rows = heads_q // heads_k * seqlen_q
    chosen = _config(q, rows)
    row_blocks = triton.cdiv(rows, chosen.block_m)
    splits = cache.capacity // LEAST_KEYS  # that a sequence may be worth
    slots = batch + _more_slots(q, heads_k * row_blocks, batch * splits)
    tile = _decode_tile(q, cache, call, chosen, splits > 1)
    counters = triton.cdiv(batch * heads_k * row_blocks, COUNTERS) * COUNTERS
    plan = Plan(
        decode_kernel,
        (slots * row_blocks, heads_k),
        q,
        *_planes(tile, q, cache.k, cache.v),
        *_sizes(cache, call),
        *(batch, slots, triton.cdiv(LEAST_KEYS, tile.block_n), counters // COUNTERS),
        *(heads_q, seqlen_q, rows // seqlen_q, cache.appended),
        *_starts(cache, call),
        call.scale(head_dim),
        float(call.attention_factor) ** 2,
        None if call.log_n is None else 1.0 / math.log(call.log_n),
        *_map_numbers(call).values(),
        tile,
        num_warps=chosen.warps,
        # A page's number is loaded as long before its keys as these before their use.
        num_stages=2 * chosen.stages - 1 if tile.paged else chosen.stages,
        maxnreg=chosen.maxnreg,
    )
    before = None if k is None else _append_plan(k, v, cache, call, row_blocks * tile.splits)
    if not tile.splits:
        return DecodeLaunches(before, plan, lse)
    partials = slots * heads_k * rows * (head_dim + 1)
    return DecodeLaunches(before, plan, lse, counters + partials, counters)


def launches_of_append(k: Tensor, v: Tensor, cache: KVCache, call: AttentionCall) -> AppendLaunches:
    """The launch of `append`."""
    return AppendLaunches(_append_plan(k, v, cache, call, 0))


def _append_plan(
    k: Tensor, v: Tensor, cache: KVCache, call: AttentionCall, counters: int
) -> Plan | None:
    """counters: how many become 0 for every sequence and head."""
    batch, new, heads_k, _ = k.shape
    if k.numel() == 0:
        return None
    block_n = 1 if new == 1 else 16
    tile = _tile(k, cache, call, (k, v), block_n=block_n, splits=counters > 0)
    # A row is moved in two halves and the rest: 16 bytes of each a thread, where there are so many.
    vectors = block_n * tile.half * k.itemsize // VECTOR_BYTES
    numbers = map_arguments([], [], call.stored)
    return Plan(
        append_kernel,
        (triton.cdiv(new, block_n), heads_k, batch),
        k,
        *_planes(tile, k, v, cache.k, cache.v),
        *_sizes(cache, call),
        *(new, counters),
        *(number for name, number in numbers.items() if name.startswith("stored")),
        tile,
        num_warps=1 if new == 1 else 4 if vectors >= 128 else 2,
    )


def _config(q: Tensor, rows: int) -> Config:
    """rows: of queries that share a head of k."""
    for kernel in ("one_token", "chunk"):
        chosen = config(kernel, q.shape[3], q.itemsize, chip_of(q))
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
        half=half,
        pairs=_power_of_two(half),
        rest=rest,
        rest_dims=_power_of_two(rest) if rest else 1,
        align=math.gcd(VECTOR_BYTES // x.itemsize, *strides),
        interleaved=call.interleaved,
        stored=kind_of(call.stored),
        raw=kind_of(UNROTATED),
        paged=cache.block_table is not None,
        padded=cache.leftpad is not None,
        **fields,
    )


def _decode_tile(
    q: Tensor, cache: KVCache, call: AttentionCall, chosen: Config, splits: bool
) -> CacheTile:
    regions, group = call.regions, q.shape[2] // cache.k.shape[2]
    several = q.shape[1] > 1
    # The number of tokens compiles nothing anew, that of heads may.
    rows = chosen.block_m if several else min(chosen.block_m, triton.next_power_of_2(group))
    at_once = MERGED // (rows * _power_of_two(q.shape[3]))
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
        from_first_key=bool(call.starts) and call.starts[0] == FIRST_KEY,
        several_tokens=several,
        splits=splits,
        merge_rows=rows if splits else 0,
        merge_splits=max(1, at_once) if splits else 0,
        widen=chip_of(q) is None,
    )


def _more_slots(q: Tensor, programs: int, useful: int) -> int:
    """How many slots the schedule has beyond one to each sequence: never from lengths.

    programs: of a slot; useful: how many splits there may be at most.
    """
    wanted = triton.cdiv(WAVES * processors_of(q), programs)
    more = min(wanted, useful, MOST_SPLITS)
    return more if more > 1 else 0


def _starts(cache: KVCache, call: AttentionCall) -> list[int]:
    """Of the regions, and the granularity; no larger than the cache: int32 never overflows."""
    most = max(cache.capacity, 1)
    starts = [max(-most, min(start, most)) for start in call.starts]
    return starts + [0] * (MOST_REGIONS - len(starts)) + [min(call.granularity, most)]


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
