"""The fused step into a cache against copies of what it writes: python bench/bench_rope_append.py

2,048 tokens of a packed projection, 32 heads of q, 8 of k and v of 128 dims, into pages of 16
slots: rotated keys and values may take 1.1 of copying both. Then all of the step, norm included,
beside its parts, each a call of its own. Its time on the host is that of one token.
"""

from __future__ import annotations

import torch
from bench_rope import backends
from compare import Floor, compare
from harness import Report, arguments, device
from shapes import HEAD_DIM, HEADS_K, HEADS_Q, PAGE_SIZE
from torch import Tensor

from extrope_kernels import apply_rope_qk, methods, rope_append_kvcache

TOKENS = 2048


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
        weights = [torch.rand(HEAD_DIM, device=device()) + 0.5 for _ in "qk"]
        self.norm = dict(zip(("q_norm_weight", "k_norm_weight"), weights))

    def append(self, q: Tensor | None = None, **norm) -> Tensor | None:
        where = {"cache_seqlens": self.lengths, "block_table": self.table}
        options = {**where, **norm, "backend": self.backend}
        return rope_append_kvcache(q, self.k, self.v, *self.caches, self.freqs, **options)

    def all(self) -> Tensor | None:
        return self.append(self.q, **self.norm)

    def apart(self) -> Tensor:
        """Norm and rotation in one pass, then the writes of PyTorch."""
        q, k = apply_rope_qk(self.q, self.k, self.freqs, **self.norm, backend=self.backend)
        slot = torch.arange(self.k.shape[1], device=device())
        rows = self.table[0, slot // PAGE_SIZE].long(), slot % PAGE_SIZE
        for cache, x in zip(self.caches, (k, self.v)):
            cache.index_put_(rows, x[0])
        return q


def bench(report: Report, dtype: torch.dtype, backend: str) -> None:
    if not report.wants(f"append {dtype}"):
        return
    tokens = 64 if report.args.quick else TOKENS
    step, one = (Step(n, dtype, backend) for n in (tokens, 1))
    into = [torch.empty_like(x) for x in (step.k, step.v)]

    def copy():
        return [a.copy_(b) for a, b in zip(into, (step.k, step.v))]

    settings = {"dtype": dtype, "backend": backend, "floor": Floor(copy)}
    compare(
        report, "append of k and v", {"extrope": step.append},
        yardsticks={"copy of k and v": copy}, bars={"copy of k and v": 1.1},
        shape=f"{tokens} x {HEADS_K} x {HEAD_DIM}", **settings,
    )  # fmt: skip
    compare(
        report, "norm, rotation and append", {"extrope": step.all},
        yardsticks={"norm and rotation, then index_put": step.apart},
        bars={"norm and rotation, then index_put": 1.0}, few={"extrope": one.all},
        shape=f"{tokens} x {HEADS_Q}/{HEADS_K} x {HEAD_DIM}", **settings,
    )  # fmt: skip


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    report = Report("rope_append", args)
    for name in backends():
        for dtype in (torch.bfloat16, torch.float32):
            bench(report, dtype, name)
    report.save()


if __name__ == "__main__":
    main()
