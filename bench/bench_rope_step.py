"""RMSNorm and the rotation in one pass, and the append: python bench/bench_rope_step.py

Norm: q (1, 8192, 32, 128) and k with 8 heads, weights of a head (Qwen3, Gemma 3) and of all heads
together (OLMo 2), beside two passes: rms_norm of PyTorch, then our rotation. The norm may add 15%
to the "rotation alone". Append: 2,048 tokens of a packed projection, 32 heads of q, 8 of k and v of
128 dims, into pages of 16 slots: rotated keys and values may take 1.1 of copying both. Then with q,
beside its parts, each a call of its own.
"""

from __future__ import annotations

from functools import partial

import torch
from bench_rope import backends
from compare import Floor, compare, error_of_tail
from harness import Report, arguments, device
from shapes import HEAD_DIM, HEADS_K, HEADS_Q, PAGE_SIZE, SEQLEN
from torch import Tensor
from torch.nn.functional import rms_norm

from extrope_kernels import apply_rope_qk, methods, rope_append_kvcache

EPS, TOKENS = 1e-6, 2048
NAMES = ("q_norm_weight", "k_norm_weight")


def bench_norm(report: Report, dtype: torch.dtype, together: bool, name: str) -> None:
    case = "norm of all heads" if together else "norm of each head"
    if not report.wants(case, dtype):
        return
    seqlen, backend = 256 if report.args.quick else SEQLEN, backends()[name]
    heads = HEADS_Q, HEADS_K
    qk = [torch.randn(1, seqlen, n, HEAD_DIM, device=device()).to(dtype) for n in heads]
    sizes = [n * HEAD_DIM if together else HEAD_DIM for n in heads]
    weights = [torch.rand(n, device=device()) + 0.5 for n in sizes]
    freqs = methods.rope(HEAD_DIM).to(device())
    normed = dict(zip(NAMES, weights), norm_eps=EPS)

    def two_passes():
        flat = [x.flatten(2) if together else x for x in qk]
        rows = [rms_norm(x, w.shape, w.to(dtype), EPS) for x, w in zip(flat, weights)]
        rows = [x.view_as(like) for x, like in zip(rows, qk)]
        return apply_rope_qk(*rows, freqs, backend=backend)

    into = [torch.empty_like(x) for x in qk]
    tails = [x[:, -64:].double() for x in qk]
    last = {"positions": max(seqlen - 64, 0), "backend": "reference"}
    exact = apply_rope_qk(*tails, freqs, **last, **normed)
    rotate = partial(apply_rope_qk, *qk, freqs, backend=backend)
    compare(
        report, case, {"extrope": partial(rotate, **normed), "rms_norm, then extrope": two_passes},
        yardsticks={"rotation alone": rotate},
        bars={"rotation alone": 1.15, "rms_norm, then extrope": 1.0},
        error=error_of_tail(list(exact)), dtype=dtype, backend=name,
        shape=f"{seqlen} x {HEADS_Q}/{HEADS_K} x {HEAD_DIM}",
        floor=Floor(lambda: [a.copy_(b) for a, b in zip(into, qk)]),
    )  # fmt: skip


class Step:
    """A packed projection and a cache with room for it."""

    def __init__(self, tokens: int, dtype: torch.dtype, backend: str) -> None:
        sizes, pages = [HEADS_Q, HEADS_K, HEADS_K], max(2 * tokens // PAGE_SIZE, 8)
        packed = torch.randn(1, tokens, sum(sizes), HEAD_DIM, device=device()).to(dtype)
        self.q, self.k, self.v = packed.split(sizes, 2)
        shape = pages, PAGE_SIZE, HEADS_K, HEAD_DIM
        self.caches = [torch.zeros(shape, device=device(), dtype=dtype) for _ in "kv"]
        self.table = torch.randperm(pages, device=device()).int()[None]
        self.lengths = torch.zeros(1, dtype=torch.int32, device=device())
        self.freqs, self.backend = methods.rope(HEAD_DIM).to(device()), backend

    def append(self, q: Tensor | None = None) -> Tensor | None:
        where = {"cache_seqlens": self.lengths, "block_table": self.table}
        options = {**where, "backend": self.backend}
        return rope_append_kvcache(q, self.k, self.v, *self.caches, self.freqs, **options)

    def apart(self) -> Tensor:
        """Rotate in one pass, then write by PyTorch."""
        q, k = apply_rope_qk(self.q, self.k, self.freqs, backend=self.backend)
        slot = torch.arange(self.k.shape[1], device=device())
        rows = self.table[0, slot // PAGE_SIZE].long(), slot % PAGE_SIZE
        for cache, x in zip(self.caches, (k, self.v)):
            cache.index_put_(rows, x[0])
        return q


def bench_append(report: Report, dtype: torch.dtype, backend: str) -> None:
    if not report.wants("append", dtype):
        return
    tokens = 64 if report.args.quick else TOKENS
    step, one = (Step(n, dtype, backend) for n in (tokens, 1))
    rows = step.k, step.v, step.q
    into = [torch.empty_like(x) for x in rows]

    def copy(count: int):
        return [a.copy_(b) for a, b in zip(into[:count], rows)]

    kv, settings = partial(copy, 2), {"dtype": dtype, "backend": backend}
    whole, of_one = (partial(each.append, each.q) for each in (step, one))
    compare(
        report, "append of k and v", {"extrope": step.append},
        yardsticks={"copy of k and v": kv}, bars={"copy of k and v": 1.1},
        shape=f"{tokens} x {HEADS_K} x {HEAD_DIM}", floor=Floor(kv), **settings,
    )  # fmt: skip
    compare(
        report, "rotation and append", {"extrope": whole},
        yardsticks={"rotation, then index_put": step.apart},
        bars={"rotation, then index_put": 1.0}, few={"extrope": of_one},
        shape=f"{tokens} x {HEADS_Q}/{HEADS_K} x {HEAD_DIM}", floor=Floor(partial(copy, 3)),
        **settings,
    )  # fmt: skip


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    report = Report("rope_step", args)
    for name in set(backends()) - {"cuda"}:  # which has the rotation alone
        for dtype in (torch.bfloat16, torch.float32):
            for together in (False, True):
                bench_norm(report, dtype, together, name)
            bench_append(report, dtype, name)
    report.save()


if __name__ == "__main__":
    main()
