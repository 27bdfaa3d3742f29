"""Blockwise causal attention (LEX) against plain attention: python bench/bench_blockwise_causal.py

8192 tokens, 8 query heads (on a GPU 32 on 8, in bf16), blocks of 2048: a query sees 1024 to 2048
keys. The floor is the work on those. "SDPA, masked" computes the same over inputs that are rotated
beforehand, with a dense mask; plain SDPA all N**2 / 2 pairs.
"""

from __future__ import annotations

import functools

import torch
from attention import SCALED, by_length, causal_sizes, compare_causal
from harness import Report, arguments
from peers import sdpa
from scaling import scaling
from shapes import BLOCK, SEQLEN
from torch import Tensor

from extrope_kernels import apply_rope_qk, blockwise_causal_attention


def seen(seqlen: int, half: int) -> Tensor:
    """(seqlen, seqlen): whether query i sees key j."""
    i = torch.arange(seqlen)
    return (i <= i[:, None]) & (i >= (i[:, None] // half - 1) * half)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    seqlen, block = (64, 16) if args.quick else (SEQLEN, BLOCK)
    report = Report("blockwise_causal", args, block_size=block)
    attend = functools.partial(blockwise_causal_attention, block_size=block)
    mask = seen(seqlen, block // 2)

    def masked(q, k, v, freqs):
        calls = sdpa(*apply_rope_qk(q, k, freqs), v, mask=mask.to(q.device))
        return {name.replace("SDPA", "SDPA, masked"): call for name, call in calls.items()}

    for sizes in causal_sizes(args.quick):
        pairs = float(mask.sum())
        compare_causal(report, attend, seqlen=seqlen, pairs=pairs, others=masked, **sizes)
    report.save()
    scaling("blockwise_causal", by_length(attend), args, about=f"{SCALED}, block_size {block}")


if __name__ == "__main__":
    main()
