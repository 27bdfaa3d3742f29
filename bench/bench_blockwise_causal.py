"""Blockwise causal attention (LEX) against plain attention: python bench/bench_blockwise_causal.py

8192 tokens, 8 query heads, blocks of 2048: a query sees 1024 to 2048 keys. The floor is the work on
those. "SDPA, masked" computes the same over inputs that are rotated beforehand, with a dense mask;
plain SDPA all N**2 / 2 pairs.
"""

from __future__ import annotations

import functools

import torch
from attention import SCALED, by_length, compare_causal
from harness import Report, arguments
from peers import sdpa
from scaling import scaling
from torch import Tensor

from extrope_kernels import apply_rope_qk, blockwise_causal_attention


def seen(seqlen: int, half: int) -> Tensor:
    """(seqlen, seqlen): whether query i sees key j."""
    i = torch.arange(seqlen)
    return (i <= i[:, None]) & (i >= (i[:, None] // half - 1) * half)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    seqlen, block = (64, 16) if args.quick else (8192, 2048)
    report = Report("blockwise_causal", args, block_size=block)
    attend = functools.partial(blockwise_causal_attention, block_size=block)
    mask = seen(seqlen, block // 2)

    def masked(q, k, v, freqs):
        calls = sdpa(*apply_rope_qk(q, k, freqs), v, mask=mask.to(q.device))
        return {name.replace("SDPA", "SDPA, masked"): call for name, call in calls.items()}

    for head_dim, dtype in ((64, torch.float32), (128, torch.float32), (128, torch.bfloat16)):
        training = {} if dtype is torch.float32 else None
        compare_causal(report, attend, seqlen=seqlen, pairs=float(mask.sum()), heads_k=2,
                       head_dim=head_dim, dtype=dtype, training_bars=training,
                       others=masked)  # fmt: skip
    report.save()
    scaling("blockwise_causal", by_length(attend), args, about=f"{SCALED}, block_size {block}")


if __name__ == "__main__":
    main()
