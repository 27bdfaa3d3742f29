"""Dual Chunk Attention against plain attention: python bench/bench_dual_chunk.py

As bench_rerope.py: 8192 tokens, 8 query heads, in chunks of 1536 tokens with a local window of 256,
ChunkLlama's for a model trained to 2048. The work and so the floor are those of plain attention.
"""

from __future__ import annotations

import functools

import torch
from attention import SCALED, by_length, compare_causal
from harness import Report, arguments
from scaling import scaling

from extrope_kernels import dual_chunk_attention


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    seqlen, chunk, local = (64, 24, 4) if args.quick else (8192, 1536, 256)
    report = Report("dual_chunk", args, chunk_size=chunk, local_window=local)
    attend = functools.partial(dual_chunk_attention, chunk_size=chunk, local_window=local)
    for head_dim, dtype in ((64, torch.float32), (128, torch.float32), (128, torch.bfloat16)):
        training = {} if dtype is torch.float32 else None
        compare_causal(report, attend, seqlen=seqlen, pairs=seqlen**2 / 2, heads_k=2,
                       head_dim=head_dim, dtype=dtype, training_bars=training)  # fmt: skip
    report.save()
    scaling("dual_chunk", by_length(attend), args, about=f"{SCALED}, chunk_size {chunk}")


if __name__ == "__main__":
    main()
