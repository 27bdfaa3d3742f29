"""The entries of the permutation: Triton, and CUDA C++. Only the size of an element matters."""

from __future__ import annotations

import re

from shapes import HEADS_K, HEADS_Q
from shapes import SEQLEN as TOKENS

from ..case import CAPABILITIES, Case, Kernel, Source, Traffic, empty, itemsize

WORDS = {"t": "int16", "j": "int32", "m": "int64"}
SYMBOL = re.compile(r"permute_kernelI(\w)Li(\d+)EEEv")
BLOCK, UNROLLED = 128, 4  # threads, heads


def triton_cases() -> list[Case]:
    return [
        Case(f"permute {part} triton", chip, 128, dtype)
        for part in ("cycles", "rows")
        for chip in CAPABILITIES
        for dtype in WORDS.values()
        if part == "rows" or dtype == "int16"
    ]


def prepare_triton(case: Case) -> tuple[Source, Traffic]:
    from .triton_compiler import record

    kernel = "cycles_kernel" if "cycles" in case.kernel else "permute_kernel"
    launch = record(kernel, case.capability, lambda: _launch(case))
    row = case.head_dim * itemsize(case.dtype)
    if "cycles" in case.kernel:
        return launch, Traffic(HEADS_K * case.head_dim * (8 + 16), HEADS_K, (), 0, 0)
    # Reads dim by dim, from one row at a time. A permutation has one head of k, in no loop.
    tiles, blocks = launch.grid[0], launch.grid[0] * launch.grid[1]
    moved = 2 * TOKENS * (HEADS_Q + HEADS_K) * row
    stored = launch.argument("TILE").block_m * row
    return launch, Traffic(moved, blocks, (tiles * HEADS_Q,), 0, stored)


def _launch(case: Case) -> None:
    from extrope_kernels.ops.permute.power import Power
    from extrope_kernels.ops.permute.triton import permute

    q, k = (empty(1, TOKENS, n, case.head_dim, dtype=case.dtype) for n in (HEADS_Q, HEADS_K))
    rows = empty(HEADS_K, case.head_dim, dtype="int64")
    positions = empty(1, TOKENS, dtype="int64")
    power = Power(rows, positions, False, 0, None, False)
    permute([q, k], [empty(*x.shape, dtype=case.dtype) for x in (q, k)], power)


def cuda_cases() -> list[Case]:
    return [
        Case("permute cuda", chip, 128, dtype, kind)
        for chip in CAPABILITIES
        for dtype in WORDS.values()
        for kind in ("vectors", "elements")
    ]


def prepare_cuda(case: Case) -> tuple[Source, Traffic]:
    from . import nvcc

    row, wide = case.head_dim * itemsize(case.dtype), case.has("vectors") * BLOCK * 16
    heads = HEADS_Q + HEADS_K
    tiles = TOKENS * row // (BLOCK * 16)
    moved, loaded = 2 * TOKENS * heads * row, UNROLLED * wide
    traffic = Traffic(moved, tiles, (tiles * heads / UNROLLED,), loaded, loaded)
    return nvcc.Function("permute/permute.cu", BLOCK // 32, case, _case_of, cuda_cases), traffic


def _case_of(chip: int, symbol: str) -> Case:
    name = SYMBOL.search(symbol)
    kind = "vectors" if int(name[2]) > 1 else "elements"
    return Case("permute cuda", chip, 128, WORDS[name[1]], kind)


KERNELS = [
    *(
        Kernel(
            name,
            [case for case in triton_cases() if case.kernel == name],
            prepare_triton,
            lambda case: case.dtype == "int16" or case.capability in (80, 90),
        )
        for name in ("permute rows triton", "permute cycles triton")
    ),
    Kernel(
        "permute cuda",
        cuda_cases(),
        prepare_cuda,
        lambda case: True,
        at_once=True,
    ),
]
