"""Time the host up to a launch, without a GPU: python bench/bench_launch.py

CPU tensors go through the public functions as on an H100, with compiled kernels, down to a driver
whose launch does nothing. Times are in units of a bare launch of three arguments, since processors
differ: each the least of many short batches, in turns. bfloat16, 32 heads of q and 8 of k, head_dim
128; keys and values in pages of 16. Ends with status 1 if a bar is missed.
"""

from __future__ import annotations

import math
import os
import sys
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

if __name__ == "__main__":  # before Triton's decorators choose the interpreter
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("EXTROPE_TRITON_CHIP", "90")

import torch
from harness import NAN, Report, arguments, column, verdict

import extrope_kernels as ek
from extrope_kernels import methods, scores

CALLS = 12  # of a batch: one this short finds a quiet time on a busy machine
BATCHES, TURNS = 5, 80  # several batches a turn: the first finds other calls' data in the caches
# Name: the most bare launches, and the most kernels, that a call may take.
BARS = {
    "apply_rope_qk, Triton": (6.0, 1),
    "rope_attention": (12.0, 2),
    "rope_attention, backward": (30.0, 4),
    "rope_attention_with_kvcache, with k and v": (14.0, 2),
    "rope_attention_with_kvcache, packed": (14.0, 2),
    "rope_append_kvcache": (NAN, 1),
}


@dataclass
class Row:
    name: str = column("the host's time up to the launch")
    microseconds: float = column("us", ".1f")
    launches: float = column("bare launches", ".1f")
    bar: float = column("bar", ".0f")
    kernels: float = column("kernels", ".0f")
    most_kernels: float = column("at most", ".0f")

    @property
    def verdict(self) -> str:
        many = self.kernels > self.most_kernels
        return "missed" if many else verdict(self.launches, self.bar)


def calls() -> dict[str, Callable[[], object]]:
    """Return calls by name; each launches its kernels once."""
    import null_driver

    random = partial(torch.randn, dtype=torch.bfloat16)
    q, k, v = (random(1, 16, heads, 128) for heads in (32, 8, 8))
    token_q, token_k = random(1, 1, 32, 128), random(1, 1, 8, 128)
    freqs, x, y = methods.rope(128), torch.zeros(64), torch.zeros(64)
    pages = random(2, 64, 16, 8, 128).unbind()
    table = torch.arange(64, dtype=torch.int32)[None]
    lengths = torch.tensor([500], dtype=torch.int32)
    # A chunk of four tokens of one sequence beside one token of another.
    packed_q, packed_k = random(5, 32, 128), random(5, 8, 128)
    boundaries = torch.tensor([0, 4, 5], dtype=torch.int32)
    leaves, by = [x.clone().requires_grad_() for x in (q, k, v)], {"backend": "triton"}
    out = ek.rope_attention(*leaves, freqs, scores.rerope(1024), **by)
    one = {"cache_seqlens": lengths, "block_table": table, **by}
    two = {"cache_seqlens": lengths.repeat(2), "block_table": table.view(2, 32), **by}

    def decode(*args, **options):  # a score is made where it is used, as in the README
        return ek.rope_attention_with_kvcache(*args, freqs, scores.rerope(1024), **options)

    return {
        "bare launch": lambda: null_driver.bare_kernel[(1,)](x, y, 3),
        "apply_rope_qk, Triton": partial(
            ek.apply_rope_qk, token_q, token_k, freqs, positions=4096, **by
        ),
        "op rope_fwd_triton": partial(
            torch.ops.extrope.rope_fwd_triton, token_q, token_k, freqs.inv_freq
        ),
        "rope_attention": lambda: ek.rope_attention(q, k, v, freqs, scores.rerope(1024), **by),
        "rope_attention, backward": partial(
            torch.autograd.grad, out, leaves, random(*out.shape), retain_graph=True
        ),
        "rope_attention_with_kvcache, with k and v": partial(
            decode, token_q, *pages, k=token_k, v=token_k, **one
        ),
        "rope_attention_with_kvcache, packed": partial(
            decode, packed_q, *pages, k=packed_k, v=packed_k, cu_seqlens_q=boundaries, **two
        ),
        "rope_append_kvcache": partial(
            ek.rope_append_kvcache, token_q, token_k, token_k, *pages, freqs, **one
        ),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    import null_driver
    import triton

    args = arguments(__doc__, argv)
    driver = null_driver.install()
    report = Report("launch", args, triton=triton.__version__)
    kernels, best, timed = {}, {}, calls()
    for name, call in timed.items():
        call()
        driver.launches.clear()
        call()
        kernels[name] = len(driver.launches) or NAN
    for _ in range(1 if args.quick else TURNS):
        for name, call in timed.items():
            seconds = min(timeit.repeat(call, number=CALLS, repeat=BATCHES))
            best[name] = min(best.get(name, math.inf), seconds / CALLS * 1e6)
            driver.launches.clear()
    for name, microseconds in best.items():
        bar, most = BARS.get(name, (NAN, NAN))
        launches = microseconds / best["bare launch"]
        report.add(Row(name, microseconds, launches, bar, kernels[name], most))
    report.save()
    return int(any(row.verdict == "missed" for row in report.rows) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
