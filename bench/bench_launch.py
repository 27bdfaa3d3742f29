"""How long the host takes up to a launch, without a GPU: python bench/bench_launch.py

Tensors of the CPU go through the public functions as on an H100, compiled kernels included, down to
a driver whose launch does nothing. In units of a bare launch of three arguments in the same run,
since processors differ. bfloat16, 32 heads of q and 8 of k, head_dim 128; keys and values in pages
of 16. Linear attention in parts is of 1,040 tokens, one head and head_dim 16: on a CPU, memory for
more would cost what it does not cost on a GPU. "op rope_fwd, C++" is the path that the CUDA library
shares with that of the CPU, here with the rotation of one token in place of the launch. Ends with
status 1 where a bar is missed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("EXTROPE_TRITON_CHIP", "90")

import null_driver
import torch
import triton
import triton.language as tl
from harness import NAN, Report, arguments, host_microseconds, verdict

import extrope_kernels as ek
from extrope_kernels import methods

WINDOW = 1024
# Name: the most bare launches, and the most kernels, that a call may take.
BARS = {
    "apply_rope_qk, Triton": (4.0, 1),
    "apply_rope_qk, C++": (2.0, NAN),
    "rerope_attention": (12.0, 2),
    "rerope_attention, backward": (20.0, 4),
    "rerope_attention_with_kvcache, with k and v": (8.0, 2),
    "rerope_attention_with_kvcache, packed": (8.0, 2),
    "rope_append_kvcache": (NAN, 1),
}


@dataclass
class Row:
    name: str
    microseconds: float
    launches: float = NAN  # bare ones that take as long
    bar: float = NAN
    kernels: float = NAN
    most_kernels: float = NAN

    @property
    def verdict(self) -> str:
        many = self.kernels > self.most_kernels
        return "missed" if many else verdict(self.launches, self.bar)


COLUMNS = {
    "name": ("the host's time up to the launch", 46, ""),
    "microseconds": ("us", 8, ".1f"),
    "launches": ("bare launches", 14, ".1f"),
    "bar": ("bar", 6, ".0f"),
    "kernels": ("kernels", 8, ".0f"),
    "most_kernels": ("at most", 8, ".0f"),
    "verdict": ("", 6, ""),
}


@triton.jit
def bare_kernel(x, y, count):
    tl.store(x, tl.load(y) + count)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def calls() -> dict[str, Callable[[], object]]:
    """By name; each of those that Triton runs launches its kernels once."""
    q, k, v = random(1, 16, 32, 128), random(1, 16, 8, 128), random(1, 16, 8, 128)
    token_q, token_k = random(1, 1, 32, 128), random(1, 1, 8, 128)
    freqs, x, y = methods.rope(128), torch.zeros(64), torch.zeros(64)
    pages = random(2, 64, 16, 8, 128).unbind()
    table = torch.arange(64, dtype=torch.int32)[None]
    lengths = torch.tensor([500], dtype=torch.int32)
    # A chunk of four tokens of one sequence beside one token of another.
    packed_q, packed_k = random(5, 32, 128), random(5, 8, 128)
    boundaries = torch.tensor([0, 4, 5], dtype=torch.int32)
    two_lengths, two_tables = lengths.repeat(2), table.view(2, 32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = ek.rerope_attention(*leaves, freqs, window=WINDOW, backend="triton")
    dout = random(*out.shape)
    return {
        "bare launch": lambda: bare_kernel[(1,)](x, y, 3),
        "apply_rope_qk, Triton": lambda: ek.apply_rope_qk(
            token_q, token_k, freqs, positions=4096, backend="triton"
        ),
        "apply_rope_qk, C++": lambda: ek.apply_rope_qk(token_q, token_k, freqs, positions=4096),
        "op rope_fwd_triton": lambda: torch.ops.extrope.rope_fwd_triton(
            token_q, token_k, freqs.inv_freq
        ),
        "rerope_attention": lambda: ek.rerope_attention(
            q, k, v, freqs, window=WINDOW, backend="triton"
        ),
        "rerope_attention, backward": lambda: torch.autograd.grad(
            out, leaves, dout, retain_graph=True
        ),
        "rerope_attention_with_kvcache, with k and v": lambda: ek.rerope_attention_with_kvcache(
            token_q, *pages, freqs, cache_seqlens=lengths, k=token_k, v=token_k,
            block_table=table, window=WINDOW, backend="triton",
        ),
        "rerope_attention_with_kvcache, packed": lambda: ek.rerope_attention_with_kvcache(
            packed_q, *pages, freqs, cache_seqlens=two_lengths, k=packed_k, v=packed_k,
            block_table=two_tables, cu_seqlens_q=boundaries, window=WINDOW, backend="triton",
        ),
        "rope_append_kvcache": lambda: ek.rope_append_kvcache(
            token_q, token_k, token_k, *pages, freqs, cache_seqlens=lengths, block_table=table,
            backend="triton",
        ),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__, argv)
    driver = null_driver.install()
    report = Report("launch", args, COLUMNS, triton=triton.__version__)
    unit = NAN
    for name, call in calls().items():
        call()
        driver.launches.clear()
        call()
        kernels = len(driver.launches) or NAN
        # Short rounds: on a busy machine the best of them is still undisturbed.
        size = (10, 3) if args.quick else (20, 600)
        microseconds = host_microseconds(call, *size)
        driver.launches.clear()
        unit = microseconds if name == "bare launch" else unit
        bar, most = BARS.get(name, (NAN, NAN))
        report.add(Row(name, microseconds, microseconds / unit, bar, kernels, most))
    report.save()
    return int(any(row.verdict == "missed" for row in report.rows) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
