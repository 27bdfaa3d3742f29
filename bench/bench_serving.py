"""What a server batches, on a paged cache: python bench/bench_serving.py

A chunk of 1,024 tokens at the end of 8,192, 8 query heads on 2, window 1024, through pages of 16 to
256 slots: at most 1.05 of the same call on a contiguous cache, and of the attention without one.
Then the chunk and 16 single tokens on 2,048 to 32,768 in one call: at most 1.1 of its parts run
alone, one after the other.
"""

from __future__ import annotations

import functools

import torch
from attention import HEADS, frequencies, make_inputs
from compare import Floor, compare, matmul_floor
from harness import Call, Report, arguments, device
from torch import Tensor

from extrope_kernels import rerope_attention
from extrope_kernels import rerope_attention_with_kvcache as decode

HEADS_K, HEAD_DIM = 2, 128
PAGES = (16, 64, 128, 256)
WINDOW = 1024
MIXED_PAGE = 128


class Sizes:
    def __init__(self, quick: bool) -> None:
        unit = 64 if quick else 1024
        self.chunk, self.keys = unit, 8 * unit
        self.singles = [2 * unit * n for n in range(1, 17)]


def bench_chunk(report: Report, sizes: Sizes, page_size: int, dtype: torch.dtype) -> None:
    case = f"chunk, pages of {page_size}"
    if not report.wants(f"{case} {str(dtype)[6:]}"):
        return
    q, k, v = make_inputs(sizes.keys, HEADS_K, HEAD_DIM, dtype)
    q, freqs = q[:, -sizes.chunk :], frequencies(HEAD_DIM)
    table = torch.randperm(sizes.keys // page_size, device=device()).int()[None]
    pages = [x.view(-1, page_size, *x.shape[2:])[table[0].argsort()] for x in (k, v)]
    lengths = torch.tensor([sizes.keys], dtype=torch.int32, device=device())
    call = functools.partial(decode, q, freqs=freqs, cache_seqlens=lengths, window=WINDOW)
    paged = functools.partial(call, k_cache=pages[0], v_cache=pages[1], block_table=table)
    others = {
        "contiguous cache": functools.partial(call, k_cache=k, v_cache=v),
        "no cache": functools.partial(rerope_attention, q, k, v, freqs, window=WINDOW),
    }
    compare(
        report, case, {"extrope": paged}, yardsticks=others, own=others,
        bars=dict.fromkeys(others, 1.05),
        shape=f"{sizes.chunk} on {sizes.keys} x {HEADS}/{HEADS_K} x {HEAD_DIM}",
        dtype=dtype, floor=chunk_floor(sizes, dtype),
    )  # fmt: skip


def chunk_floor(sizes: Sizes, dtype: torch.dtype) -> Floor:
    pairs = sizes.chunk * (sizes.keys - sizes.chunk / 2)
    return matmul_floor(4 * HEADS * HEAD_DIM * pairs, dtype, device())


def bench_mixed(report: Report, sizes: Sizes, dtype: torch.dtype) -> None:
    case = "chunk and single tokens"
    if not report.wants(f"{case} {str(dtype)[6:]}"):
        return
    counts, lengths = [sizes.chunk] + [1] * len(sizes.singles), [sizes.keys, *sizes.singles]
    used = torch.tensor([-(-length // MIXED_PAGE) for length in lengths])
    order, ends = torch.randperm(int(used.sum())).int(), used.cumsum(0)
    table = torch.zeros(len(lengths), int(used.max()), dtype=torch.int32)
    for row, end, count in zip(table, ends, used):
        row[:count] = order[end - count : end]
    shape = len(order), MIXED_PAGE, HEADS_K, HEAD_DIM
    caches = [torch.randn(shape, device=device()).to(dtype) for _ in "kv"]
    q = torch.randn(sum(counts), HEADS, HEAD_DIM, device=device()).to(dtype)
    rows = torch.tensor([0, *counts]).cumsum(0).int()

    def part(begin: int, end: int) -> Call:
        """The sequences begin..end-1 in one call."""
        own: tuple[Tensor, ...] = (table[begin:end], torch.tensor(lengths[begin:end]).int(),
                                   rows[begin : end + 1] - rows[begin])  # fmt: skip
        blocks, seqlens, cu_seqlens = (x.to(device()) for x in own)
        return functools.partial(
            decode, q[rows[begin] : rows[end]], *caches, frequencies(HEAD_DIM), window=WINDOW,
            cache_seqlens=seqlens, block_table=blocks, cu_seqlens_q=cu_seqlens,
        )  # fmt: skip

    chunk, singles = part(0, 1), part(1, len(counts))
    compare(
        report, case, {"extrope": part(0, len(counts))},
        yardsticks={"its parts alone": lambda: (chunk(), singles())},
        bars={"its parts alone": 1.1},
        shape=f"{sizes.chunk} + {len(sizes.singles)} x 1",
        dtype=dtype, floor=chunk_floor(sizes, dtype), own=("its parts alone",),
    )  # fmt: skip


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    report, sizes = Report("serving", args, window=WINDOW), Sizes(args.quick)
    for dtype in (torch.float32, torch.bfloat16):
        for page_size in PAGES:
            bench_chunk(report, sizes, page_size, dtype)
        bench_mixed(report, sizes, dtype)
    report.save()


if __name__ == "__main__":
    main()
