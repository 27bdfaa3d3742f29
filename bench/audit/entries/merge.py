"""The entries of the merge, in Triton: two sets of keys, and one more in place of float32."""

from __future__ import annotations

from itertools import product
from unittest import mock

import torch
from shapes import HEADS_Q
from shapes import SEQLEN as TOKENS

from ..case import CAPABILITIES, Case, Kernel, Source, Traffic, empty, itemsize


def cases() -> list[Case]:
    dims = {"bfloat16": (64, 128, 256), "float32": (128,), "float16": (128,)}
    return [
        Case("merge triton", chip, dim, dtype, where)
        for dtype, some in dims.items()
        for chip, dim, where in product(CAPABILITIES, some, ("two", "in-place"))
    ]


def in_sample(case: Case) -> bool:
    usual = (case.dtype, case.head_dim) == ("bfloat16", 128)
    return usual and (case.capability, case.variant) in ((90, "two"), (100, "in-place"))


def prepare(case: Case) -> tuple[Source, Traffic]:
    from .triton_compiler import record

    with mock.patch.object(torch.Tensor, "data_ptr", lambda x: 16 * id(x)):
        launch = record("merge_kernel", case.capability, lambda: _launch(case))
    tiles, heads = launch.grid[:2]
    row, block_m = case.head_dim * itemsize(case.dtype), launch.argument("TILE").block_m
    merged = case.head_dim * itemsize("float32") if case.has("in-place") else row
    first = merged if case.has("in-place") else row
    numbers = 3 * itemsize("float32")
    moved = TOKENS * HEADS_Q * (first + row + merged + numbers)
    return launch, Traffic(moved, tiles * heads, (), block_m * (first + row), block_m * merged)


def _launch(case: Case) -> None:
    from extrope_kernels.ops.attention.triton.merge import merge_fwd, merge_inplace

    shape = (1, TOKENS, HEADS_Q, case.head_dim)
    one, other = (empty(*shape, dtype=case.dtype) for _ in range(2))
    lses = [empty(1, HEADS_Q, TOKENS) for _ in range(2)]
    if case.has("in-place"):
        merge_inplace(empty(*shape), lses[0], [other], lses[1:])
    else:
        merge_fwd([one, other], lses)


KERNELS = [Kernel(name="merge triton", cases=cases(), prepare=prepare, sample=in_sample)]
