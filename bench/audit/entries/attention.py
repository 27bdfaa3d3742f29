"""The entries of region attention: forward, dq and dk/dv, over one region (plain) to three; and
delta, the row sums that both gradients need.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache, partial
from itertools import product
from unittest import mock

from ..case import CAPABILITIES, Case, Kernel, Source, Traffic, empty, itemsize

SEQLEN, HEADS_Q, HEADS_K, WINDOW = 8192, 32, 8, 2048
HEAD_DIMS = (64, 96, 128, 256)
NAMES = ("forward", "dq", "dkv")


def cases(name: str) -> list[Case]:
    """Regions: R1 plain, R2 ReRoPE, R3 dual chunk. Every tile of both tables; at the
    common head_dim also float16, which differs by the conversions, packed sequences with a scale
    for each row, and the regions of blockwise causal attention, which have no first key.
    """
    kernel = f"attention {name}"
    every = [*product(("bfloat16",), ("R1", "R2", "R3"), HEAD_DIMS)]
    every += product(("float32",), ("R2",), HEAD_DIMS)
    more = [
        ("float32", "R3"),
        ("float16", "R2"),
        ("bfloat16", "R2 packed"),
        ("bfloat16", "R2 blocks"),
    ]
    every += [(dtype, variant, 128) for dtype, variant in more]
    return [
        Case(kernel, chip, dim, dtype, variant)
        for dtype, variant, dim in every
        for chip in CAPABILITIES
    ]


def delta_cases() -> list[Case]:
    return [
        Case("attention delta", chip, dim, dtype, "R1")
        for dtype in ("bfloat16", "float32")
        for dim in HEAD_DIMS
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
    }
    return chip in picked.get((case.dtype, case.variant, dim), ())


def prepare(case: Case) -> tuple[Source, Traffic]:
    launch = _record(case)
    tile = launch.kwargs["TILE"]
    by_tile = _delta_traffic if case.kernel.endswith("delta") else traffic
    return launch, by_tile(case, tile.queries, tile.keys)


def layout(case: Case) -> tuple[tuple[int, ...], int]:
    from extrope_kernels.ops.attention.regions import FIRST_KEY

    if case.has("blocks"):
        return (-WINDOW, 0), WINDOW
    if case.has("R3"):
        return (FIRST_KEY, -WINDOW, 0), WINDOW
    return ((FIRST_KEY, 1 - WINDOW), 1) if case.has("R2") else ((FIRST_KEY,), 1)


def _launch(case: Case) -> None:
    from extrope_kernels.ops.attention.regions import Layout
    from extrope_kernels.ops.attention.triton import backward, forward

    packed = case.has("packed")
    starts, granularity = layout(case)
    row_scale = empty(SEQLEN) if packed else None
    cu_seqlens = empty(9, dtype="int32") if packed else None
    by = Layout(starts, granularity, 0.1, row_scale, cu_seqlens)
    batch = () if packed else (1,)
    rows = partial(empty, *batch, SEQLEN, dtype=case.dtype)
    q = [rows(HEADS_Q, case.head_dim) for _ in starts]
    k = [rows(HEADS_K, case.head_dim) for _ in starts]
    if case.kernel.endswith("forward"):
        forward(q, k, k[0], by)
    else:
        backward(q[0], None, q, k, k[0], q[0], empty(*batch, HEADS_Q, SEQLEN), by)


def _record(case: Case):
    from extrope_kernels.ops.attention.triton import launch as module

    from .triton_compiler import record

    name = case.kernel.split()[1]
    others = tuple(f"{other}_kernel" for other in (*NAMES, "delta") if other != name)
    with (
        mock.patch.object(module, "_capability", lambda device: case.capability),
        mock.patch.object(module, "_interpreted", lambda: False),
    ):
        return record(module, f"{name}_kernel", lambda: _launch(case), others)


def traffic(case: Case, queries: int, keys: int) -> Traffic:
    """What a launch with tiles of so many rows does, plain or not."""
    name, size, dim = case.kernel.split()[-1], itemsize(case.dtype), case.head_dim
    starts, granularity = layout(case)
    q_rows, k_rows = SEQLEN * HEADS_Q * dim, SEQLEN * HEADS_K * dim
    per_row = 4 * SEQLEN * HEADS_Q  # lse, delta
    frames = len(starts) * (q_rows + k_rows)
    by_key = name == "dkv"
    own, other = (keys, queries) if by_key else (queries, keys)
    moved = {
        "forward": size * (frames + k_rows + q_rows) + per_row,
        "dq": size * (frames + k_rows + q_rows) + 2 * per_row + 4 * len(starts) * q_rows,
        "dkv": size * (frames + 2 * k_rows + q_rows) + 2 * per_row + 4 * len(starts) * k_rows,
    }
    stored = {
        "forward": own * dim * size,
        "dq": len(starts) * own * dim * 4,
        "dkv": own * dim * (size + len(starts) * 4),
    }
    return Traffic(
        bytes=moved[name],
        blocks=-(-SEQLEN // own) * (HEADS_K if by_key else HEADS_Q),
        passes=(HEADS_Q * tiles(starts, granularity, own, other, by_key),),
        loaded=2 * other * dim * size,  # k and v, or q and dout
        stored=stored[name],
        operations={"forward": 2, "dq": 3, "dkv": 4}[name] * 2 * queries * keys * dim,
    )


def _delta_traffic(case: Case, queries: int, keys: int) -> Traffic:
    row = case.head_dim * itemsize(case.dtype)
    moved = SEQLEN * HEADS_Q * (2 * row + 4 + 4)  # out, dout, lse, delta
    return Traffic(moved, SEQLEN // queries * HEADS_Q, (), loaded=2 * queries * row, stored=0)


@lru_cache
def tiles(starts: tuple[int, ...], granularity: int, own: int, other: int, by_key: bool) -> int:
    """How many tiles of `other` rows all tiles of `own` rows of one head go through."""
    count = 0
    for region in range(len(starts)):
        low, high = (
            [_first_key(i, starts, granularity, r) for i in range(SEQLEN)]
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


def _first_key(position: int, starts, granularity: int, region: int) -> int:
    key = position + 1
    if region < len(starts):
        key = min(key, position // granularity * granularity + starts[region])
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
        name="attention delta",
        cases=delta_cases(),
        prepare=prepare,
        sample=lambda case: (case.capability, case.head_dim, case.dtype) == (90, 128, "bfloat16"),
    )
)
