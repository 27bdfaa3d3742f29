"""ReRoPE attention against plain attention: python bench/bench_rerope.py

N = 8192, causal, window 1024, 8 query heads. Our times include the rotation, those of
F.scaled_dot_product_attention and flash-attn do not: they get rotated inputs, and compute plain
attention. The floor is the rate of a square matrix product for what plain causal attention needs,
2 * heads * N**2 * head_dim operations forward and 3.5 times that with the backward, so the second
product where a tile straddles the window shows as lost speed; that costs 1 + tile / N.
"no window" is our own kernel computing plain attention. The two-score formula in eager PyTorch and
FlexAttention's composition compute what we do; the former is paired with ours at 2048 tokens, and
goes along the curves over the length while its scores fit into memory.

The backward in bf16 has a row where a CPU has AMX: elsewhere PyTorch's own takes minutes.

On a GPU: 32 heads on 8 of 128 in bf16, windows of 1024 and 4096, 8k to 128k tokens. The targets
are: at most 1.03 forward and 1.04 backward against our own kernel without a window at 8k tokens,
1.015 at 32k; never slower than two flash-attention calls and a merge (the flash_attn backend).
A100: 0.95 of FlashAttention-2 forward, 0.85 backward; H100: 450 TFLOP/s forward, 300 backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from attention import SCALED, Attend, by_length, compare_causal
from harness import Call, Report, arguments, device
from machine import memory
from peers import dense_rerope, flex_rerope
from scaling import scaling
from shapes import HEAD_DIM, HEADS_K, HEADS_Q, LONGER, SEQLEN, WINDOW

from extrope_kernels import rerope_attention

BARS = (  # head_dim, key heads, dtype, forward and training: our time over SDPA's, at most
    (64, 2, torch.float32, 0.85, 0.85),
    (128, 2, torch.float32, 0.92, 0.95),
    (64, 8, torch.float32, 1.05, 1.05),
    (128, 8, torch.float32, 1.05, 1.05),
    (64, 2, torch.bfloat16, 0.75, 0.75),
    (128, 2, torch.bfloat16, 0.75, 0.75),
)


MOST_TRAINED = 32_768  # tokens: the gradients of longer ones do not fit into 24 GB


def cases(quick: bool) -> Iterator[dict]:
    """Sizes, window and bars of each; on a GPU those that models have."""
    if device() == "cuda" and not quick:
        for seqlen, window in ((SEQLEN, WINDOW), *LONGER):
            yield {
                **{"seqlen": seqlen, "window": window, "about": f", window {window}"},
                **{"heads": HEADS_Q, "heads_k": HEADS_K, "head_dim": HEAD_DIM},
                "dtype": torch.bfloat16,
                "forward_bars": {"no window": 1.03 if seqlen < 32_768 else 1.015},
                "training_bars": {"no window": 1.04} if seqlen <= MOST_TRAINED else None,
            }
        return
    amx = torch.cpu._is_amx_tile_supported()
    for head_dim, heads_k, dtype, forward, training in BARS:
        yield {
            **{"seqlen": 64 if quick else SEQLEN, "window": 16 if quick else WINDOW},
            **{"heads_k": heads_k, "head_dim": head_dim, "dtype": dtype},
            **{
                "forward_bars": both(forward),
                "training_bars": both(training) if amx or dtype != torch.bfloat16 else None,
            },
        }


def both(bar: float | None) -> dict[str, float] | None:
    return None if bar is None else {"SDPA": bar, "SDPA, keys repeated": bar, "no window": 1.03}


def curves(attend: Attend, window: int) -> Callable[[int], dict[str, Call]]:
    """Ours and, while a handful of N x N scores fits into memory, the two-score formula."""
    ours, dense = by_length(attend), by_length(functools.partial(dense_rerope, window=window))
    bytes_of_scores = 6 * 2 * 4  # copies, heads, float32

    def calls_of_length(seqlen: int) -> dict[str, Call]:
        calls = {"rerope": ours(seqlen)}
        if bytes_of_scores * seqlen**2 < memory():
            calls["two scores, eager"] = dense(seqlen)
        return calls

    return calls_of_length


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    short, window = (32, 16) if args.quick else (2048, WINDOW)
    report = Report("rerope", args, window=window)
    attend = functools.partial(rerope_attention, window=window)

    def unwindowed(q, k, v, freqs):
        call = lambda: rerope_attention(q, k, v, freqs, window=q.shape[1])  # noqa: E731
        if device() == "cuda":
            call.leaves = [q, k, v]
        return {"no window": call}

    def dense(q, k, v, freqs):
        call = lambda: dense_rerope(q, k, v, freqs, window)  # noqa: E731
        compiled = torch.compile(dense_rerope, dynamic=False)
        return {"two scores, eager": call,
                "two scores, compiled": lambda: compiled(q, k, v, freqs, window)}  # fmt: skip

    for case in cases(args.quick):
        own = {"window": case.pop("window")}
        compare_causal(
            report,
            functools.partial(rerope_attention, **own),
            pairs=case["seqlen"] ** 2 / 2,
            others=functools.partial(flex_rerope, **own),
            yardsticks=unwindowed,
            **case,
        )
    compare_causal(report, attend, seqlen=short, pairs=short**2 / 2, others=dense, heads_k=2,
                   head_dim=64, dtype=torch.float32)  # fmt: skip
    report.save()
    scaling("rerope", curves(attend, window), args, about=f"{SCALED}, window {window}")


if __name__ == "__main__":
    main()
