"""Fused steps into a cache for the emulated CUDA op, judged against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from extrope_kernels import methods, scores
from extrope_kernels.ops._shared.dtypes import FP8, quantize
from extrope_kernels.ops.rope.append import reference
from extrope_kernels.testing import DTYPES

from ..cases import short
from .emulated import ops
from .norm_cases import Case, compare_rows

FILLER = -7.0  # of slots that nothing may be written to


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Step:
    """New tokens as views of one packed projection, a cache, and what the op is given beside."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    head_dim_v: int = 64
    rotary_dim: int | None = None  # 0: nothing is rotated
    blocks: tuple[int, int] = (2, 23)  # of the cache: how many, of how many slots
    tokens: tuple[int, ...] = (2, 5)
    norms: str = "hh"
    has_q: bool = True
    inv_freq: Tensor | None = None
    where: dict = field(default_factory=lambda: {"cache_seqlens": ints(3, 9)})
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        (n, m), d, d_v = self.heads, self.head_dim, self.head_dim_v
        packed = torch.randn(*self.tokens, (n + m) * d + m * d_v).to(self.dtype)
        parts = packed.split([n * d, m * d, m * d_v], -1)
        self.q, self.k, self.v = (x.unflatten(-1, (h, -1)) for x, h in zip(parts, (n, m, m)))
        self.weights: list[Tensor | None] = [None, None]
        for i, kind in enumerate(self.norms):
            if kind != "-" and (self.has_q or i == 1):
                self.weights[i] = torch.rand(d * (1 if kind == "h" else self.heads[i])) + 0.5
        if self.inv_freq is None and self.rotary_dim != 0:
            self.inv_freq = methods.rope(self.rotary_dim or d).inv_freq

    def caches(self, dtype: torch.dtype) -> list[Tensor]:
        # Gaps between heads, so that a vector too far shows.
        shapes = [(*self.blocks, self.heads[1], n + 16) for n in (self.head_dim, self.head_dim_v)]
        whole = [torch.full(shape, FILLER).to(dtype) for shape in shapes]
        return [x[..., : x.shape[-1] - 16] for x in whole]

    def run(
        self, op, dtype: torch.dtype, cached: torch.dtype | None = None, **more
    ) -> list[Tensor]:
        qkv = [x.to(dtype) if dtype != self.dtype else x for x in (self.q, self.k, self.v)]
        caches = self.caches(cached or dtype)
        given = (*self.weights, self.inv_freq)
        q = qkv[0] if self.has_q else None
        out = op(q, *qkv[1:], *caches, *given, **self.where, **self.options, **more)
        return [out, *caches]

    def check(self) -> None:
        got = self.run(ops.rope_append, self.dtype)
        same = self.run(reference.rope_append, self.dtype)
        want = self.run(reference.rope_append, torch.float64)
        ulp = min(torch.finfo(torch.float32).eps, torch.finfo(self.dtype).eps)
        for name, *values in zip(("q", "k_cache"), got, same, want):
            compare_rows(name, ulp, *values)
        assert torch.equal(got[2], same[2]), "v_cache"
        for cache, expected in zip(got[1:], want[1:]):
            assert torch.equal(cache == FILLER, expected == FILLER), "wrote where nothing goes"
            assert (cache._base[..., -16:] == FILLER).all(), "wrote between the heads"

    def case(self) -> Case:
        return self.name, self.check


def quantized(step: Step) -> None:
    """The rows of a cache of the tokens' own type, over their scale."""
    scales = {f"{n}_scale": torch.rand(step.heads[1]) / 30 + 0.01 for n in "kv"}
    plain = step.run(ops.rope_append, step.dtype)
    got = step.run(ops.rope_append, step.dtype, FP8, **scales)
    assert torch.equal(got[0], plain[0])
    for cache, rows, scale in zip(got[1:], plain[1:], scales.values()):
        written = rows != FILLER
        bits = cache.contiguous().view(torch.uint8)
        want = quantize(rows, scale).view(torch.uint8)
        filler = torch.tensor(FILLER).to(FP8).view(torch.uint8)
        assert torch.equal(bits[written], want[written]), "not rounded as the reference does"
        assert (bits[~written] == filler).all()


def past_the_end() -> None:
    """What does not fit the cache is not written; a table may name no page."""
    step = Step("end", where={"cache_seqlens": ints(20, 40)})
    _, k_cache, _ = step.run(ops.rope_append, step.dtype)
    rows = (k_cache != FILLER).flatten(2).any(-1)
    assert rows.nonzero().tolist() == [[0, 20], [0, 21], [0, 22]]
    table = torch.tensor([[0, -1], [99, 1]], dtype=torch.int32)
    where = {"cache_seqlens": ints(2, 2), "block_table": table}
    step = Step("pages", blocks=(2, 4), where=where)
    _, k_cache, _ = step.run(ops.rope_append, step.dtype)
    rows = (k_cache != FILLER).flatten(2).any(-1)
    assert rows.nonzero().tolist() == [[0, 2], [0, 3], [1, 0], [1, 1], [1, 2]]


def steps() -> Iterator[Step]:
    for dtype in DTYPES:
        for norms in ("hh", "aa", "--"):
            yield Step(f"{short(dtype)}-{norms}", dtype, norms=norms)
    odd = {"head_dim": 34, "head_dim_v": 9, "rotary_dim": 6, "heads": (3, 1)}
    yield Step("odd", **odd)
    yield Step("odd-interleaved", **odd, options={"interleaved": True})
    yield Step("partial", head_dim=80, head_dim_v=128, rotary_dim=48, heads=(5, 5))
    yield Step("interleaved", options={"interleaved": True, "attention_factor": 1.1})
    decay = {"log_decay": torch.linspace(-1e-2, 1e-2, 32)}
    where = {"cache_seqlens": ints(3, 9), **decay}
    yield Step("decay", where=where, options={"decay_origin": 5.0})
    yield Step("no-rotation", rotary_dim=0)
    yield Step("copy", rotary_dim=0, norms="--")
    yield Step("no-q", has_q=False)
    yield Step("no-tokens", tokens=(2, 0))
    yield Step("leftpad", where={"cache_seqlens": ints(3, 9), "cache_leftpad": ints(0, 4)})
    both = methods.rope(64).inv_freq * torch.rand(2, 4, 1)
    yield Step("per-head", heads=(4, 4), inv_freq=both)
    table = torch.randperm(12).int().view(2, 6)
    paged = {"cache_seqlens": ints(3, 9), "block_table": table}
    yield Step("paged", blocks=(12, 4), where=paged)
    starts = ints(0, 2, 2, 7)
    table = torch.randperm(12).int().view(3, 4)
    where = {"cache_seqlens": ints(3, 9, 5), "block_table": table, "cu_seqlens": starts}
    yield Step("packed-paged-padding", blocks=(12, 4), tokens=(9,), where=where)
    for dtype in (torch.int32, torch.int64):
        slots = torch.tensor([5, -1, 40, 0, 13, -1, 22], dtype=dtype)
        where = {"slot_mapping": slots, "positions": torch.arange(7) * 3}
        yield Step(f"slots-{short(dtype)}", blocks=(12, 4), tokens=(7,), where=where)
    for score in (scores.rerope(8), scores.dual_chunk(16, 4)):
        options = {"stored": [float(n) for n in score.stored]}
        yield Step(f"score-{score.name}", options=options)


def everything() -> Iterator[Case]:
    for step in steps():
        yield step.case()
    for dtype in DTYPES:
        step = Step(f"fp8-{short(dtype)}", dtype)
        yield step.name, lambda step=step: quantized(step)
    step = Step("fp8-odd", head_dim=34, head_dim_v=9, rotary_dim=6)
    yield step.name, lambda step=step: quantized(step)
    yield "past-the-end", past_the_end


def shared_memory() -> Iterator[Case]:
    yield Step("aa", norms="aa").case()
    yield Step("hh", torch.float64, heads=(20, 3)).case()
