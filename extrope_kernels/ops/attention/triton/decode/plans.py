"""Plans of calls over a key/value cache: their launches, settled for the layout of the tensors."""

from __future__ import annotations

import math

import triton
from torch import Tensor

from .....scores import UNROTATED
from .....scores.base import FIRST_KEY
from ...._shared.fp8 import FP8
from ...._shared.triton.fp8 import kind_of_cache
from ...._shared.triton.launch import VECTOR_BYTES, Plan, chip_of, strides_of
from ...._shared.triton.position_maps import kind_of, map_arguments, side_arguments
from ...call import AttentionCall, KVCache, lse_shape
from .append import append_kernel
from .cache import CacheTile
from .configs import Config, config
from .grid import grid_of
from .kernels import decode_kernel
from .launches import DecodeLaunches

LEAST_DIMS = 16  # of a product, and rows of one
MOST_REGIONS = 3
COUNTERS = 4  # at once, so that the partial results behind them stay aligned
MERGED = 4096  # numbers that a program merges at once: 16 to 32 registers a thread


def launches_of_decode(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> DecodeLaunches:
    """What decode launches for these layouts and options."""
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
    plan = Plan(
        decode_kernel,
        (grid.slots * grid.row_blocks, heads_k),
        q,
        **_strides(tile, q, "q_batch", "q_token", "q_head"),
        **_cache_arguments(tile, cache, call),
        batch=batch,
        slots=grid.slots,
        least_blocks=grid.least_blocks,
        counters=counters // COUNTERS,
        heads_q=heads_q,
        seqlen_q=seqlen_q,
        group=group,
        appended=cache.appended if call.cu_seqlens is None else int(k is not None),
        **_bounds(cache, call),
        **_softmax_arguments(call, head_dim),
        **side_arguments("q", [region.q_map for region in call.regions]),
        **side_arguments("k", [region.k_map for region in call.regions]),
        **map_arguments("stored", call.stored),
        TILE=tile,
        num_warps=chosen.warps,
        # A page's number is loaded as long before its keys as these before their use.
        num_stages=2 * chosen.stages - 1 if tile.paged else chosen.stages,
        maxnreg=chosen.maxnreg,
    )
    before = (
        None if k is None else _append_plan(k, v, cache, call, grid.counters if tile.splits else 0)
    )
    if not tile.splits:
        return DecodeLaunches(before, plan, *results)
    partials = grid.slots * heads_k * grid.rows * (tile.head_dim_v + 1)
    return DecodeLaunches(before, plan, *results, counters + partials, counters)


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
    return Plan(
        append_kernel,
        (triton.cdiv(new, block_n), heads_k, batch),
        k,
        **_strides(tile, k, "k_batch", "k_token", "k_head"),
        **_strides(tile, v, "v_batch", "v_token", "v_head"),
        **_cache_arguments(tile, cache, call),
        new=new,
        row_blocks=counters,
        sequences=sequences,
        search_steps=search_steps,
        pages=cache.k.shape[0],
        **map_arguments("stored", call.stored),
        TILE=tile,
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


def _strides(tile: CacheTile, x: Tensor, *names: str) -> dict[str, int]:
    """Of the first three dimensions, as kernels count them."""
    strides = (n // tile.align for n in strides_of(x)[:3])
    return dict(zip(names, strides, strict=True))


def _cache_arguments(tile: CacheTile, cache: KVCache, call: AttentionCall) -> dict[str, int]:
    """What both kernels are told of the cache, and of the frequencies of its sequences."""
    table, freq = cache.block_table, call.inv_freq
    return {
        **_strides(tile, cache.k, "k_block", "k_slot", "k_row"),
        **_strides(tile, cache.v, "v_block", "v_slot", "v_row"),
        "table_batch": 0 if table is None else table.stride(0),
        "page_size": cache.k.shape[1],
        "capacity": cache.capacity,
        "freq_batch": strides_of(freq)[0] if freq.dim() == 2 else 0,
    }


def _bounds(cache: KVCache, call: AttentionCall) -> dict[str, int | None]:
    """Which keys queries see; no larger than the cache: int32 never overflows."""
    most, window = max(cache.capacity, 1), call.sliding_window
    starts = [max(-most, min(start, most)) for start in call.starts]
    starts += [0] * (MOST_REGIONS - len(starts))
    return {
        **{f"start_{n}": start for n, start in enumerate(starts)},
        "granularity": min(call.granularity, most),
        "sliding_window": None if window is None else min(window, most),
    }


def _softmax_arguments(call: AttentionCall, head_dim: int) -> dict[str, float | int | None]:
    scale, strides = call.query_scale, (None, None)
    if scale is not None:
        strides = (*(0,) * (2 - scale.dim()), *strides_of(scale))
    return {
        "scale_batch": strides[0],
        "scale_token": strides[1],
        "softmax_scale": call.scale(head_dim),
        "amplitude": float(call.attention_factor) ** 2,
        "per_log_n": None if call.log_n is None else 1.0 / math.log(call.log_n),
        "softcap": call.softcap * math.log2(math.e) if call.softcap != 0 else None,
    }


def _power_of_two(n: int) -> int:
    return max(LEAST_DIMS, triton.next_power_of_2(n))
