"""RMSNorm and the rotation in one pass against the rotation alone: python bench/bench_rope_norm.py

q (1, 8192, 32, 128) and k with 8 heads; weights of a head (Qwen3, Gemma 3) and of all heads
together (OLMo 2), beside two passes: rms_norm of PyTorch, then our rotation. The norm may add 15%
to the "rotation alone".
"""

from __future__ import annotations

import torch
from bench_rope import backends
from compare import Floor, compare, error_of_tail
from harness import Report, arguments, device
from machine import kept_memory
from shapes import HEAD_DIM, HEADS_K, HEADS_Q, SEQLEN
from torch.nn.functional import rms_norm

from extrope_kernels import apply_rope_qk, methods

EPS = 1e-6
NAMES = ("q_norm_weight", "k_norm_weight")


def bench(report: Report, dtype: torch.dtype, together: bool, name: str) -> None:
    case = "norm of all heads" if together else "norm of each head"
    if not report.wants(f"{case} {dtype}"):
        return
    seqlen, backend = 256 if report.args.quick else SEQLEN, backends()[name]
    heads = HEADS_Q, HEADS_K
    qk = [torch.randn(1, seqlen, n, HEAD_DIM, device=device()).to(dtype) for n in heads]
    sizes = [n * HEAD_DIM if together else HEAD_DIM for n in heads]
    weights = [torch.rand(n, device=device()) + 0.5 for n in sizes]
    freqs = methods.rope(HEAD_DIM).to(device())
    normed = dict(zip(NAMES, weights), norm_eps=EPS)

    def two_passes():
        flat = [x.flatten(2) if together else x for x in qk]
        rows = [rms_norm(x, w.shape, w.to(dtype), EPS) for x, w in zip(flat, weights)]
        rows = [x.view_as(like) for x, like in zip(rows, qk)]
        return apply_rope_qk(*rows, freqs, backend=backend)

    into = [torch.empty_like(x) for x in qk]
    tails = [x[:, -64:].double() for x in qk]
    exact = apply_rope_qk(
        *tails, freqs, positions=max(seqlen - 64, 0), backend="reference", **normed
    )
    compare(
        report, case,
        {"extrope": lambda: apply_rope_qk(*qk, freqs, backend=backend, **normed),
         "rms_norm, then extrope": two_passes},
        yardsticks={"rotation alone": lambda: apply_rope_qk(*qk, freqs, backend=backend)},
        bars={"rotation alone": 1.15, "rms_norm, then extrope": 1.0},
        error=error_of_tail(list(exact)), dtype=dtype, backend=name,
        shape=f"{seqlen} x {HEADS_Q}/{HEADS_K} x {HEAD_DIM}",
        floor=Floor(lambda: [a.copy_(b) for a, b in zip(into, qk)]),
    )  # fmt: skip


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    report = Report("rope_norm", args)
    for name in backends():
        for dtype in (torch.bfloat16, torch.float32):
            for together in (False, True):
                with kept_memory():
                    bench(report, dtype, together, name)
    report.save()


if __name__ == "__main__":
    main()
