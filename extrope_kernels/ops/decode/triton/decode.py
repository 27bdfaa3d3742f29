"""Attention over a key/value cache: write new keys and values into it, then attend.

There are two launches. The first writes k and v (ops/cache/triton/append.py); it rotates keys to
the positions at which the score method stores them. The second attends. If a region sees keys at
other positions, it rotates them while it loads them.

Programs that share a sequence take splits of its keys (schedule.py). The last of them to finish
merges their results (splits.py).

The mask: in region r, a query at position p sees the keys j with begin(r) <= j < begin(r + 1),
where begin(r) = block(p) + starts[r], but with a sliding window not below p + 1 - window, and
begin(regions) = p + 1; all are clamped to the keys that exist. block() rounds down to a multiple of
granularity: queries of a dual_chunk chunk share starts. starts are at most 0, and rise. mask.py
has these as region_begin, with a picture. Its other arguments are seqlen_k and the position of key
0, which is 0 here: key j has position j.

Names:

row                 a token and one of the `group` heads of q that share a head of k
M, N                M is BLOCK_M, rows; N is BLOCK_N, keys
P, R, V             pairs of dims that rotate, the other dims, and the dims of v, each rounded up to
                    a power of two
base 2              of logits and their sums: they are multiplied by log2(e)
work_of_program     which rows and keys are this program's (schedule.py)
load_parts          load rows in three parts: the first dims of their pairs, (.., P), the second
                    dims, and the dims that do not rotate, (.., R): 0 for rows that are not valid.
                    If all dims rotate, the third part is the first again, and never used
of_pairs            load one number for each pair, (1, P)
widened_codes       numbers of a type, of the bits of fp8, without their scale
cos_sin_of_map      cosine and sine of freq * (MAP(position) - FROM(position)), exact in fixed
                    point, times exp(decay * the same difference): float32, (tokens, P), or (1, P)
                    if no token differs. FROM None counts as 0. A map by pair has a divisor and an
                    offset for each pair, in pair_maps
nth_map             a region's map, of MODEL.q_maps or MODEL.k_maps
not_finite          NaN where a frequency is no number, else 0: a fixed point has no NaN
softcap             tanh(x * SCALE / SOFTCAP)
weights_of_block    row_max with a block's logits, their weights exp2(logits - row_max), and what to
                    multiply earlier sums by
store_results       add the sinks, normalise and store out and lse (splits.py)
store_split         store a split's share; the last split of a block of rows merges all of them
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._math.dtypes import FP8, as_bits
from ..._math.triton.launch import VECTOR_BYTES, Launch, chip_of, strides_by_name, strides_of
from ..._math.triton.pairs import load_parts, of_pairs
from ...attention.call import AttentionCall, lse_shape
from ...attention.triton import configs
from ...attention.triton.device import (
    FARTHEST_INT32,
    LEAST_DIMS,
    freq_heads_of,
    log2_e,
    sequence_stride,
    softcap,
    weights_of_block,
    with_contiguous_rows,
)
from ...attention.triton.maps import (
    cos_sin_of_map,
    map_of,
    not_finite,
    nth_map,
    stored_map,
)
from ...attention.triton.mask import region_begin
from ...cache.call import Append, KVCache
from ...cache.triton.append import build_append, launch_append
from ...cache.triton.fp8 import kind_of_cache, widened_codes
from ...rope.call import RopeTensors
from .schedule import CacheLengths, grid_of, keys_of, queries_of, work_of_program
from .splits import OutputTarget, store_results, store_split

COUNTERS = 4  # counters come in fours, so that the partial results after them are aligned
MERGED = 4096  # numbers that a program merges at a time: 16 to 32 registers per thread


class DecodeModel(NamedTuple):
    """Constants of the compiled kernel: the settings of a model and its cache."""

    group: int  # heads of q that share one of k
    head_dim: int  # dims of queries and keys
    head_dim_v: int
    # head_dim_v, rounded up to a power of two. One tile, unlike the forward's two: what is past
    # head_dim_v is not loaded, and decode waits for memory.
    dims_v: int
    half: int  # pairs of dims that rotate
    freq_heads: int  # heads of k with frequencies of their own; 1: all share
    pairs: int  # half, rounded up to a power of two
    rotary_offset: int  # the first dim of the first pair
    rest: int  # dims before and after the rotated ones
    rest_dims: int  # rest, rounded up to a power of two; 1 if none
    interleaved: bool  # a pair's two dims are neighbours; else rotated dims i and half + i
    starts: tuple[int, ...]  # of each region, from the first position of the query's block of
    # `granularity` on
    granularity: int
    window: int  # most keys that a query sees, or 0: all
    from_key_0: bool  # region 0 begins at key 0 for every query
    q_maps: tuple[tuple, ...]  # one per region, see `map_of`
    k_maps: tuple[tuple, ...]
    rotates_keys: tuple[bool, ...]  # by region: True if it sees keys at other positions than stored
    softmax_scale_log2: float  # softmax_scale * log2(e)
    softcap_log2: float  # softcap * log2(e), or 0: none
    attention_factor_sq: float  # multiplies queries, for both sides
    paged: bool  # block_table names the pages of a sequence
    padded: bool  # leftpad is given
    packed: bool  # the queries of all sequences follow one another
    codes: int  # how to read a cache in fp8: see `kind_of_cache`; 0: it is not in fp8
    widen: bool  # widen operands to float32 for products: the interpreter has no bfloat16


class DecodeBlocks(NamedTuple):
    """Constants of the compiled kernel: sizes of blocks, and facts of the call."""

    block_m: int  # rows of queries
    block_n: int  # rows of keys
    align: int  # elements; divides all strides
    several_tokens: bool  # queries have more than one token
    splits: bool  # several programs may share a sequence
    merge_rows: int  # rows of queries that are merged at a time,
    merge_splits: int  # and splits of each; both 0 without `splits`


# -------------------------------------------------------------------------------------------------
# The second launch: attend


@triton.jit
def decode_kernel(
    q, k_cache, v_cache,  # (batch, num_tokens, heads_q, head_dim); (blocks, slots, heads_k, ...)
    out, lse,  # see OutputTarget
    scratch,  # counters, all 0, then partial results: see store_split; None if there are no splits
    inv_freq, log_decay,  # (sequences or 1, freq_heads, half) float; (half,) or None: xPos
    pair_maps,  # (rows, 2: divisors and offsets, half) float64, or None
    query_scale, sinks,  # (batch or 1, num_tokens) float32 or None; see OutputTarget
    k_scale, v_scale,  # (heads_k,) float32 of a cache in fp8, or None
    seqlens,  # (batch,) int32: slots in use before this call
    leftpad, cu_seqlens,  # (batch,) int32: slot of key 0, or None; (batch + 1,) int32 if packed
    block_table,  # (sequences, pages of a sequence) int32, or None
    q_stride_batch, q_stride_seq, q_stride_head,  # divided by BLOCKS.align
    k_stride_block, k_stride_slot, k_stride_head,
    v_stride_block, v_stride_slot, v_stride_head,
    table_stride, freq_stride, query_scale_stride,  # between sequences; 0: all share it
    page_size, capacity,  # slots of a page, and of a sequence
    batch, num_tokens,  # sequences; queries of each, or packed of all
    appended,  # keys that this call wrote for each sequence; packed: for each query, 0 or 1
    num_items, least_blocks,  # of the schedule; blocks of keys that a split has at least
    num_counters,  # see store_split
    # Maps with names, which Triton 3.6 takes alone, but not within MODEL:
    Q_STORED: tl.constexpr,  # the map by which queries come rotated; None: raw
    STORED: tl.constexpr,  # that of keys in the cache
    MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Attend. Axis 0: items of the schedule, then blocks of rows; axis 1: heads of k.

    A block of a cache is a sequence, or with block_table a page. Packed, q is one batch of all
    tokens, and `batch` counts sequences.
    """
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    ALIGN: tl.constexpr = BLOCKS.align
    GROUP: tl.constexpr = MODEL.group
    DIMS_V: tl.constexpr = MODEL.dims_v
    REGIONS: tl.constexpr = len(MODEL.starts)
    OPERAND: tl.constexpr = tl.float32 if MODEL.widen else q.dtype.element_ty  # of products

    # This program's block of rows, and its split, 0 to splits - 1, of the keys of its sequence: by
    # the table at the top of schedule.py. A program with nothing to do has a sequence that does not
    # exist, `batch` or more, and one split.
    head = tl.program_id(1)  # of k
    lengths = CacheLengths(seqlens, leftpad, cu_seqlens, batch, num_tokens, appended, capacity)
    item, sequence, row_block, split, splits = work_of_program(
        num_items, least_blocks, lengths, MODEL, BLOCKS
    )
    exists = sequence < batch
    first_token, seqlen_q = queries_of(sequence, lengths, MODEL)  # first_token is 0 unless packed
    pad, seqlen_k = keys_of(sequence, seqlen_q, lengths, MODEL)  # seqlen_k: with this call's keys
    q_batch = tl.cast(0 if MODEL.packed else sequence, tl.int64)

    # Rows (M,). Queries are the last tokens of their sequence, so the last one has the last key's
    # position. Rows after num_rows are computed, but not stored.
    num_rows = seqlen_q * GROUP
    if not MODEL.packed:
        num_rows = tl.where(exists, num_rows, 0)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < num_rows
    token = row // GROUP  # of the sequence
    position = seqlen_k - seqlen_q + token
    head_q = head * GROUP + row % GROUP

    # Keys [key_begin, key_end): this split of those that any row sees. A split is whole blocks of N
    # keys. region_begin rises with the position, so the first row sees the earliest key.
    last_row = tl.minimum(row_block * BLOCK_M + BLOCK_M, seqlen_q * GROUP) - 1
    first_position = seqlen_k - seqlen_q + row_block * BLOCK_M // GROUP
    last_position = seqlen_k - seqlen_q + last_row // GROUP
    first_seen = region_begin(first_position, seqlen_k, 0, 0, MODEL)
    num_keys = tl.where(exists, tl.maximum(last_position + 1 - first_seen, 0), 0)
    split_keys = tl.cdiv(tl.cdiv(num_keys, splits), BLOCK_N) * BLOCK_N
    key_begin = first_seen + split * split_keys
    key_end = tl.minimum(key_begin + split_keys, first_seen + num_keys)

    # Frequencies of this head and sequence, or of the last one if it does not exist: (1, P).
    if MODEL.freq_heads > 1:
        inv_freq += head * MODEL.half
    freq_sequence = tl.minimum(sequence, batch - 1).to(tl.int64)
    freq = of_pairs(inv_freq + freq_sequence * freq_stride, MODEL)
    pair = tl.arange(0, MODEL.pairs)
    # By xPos, query i and key j have amplitudes exp(i * decay) and exp(-j * decay).
    q_decay = None
    k_decay = None
    if log_decay is not None:
        q_decay = of_pairs(log_decay, MODEL).to(tl.float64)  # (1, P)
        k_decay = -q_decay
    rope = KeyRope(freq, k_decay, pair_maps, pair)

    # What all regions share: pointers, and the factor of each row's logits, (M, 1) of base 2.
    # Strides come divided by ALIGN: the product at the end shows the compiler that it may load 16
    # bytes at a time.
    q_offset = q_batch * q_stride_batch + (first_token + token).to(tl.int64) * q_stride_seq
    q_row = q + (q_offset + head_q.to(tl.int64) * q_stride_head) * ALIGN  # (M,)
    pages = None
    if MODEL.paged:
        pages = block_table + tl.cast(sequence, tl.int64) * table_stride
    scale_of_k = None
    if MODEL.codes:
        scale_of_k = tl.load(k_scale + head)
    cache = CacheOfHead(
        k_cache + tl.cast(head, tl.int64) * k_stride_head * ALIGN,
        v_cache + tl.cast(head, tl.int64) * v_stride_head * ALIGN,
        k_stride_block, k_stride_slot, v_stride_block, v_stride_slot, tl.cast(sequence, tl.int64),
        pages, page_size, pad, scale_of_k,
    )  # fmt: skip
    scale = MODEL.softmax_scale_log2
    if query_scale is not None:
        query_scale += q_batch * query_scale_stride
        of_token = tl.load(query_scale + (first_token + token), mask=valid, other=1.0)
        scale = scale * of_token[:, None]  # (M, 1)

    # Below any logit, but finite: a row that has seen no key has exp2(-inf - -1e30) = 0, not NaN.
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIMS_V), tl.float32)
    # Regions cut the keys of a row in their order, far keys first. Here near keys come first: their
    # cosines and sines then leave the registers before far keys are added.
    for r in tl.static_range(REGIONS - 1, -1, -1):
        if r + 1 < REGIONS:
            # Without a barrier, q would be loaded once, and hold registers through all regions.
            tl.debug_barrier()
        # q, rotated to the positions of the region's map. cos, sin: (M, P), or (1, P) if all rows
        # share one position. Keys have no attention factor: queries carry it for both.
        cos, sin = cos_sin_of_map(
            position, freq, q_decay, pair_maps, pair, nth_map(MODEL.q_maps, r), Q_STORED, MODEL.half
        )
        cos *= MODEL.attention_factor_sq * scale
        sin *= MODEL.attention_factor_sq * scale
        q0, q1, q_rest = load_parts(q_row, valid, MODEL)  # (M, P), (M, P), (M, R)
        q0, q1 = q0.to(tl.float32), q1.to(tl.float32)
        q0, q1 = q0 * cos - q1 * sin, q1 * cos + q0 * sin
        q_rest = q_rest.to(tl.float32) * scale
        if r + 1 == REGIONS:
            # Any row that sees a key sees its own, the last: NaN in its region is in the row, and
            # in what the splits of the row are merged to.
            q0 += not_finite(freq)
        # Row i sees the keys [row_begin[i], row_end[i]) of the region. Both rise with the row: so
        # [begin, end) holds those of all rows. A region begins where the one before it ends.
        row_begin = region_begin(position, seqlen_k, 0, r, MODEL)  # (M,)
        row_end = region_begin(position, seqlen_k, 0, r + 1, MODEL)
        begin, end = key_begin, key_end
        if r > 0:
            begin = tl.maximum(begin, region_begin(first_position, seqlen_k, 0, r, MODEL))
        if r + 1 < REGIONS:
            end = tl.minimum(end, region_begin(last_position, seqlen_k, 0, r + 1, MODEL))
        row_max, row_sum, acc = _add_region(
            row_max, row_sum, acc, q0.to(OPERAND), q1.to(OPERAND), q_rest.to(OPERAND), cache, rope,
            begin, end, row_begin, row_end, r, STORED, MODEL, BLOCKS,
        )  # fmt: skip
    if MODEL.codes:
        acc *= tl.load(v_scale + head)

    # A program with all keys of its rows stores their results; others merge theirs.
    target = OutputTarget(
        out, lse, sinks, exists, q_batch, first_token, num_tokens, head, tl.num_programs(1)
    )
    if BLOCKS.splits:
        if splits > 1:
            store_split(
                target, scratch, num_counters, item, num_items, split, splits, row_block, num_rows,
                row, valid, row_max, row_sum, acc, MODEL, BLOCKS,
            )  # fmt: skip
        else:
            store_results(target, row, valid, row_max, row_sum, acc, MODEL)
    else:
        store_results(target, row, valid, row_max, row_sum, acc, MODEL)


class CacheOfHead(NamedTuple):
    """The cached keys and values of one sequence and head of k."""

    k: tl.tensor  # pointers to dim 0 of the head in slot 0 of block 0
    v: tl.tensor
    k_stride_block: tl.tensor  # all divided by BLOCKS.align
    k_stride_slot: tl.tensor
    v_stride_block: tl.tensor
    v_stride_slot: tl.tensor
    sequence: tl.tensor  # int64: the block, unless paged
    pages: tl.tensor  # paged, slot s is in block pages[s // page_size]
    page_size: tl.tensor
    pad: tl.tensor  # the slot of key 0
    k_scale: tl.tensor  # of keys in fp8; else None


class KeyRope(NamedTuple):
    """What rotates keys to other positions than those at which they are stored."""

    freq: tl.tensor  # (1, P)
    decay: tl.tensor  # (1, P) float64, or None: xPos
    pair_maps: tl.tensor
    pair: tl.tensor  # (P,): 0, 1, ...


@triton.jit
def _add_region(
    row_max, row_sum, acc,  # (M,), (M,), (M, V) float32: the online softmax of the keys so far
    q0, q1, q_rest,  # (M, P), (M, P), (M, R): rotated and scaled, in the type of products
    cache, rope,  # CacheOfHead, KeyRope
    begin, end,  # the keys of this region and split that any of the rows sees
    row_begin, row_end,  # (M,): row i sees keys [row_begin[i], row_end[i])
    REGION: tl.constexpr, STORED: tl.constexpr, MODEL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add a region's keys to the online softmax; return row_max, row_sum and acc."""
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    ROTATES: tl.constexpr = MODEL.rotates_keys[REGION]
    OPERAND: tl.constexpr = q0.dtype
    dim_v = tl.arange(0, MODEL.dims_v)
    for start in tl.range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)  # (N,)
        valid = key < end
        slot = cache.pad + key  # int32: in 64 bits, a GPU calls a function for every division
        if MODEL.paged:
            page_ptr = cache.pages + slot // cache.page_size
            block = tl.load(page_ptr, mask=valid, other=0).to(tl.int64)
            slot = slot % cache.page_size
        else:
            block = cache.sequence

        # logits = q @ k.T: (M, N)
        k_offset = block * cache.k_stride_block + slot.to(tl.int64) * cache.k_stride_slot
        k_row = cache.k + k_offset * BLOCKS.align  # (N,)
        k0, k1, k_rest = load_parts(k_row, valid, MODEL)  # (N, P), (N, P), (N, R); 0 if not valid
        if MODEL.codes:
            LIKE: tl.constexpr = tl.float32 if ROTATES else OPERAND
            k0 = widened_codes(k0, LIKE, MODEL.codes)
            k1 = widened_codes(k1, LIKE, MODEL.codes)
            if MODEL.rest > 0:
                k_rest = widened_codes(k_rest, LIKE, MODEL.codes)
        if ROTATES:  # from their stored positions to those that this region sees
            cos, sin = cos_sin_of_map(
                key, rope.freq, rope.decay, rope.pair_maps, rope.pair,
                nth_map(MODEL.k_maps, REGION), STORED, MODEL.half,
            )  # fmt: skip
            k0, k1 = k0.to(tl.float32), k1.to(tl.float32)
            k0, k1 = k0 * cos - k1 * sin, k1 * cos + k0 * sin
        k0, k1 = k0.to(OPERAND), k1.to(OPERAND)  # before any product: float32 takes more registers
        logits = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        logits = tl.dot(q1, tl.trans(k1), logits, input_precision="ieee")
        if MODEL.rest > 0:
            logits = tl.dot(q_rest, tl.trans(k_rest.to(OPERAND)), logits, input_precision="ieee")
        if MODEL.codes:  # not into q: float16 lacks small numbers
            logits *= cache.k_scale
        if MODEL.softcap_log2 > 0:  # `softcap` returns tanh(logits * 1.0 / softcap_log2)
            logits = MODEL.softcap_log2 * softcap(logits, 1.0, MODEL.softcap_log2)

        # weights = exp2(logits - row_max): (M, N)
        sees = valid[None, :]
        if BLOCKS.several_tokens:  # rows of one token all see the same keys
            sees = sees & (key[None, :] < row_end[:, None])
            if not (REGION == 0 and MODEL.from_key_0):
                sees = sees & (key[None, :] >= row_begin[:, None])
        logits = tl.where(sees, logits, float("-inf"))
        row_max, weights, rescale = weights_of_block(row_max, logits, 1.0)
        row_sum = row_sum * rescale + tl.sum(weights, 1)

        # acc = acc * rescale + weights @ v
        v_offset = block * cache.v_stride_block + slot.to(tl.int64) * cache.v_stride_slot
        v_row = cache.v + v_offset * BLOCKS.align  # (N,)
        mask = valid[:, None] & (dim_v < MODEL.head_dim_v)[None, :]
        v = tl.load(v_row[:, None] + dim_v[None, :], mask=mask, other=0.0)  # (N, V)
        if MODEL.codes:
            v = widened_codes(v, OPERAND, MODEL.codes)
        v = v.to(OPERAND)
        acc = tl.dot(weights.to(OPERAND), v, acc * rescale[:, None], input_precision="ieee")
    return row_max, row_sum, acc


# -------------------------------------------------------------------------------------------------
# The launches


class DecodeLaunches(NamedTuple):
    """Both launches, and the sizes of their shared scratch."""

    append: Launch | None  # None: there is nothing to write
    attend: Launch
    append_rotates: bool  # the first launch rotates keys; else it writes them as they come
    num_counters: int  # numbers at the head of scratch that must be 0
    scratch_size: int  # float32 numbers, with the counters; 0 if no programs share a sequence


def decode(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: KVCache,
    call: AttentionCall,
    launches: DecodeLaunches,
) -> tuple[Tensor, Tensor]:
    """Append and attend; arguments and results as in `reference`; float32, bfloat16 and float16.

    Keys and values that do not fit into the cache are not written.
    """
    out = q.new_empty((*q.shape[:-1], cache.v.shape[3]))
    lse = q.new_empty(lse_shape(q), dtype=torch.float32)
    call = with_contiguous_rows(call)  # copies its small tensors if they have strides
    append, attend, append_rotates, num_counters, scratch_size = launches
    # Kernels read fp8 as its bits, int8.
    k_cache, v_cache = (as_bits(x) if x.dtype == FP8 else x for x in (cache.k, cache.v))
    scratch = q.new_empty(scratch_size, dtype=torch.float32) if scratch_size else None
    if append is not None:  # it sets the counters at the head of scratch to 0
        rope_args = {"cu_seqlens": call.cu_seqlens}
        if append_rotates:
            rope_args["inv_freq"], rope_args["log_decay"] = call.inv_freq, call.log_decay
            rope_args["positions"] = cache.seqlens  # which new tokens follow
        launch_append(append, cache, k, v, counters=scratch, **rope_args)
    elif scratch is not None:  # no first launch sets the counters to 0
        scratch[:num_counters].zero_()
    attend.run(
        q=q, k_cache=k_cache, v_cache=v_cache, out=out, lse=lse, scratch=scratch,
        inv_freq=call.inv_freq, log_decay=call.log_decay, pair_maps=call.pair_maps,
        query_scale=call.query_scale, sinks=call.sinks, k_scale=cache.scales.k,
        v_scale=cache.scales.v, seqlens=cache.seqlens, leftpad=cache.leftpad,
        cu_seqlens=call.cu_seqlens, block_table=cache.block_table,
    )  # fmt: skip
    return out, lse


def decode_launches(
    q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, call: AttentionCall
) -> DecodeLaunches:
    """Build both launches for tensors of these layouts."""
    call = with_contiguous_rows(call)
    if call.cu_seqlens is not None:  # as one sequence; only the device knows the boundaries
        q = q[None]
    num_tokens, heads_k = q.shape[1], cache.k.shape[2]
    config = _config(q, cache, call)
    grid = grid_of(q, cache, call, config.block_m, config.block_n)
    model, blocks = constants_of(q, cache, call, config, grid.splits and q.numel() > 0)
    num_counters = scratch_size = 0
    if blocks.splits:  # counters and partial results: see store_split
        num_counters = triton.cdiv(heads_k * grid.counters, COUNTERS) * COUNTERS
        partials = grid.num_items * heads_k * grid.item_rows
        scratch_size = num_counters + partials * (model.head_dim_v + 1)
    stages = config.stages
    if model.paged:  # a page's number needs as many stages before its keys as keys before their use
        stages = 2 * stages - 1
    # Keys that this call adds to a sequence; packed: with each of its queries, 0 or 1.
    appended = cache.appended if call.cu_seqlens is None else int(k is not None)
    numbers = {
        **strides_by_name("q", q, blocks.align),
        **strides_by_name("k", cache.k, blocks.align, ("block", "slot", "head")),
        **strides_by_name("v", cache.v, blocks.align, ("block", "slot", "head")),
        "table_stride": 0 if cache.block_table is None else cache.block_table.stride(0),
        "freq_stride": sequence_stride(call.inv_freq, dims=2),
        "query_scale_stride": sequence_stride(call.query_scale, dims=2),
        "page_size": cache.k.shape[1],
        "capacity": cache.capacity,
        "batch": len(cache.seqlens),
        "num_tokens": num_tokens,
        "appended": appended,
        "num_items": grid.num_items,
        "least_blocks": grid.least_blocks,
        "num_counters": num_counters,
    }
    programs = (grid.num_items * grid.row_blocks, heads_k)
    attend = Launch(
        decode_kernel,
        programs if q.numel() else (0,),
        numbers=numbers,
        constants={
            "Q_STORED": stored_map(call.q_stored),
            "STORED": stored_map(call.stored),
            "MODEL": model,
            "BLOCKS": blocks,
        },
        options=config._replace(stages=stages).options,
    )
    # Else the cache has keys as they come, like queries.
    append, append_rotates = None, call.stored != call.q_stored
    if k is not None:
        new = Append(None, k, v, cache, RopeTensors(None, cu_seqlens=call.cu_seqlens))
        if append_rotates:
            rope = new.rope._replace(inv_freq=call.inv_freq, log_decay=call.log_decay)
            new = new._replace(rope=rope, options=call.dims_that_rotate, stored=call.stored)
        append = build_append(new, num_counters)
    return DecodeLaunches(append, attend, append_rotates, num_counters, scratch_size)


def _config(q: Tensor, cache: KVCache, call: AttentionCall) -> configs.Config:
    """Choose settings by the rows that share a head of k; for packed queries, by their average."""
    tokens = q.shape[1]
    if call.cu_seqlens is not None:
        tokens = triton.cdiv(tokens, max(len(cache.seqlens), 1))
    rows = tokens * q.shape[2] // cache.k.shape[2]
    suffix = "_fp8" if cache.k.dtype == FP8 else ""
    config = configs.config_of("one_token" + suffix, q, cache.v)
    return config if rows <= config.block_m else configs.config_of("chunk" + suffix, q, cache.v)


def constants_of(
    q: Tensor, cache: KVCache, call: AttentionCall, config: configs.Config, splits: bool
) -> tuple[DecodeModel, DecodeBlocks]:
    """Return the second launch's constants; q: (batch, seqlen_q, heads_q, head_dim)."""
    head_dim, head_dim_v, half = cache.k.shape[3], cache.v.shape[3], call.inv_freq.shape[-1]
    regions, window, group = call.regions, call.sliding_window, q.shape[2] // cache.k.shape[2]
    packed, rest = call.cu_seqlens is not None, head_dim - 2 * half
    model = DecodeModel(
        group=group,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dims_v=_power_of_two(head_dim_v),
        half=half,
        freq_heads=freq_heads_of(call),
        pairs=_power_of_two(half),
        rotary_offset=call.rotary_offset,
        rest=rest,
        rest_dims=_power_of_two(rest) if rest else 1,
        interleaved=call.interleaved,
        # FARTHEST_INT32 is past all positions; sums of three fit in int32.
        starts=tuple(max(-FARTHEST_INT32, min(start, FARTHEST_INT32)) for start in call.starts),
        granularity=min(call.granularity, FARTHEST_INT32),
        window=0 if window is None else min(window, FARTHEST_INT32),
        from_key_0=window is None and call.starts[0] <= -FARTHEST_INT32,
        q_maps=tuple(map_of(region.q_map) for region in regions),
        k_maps=tuple(map_of(region.k_map) for region in regions),
        rotates_keys=tuple(region.k_map != call.stored for region in regions),
        softmax_scale_log2=call.scale(head_dim) * log2_e(),
        softcap_log2=call.softcap * log2_e(),
        attention_factor_sq=float(call.attention_factor) ** 2,
        paged=cache.block_table is not None,
        padded=cache.leftpad is not None,
        packed=packed,
        codes=kind_of_cache(chip_of(q)) if cache.k.dtype == FP8 else 0,
        widen=chip_of(q) is None,  # interpreted
    )
    several = q.shape[1] > 1 or packed
    # Another number of tokens compiles nothing again; another number of heads may.
    rows = config.block_m if several else min(config.block_m, triton.next_power_of_2(group))
    # Elements, up to 16 bytes, that divide all strides.
    strides = (n for x in (q, cache.k, cache.v) for n in strides_of(x)[:3])  # 0 where a size is 1
    return model, DecodeBlocks(
        block_m=config.block_m,
        block_n=config.block_n,
        align=math.gcd(VECTOR_BYTES // min(q.itemsize, cache.k.itemsize), *strides),
        several_tokens=several,
        splits=splits,
        merge_rows=rows if splits else 0,
        merge_splits=max(1, MERGED // (rows * model.dims_v)) if splits else 0,
    )


def _power_of_two(n: int) -> int:
    """Round dims up to a power of two that tl.dot takes."""
    return max(LEAST_DIMS, triton.next_power_of_2(n))
