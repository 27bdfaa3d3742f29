"""What sinks, a cap and a sliding window add to attention: python bench/bench_softmax_options.py

ReRoPE attention with each of them over the same call "without", forward and with the backward, 8
query heads on 2. Sinks may add 5% and a cap 12% at 8,192 tokens; a sliding window of 1,024 at
16,384 may take 1.15 of its share of the pairs. The floor is as in bench_rerope.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from attention import HEADS, TAIL, backends, frequencies, make_inputs
from compare import compare, error_of_tail, matmul_floor, with_backward
from harness import Report, arguments, device
from shapes import SEQLEN, WINDOW

from extrope_kernels import rerope_attention

HEADS_K = 2
CAP = 50.0  # Gemma 2's


class Option(NamedTuple):
    given: dict
    seqlen: int
    bar: float
    pairs: float  # that a head computes


def options(seqlen: int, window: int) -> dict[str, Option]:
    sinks = torch.randn(HEADS, device=device())
    causal, seen = seqlen**2 / 2, 2 * seqlen * window - window**2 / 2
    return {
        "sinks": Option({"sinks": sinks}, seqlen, 1.05, causal),
        "softcap": Option({"softcap": CAP}, seqlen, 1.12, causal),
        "sliding window": Option(
            {"sliding_window": window}, 2 * seqlen, 1.15 * seen / (4 * causal), seen
        ),
    }


def bench(
    report: Report, name: str, option: Option, window: int, head_dim: int, dtype: torch.dtype
) -> None:
    q, k, v = make_inputs(option.seqlen, HEADS_K, head_dim, dtype)
    attend = functools.partial(rerope_attention, freqs=frequencies(head_dim), window=window)
    tail = q[:, -TAIL:].double(), k.double(), v.double()
    tensors = {key: x for key, x in option.given.items() if isinstance(x, torch.Tensor)}
    wide = option.given | {key: x.double() for key, x in tensors.items()}
    error = error_of_tail([attend(*tail, backend="reference", **wide)])
    for backend, argument in backends().items():
        calls = [
            functools.partial(attend, q, k, v, backend=argument, **given)
            for given in (option.given, {})
        ]
        for work, of_backward in ((1, False), (3.5, True)):
            part = "training" if of_backward else "forward"
            if not report.wants(f"{part} {name} {head_dim} {str(dtype)[6:]}"):
                continue
            if of_backward:
                leaves = [[q, k, v, *tensors.values()], [q, k, v]]
                calls = [with_backward(call, of) for call, of in zip(calls, leaves)]
            with torch.set_grad_enabled(of_backward):
                compare(
                    report, f"{part} {name}", {"extrope": calls[0]},
                    yardsticks={"without": calls[1]}, own=("without",),
                    bars={"without": option.bar}, error=None if of_backward else error,
                    floor=matmul_floor(4 * HEADS * option.pairs * head_dim * work, dtype, device()),
                    dtype=dtype, backend=backend,
                    shape=f"{option.seqlen} x {HEADS}/{HEADS_K} x {head_dim}",
                )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    report = Report("softmax_options", args)
    seqlen, window = (64, 16) if args.quick else (SEQLEN, WINDOW)
    for name, option in options(seqlen, window).items():
        for dtype in (torch.float32, torch.bfloat16):
            for head_dim in (64,) if args.quick else (64, 128):
                bench(report, name, option, window, head_dim, dtype)
    report.save()


if __name__ == "__main__":
    main()
