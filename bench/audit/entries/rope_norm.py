"""The entries of the rotation with a norm before it, in Triton."""

from __future__ import annotations

from itertools import product
from unittest import mock

import torch
from shapes import HEADS_K, HEADS_Q
from shapes import SEQLEN as TOKENS

from ..case import CAPABILITIES, Case, Kernel, Source, Traffic, empty, itemsize

# forward, backward; weights of a head, or of all heads together; half of the dims pass unrotated.
KINDS = [
    f"{layout} {direction}{more}"
    for layout, direction in product(("halves", "interleaved"), ("forward", "backward"))
    for more in ("", " together", " partial")
]


def cases() -> list[Case]:
    dims = {"bfloat16": (64, 128, 256), "float32": (128,), "float16": (128,)}
    return [
        Case("rope norm triton", chip, dim, dtype, kind)
        for dtype, some in dims.items()
        for chip, dim, kind in product(CAPABILITIES, some, KINDS)
    ]


def in_sample(case: Case) -> bool:
    wanted = {90: "halves", 100: "interleaved"}
    layout = wanted.get(case.capability)
    return case.dtype == "bfloat16" and case.head_dim == 128 and layout in case.variant.split()


def prepare(case: Case) -> tuple[Source, Traffic]:
    from .triton_compiler import record

    # Tensors without storage are all at 0, and so look as if normed in place.
    with mock.patch.object(torch.Tensor, "data_ptr", lambda x: 16 * id(x)):
        launch = record("norm_rotate_kernel", case.capability, lambda: _launch(case))
    tile = launch.argument("TILE")
    tiles, shares = launch.grid[:2]
    row = case.head_dim * itemsize(case.dtype)
    heads, read = HEADS_Q + HEADS_K, 2 if case.has("backward") else 1
    loops = 2 if case.has("together") else 1  # the mean square of a token comes first
    return launch, Traffic(
        bytes=TOKENS * heads * row * (read + 1),
        blocks=tiles * shares,
        passes=(tiles * HEADS_Q, tiles * HEADS_K) * loops,
        loaded=read * tile.tokens * row,
        stored=tile.tokens * row,
    )


def _launch(case: Case) -> None:
    """32 heads of q, 8 of k; weights in float32, as Gemma's 1 + w are."""
    from extrope_kernels.ops.rope.triton import norm_ops

    dim, heads = case.head_dim, (HEADS_Q, HEADS_K)
    q, k = (empty(1, TOKENS, n, dim, dtype=case.dtype) for n in heads)
    weights = [empty(n * dim if case.has("together") else dim) for n in heads]
    inv_freq = empty(dim // (4 if case.has("partial") else 2))
    options = {"interleaved": case.has("interleaved")}
    if case.has("backward"):
        saved = torch.empty_like(q), torch.empty_like(k)
        norm_ops.rope_norm_bwd(q, k, *saved, *weights, inv_freq, **options)
    else:
        norm_ops.rope_norm_fwd(q, k, *weights, inv_freq, **options)


KERNELS = [
    Kernel(name="rope norm triton", cases=cases(), prepare=prepare, sample=in_sample),
]
