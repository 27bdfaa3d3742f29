"""The entries of the fused step into a cache, in Triton."""

from __future__ import annotations

from itertools import product

import torch
from shapes import BATCH, HEADS_K, HEADS_Q, PAGE_SIZE
from shapes import SEQLEN as TOKENS

from ..case import CAPABILITIES, Case, Kernel, Source, Traffic, empty, itemsize

# Many tokens, or one of each sequence; where they go; a norm of each head, or of all together; half
# of the dims pass unrotated, or all; keys where Leaky ReRoPE has them; a cache in fp8.
KINDS = [
    *(
        f"{tokens} {place} norm"
        for tokens in ("chunk", "one-token")
        for place in ("paged", "slots")
    ),
    *("chunk", "chunk together", "chunk interleaved norm", "chunk partial norm"),
    *("chunk slots fp8 norm", "one-token paged fp8 norm", "chunk paged fp8 unrotated"),
    *("chunk paged slow norm", "chunk packed paged norm", "chunk paged unrotated"),
]


def cases() -> list[Case]:
    """Every kind at the common head_dim; the others as serving engines have them."""
    usual = [("bfloat16", 128, kind) for kind in KINDS]
    others = [("bfloat16", dim, "chunk slots norm") for dim in (64, 256)]
    others += [(dtype, 128, "chunk slots norm") for dtype in ("float32", "float16")]
    return [
        Case("rope append triton", chip, dim, dtype, kind)
        for chip, (dtype, dim, kind) in product(CAPABILITIES, usual + others)
    ]


def in_sample(case: Case) -> bool:
    wanted = {90: "chunk slots norm", 100: "one-token paged norm"}
    return (case.dtype, case.head_dim) == ("bfloat16", 128) and (
        wanted.get(case.capability) == case.variant
    )


def prepare(case: Case) -> tuple[Source, Traffic]:
    from .triton_compiler import record

    launch = record("rope_append_kernel", case.capability, lambda: _launch(case))
    tile = launch.argument("TILE")
    tiles, shares = launch.grid[:2]
    row = case.head_dim * itemsize(case.dtype)
    cached = case.head_dim * itemsize(_cache_dtype(case))
    tokens = BATCH if case.has("one-token") else TOKENS
    passes = (tiles * HEADS_Q, tiles * HEADS_K) * (2 if case.has("together") else 1)
    return launch, Traffic(
        bytes=tokens * (2 * HEADS_Q * row + 2 * HEADS_K * (row + cached)),
        blocks=tiles * shares,
        passes=(*passes, tiles * HEADS_K),
        loaded=tile.tokens * row,
        stored=tile.tokens * row,
    )


def _cache_dtype(case: Case) -> str:
    return "float8_e4m3fn" if case.has("fp8") else case.dtype


def _launch(case: Case) -> None:
    """32 heads of q, 8 of k and v, views of a packed projection."""
    from extrope_kernels.ops.rope.triton import append_ops
    from extrope_kernels.scores import rerope

    dim, slots = case.head_dim, case.has("slots")
    batch, seqlen = (BATCH, 1) if case.has("one-token") else (1, TOKENS)
    packed = slots or case.has("packed")
    tokens = (batch * seqlen,) if packed else (batch, seqlen)
    sizes = [HEADS_Q, HEADS_K, HEADS_K]
    qkv = empty(*tokens, sum(sizes), dim, dtype=case.dtype).split(sizes, -2)
    pages = 4 * TOKENS // PAGE_SIZE
    paged = slots or case.has("paged")
    cache = (pages, PAGE_SIZE) if paged else (batch, 2 * TOKENS)
    caches = [empty(*cache, HEADS_K, dim, dtype=_cache_dtype(case)) for _ in "kv"]
    scales = [empty(HEADS_K), empty(HEADS_K)] if case.has("fp8") else []
    weights: list[torch.Tensor | None] = [None, None]
    if case.has("norm") or case.has("together"):
        heads = (HEADS_Q, HEADS_K) if case.has("together") else (1, 1)
        weights = [empty(n * dim) for n in heads]

    def ints(*shape: int, dtype: str = "int32") -> torch.Tensor:
        return empty(*shape, dtype=dtype)

    where = [
        None if slots else ints(batch),
        ints(batch, pages // batch) if paged and not slots else None,
        ints(*tokens, dtype="int64") if slots else None,
        ints(batch + 1) if case.has("packed") else None,
        None,
        ints(*tokens, dtype="int64") if slots else None,
    ]
    options: dict = {"interleaved": True} if case.has("interleaved") else {}
    if case.has("slow"):
        options["stored"] = [float(n) for n in rerope(4096, 4.0).stored]
    inv_freq = None if case.has("unrotated") else empty(dim // (4 if case.has("partial") else 2))
    if scales:
        where += [None, None, *scales]
    append_ops.rope_append(*qkv, *caches, *weights, inv_freq, *where, **options)


KERNELS = [
    Kernel(name="rope append triton", cases=cases(), prepare=prepare, sample=in_sample),
]
