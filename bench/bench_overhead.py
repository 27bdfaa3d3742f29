"""Time small calls, in units of torch.add on one element: python bench/bench_overhead.py

This is the time between Python and the kernel: eager, nothing recorded, bfloat16. The rotation and
the append have 32 heads of q and 8 of k of 128 dims, attention and the decode step 8 and 2 of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import NAN, Report, arguments, device, host_microseconds, verdict
from torch import Tensor

import extrope_kernels as ek
from extrope_kernels import methods, scores

UNIT = "torch.add on one element"
BARS = {  # in units of it, since processors differ
    "rotation of one token": 12.0,
    "append of one token": 12.0,
    "decode step with its append": 40.0,
    "attention of 16 tokens": 40.0,
}


@dataclass
class Row:
    name: str
    microseconds: float
    adds: float
    bar: float = NAN

    @property
    def verdict(self) -> str:
        return verdict(self.adds, self.bar)


COLUMNS = {
    "name": ("", 30, ""),
    "microseconds": ("us", 8, ".1f"),
    "adds": ("of torch.add", 12, ".1f"),
    "bar": ("bar", 5, ".0f"),
    "verdict": ("", 6, ""),
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=device(), dtype=torch.bfloat16)


def calls() -> dict[str, Callable[[], object]]:
    q, k = random(1, 1, 32, 128), random(1, 1, 8, 128)
    freqs, short = methods.rope(128).to(device()), methods.rope(64).to(device())
    caches, small = [random(1, 16, 8, 128) for _ in "kv"], [random(1, 16, 2, 64) for _ in "kv"]
    lengths = torch.tensor([8], dtype=torch.int32, device=device())
    token = [random(1, 1, heads, 64) for heads in (8, 2, 2)]
    tokens = [random(1, 16, heads, 64) for heads in (8, 2, 2)]
    score, one = scores.rerope(4), random(1)
    return {
        UNIT: lambda: torch.add(one, one),
        "rotation of one token": lambda: ek.apply_rope_qk(q, k, freqs, positions=4096),
        "append of one token": lambda: ek.rope_append_kvcache(
            q, k, k, *caches, freqs, cache_seqlens=lengths
        ),
        "decode step with its append": lambda: ek.rope_attention_with_kvcache(
            token[0], *small, short, score, k=token[1], v=token[2], cache_seqlens=lengths
        ),
        "attention of 16 tokens": lambda: ek.rope_attention(*tokens, short, score),
    }


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    report, unit = Report("overhead", args, COLUMNS), NAN
    for name, call in calls().items():
        for _ in range(3):
            call()
        microseconds = host_microseconds(call, *((2, 1) if args.quick else (200, 60)))
        unit = microseconds if name == UNIT else unit
        report.add(Row(name, microseconds, microseconds / unit, BARS.get(name, NAN)))
    report.save()


if __name__ == "__main__":
    main()
