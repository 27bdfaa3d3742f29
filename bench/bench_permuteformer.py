"""PermuteFormer's attention against softmax attention: python bench/bench_permuteformer.py

Causal, 8 heads of q, k and v. Our time includes the permutation of q and k; that of our own softmax
attention the rotation; SDPA gets rotated inputs.

The floor is a square matrix product's rate for 4 D D + 4 D (C + 1) / 2 operations a token and head,
D = head_dim: the state read and written, and the pairs within a chunk of C tokens, that of the
kernel. Softmax takes 4 D (N + 1) / 2. Neither counts exponentials, powers, permutations, rotations
or memory. At N = 16384 in float32 we have to be 25 times faster.
"""

from __future__ import annotations

from functools import partial

import torch
from bench_attention import frequencies, make_inputs
from compare import compare, error_of_tail, matmul_floor, trained
from harness import Report, arguments, device
from peers import sdpa

from extrope_kernels import apply_rope_qk, head_permutations, rope_attention
from extrope_kernels import permuteformer_attention as permuteformer

HEADS = 8
OWN = "our softmax attention"
HELD = 16384, torch.float32  # to the bar
CHUNK = 48  # tokens of a chunk of the CPU kernel
BACKEND = "cpu" if device() == "cpu" else "fla"


def bench(report: Report, seqlen: int, dim: int, dtype: torch.dtype, training: bool) -> None:
    case = "training" if training else "forward"
    if not report.wants(f"{case} {seqlen} x {dim}", dtype):
        return
    qkv = make_inputs(seqlen, HEADS, dim, dtype)
    given = {"permutations": head_permutations(HEADS, dim).to(device()), "backend": BACKEND}
    ours = partial(permuteformer, *qkv, **given)
    softmax = partial(rope_attention, *qkv, frequencies(dim))
    ours.leaves = softmax.leaves = qkv
    others = {OWN: softmax, **sdpa(*apply_rope_qk(*qkv[:2], frequencies(dim)), qkv[2])}
    operations = HEADS * seqlen * (4 * dim * dim + 4 * dim * (CHUNK + 1) / 2)
    compared = {"dtype": dtype, "shape": f"{seqlen} x {HEADS} x {dim}", "backend": BACKEND,
                "floor": matmul_floor(operations * (3 if training else 1), dtype),
                "own": (OWN,)}  # fmt: skip
    if training:
        compare(report, case, trained({"extrope": ours}), yardsticks=trained(others), **compared)
        return
    # The dense formula in float64 sees no more.
    first = [x[:, :1024].double() for x in qkv]
    exact = permuteformer(*first, **given | {"backend": "reference"})
    with torch.no_grad():
        compare(
            report, case, {"extrope": ours}, yardsticks=others,
            error=lambda out: error_of_tail([exact])(out[:, : exact.shape[1]]),
            few={"extrope": partial(permuteformer, *(x[:, :1] for x in qkv), **given)},
            bars={OWN: 1 / 25} if (seqlen, dtype) == HELD else {}, **compared,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    report = Report("permuteformer", args)
    lengths = (64,) if args.quick else (2048, 16384)
    for dim in (64, 128):
        for seqlen in lengths:
            bench(report, seqlen, dim, torch.float32, training=False)
        bench(report, lengths[-1], dim, torch.bfloat16, training=False)
        bench(report, min(8192, lengths[-1]), dim, torch.float32, training=True)
    report.save()


if __name__ == "__main__":
    main()
