"""ReRoPE attention against PyTorch's plain attention: python bench/bench_rerope.py

N = 8192, causal, window 1024, 8 query heads; our times include the rotation, those of
F.scaled_dot_product_attention do not (it gets rotated inputs, and keys shared or repeated over the
query heads, whichever is faster). Every ratio is of medians measured in turn in one run. GFLOP/s
counts what plain causal attention needs, 2 * heads * N**2 * head_dim forward and 3.5 times that
with the backward, so the second product where a tile straddles the window shows as lost speed. The
floor of that is (1 + tile / N): 1.01 at tiles of 64 rows.

The backward in bf16 has no row: PyTorch's own takes minutes here.

The dense row is what one writes in eager PyTorch: two score matrices, a select, a softmax.

On a GPU the targets are: at most 1.03 forward and 1.04 backward against our own kernel without a
window at 8k tokens, 1.015 at 32k; never slower than two flash-attention calls and a merge;
decode at 32k to 128k within 1.05 of plain split-KV attention. A100: 0.95 of FlashAttention-2
forward, 0.85 backward; H100: 450 TFLOP/s forward, 300 backward (bf16, head_dim 128).
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

from extrope_kernels import RopeFreqs, apply_rope, apply_rope_qk, methods, rerope_attention
from extrope_kernels import rerope_attention_with_kvcache as decode

N, WINDOW, HEADS = 8192, 1024, 8


@dataclass
class AttentionRow:
    """One measured case: ratio is ours / the other's, in the same run; bar what it has to be."""

    case: str
    dtype: str
    head_dim: int
    heads: str
    seqlen: int
    milliseconds: float
    against: str
    ratio: float
    bar: float
    gflops: float
    error: float


@dataclass
class CurveRow:
    """One implementation at one length: forward time and peak memory over the inputs'."""

    implementation: str
    seqlen: int
    milliseconds: float
    megabytes: float


def make_inputs(seqlen: int, heads_k: int, head_dim: int, dtype: torch.dtype):
    shapes = [(1, seqlen, heads, head_dim) for heads in (HEADS, heads_k, heads_k)]
    return [torch.randn(shape, device=device()).to(dtype) for shape in shapes]


def frequencies(head_dim: int) -> RopeFreqs:
    freqs = methods.rope(head_dim)
    return RopeFreqs(freqs.inv_freq.to(device()))


def with_backward(attend: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    grad = torch.randn_like(leaves[0])
    for x in leaves:
        x.requires_grad_()
    return lambda: torch.autograd.grad(attend(), leaves, grad.view_as(leaves[0]))


def sdpa_calls(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[list[Tensor], Callable[[], Tensor]]]:
    """Inputs and calls of PyTorch's attention, keys shared or repeated over the query heads."""
    shared = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    groups = q.shape[2] // k.shape[2]
    repeated = [shared[0].clone(), *(x.repeat_interleave(groups, 1) for x in shared[1:])]
    attend = F.scaled_dot_product_attention
    calls = [(repeated, lambda: attend(*repeated, is_causal=True))]
    if groups > 1:
        calls.append((shared, lambda: attend(*shared, is_causal=True, enable_gqa=True)))
    return calls


def dense(q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs, window: int) -> Tensor:
    """The two-score formula in eager PyTorch, N x N twice."""
    groups = q.shape[2] // k.shape[2]
    i = torch.arange(q.shape[1], device=q.device)
    distance = i[:, None] - i
    far_q = apply_rope(q, freqs, positions=torch.full_like(i, window))
    near_q, near_k = apply_rope_qk(q, k, freqs)
    scores = [
        torch.matmul(a.transpose(1, 2), b.repeat_interleave(groups, 2).permute(0, 2, 3, 1))
        for a, b in ((near_q, near_k), (far_q, k))
    ]
    merged = torch.where(distance < window, *scores) * q.shape[-1] ** -0.5
    weights = merged.masked_fill(distance < 0, -torch.inf).softmax(-1)
    return torch.matmul(weights, v.repeat_interleave(groups, 2).transpose(1, 2)).transpose(1, 2)


class Report:
    """Prints each row when it is measured, and keeps it."""

    columns = "{:22} {:9} {:>4} {:>6} {:>7} {:>9} {:16} {:>6} {:>5} {:>8} {:>8}"

    def __init__(self) -> None:
        self.rows: list[AttentionRow] = []
        names = ("", "dtype", "dim", "heads", "N", "ms", "against", "ratio", "bar", "GFLOP/s")
        print(self.columns.format(*names, "error"))

    def add(self, row: AttentionRow) -> None:
        self.rows.append(row)
        numbers = (f"{row.ratio:.3f}", f"{row.bar:.2f}", f"{row.gflops:.0f}", f"{row.error:.1e}")
        print(
            self.columns.format(
                row.case, row.dtype, row.head_dim, row.heads, row.seqlen,
                f"{row.milliseconds:.2f}", row.against, *numbers,
            ),
            flush=True,
        )  # fmt: skip


def error_of_tail(q, k, v, freqs) -> float:
    """Largest error of the last 16 rows against the dense formula in float64."""
    rows = [x.detach().double() for x in (q[:, -16:], k, v)]
    exact = rerope_attention(*rows, freqs, window=WINDOW, backend="reference")
    out = rerope_attention(q.detach(), k.detach(), v.detach(), freqs, window=WINDOW)
    return largest_error(out[:, -16:], exact)


def bench_prefill(report, head_dim, heads_k, dtype, bars, repeats) -> None:
    """Forward, and forward with backward, against PyTorch; then our own kernel without a window."""
    q, k, v = make_inputs(N, heads_k, head_dim, dtype)
    freqs = frequencies(head_dim)
    error = error_of_tail(q, k, v, freqs)
    rotated = [*apply_rope_qk(q, k, freqs), v]
    flops = 2 * HEADS * N**2 * head_dim

    def ours(window=WINDOW):
        return rerope_attention(q, k, v, freqs, window=window)

    def add(case, times, against, bar, work):
        fastest = min(times[1:])
        report.add(
            AttentionRow(
                case, str(dtype)[6:], head_dim, f"{HEADS}/{heads_k}", N, times[0], against,
                times[0] / fastest, bar, work / times[0] / 1e6, error,
            )
        )  # fmt: skip

    with torch.no_grad():
        theirs = [call for _, call in sdpa_calls(*rotated)]
        add("forward", paired(ours, *theirs, repeats=repeats), "SDPA", bars[0], flops)
        times = paired(ours, lambda: ours(N), repeats=repeats)
        add("forward", times, "ours, no window", 1.03, flops)
    if bars[1]:
        calls = [with_backward(call, leaves) for leaves, call in sdpa_calls(*rotated)]
        times = paired(with_backward(ours, [q, k, v]), *calls, repeats=max(repeats // 2, 1))
        add("forward + backward", times, "SDPA", bars[1], 3.5 * flops)


def bench_decode(report, head_dim, heads_k, dtype, cached, repeats) -> None:
    """One token over a long cache, against PyTorch and against our own without a window."""
    q, k, v = make_inputs(cached, heads_k, head_dim, dtype)
    q = q[:, -1:]
    freqs = frequencies(head_dim)
    stored = apply_rope(k, freqs)
    theirs = decode_calls(apply_rope(q, freqs, positions=cached - 1), stored, v)
    cache = {"cache_seqlens": cached, "window": WINDOW}
    times = paired(
        lambda: decode(q, k, v, freqs, **cache),
        lambda: decode(q, stored, v, freqs, factor=1.0, **cache),
        *theirs,
        repeats=repeats,
    )
    exact = rerope_attention(
        q.double(), k.double(), v.double(), freqs, window=WINDOW, backend="reference"
    )
    error = largest_error(decode(q, k, v, freqs, **cache), exact)
    flops = 4 * HEADS * cached * head_dim
    for against, other, bar in (
        ("ours, no window", times[1], 1.15),
        ("SDPA", min(times[2:]), 1.15),
    ):
        report.add(
            AttentionRow(
                "decode", str(dtype)[6:], head_dim, f"{HEADS}/{heads_k}", cached, times[0],
                against, times[0] / other, bar, flops / times[0] / 1e6, error,
            )
        )  # fmt: skip


def decode_calls(q: Tensor, k: Tensor, v: Tensor) -> list[Callable[[], Tensor]]:
    """PyTorch's attention for one token over its best cache, heads first."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    groups, attend = q.shape[1] // k.shape[1], F.scaled_dot_product_attention
    packed = q.view(1, k.shape[1], groups, q.shape[-1])  # the heads of a group as rows
    return [
        lambda: attend(q, k, v, enable_gqa=groups > 1),
        lambda: attend(packed, k, v),
    ]


def bench_curve(lengths: list[int], dense_up_to: int) -> list[CurveRow]:
    """Time and peak memory of ours and of the dense formula, fp32, head_dim 64, 8 heads on 2."""
    progress = tqdm(lengths, desc="length", unit="length")
    return [row for n in progress for row in bench_length(n, with_dense=n <= dense_up_to)]


@torch.no_grad()
def bench_length(seqlen: int, with_dense: bool) -> list[CurveRow]:
    freqs = frequencies(64)
    q, k, v = make_inputs(seqlen, 2, 64, torch.float32)
    calls = {"extrope": lambda: rerope_attention(q, k, v, freqs, window=WINDOW)}
    if with_dense:
        calls["dense"] = lambda: dense(q, k, v, freqs, WINDOW)
    repeats = 3 if seqlen <= 8192 else 1
    return [
        CurveRow(name, seqlen, paired(call, repeats=repeats)[0], peak_megabytes(call))
        for name, call in calls.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="paired runs of each case")
    parser.add_argument("--longest", type=int, default=65536, help="end of the curve, in tokens")
    parser.add_argument("--dense", type=int, default=8192, help="longest dense run, in tokens")
    args = parser.parse_args()
    print(" ".join(f"{name}: {value}" for name, value in machine().items()))
    torch.manual_seed(0)
    report = Report()
    f32, bf16 = torch.float32, torch.bfloat16
    for head_dim, heads_k, dtype, bars in (
        (64, 2, f32, (0.85, 0.85)),
        (128, 2, f32, (0.92, 0.95)),
        (64, 8, f32, (1.05, 1.05)),
        (128, 8, f32, (1.05, 1.05)),
        (64, 2, bf16, (0.75, None)),
        (128, 2, bf16, (0.75, None)),
    ):
        bench_prefill(report, head_dim, heads_k, dtype, bars, args.repeats)
    for head_dim in (64, 128):
        for dtype in (f32, bf16):
            bench_decode(report, head_dim, 2, dtype, 32768, 5 * args.repeats)
    save("rerope", report.rows)  # now: the curve may take as long again
    lengths = [n for n in (2**x for x in range(10, 17)) if n <= args.longest]
    curve = bench_curve(lengths, args.dense)
    for row in curve:
        print(f"{row.implementation:10} {row.seqlen:6} {row.milliseconds:10.1f} ms "
              f"{row.megabytes:8.0f} MB")  # fmt: skip
    save("rerope_curve", curve)


if __name__ == "__main__":
    main()
