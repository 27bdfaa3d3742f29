"""The entries of region attention: forward, dq and dk/dv, over one region (plain) to three; and
the rotation into the frames of all regions, and back.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache, partial
from itertools import product

from shapes import BLOCK, CHUNK, HEADS_K, HEADS_Q, LOCAL, SEQLEN, SLIDING, WINDOW

from ..case import CAPABILITIES, Case, Kernel, Source, Traffic, empty, itemsize

HEAD_DIMS = (64, 96, 128, 256)
NAMES = ("forward", "dq", "dkv")
# What models add to the softmax: a word each, and all of them together.
SOFTMAX = ("sinks", "cap", "sliding", "scale", "starts")
ALL = " ".join(("R2", *SOFTMAX))
MLA = (192, "R2 v128")  # head_dim of q and k, and of v


def cases(name: str) -> list[Case]:
    """Regions: R1 plain, R2 ReRoPE, R3 dual chunk. Every tile of both tables; at the
    common head_dim also float16, which differs by the conversions, packed sequences, and the
    regions of blockwise causal attention, which have no first key; and what models add to the
    softmax, one by one and all together, with values of another head_dim beside. wide: results in
    float32, which dq's frames are anyway.
    """
    kernel = f"attention {name}"
    every = [*product(("bfloat16",), ("R1", "R2", "R3"), HEAD_DIMS)]
    every += product(("float32",), ("R2",), HEAD_DIMS)
    every += [("float32", "R3", 128), ("float16", "R2", 128)]
    variants = "R2 packed", "R2 blocks", *(f"R2 {word}" for word in SOFTMAX), ALL
    every += [*(("bfloat16", variant, 128) for variant in variants), ("bfloat16", MLA[1], MLA[0])]
    every += [("bfloat16", "R2 wide", 128)] if name != "dq" else []
    return [
        Case(kernel, chip, dim, dtype, variant)
        for dtype, variant, dim in every
        for chip in CAPABILITIES
    ]


def rotate_cases() -> list[Case]:
    """Into the frames of R2 ReRoPE, R3 dual chunk, slow: Leaky ReRoPE, grouped: SelfExtend, and of
    XPOS in blocks; inverse: their gradients; keys: those alone, as for the forward. ReRoPE with
    every head_dim, layout and type.
    """
    variants = ["R3", "slow", "grouped", "blocks decay", "R2 interleaved", "R2 partial"]
    every = [*product(("bfloat16",), ("R2",), HEAD_DIMS)]
    every += product(("bfloat16",), [*variants, "R2 packed"], (128,))
    every += [("float16", "R2", 128), ("float32", "R2", 128)]
    every += [("bfloat16", f"R2 {words}", 128) for words in ("scale starts", "packed starts")]
    return [
        Case("attention rotate", chip, dim, dtype, variant + direction)
        for dtype, variant, dim in every
        for direction in ("", " inverse")
        for chip in CAPABILITIES
    ] + [
        Case("attention rotate", chip, 128, "bfloat16", variant)
        for variant in ("R2 keys", "R2 wide inverse")
        for chip in CAPABILITIES
    ]


def in_sample(case: Case) -> bool:
    """The common head_dim on every chip; the others where a tile, or its instructions, differ."""
    name, chip, dim = case.kernel.split()[1], case.capability, case.head_dim
    picked = {
        ("bfloat16", "R2", 128): CAPABILITIES,
        ("bfloat16", "R1", 128): {"forward": (80, 90, 100, 120), "dq": (90, 100), "dkv": (80,)}[
            name
        ],
        ("bfloat16", "R2", 64): (100,) if name == "forward" else (80,),
        ("bfloat16", "R3", 256): (86,),
        ("bfloat16", "R3", 96): (90,),
        ("float16", "R2", 128): (120,),
        ("float32", "R2", 64): (89,),
        ("float32", "R2", 256): (90,) if name == "dq" else (),
        ("bfloat16", "R2 packed", 128): (80,),
        ("bfloat16", "R2 wide", 128): (80, 90),
        ("bfloat16", ALL, 128): {"forward": (90,), "dq": (80,), "dkv": (100,)}[name],
        ("bfloat16", MLA[1], MLA[0]): {"forward": (80, 90), "dq": (100,), "dkv": (90,)}[name],
    }
    return chip in picked.get((case.dtype, case.variant, dim), ())


def rotate_in_sample(case: Case) -> bool:
    picked = {
        "R2": (80,),
        "R2 keys": (90,),
        "R3": (90,),
        "R3 inverse": (80,),
        "slow inverse": (90,),
        "grouped": (120,),
        "blocks decay inverse": (100,),
        "R2 interleaved": (100,),
        "R2 packed": (90,),
        "R2 packed starts": (80,),
        "R2 scale starts inverse": (90,),
    }
    usual = (case.head_dim, case.dtype) == (128, "bfloat16")
    return usual and case.capability in picked.get(case.variant, ())


def prepare(case: Case) -> tuple[Source, Traffic]:
    launch = _record(case)
    tile = launch.argument("TILE")
    return launch, traffic(case, tile.block_m, tile.block_n)


def prepare_rotate(case: Case) -> tuple[Source, Traffic]:
    launch = _record(case)
    return launch, _rotate_traffic(case, launch)


def score_of(case: Case):
    """The score method of a case, by the words of its variant."""
    from extrope_kernels import scores

    by_word = {
        "R1": lambda: scores.rerope(WINDOW, 1.0),
        "R2": lambda: scores.rerope(WINDOW),
        "R3": lambda: scores.dual_chunk(CHUNK, LOCAL),
        "slow": lambda: scores.rerope(WINDOW, 4.0),
        "grouped": lambda: scores.self_extend(WINDOW, 4),
        "blocks": lambda: scores.blockwise_causal(BLOCK),
    }
    word = "blocks" if case.has("blocks") else (case.variant or "R1").split()[0]
    return by_word[word]()


def layout(case: Case) -> tuple[tuple[int, ...], int]:
    score = score_of(case)
    return tuple(score.starts), score.granularity


def _launch(case: Case) -> None:
    from extrope_kernels.ops._shared.attention_call import AttentionCall, score_options
    from extrope_kernels.ops.attention.triton import backward, forward

    packed, half = case.has("packed"), case.head_dim // (4 if case.has("partial") else 2)
    start = empty(8 if packed else 1, dtype="int32") if case.has("starts") else None
    call = AttentionCall(
        empty(half),
        empty(9, dtype="int32") if packed else None,
        empty(half) if case.has("decay") else None,
        empty(HEADS_Q) if case.has("sinks") else None,
        empty(SEQLEN) if case.has("scale") else None,
        start,
        start,
        softcap=50.0 if case.has("cap") else 0.0,
        sliding_window=SLIDING if case.has("sliding") else None,
        **score_options(score_of(case)),
        log_n=4096.0 if packed else None,
        interleaved=case.has("interleaved"),
        float32_results=case.has("wide"),
    )
    batch = () if packed else (1,)
    rows = partial(empty, *batch, SEQLEN, dtype=case.dtype)
    q, k = rows(HEADS_Q, case.head_dim), rows(HEADS_K, case.head_dim)
    v, out = rows(HEADS_K, dim_v(case)), rows(HEADS_Q, dim_v(case))
    if case.kernel.endswith("forward") or case.has("keys"):
        forward(q, k, v, call)
    else:
        backward(out, None, q, k, v, out, empty(*batch, HEADS_Q, SEQLEN), call)


def results_size(case: Case) -> int:
    """Bytes of an element of out or of a gradient."""
    return 4 if case.has("wide") else itemsize(case.dtype)


def dim_v(case: Case) -> int:
    return 128 if case.has("v128") else case.head_dim


def _record(case: Case):
    from .triton_compiler import record

    name, nth = case.kernel.split()[1], -1 if case.has("inverse") else 0
    return record(f"{name}_kernel", case.capability, lambda: _launch(case), nth)


def traffic(case: Case, block_m: int, block_n: int) -> Traffic:
    """What a launch with tiles of so many rows does, plain or not."""
    name, size = case.kernel.split()[-1], itemsize(case.dtype)
    of_results = results_size(case)
    dim, of_v = case.head_dim, dim_v(case)
    starts, granularity = layout(case)
    window = SLIDING if case.has("sliding") else SEQLEN
    q_rows, k_rows = SEQLEN * HEADS_Q * dim, SEQLEN * HEADS_K * dim
    out_rows, v_rows = SEQLEN * HEADS_Q * of_v, SEQLEN * HEADS_K * of_v
    per_row = 4 * SEQLEN * HEADS_Q  # lse, delta
    k_frames = len(starts) * k_rows
    frames = len(starts) * q_rows + k_frames
    by_key = name == "dkv"
    own, other = (block_n, block_m) if by_key else (block_m, block_n)
    moved = {
        "forward": size * (k_frames + v_rows + q_rows) + of_results * out_rows + per_row,
        "dq": size * (frames + v_rows + 2 * out_rows) + 2 * per_row + 4 * len(starts) * q_rows,
        "dkv": size * (frames + v_rows + out_rows)
        + (of_results * v_rows + 4 * len(starts) * k_rows + 2 * per_row),
    }
    stored = {
        "forward": own * of_v * of_results,
        "dq": len(starts) * own * dim * 4,
        "dkv": own * (of_v * of_results + len(starts) * dim * 4),
    }
    depth = {"forward": dim + of_v, "dq": 2 * dim + of_v, "dkv": 2 * (dim + of_v)}
    return Traffic(
        bytes=moved[name],
        blocks=-(-SEQLEN // own) * (HEADS_K if by_key else HEADS_Q),
        passes=(HEADS_Q * tiles(starts, granularity, own, other, by_key, window),),
        loaded=other * (dim + of_v) * size,  # k and v, or q and dout
        stored=stored[name],
        operations=2 * block_m * block_n * depth[name],
    )


def _rotate_traffic(case: Case, launch) -> Traffic:
    """q and k once, and their frames; what a program loads and stores for one head."""
    tile, size = launch.argument("TILE"), itemsize(case.dtype)
    inverse = case.has("inverse")
    heads = HEADS_Q * len(tile.q_maps) + HEADS_K * len(tile.k_maps)
    sources = (HEADS_Q if tile.q_maps else 0) + (HEADS_K if tile.k_maps else 0)
    raw = results_size(case) if inverse else size
    moved = SEQLEN * case.head_dim * (raw * sources + (4 if inverse else size) * heads)
    row = tile.tokens * case.head_dim
    blocks = math.prod(launch.grid)
    each = -(-SEQLEN // tile.tokens)
    return Traffic(
        bytes=moved,
        blocks=blocks,
        passes=tuple(
            each * heads for heads, maps in ((HEADS_K, tile.k_maps), (HEADS_Q, tile.q_maps)) if maps
        ),
        loaded=row * (4 if inverse else size),
        stored=row * raw,
    )


@lru_cache
def tiles(
    starts: tuple[int, ...],
    granularity: int,
    own: int,
    other: int,
    by_key: bool,
    window: int = SEQLEN,
) -> int:
    """How many tiles of `other` rows all tiles of `own` rows of one head go through."""
    count = 0
    for region in range(len(starts)):
        low, high = (
            [_first_key(i, starts, granularity, window, r) for i in range(SEQLEN)]
            for r in (region, region + 1)
        )
        for first in range(0, SEQLEN, own):
            last = min(first + own, SEQLEN) - 1
            if by_key:  # the queries whose keys, all rising, begin before the last and end after
                begin, end = bisect_right(high, first), bisect_right(low, last)
            else:
                begin, end = low[first], high[last]
            count += -(-max(end - begin, 0) // other)
    return count


def _first_key(position: int, starts, granularity: int, window: int, region: int) -> int:
    key = position + 1
    if region < len(starts):
        first = position // granularity * granularity + starts[region]
        key = min(key, max(first, position + 1 - window))
    return max(key, 0)


def _plain(case: Case) -> Case:
    return Case(f"plain {case.kernel}", case.capability, case.head_dim, case.dtype)


KERNELS = [
    Kernel(
        name=f"attention {name}",
        cases=cases(name),
        prepare=prepare,
        sample=in_sample,
        plain=_plain,
        holds_stack=name == "dkv",
    )
    for name in NAMES
]
KERNELS.append(
    Kernel(
        name="attention rotate",
        cases=rotate_cases(),
        prepare=prepare_rotate,
        sample=rotate_in_sample,
    )
)
