"""The entries of the rotation by given cosines and sines, in Triton."""

from __future__ import annotations

from itertools import product
from unittest import mock

import torch
from shapes import HEADS_K, HEADS_Q
from shapes import SEQLEN as TOKENS

from ..case import CAPABILITIES, Case, Kernel, Source, Traffic, empty, itemsize


def cases() -> list[Case]:
    """Tables in the dtype of q, as models have them."""
    dims = {"bfloat16": (64, 128, 256), "float32": (128,), "float16": (128,)}
    return [
        Case("rope cos sin triton", chip, dim, dtype, layout)
        for dtype, some in dims.items()
        for chip, dim, layout in product(CAPABILITIES, some, ("halves", "interleaved"))
    ]


def in_sample(case: Case) -> bool:
    usual = (case.dtype, case.head_dim) == ("bfloat16", 128)
    return usual and (case.capability, case.variant) in ((90, "halves"), (100, "interleaved"))


def prepare(case: Case) -> tuple[Source, Traffic]:
    from .triton_compiler import record

    with mock.patch.object(torch.Tensor, "data_ptr", lambda x: 16 * id(x)):
        launch = record("cos_sin_kernel", case.capability, lambda: _launch(case))
    tile = launch.argument("TILE")
    tiles, shares = launch.grid[:2]
    size = case.head_dim * itemsize(case.dtype)
    moved = 2 * TOKENS * (HEADS_Q + HEADS_K) * size + TOKENS * size
    passes = (tiles * HEADS_Q, tiles * HEADS_K)
    loaded = tile.tokens * size
    return launch, Traffic(moved, tiles * shares, passes, loaded, loaded)


def _launch(case: Case) -> None:
    """32 heads of q, 8 of k."""
    from extrope_kernels.ops.rope.triton.cos_sin import rope_cos_sin

    q, k = (empty(1, TOKENS, n, case.head_dim, dtype=case.dtype) for n in (HEADS_Q, HEADS_K))
    cos, sin = (empty(1, TOKENS, case.head_dim // 2, dtype=case.dtype) for _ in range(2))
    rope_cos_sin(q, k, cos, sin, interleaved=case.has("interleaved"))


KERNELS = [
    Kernel(name="rope cos sin triton", cases=cases(), prepare=prepare, sample=in_sample),
]
