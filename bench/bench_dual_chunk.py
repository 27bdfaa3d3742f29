"""Dual Chunk Attention against plain attention: python bench/bench_dual_chunk.py

As bench_rerope.py: 8192 tokens, 8 query heads, in chunks of 1536 tokens with a local window of 256,
ChunkLlama's for a model trained to 2048; on a GPU 32 heads on 8, bf16, a local window of 512. The
work and so the floor are those of plain attention.
"""

from __future__ import annotations

import functools

import torch
from attention import SCALED, by_length, causal_sizes, compare_causal
from harness import Report, arguments, device
from scaling import scaling
from shapes import CHUNK, LOCAL, SEQLEN

from extrope_kernels import dual_chunk_attention


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    on_gpu = device() == "cuda" and not args.quick
    seqlen, chunk, local = (64, 24, 4) if args.quick else (SEQLEN, CHUNK, LOCAL if on_gpu else 256)
    report = Report("dual_chunk", args, chunk_size=chunk, local_window=local)
    attend = functools.partial(dual_chunk_attention, chunk_size=chunk, local_window=local)
    for sizes in causal_sizes(args.quick):
        compare_causal(report, attend, seqlen=seqlen, pairs=seqlen**2 / 2, **sizes)
    report.save()
    scaling("dual_chunk", by_length(attend), args, about=f"{SCALED}, chunk_size {chunk}")


if __name__ == "__main__":
    main()
