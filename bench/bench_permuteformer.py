"""PermuteFormer's attention against softmax attention: python bench/bench_permuteformer.py

Causal, 8 heads of q, k and v. Our time includes the permutation of q and k; that of our own softmax
attention the rotation; SDPA gets rotated inputs.

The floor is a square matrix product's rate for 4 D D + 4 D (C + 1) / 2 operations a token and head,
D = head_dim: the state read and written, and the pairs within a chunk of C tokens, that of the
kernel. Softmax takes 4 D (N + 1) / 2. Neither counts exponentials, powers, permutations, rotations
or memory. At N = 16384 in float32 we have to be 25 times faster.
"""

from __future__ import annotations

import functools

import torch
from bench_attention import frequencies, make_inputs
from compare import compare, error_of_tail, matmul_floor, trained
from harness import Call, Report, arguments, device
from peers import sdpa
from torch import Tensor

from extrope_kernels import (
    apply_rope_qk,
    head_permutations,
    permuteformer_attention,
    rope_attention,
)

HEADS = 8
OWN = ("our softmax attention",)
CHUNK = 48  # tokens of a chunk of the CPU kernel
BACKEND = "cpu" if device() == "cpu" else "fla"


def operations(seqlen: int, dim: int) -> float:
    """Count the operations of all heads."""
    return HEADS * seqlen * (4 * dim * dim + 4 * dim * (CHUNK + 1) / 2)


def calls(qkv: list[Tensor], permutations: Tensor) -> tuple[Call, dict[str, Call]]:
    """Return ours, and softmax attentions of the same size, with the leaves for gradients."""
    q, k, v = qkv
    freqs = frequencies(q.shape[-1])

    def ours():
        return permuteformer_attention(q, k, v, permutations=permutations, backend=BACKEND)

    def softmax():
        return rope_attention(q, k, v, freqs)

    ours.leaves = softmax.leaves = qkv
    return ours, {"our softmax attention": softmax, **sdpa(*apply_rope_qk(q, k, freqs), v)}


def bench(report: Report, seqlen: int, dim: int, dtype: torch.dtype, training: bool) -> None:
    case = "training" if training else "forward"
    if not report.wants(f"{case} {seqlen} x {dim}", dtype):
        return
    qkv, permutations = make_inputs(seqlen, HEADS, dim, dtype), head_permutations(HEADS, dim)
    permutations = permutations.to(device())
    first = [x[:, :1024] for x in qkv]  # the dense formula in float64 sees no more
    exact = permuteformer_attention(
        *(x.double() for x in first), permutations=permutations, backend="reference"
    )
    ours, others = calls(qkv, permutations)
    held = seqlen == 16384 and dtype == torch.float32 and not training
    about = {
        "dtype": dtype,
        "shape": f"{seqlen} x {HEADS} x {dim}",
        "backend": BACKEND,
        "floor": matmul_floor(operations(seqlen, dim) * (3 if training else 1), dtype),
        "bars": {"our softmax attention": 1 / 25} if held else {},
    }
    if training:
        beside = trained(others)
        compare(report, case, trained({"extrope": ours}), yardsticks=beside, own=OWN, **about)
        return
    one = [x[:, :1] for x in qkv]
    short = functools.partial(permuteformer_attention, permutations=permutations, backend=BACKEND)
    with torch.no_grad():
        compare(
            report,
            case,
            {"extrope": ours},
            yardsticks=others,
            own=OWN,
            error=lambda out: error_of_tail([exact])(out[:, : exact.shape[1]]),
            few={"extrope": functools.partial(short, *one)},
            **about,
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
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
