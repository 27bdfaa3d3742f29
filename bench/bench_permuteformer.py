"""PermuteFormer's attention against softmax attention: python bench/bench_permuteformer.py

Causal, 8 heads of q, k and v. Our time includes the permutation of q and k; that of our own softmax
attention (rerope_attention with a window of N) the rotation; SDPA gets rotated inputs.

The floor is a square matrix product's rate for 4 D D + 4 D (C + 1) / 2 operations a token and head,
D = head_dim: the state read and written, and the pairs within a chunk of C tokens, that of the
kernel. Softmax takes 4 D (N + 1) / 2. Their ratio is the gain to expect; at N = 16384 we have to
reach half of it. The operations count no exponentials, powers, permutations, rotations or memory.
"""

from __future__ import annotations

import functools

import torch
from attention import frequencies, make_inputs, trained
from compare import compare, error_of_tail, matmul_floor
from harness import Call, Report, arguments, device
from peers import sdpa
from scaling import scaling
from torch import Tensor

from extrope_kernels import (
    apply_rope_qk,
    head_permutations,
    permuteformer_attention,
    permuteformer_step,
    rerope_attention,
)
from extrope_kernels.cli import CPU_CAPABILITIES

HEADS = 8
CHUNKS_BF16 = {"AVX-512 BF16": 64, "AMX": 96}


def chunk(dtype: torch.dtype) -> int:
    """Tokens of a chunk of the kernel that runs."""
    if device() == "cuda":
        return 64
    capability = CPU_CAPABILITIES[torch.ops.extrope.cpu_capability()]
    return CHUNKS_BF16.get(capability, 48) if dtype == torch.bfloat16 else 48


def operations(seqlen: int, dim: int, dtype: torch.dtype) -> tuple[float, float]:
    """Of all heads: linear, softmax."""
    per_token = 4 * dim * dim + 4 * dim * (chunk(dtype) + 1) / 2, 4 * dim * (seqlen + 1) / 2
    return tuple(HEADS * seqlen * x for x in per_token)


def calls(qkv: list[Tensor], permutations: Tensor) -> tuple[Call, dict[str, Call]]:
    """Ours, and softmax attentions of the same size, with the leaves that gradients go to."""
    q, k, v = qkv
    freqs = frequencies(q.shape[-1])

    def ours():
        return permuteformer_attention(q, k, v, permutations=permutations)

    def softmax():
        return rerope_attention(q, k, v, freqs, window=q.shape[1])

    ours.leaves = softmax.leaves = qkv
    return ours, {"our softmax attention": softmax, **sdpa(*apply_rope_qk(q, k, freqs), v)}


def bench(report: Report, seqlen: int, dim: int, dtype: torch.dtype, training: bool) -> None:
    case = "training" if training else "forward"
    if not report.wants(f"{case} {seqlen} x {dim} {str(dtype)[6:]}"):
        return
    qkv, permutations = make_inputs(seqlen, HEADS, dim, dtype), head_permutations(HEADS, dim)
    permutations = permutations.to(device())
    first = [x[:, :1024] for x in qkv]  # the dense formula in float64 sees no more
    exact = permuteformer_attention(
        *(x.double() for x in first), permutations=permutations, backend="reference"
    )
    ours, others = calls(qkv, permutations)
    linear, softmax = operations(seqlen, dim, dtype)
    about = {
        "dtype": dtype,
        "shape": f"{seqlen} x {HEADS} x {dim}",
        "backend": device(),
        "floor": matmul_floor(linear * (3 if training else 1), dtype, device()),
        "bars": {"our softmax attention": 2 * linear / softmax} if seqlen == 16384 else {},
    }
    if training:
        compare(report, case, trained({"extrope": ours}), yardsticks=trained(others), **about)
        return
    one = [x[:, :1] for x in qkv]
    with torch.no_grad():
        compare(
            report,
            case,
            {"extrope": ours},
            yardsticks=others,
            error=lambda out: error_of_tail([exact])(out[:, : exact.shape[1]]),
            few={"extrope": lambda: permuteformer_attention(*one, permutations=permutations)},
            **about,
        )


def by_length(seqlen: int) -> dict[str, Call]:
    qkv = make_inputs(seqlen, 2, 64, torch.float32, heads=2)
    permutations = head_permutations(2, 64).to(device())
    one = [x[:, :1] for x in qkv]
    _, state = permuteformer_step(*one, permutations=permutations)
    step = functools.partial(
        permuteformer_step, *one, state, permutations=permutations, positions=seqlen
    )
    return {
        "attention": functools.partial(permuteformer_attention, *qkv, permutations=permutations),
        "one token": step,
    }


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
    scaling("permuteformer", by_length, args, about="float32, 2 heads, head_dim 64")


if __name__ == "__main__":
    main()
