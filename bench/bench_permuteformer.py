"""PermuteFormer's attention against softmax attention: python bench/bench_permuteformer.py

Causal, 8 heads of q, k and v. Our time includes the permutation of q and k; that of our own softmax
attention (rerope_attention with a window of N) the rotation. F.scaled_dot_product_attention gets
rotated inputs. All are measured in turn in one run.

Operations, multiplications and additions of a token and head, D = head_dim:
    softmax    4 D (N + 1) / 2          scores and values of the pairs that are seen
    linear     4 D D + 4 D (C + 1) / 2  the state read and written, pairs within a chunk of C
Neither counts exponentials, powers, permutations, rotations or memory. "predicted" is their ratio,
"measured" that of the times; at N = 16384 it has to be at least half the predicted one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import device, largest_error, machine, paired, peak_megabytes, save
from torch import Tensor
from tqdm import tqdm

from extrope_kernels import (
    RopeFreqs,
    apply_rope_qk,
    head_permutations,
    methods,
    permuteformer_attention,
    permuteformer_step,
    rerope_attention,
)

HEADS, CHUNK = 8, 96 if device() == "cpu" else 64


@dataclass
class LengthRow:
    """One length. Milliseconds of each; ratios are theirs / ours, in the same run."""

    direction: str
    dtype: str
    head_dim: int
    seqlen: int
    milliseconds: float
    softmax_milliseconds: float
    sdpa_milliseconds: float
    predicted: float
    measured: float
    against_sdpa: float
    megabytes: float
    error: float


def predicted(seqlen: int, dim: int) -> float:
    softmax = 4 * dim * (seqlen + 1) / 2
    return softmax / (4 * dim * dim + 4 * dim * (CHUNK + 1) / 2)


def error_of(q, k, v, permutations) -> float:
    """Largest error over the first 1024 tokens, against the dense formula in float64."""
    rows = [x[:, :1024].detach() for x in (q, k, v)]
    by = {"permutations": permutations}
    exact = permuteformer_attention(*(x.double() for x in rows), **by, backend="reference")
    return largest_error(permuteformer_attention(*rows, **by), exact)


def with_backward(call: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    grad = torch.randn_like(leaves[-1])
    return lambda: torch.autograd.grad(call(*leaves), leaves, grad)


def bench(seqlen: int, dim: int, dtype: torch.dtype, backward: bool, repeats: int) -> LengthRow:
    q, k, v = (torch.randn(1, seqlen, HEADS, dim, device=device()).to(dtype) for _ in range(3))
    permutations = head_permutations(HEADS, dim).to(device())
    freqs = RopeFreqs(methods.rope(dim).inv_freq.to(device()))
    rotated = [x.transpose(1, 2).contiguous() for x in (*apply_rope_qk(q, k, freqs), v)]
    functions = (
        ([q, k, v], lambda q, k, v: permuteformer_attention(q, k, v, permutations=permutations)),
        ([q, k, v], lambda q, k, v: rerope_attention(q, k, v, freqs, window=seqlen)),
        (rotated, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    )
    if backward:
        calls = [with_backward(call, leaves) for leaves, call in functions]
    else:
        calls = [lambda call=call, leaves=leaves: call(*leaves) for leaves, call in functions]
    times = paired(*calls, repeats=repeats)
    return LengthRow(
        "forward + backward" if backward else "forward", str(dtype)[6:], dim, seqlen, *times,
        predicted(seqlen, dim), times[1] / times[0], times[2] / times[0],
        peak_megabytes(calls[0]), error_of(q, k, v, permutations),
    )  # fmt: skip


def bench_step(dim: int, repeats: int) -> float:
    """Milliseconds of one token after any number of others."""
    q, k, v = (torch.randn(1, 1, HEADS, dim, device=device()) for _ in range(3))
    permutations = head_permutations(HEADS, dim).to(device())
    _, state = permuteformer_step(q, k, v, permutations=permutations)
    by = {"permutations": permutations, "positions": 1}
    return paired(lambda: permuteformer_step(q, k, v, state, **by), repeats=repeats)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="paired runs of each case")
    parser.add_argument("--longest", type=int, default=65536, help="end of the curve, in tokens")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="head dimensions")
    args = parser.parse_args()
    print(" ".join(f"{name}: {value}" for name, value in machine().items()))
    torch.manual_seed(0)
    lengths = [n for n in (2**x for x in range(10, 17)) if n <= args.longest]
    cases = [(n, dim, torch.float32, False) for dim in args.dims for n in lengths]
    at = min(16384, args.longest)
    cases += [(at, dim, torch.bfloat16, False) for dim in args.dims]
    cases += [(min(8192, at), dim, torch.float32, True) for dim in args.dims]
    columns = "{:19} {:9} {:>4} {:>6} {:>9} {:>10} {:>10} {:>9} {:>9} {:>9} {:>7} {:>8}"
    names = ("", "dtype", "dim", "N", "ms", "softmax ms", "SDPA ms", "predicted", "measured")
    print(columns.format(*names, "vs SDPA", "MB", "error"))
    rows = []
    for seqlen, dim, dtype, backward in tqdm(cases, desc="case", unit="case"):
        row = bench(seqlen, dim, dtype, backward, args.repeats if seqlen <= 16384 else 1)
        rows.append(row)
        times = (row.milliseconds, row.softmax_milliseconds, row.sdpa_milliseconds)
        tqdm.write(
            columns.format(
                row.direction, row.dtype, dim, seqlen, *(f"{x:.2f}" for x in times),
                f"{row.predicted:.2f}", f"{row.measured:.2f}", f"{row.against_sdpa:.2f}",
                f"{row.megabytes:.0f}", f"{row.error:.1e}",
            )
        )  # fmt: skip
    steps = {str(dim): bench_step(dim, 40 * args.repeats) for dim in args.dims}
    print("one token, ms by head_dim:", ", ".join(f"{d}: {ms:.3f}" for d, ms in steps.items()))
    save("permuteformer", rows, step_milliseconds=steps)


if __name__ == "__main__":
    main()
