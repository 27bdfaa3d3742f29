"""From PyTorch tensors to launches of the kernels over a key/value cache."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ..frames import Call
from ..kvcache_arguments import KVCache
from .cache import Cache, CacheTile, Plane
from .decode import append_kernel, decode_kernel, merge_kernel

VECTOR_BYTES = 16
LEAST_LANES = 16  # of a product, and rows of one
LEAST_TILES = 4  # of keys in a split, or its start and merge show
# Programs for each multiprocessor: enough loads in flight, and an even last wave.
WAVES = 2
PROCESSORS = 132  # where there is no device to ask


def decode(q: Tensor, cache: KVCache, call: Call) -> tuple[Tensor, Tensor]:
    """Same arguments and results as in `kvcache_reference`; float32, bfloat16 and float16."""
    batch, seqlen_q, heads_q, head_dim = q.shape
    heads_k = cache.k.shape[2]
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    group = heads_q // heads_k
    tile, warps, stages = _tile(cache, call, [q], group, seqlen_q)
    row_tiles = triton.cdiv(group * seqlen_q, tile.rows)
    splits = _splits(q, cache, tile, batch * heads_k * row_tiles)
    sums = q.new_empty((splits, batch, seqlen_q, heads_q, head_dim), dtype=torch.float32)
    logs = q.new_empty((splits, batch, seqlen_q, heads_q), dtype=torch.float32)
    with torch.cuda.device_of(q):
        decode_kernel[(splits * row_tiles, heads_k, batch)](
            _plane(q, tile.align),
            _cache(cache, call, tile.align),
            sums,
            logs,
            heads_q,
            seqlen_q,
            group,
            splits,
            cache.appended,
            call.score.window,
            *_factor(call),
            call.softmax_scale or head_dim**-0.5,
            call.attention_factor**2,
            None if call.log_n is None else 1.0 / math.log(call.log_n),
            TILE=tile,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
        merge_kernel[(batch * seqlen_q * heads_q,)](
            *(sums, logs, out, lse, splits, seqlen_q, heads_q),
            TILE=tile._replace(keys=16),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out, lse


def append(cache: KVCache, k: Tensor, v: Tensor, call: Call) -> None:
    """Same arguments as in `kvcache_reference`; what does not fit the cache is not written."""
    batch, new, heads_k, _ = k.shape
    if k.numel() == 0:
        return
    tile, *_ = _tile(cache, call, [k, v], 1, 1)
    tile = tile._replace(keys=1 if new == 1 else 16)
    # A row is moved in two halves and the rest: 16 bytes of each a thread, where there are so many.
    vectors = tile.keys * tile.half * k.itemsize // VECTOR_BYTES
    with torch.cuda.device_of(k):
        append_kernel[(triton.cdiv(new, tile.keys), heads_k, batch)](
            _plane(k, tile.align),
            _plane(v, tile.align),
            _cache(cache, call, tile.align),
            new,
            *_factor(call),
            TILE=tile,
            num_warps=1 if new == 1 else 4 if vectors >= 128 else 2,
            enable_fp_fusion=True,
        )


def _tile(
    cache: KVCache, call: Call, others: list[Tensor], group: int, tokens: int
) -> tuple[CacheTile, int, int]:
    """The tile of a kernel, its warps and pipeline stages."""
    head_dim, half = cache.k.shape[3], call.inv_freq.shape[-1]
    rest = head_dim - 2 * half
    strides = (n for x in (cache.k, cache.v, *others) for n in _strides(x)[:3])
    interpreted = cache.k.device.type == "cpu"
    rows, keys, warps, stages = _sizes(head_dim, cache.k.itemsize, group * tokens)
    if interpreted:
        rows, keys = LEAST_LANES, LEAST_LANES
    frames = {1.0: "plain", math.inf: "raw"}
    tile = CacheTile(
        rows=rows,
        keys=keys,
        head_dim=head_dim,
        lanes=_power_of_two(head_dim),
        half=half,
        pairs=_power_of_two(half),
        rest=rest,
        rest_lanes=_power_of_two(rest) if rest else 1,
        align=math.gcd(VECTOR_BYTES // cache.k.itemsize, *strides),
        interleaved=call.interleaved,
        frame=frames.get(call.score.factor, "grouped" if call.score.grouped else "slow"),
        several_tokens=tokens > 1,
        widen=interpreted,
    )
    return tile, warps, stages


def _sizes(head_dim: int, itemsize: int, rows: int) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps and stages: what compiles without spills on every chip."""
    if itemsize == 4:  # products without tensor cores, from registers
        return 16, 32 if head_dim <= 64 else 16, 8, 3
    if head_dim > 128:
        return 16, 32, 8, 3
    if rows <= 16:
        return 16, 64, 4, 2
    return (32, 64, 4, 2) if head_dim <= 64 else (64, 64, 8, 3)


def _splits(q: Tensor, cache: KVCache, tile: CacheTile, programs: int) -> int:
    """How many programs share the keys of a sequence: from the capacity, never from lengths."""
    processors = PROCESSORS
    if q.is_cuda:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    wanted = triton.cdiv(WAVES * processors, programs)
    return max(1, min(wanted, cache.capacity // (LEAST_TILES * tile.keys)))


def _factor(call: Call) -> tuple[float, int]:
    factor = call.score.factor
    return 1.0 / factor, int(factor) if call.score.grouped else 1


def _cache(cache: KVCache, call: Call, align: int) -> Cache:
    freq, table = call.inv_freq, cache.block_table
    return Cache(
        k=_plane(cache.k, align),
        v=_plane(cache.v, align),
        seqlens=cache.seqlens,
        leftpad=cache.leftpad,
        block_table=table,
        table_batch=0 if table is None else table.stride(0),
        page_size=cache.k.shape[1],
        capacity=cache.capacity,
        inv_freq=freq,
        freq_batch=freq.stride(0) if freq.dim() == 2 and freq.shape[0] > 1 else 0,
    )


def _plane(x: Tensor, align: int) -> Plane:
    return Plane(x, *(n // align for n in _strides(x)[:3]))


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of x, 0 along dimensions of size 1: torch leaves those open."""
    return tuple(0 if size == 1 else n for size, n in zip(x.shape, x.stride(), strict=True))


def _power_of_two(n: int) -> int:
    return max(LEAST_LANES, triton.next_power_of_2(n))
