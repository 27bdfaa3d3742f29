"""The entries of the rotation: Triton, and CUDA C++."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from unittest import mock

import torch
from shapes import HEADS_K, HEADS_Q
from shapes import SEQLEN as TOKENS

from ..case import CAPABILITIES, Case, Kernel, Source, Traffic, empty, itemsize

HEAD_DIMS = (64, 96, 128, 256)
DTYPES = ("bfloat16", "float16", "float32", "float64")
KINDS = [f"{layout} {direction}" for layout in ("halves", "interleaved")
         for direction in ("forward", "gradient")]  # fmt: skip


def triton_cases() -> list[Case]:
    """gradient: with that of the angles. Other types and options at the common head_dim."""
    dims = {"bfloat16": HEAD_DIMS, "float32": HEAD_DIMS, "float16": (128,), "float64": (128,)}
    found = [
        Case("rope triton", chip, dim, dtype, kind)
        for dtype, some in dims.items()
        for chip, dim, kind in product(CAPABILITIES, some, KINDS)
    ]
    # packed: frequencies by sequence and head; partial: half of the lanes pass through.
    more = ("one-token", "packed", "decay", "axes", "partial")
    return found + [
        Case("rope triton", chip, 128, "bfloat16", f"{kind} {option}")
        for chip, kind, option in product(CAPABILITIES, (KINDS[0], KINDS[3]), more)
    ]


def in_triton_sample(case: Case) -> bool:
    chips = {
        ("bfloat16", 128): CAPABILITIES,
        ("float32", 128): (80, 90),
        ("float16", 128): (100,),
        ("float64", 128): (80,),
        ("bfloat16", 64): (86,),
        ("bfloat16", 96): (90,),
        ("float32", 256): (120,),
    }
    if case.capability not in chips.get((case.dtype, case.head_dim), ()):
        return False
    words = case.variant.split()
    if case.capability not in (80, 120) or case.dtype == "float64":
        return words in (["halves", "gradient"], ["interleaved", "forward"])
    return words[:2] in (["halves", "forward"], ["interleaved", "gradient"])


def prepare_triton(case: Case) -> tuple[Source, Traffic]:
    from .triton_compiler import record

    # Tensors without storage are all at 0, and so look as if turned in place.
    with mock.patch.object(torch.Tensor, "data_ptr", lambda x: 16 * id(x)):
        launch = record("rotate_kernel", case.capability, lambda: _launch(case))
    tile = launch.argument("TILE")
    row = 2 * tile.half * itemsize(case.dtype)
    tiles, shares = launch.grid[:2]
    heads_k = HEADS_Q if case.has("packed") else HEADS_K
    tokens = 1 if case.has("one-token") else TOKENS
    return launch, traffic(case, tokens, heads_k, tile.tokens * row, tiles, shares)


def traffic(case: Case, tokens, heads_k, tile_bytes, tiles, shares) -> Traffic:
    """Of a launch whose pass turns one head of q or k in a tile."""
    heads, read = HEADS_Q + heads_k, 2 if case.has("gradient") else 1
    return Traffic(
        bytes=tokens * heads * case.head_dim * itemsize(case.dtype) * (read + 1),
        blocks=tiles * shares,
        passes=(tiles * HEADS_Q, tiles * heads_k),
        loaded=read * tile_bytes,
        stored=tile_bytes,
    )


def _launch(case: Case) -> None:
    """32 heads of q, 8 of k (or 32, where each has its own frequencies)."""
    from extrope_kernels.ops.rope.rotation import Rotation
    from extrope_kernels.ops.rope.triton import rotate

    packed, sequences = case.has("packed"), 8
    half = case.head_dim // (4 if case.has("partial") else 2)
    tokens = 1 if case.has("one-token") else TOKENS
    q = empty(1, tokens, HEADS_Q, case.head_dim, dtype=case.dtype)
    k = empty(1, tokens, HEADS_Q if packed else HEADS_K, case.head_dim, dtype=case.dtype)
    positions = empty(sequences, dtype="int64") if packed else None
    if case.has("axes"):
        positions = empty(3, 1, tokens, dtype="int64")
    gradient = case.has("gradient")
    rotation = Rotation(
        inv_freq=empty(sequences, HEADS_Q, half) if packed else empty(1, 1, half),
        positions=positions,
        positions_are_offsets=packed,
        offset=0,
        cu_seqlens=empty(sequences + 1, dtype="int32") if packed else None,
        log_decay=empty(half) if case.has("decay") else None,
        decay_signs=(1.0, -1.0),
        amplitude=1.0,
        conjugate=gradient,
        interleaved=case.has("interleaved"),
        axes=empty(half, dtype="int32") if case.has("axes") else None,
    )
    wide = "float64" if case.dtype == "float64" else "float32"
    angle_grad = empty(1, tokens, HEADS_Q if packed else 1, half, dtype=wide) if gradient else None
    saved = [q, k] if gradient else None
    rotate([q, k], [torch.empty_like(x) for x in (q, k)], saved, angle_grad, rotation)


# (dtype, elements of an access, layout, direction, positions by axis)
CUDA_KERNELS = [(dtype, 1, "halves", "gradient", True) for dtype in DTYPES] + [
    (dtype, 16 // itemsize(dtype), *kind.split(), axes)
    for dtype, kind, axes in product(DTYPES[:3], KINDS, (False, True))
    if not (axes and "gradient" in kind)
]
BLOCK, UNROLLED = 128, {"forward": 4, "gradient": 2}  # threads, heads
SYMBOL = re.compile(r"rope_kernelI(\w+?)Li(\d+)ELb(\d)ELb(\d)ELb(\d)EEEv")
TYPES = {"f": "float32", "d": "float64", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}


def cuda_cases() -> list[Case]:
    """One kernel serves every head_dim, and one by elements whatever no vector fits."""
    return [_cuda_case(chip, *kernel) for chip, kernel in product(CAPABILITIES, CUDA_KERNELS)]


def _cuda_case(chip: int, dtype: str, elements: int, layout: str, direction: str, axes) -> Case:
    kind = f"{layout} {direction}" if elements > 1 else "elements"
    return Case("rope cuda", chip, 128, dtype, kind + " axes" * axes)


def prepare_cuda(case: Case) -> tuple[Source, Traffic]:
    from . import nvcc

    source = nvcc.Function("rope/rope.cu", BLOCK // 32, case, _case_of, cuda_cases)
    return source, _cuda_traffic(case)


def _case_of(chip: int, symbol: str) -> Case:
    name = SYMBOL.search(symbol)
    kind = ("interleaved" if name[3] == "1" else "halves",
            "gradient" if name[4] == "1" else "forward")  # fmt: skip
    return _cuda_case(chip, TYPES[name[1]], int(name[2]), *kind, name[5] == "1")


def _cuda_traffic(case: Case) -> Traffic:
    """A thread takes two vectors of every head, UNROLLED heads a pass; or, past rotary_dim, one."""
    row = case.head_dim * itemsize(case.dtype)
    tokens = BLOCK * 2 * 16 // row  # of a block
    heads = UNROLLED["gradient" if case.has("gradient") else "forward"]
    by_elements = case.has("elements")
    base = traffic(case, TOKENS, HEADS_K, tokens * row * heads, TOKENS // tokens, 1)
    return replace(
        base,
        # Two loops copy. In that which turns, the sines of the first pass count in every one.
        passes=(0, 0, TOKENS // tokens * (HEADS_Q + HEADS_K) // heads),
        loaded=0 if by_elements else heads * BLOCK * 16,
        stored=0 if by_elements else base.stored,
    )


KERNELS = [
    Kernel(
        name="rope triton",
        cases=triton_cases(),
        prepare=prepare_triton,
        sample=in_triton_sample,
    ),
    Kernel(
        name="rope cuda",
        cases=cuda_cases(),
        prepare=prepare_cuda,
        sample=lambda case: True,
        at_once=True,
    ),
]
