"""From PyTorch tensors to launches of the kernels over a key/value cache."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ....scores import UNROTATED
from ....scores.base import FIRST_KEY
from ..._shared.attention_call import AttentionCall
from ..._shared.triton.launch import VECTOR_BYTES, strides_of
from ..._shared.triton.position_maps import kind_of, map_arguments
from ..arguments import KVCache
from .cache import Cache, CacheTile, Plane
from .kernels import append_kernel, decode_kernel, merge_kernel

LEAST_DIMS = 16  # of a product, and rows of one
LEAST_BLOCKS = 4  # of keys in a split, or its start and merge show
MOST_REGIONS = 3
# Programs for each multiprocessor: enough loads in flight, and an even last wave.
WAVES = 2
PROCESSORS = 132  # where there is no device to ask


def decode(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as in `reference`; float32, bfloat16 and float16."""
    if k is not None:
        append(k, v, cache, call)
    batch, seqlen_q, heads_q, head_dim = q.shape
    heads_k = cache.k.shape[2]
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    group = heads_q // heads_k
    tile, warps, stages = _tile(cache, call, [q], group, seqlen_q)
    row_blocks = triton.cdiv(group * seqlen_q, tile.block_m)
    splits = _splits(q, cache, tile, batch * heads_k * row_blocks)
    partial_out = q.new_empty((splits, batch, seqlen_q, heads_q, head_dim), dtype=torch.float32)
    partial_lse = q.new_empty((splits, batch, seqlen_q, heads_q), dtype=torch.float32)
    with torch.cuda.device_of(q):
        decode_kernel[(splits * row_blocks, heads_k, batch)](
            _plane(q, tile.align),
            _cache(cache, tile.align),
            partial_out,
            partial_lse,
            *_sizes_of(cache),
            *_frequencies(call),
            heads_q,
            seqlen_q,
            group,
            splits,
            cache.appended,
            *_starts(cache, call),
            call.scale(head_dim),
            call.attention_factor**2,
            None if call.log_n is None else 1.0 / math.log(call.log_n),
            **_map_arguments(call),
            TILE=tile,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
        merge_kernel[(batch * seqlen_q * heads_q,)](
            *(partial_out, partial_lse, out, lse, splits, seqlen_q, heads_q),
            TILE=tile._replace(block_n=16),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out, lse


def append(k: Tensor, v: Tensor, cache: KVCache, call: AttentionCall) -> None:
    """Same arguments as in `reference`; what does not fit the cache is not written."""
    batch, new, heads_k, _ = k.shape
    if k.numel() == 0:
        return
    tile, *_ = _tile(cache, call, [k, v], 1, 1)
    tile = tile._replace(
        block_n=1 if new == 1 else 16, q_maps=(), k_maps=(), rotates_keys=(), from_first_key=False
    )
    # A row is moved in two halves and the rest: 16 bytes of each a thread, where there are so many.
    vectors = tile.block_n * tile.half * k.itemsize // VECTOR_BYTES
    numbers = map_arguments([], [], call.stored)
    with torch.cuda.device_of(k):
        append_kernel[(triton.cdiv(new, tile.block_n), heads_k, batch)](
            _plane(k, tile.align),
            _plane(v, tile.align),
            _cache(cache, tile.align),
            *_sizes_of(cache),
            *_frequencies(call),
            new,
            **{name: n for name, n in numbers.items() if name.startswith("stored")},
            TILE=tile,
            num_warps=1 if new == 1 else 4 if vectors >= 128 else 2,
            enable_fp_fusion=True,
        )


def _tile(
    cache: KVCache, call: AttentionCall, others: list[Tensor], group: int, tokens: int
) -> tuple[CacheTile, int, int]:
    """The tile of a kernel, its warps and pipeline stages."""
    head_dim, half = cache.k.shape[3], call.inv_freq.shape[-1]
    rest = head_dim - 2 * half
    strides = (n for x in (cache.k, cache.v, *others) for n in strides_of(x)[:3])
    interpreted = cache.k.device.type == "cpu"
    block_m, block_n, warps, stages = _blocks(head_dim, cache.k.itemsize, group * tokens)
    if interpreted:
        block_m, block_n = LEAST_DIMS, LEAST_DIMS
    regions = call.regions
    tile = CacheTile(
        block_m=block_m,
        block_n=block_n,
        head_dim=head_dim,
        dims=_power_of_two(head_dim),
        half=half,
        pairs=_power_of_two(half),
        rest=rest,
        rest_dims=_power_of_two(rest) if rest else 1,
        align=math.gcd(VECTOR_BYTES // cache.k.itemsize, *strides),
        interleaved=call.interleaved,
        q_maps=tuple(kind_of(region.q_map) for region in regions),
        k_maps=tuple(kind_of(region.k_map) for region in regions),
        stored=kind_of(call.stored),
        raw=kind_of(UNROTATED),
        rotates_keys=tuple(region.k_map != call.stored for region in regions),
        from_first_key=bool(call.starts) and call.starts[0] == FIRST_KEY,
        several_tokens=tokens > 1,
        widen=interpreted,
    )
    return tile, warps, stages


def _blocks(head_dim: int, itemsize: int, rows: int) -> tuple[int, int, int, int]:
    """Rows of queries and of keys, warps and stages: what compiles without spills on every chip."""
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
    return max(1, min(wanted, cache.capacity // (LEAST_BLOCKS * tile.block_n)))


def _starts(cache: KVCache, call: AttentionCall) -> list[int]:
    """Of the regions, and the granularity; no larger than the cache: int32 never overflows."""
    most = max(cache.capacity, 1)
    starts = [max(-most, min(start, most)) for start in call.starts]
    return starts + [0] * (MOST_REGIONS - len(starts)) + [min(call.granularity, most)]


def _map_arguments(call: AttentionCall) -> dict[str, float]:
    regions = call.regions
    return map_arguments([r.q_map for r in regions], [r.k_map for r in regions], call.stored)


def _frequencies(call: AttentionCall) -> tuple[Tensor, int, Tensor | None]:
    freq = call.inv_freq
    return freq, strides_of(freq)[0] if freq.dim() == 2 else 0, call.log_decay


def _sizes_of(cache: KVCache) -> tuple[int, int, int]:
    """The block table's stride, the slots of a page, and those of a sequence."""
    table = cache.block_table
    return 0 if table is None else table.stride(0), cache.k.shape[1], cache.capacity


def _cache(cache: KVCache, align: int) -> Cache:
    k, v = _plane(cache.k, align), _plane(cache.v, align)
    return Cache(k, v, cache.seqlens, cache.leftpad, cache.block_table)


def _plane(x: Tensor, align: int) -> Plane:
    return Plane(x, *(n // align for n in strides_of(x)[:3]))


def _power_of_two(n: int) -> int:
    return max(LEAST_DIMS, triton.next_power_of_2(n))
