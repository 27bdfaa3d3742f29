"""The entries of attention over a key/value cache: decode, and the append."""

from __future__ import annotations

import math
from itertools import pairwise, product

from shapes import BATCH, HEADS_K, HEADS_Q, KEYS, PAGE_SIZE
from shapes import KEYS_WINDOW as WINDOW

from ..case import CAPABILITIES, Case, Kernel, Source, Traffic, empty, itemsize
from ..chips import WARP
from ..sass import WIDE

HEAD_DIMS = (64, 96, 128, 256)
PROMPT = 64  # tokens of a chunk
METHODS = ("raw", "slow", "grouped", "plain", "chunks", "blocks")
NAMES = ("decode", "append")
SLIDING = 1024  # keys in the window of a layer that has one
# As in GPT-OSS, Gemma 2, Llama 4, MLA, a serving engine; and all at once.
DECODE_OPTIONS = (
    ("bfloat16", 64, "plain paged sinks sliding one-token"),
    ("bfloat16", 64, "raw paged sinks chunk"),
    ("bfloat16", 256, "plain paged capped one-token"),
    ("bfloat16", 128, "raw paged capped chunk"),
    ("float32", 128, "raw paged capped one-token"),
    ("bfloat16", 128, "raw paged scaled one-token"),
    ("bfloat16", 192, "plain paged values one-token"),
    ("bfloat16", 192, "raw paged values chunk"),
    ("bfloat16", 128, "raw paged packed one-token"),
    ("bfloat16", 128, "slow paged packed chunk"),
    ("bfloat16", 128, "raw paged packed sinks capped sliding scaled one-token"),
    ("bfloat16", 128, "raw paged packed sinks capped sliding scaled chunk"),
)
DECODE_FP8 = (
    *product(("bfloat16",), HEAD_DIMS, ("raw paged fp8 one-token", "raw paged fp8 chunk")),
    ("bfloat16", 128, "slow paged fp8 one-token"),
    ("float16", 128, "raw paged fp8 one-token"),
    ("float32", 128, "raw paged fp8 one-token"),
    ("bfloat16", 128, "raw paged packed sinks capped sliding scaled fp8 one-token"),
)
APPEND_OPTIONS = (
    ("bfloat16", 128, "raw paged packed chunk"),
    ("bfloat16", 128, "slow paged packed chunk"),
    ("bfloat16", 192, "plain paged values chunk"),
    ("bfloat16", 128, "raw paged fp8 one-token"),
    ("bfloat16", 128, "slow paged fp8 chunk"),
    ("bfloat16", 128, "plain paged fp8 chunk"),
)


def cases(name: str) -> list[Case]:
    """One token or a chunk; raw: ReRoPE, slow: Leaky ReRoPE, grouped: SelfExtend, plain: RoPE,
    chunks: dual chunk, blocks: blockwise causal with XPOS. Options of the softmax by their words;
    values: of two thirds of head_dim; packed: queries of all sequences one behind the other; fp8:
    the cache.

    Every tile; methods, layouts and float16 at the common head_dim.
    """
    kernel = f"cache {name}"
    variants = [f"{method} paged" for method in METHODS[1:]]
    variants += ["raw", "slow interleaved paged", "slow partial paged"]
    usual = "chunk" if name == "append" else "one-token"
    every = [*product(("bfloat16",), HEAD_DIMS, (f"raw paged {usual}",))]
    every += product(("bfloat16",), (128,), [f"{variant} {usual}" for variant in variants])
    if name == "decode":
        every += product(("float32",), HEAD_DIMS, ("raw paged one-token", "raw paged chunk"))
        every += product(("bfloat16",), HEAD_DIMS, ("raw paged chunk",))
        every += [
            ("bfloat16", 128, "slow paged chunk"),
            ("bfloat16", 128, "chunks paged chunk"),
            ("bfloat16", 256, "grouped paged one-token"),
            ("bfloat16", 256, "slow paged one-token"),
            ("float16", 128, "raw paged one-token"),
            *DECODE_OPTIONS,
            *DECODE_FP8,
        ]
    if name == "append":
        every += [("bfloat16", 128, "raw paged one-token"), ("float32", 128, "slow paged chunk")]
        every += APPEND_OPTIONS
    return [
        Case(kernel, chip, dim, dtype, variant)
        for dtype, dim, variant in every
        for chip in CAPABILITIES
    ]


def in_sample(case: Case) -> bool:
    """Where registers were found to be tightest, and every chip."""
    chip, key = case.capability, (case.dtype, case.head_dim, case.variant)
    if case.kernel == "cache append":
        few = ("grouped paged chunk", "slow paged packed chunk", "slow paged fp8 chunk")
        return chip == 80 and key in {("bfloat16", 128, variant) for variant in few}
    picked = {
        ("bfloat16", 128, "raw paged one-token"): CAPABILITIES,
        ("bfloat16", 256, "raw paged one-token"): (80, 86, 120),
        ("bfloat16", 128, "raw paged fp8 one-token"): (80, 90, 120),
        ("bfloat16", 256, "raw paged fp8 one-token"): (86,),
        ("float16", 128, "raw paged one-token"): (90,),
        ("bfloat16", 64, "raw paged one-token"): (100,),
        ("float32", 256, "raw paged one-token"): (90,),
        ("bfloat16", 128, "slow paged one-token"): (80,),
        ("bfloat16", 128, "chunks paged one-token"): (90,),
        ("bfloat16", 128, "blocks paged one-token"): (100,),
        ("bfloat16", 256, "grouped paged one-token"): (90,),
        ("bfloat16", 256, "slow paged one-token"): (120,),
        ("bfloat16", 128, "slow interleaved paged one-token"): (120,),
        ("bfloat16", 128, "raw paged chunk"): (120,),
        ("bfloat16", 96, "raw paged one-token"): (86,),
        ("bfloat16", 64, "plain paged sinks sliding one-token"): (90,),
        ("bfloat16", 256, "plain paged capped one-token"): (80,),
        ("bfloat16", 192, "plain paged values one-token"): (100,),
        ("bfloat16", 128, "raw paged packed sinks capped sliding scaled one-token"): (90,),
        ("bfloat16", 128, "raw paged packed sinks capped sliding scaled chunk"): (120,),
    }
    return chip in picked.get(key, ())


def prepare(case: Case) -> tuple[Source, Traffic]:
    from .triton_compiler import record

    name = case.kernel.split()[1]
    launch = record(f"{name}_kernel", case.capability, lambda: _launch(case))
    return launch, _traffic(case, launch)


def _tokens(case: Case) -> int:
    return PROMPT if case.has("chunk") else 1


def _head_dim_v(case: Case) -> int:
    return case.head_dim * 2 // 3 if case.has("values") else case.head_dim


def _cache_dtype(case: Case) -> str:
    return "float8_e4m3fn" if case.has("fp8") else case.dtype


def _score(case: Case):
    from extrope_kernels import scores

    method = next(word for word in case.variant.split() if word in METHODS)
    return {
        "raw": lambda: scores.rerope(WINDOW),
        "slow": lambda: scores.rerope(WINDOW, 4.0),
        "grouped": lambda: scores.self_extend(WINDOW, 4),
        "plain": lambda: scores.rerope(WINDOW, 1.0),
        "chunks": lambda: scores.dual_chunk(WINDOW + 512, 512),
        "blocks": lambda: scores.blockwise_causal(2 * WINDOW),
    }[method]()


def _launch(case: Case) -> None:
    """32 heads of q, 8 of k, room for 32k keys in each of two sequences."""
    from extrope_kernels.ops._shared.attention_call import AttentionCall, score_options
    from extrope_kernels.ops._shared.dtypes import Scales
    from extrope_kernels.ops.decode.arguments import KVCache
    from extrope_kernels.ops.decode.triton import launch

    paged, pages = case.has("paged"), KEYS // PAGE_SIZE
    shape = (BATCH * pages, PAGE_SIZE) if paged else (BATCH, KEYS)
    dims = case.head_dim, _head_dim_v(case)
    caches = [empty(*shape, HEADS_K, n, dtype=_cache_dtype(case)) for n in dims]
    table = empty(BATCH, pages, dtype="int32") if paged else None
    seqlens = empty(BATCH, dtype="int32")
    boundaries = empty(BATCH + 1, dtype="int32") if case.has("packed") else None
    scales = Scales(empty(HEADS_K), empty(HEADS_K)) if case.has("fp8") else Scales()
    cache = KVCache(*caches, seqlens, table, seqlens, 0, boundaries, scales)
    tokens = (BATCH * _tokens(case),) if case.has("packed") else (BATCH, _tokens(case))
    half = case.head_dim // (4 if case.has("partial") else 2)
    call = AttentionCall(
        empty(half),
        boundaries,
        log_decay=empty(half) if case.has("blocks") else None,
        **score_options(_score(case), stored=True),
        log_n=4096.0,
        interleaved=case.has("interleaved"),
        sinks=empty(HEADS_Q) if case.has("sinks") else None,
        query_scale=empty(*tokens) if case.has("scaled") else None,
        softcap=50.0 if case.has("capped") else 0.0,
        sliding_window=SLIDING if case.has("sliding") else None,
    )
    q = empty(*tokens, HEADS_Q, case.head_dim, dtype=case.dtype)
    k, v = (empty(*tokens, HEADS_K, n, dtype=case.dtype) for n in dims)
    if case.kernel == "cache decode":
        launch.decode(q, None, None, cache, call)
    elif case.has("packed"):
        launch.decode(q, k, v, cache, call)
    else:
        launch.append(k, v, cache, call)


def _keys_by_region(case: Case) -> list[int]:
    """How many keys the last query sees in each region."""
    score, last = _score(case), KEYS - 1
    block = last // score.granularity * score.granularity
    least = KEYS - SLIDING if case.has("sliding") else 0
    bounds = [max(least, block + start) for start in score.starts] + [KEYS]
    return [end - begin for begin, end in pairwise(bounds)]


def _traffic(case: Case, launch) -> Traffic:
    name, tokens = case.kernel.split()[1], _tokens(case)
    tile, blocks = launch.argument("TILE"), math.prod(launch.grid)
    row, row_v = (n * itemsize(_cache_dtype(case)) for n in (case.head_dim, _head_dim_v(case)))
    row_q, row_out = (n * itemsize(case.dtype) for n in (case.head_dim, _head_dim_v(case)))
    wide_row, rows = _head_dim_v(case) * 4, BATCH * tokens * HEADS_Q
    if name == "append":
        moved = BATCH * tokens * HEADS_K * (row + row_v + row_q + row_out)
        # k and v go one after the other, and a row of one token has no 16 bytes for every thread.
        wide = WIDE * WARP * launch.kwargs["num_warps"]
        rows = sum(tile.block_n * n // wide * wide for n in (row_q, row_out))
        # What a thread loads by 16 bytes it stores by 8 in fp8.
        stored = 0 if case.has("fp8") else rows
        # The loop of packed tokens looks for their sequences.
        return Traffic(moved, blocks, (), loaded=0 if tile.packed else rows, stored=stored)
    keys = _keys_by_region(case)
    cached = BATCH * sum(keys) * HEADS_K * (row + row_v)
    row_blocks = -(-tokens * HEADS_Q // HEADS_K // tile.block_m)
    each = BATCH * HEADS_K * row_blocks / tile.block_n
    # The shortest loop first: one that rotates no key.
    by_length = sorted(zip(tile.rotates_keys, keys), key=lambda region: region[0])
    passes, loaded = [count * each for _, count in by_length], tile.block_n * (row + row_v)
    splits = _splits(launch, sum(keys), row_blocks)
    partial = 2 * splits * rows * wide_row  # written and read
    if tile.splits:
        # The loop that merges is shorter still.
        passes.insert(0, -(-splits // tile.merge_splits) * BATCH * HEADS_K * row_blocks)
        loaded = min(loaded, tile.merge_splits * tile.merge_rows * wide_row)
    return Traffic(
        bytes=cached + rows * (row_q + row_out) + partial,
        blocks=blocks,
        passes=tuple(passes),
        loaded=loaded,
        stored=min(tile.block_m, HEADS_Q // HEADS_K * tokens) * wide_row,
        operations=2 * tile.block_m * tile.block_n * (case.head_dim + _head_dim_v(case)),
    )


def _splits(launch, keys: int, row_blocks: int) -> int:
    """How many programs share a sequence; none where each has its own."""
    tile = launch.argument("TILE")
    blocks, taken = -(-keys // tile.block_n), BATCH * (row_blocks if tile.packed else 1)
    more = max(launch.argument("slots") - taken, 1)
    splits = -(-blocks // max(-(-taken * blocks // more), launch.argument("least_blocks")))
    return splits if splits > 1 else 0


KERNELS = [
    Kernel(
        name=f"cache {name}",
        cases=cases(name),
        prepare=prepare,
        sample=in_sample,
    )
    for name in NAMES
]
