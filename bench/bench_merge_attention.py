"""The exact merge of two attentions over disjoint keys: python bench/bench_merge_attention.py

Two outputs (1, 8192, 32, 128) and their log-sum-exps. The floor is copy_ of three tensors of that
size, halved: two are read, one is written. The peers are the formula in PyTorch operations, which
is what a CPU runs, and what torch.compile makes of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from compare import Floor, compare, error_of_tail
from harness import Report, arguments, device
from torch import Tensor

from extrope_kernels import merge_attention
from extrope_kernels.ops.attention.merge import merge_fwd as formula

HEADS, HEAD_DIM = 32, 128


def parts(seqlen: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    outs = [torch.randn(1, seqlen, HEADS, HEAD_DIM, device=device()).to(dtype) for _ in range(2)]
    return outs, [torch.randn(1, HEADS, seqlen, device=device()) for _ in range(2)]


def error_of(outs: list[Tensor], lses: list[Tensor]) -> Callable[[object], float]:
    """The error of the merge of these parts."""
    exact, _ = merge_attention([x[:, -64:].double() for x in outs], [x[..., -64:] for x in lses])
    error = error_of_tail([exact])
    return lambda result: error(result[0])


@torch.no_grad()
def bench(report: Report, dtype: torch.dtype) -> None:
    if not report.wants(f"merge {str(dtype)[6:]}"):
        return
    seqlen = 32 if report.args.quick else 8192
    outs, lses = parts(seqlen, dtype)
    into = torch.empty_like(outs[0])
    compiled = torch.compile(formula, dynamic=False)
    compare(
        report,
        "merge",
        {
            "extrope": lambda: merge_attention(outs, lses),
            "eager": lambda: formula(outs, lses),
            "compiled": lambda: compiled(outs, lses),
        },
        error=error_of(outs, lses),
        dtype=dtype,
        shape=f"2 of {seqlen} x {HEADS} x {HEAD_DIM}",
        backend="torch" if device() == "cpu" else "triton",
        floor=Floor(lambda: into.copy_(outs[0]), 1.5),
    )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    report = Report("merge_attention", args)
    for dtype in (torch.float32, torch.bfloat16):
        bench(report, dtype)
    report.save()


if __name__ == "__main__":
    main()
