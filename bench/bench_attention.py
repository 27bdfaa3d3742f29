"""Attention by every score method against plain attention: python bench/bench_attention.py

8192 tokens, causal, 8 query heads (on a GPU 32 on 8 of 128, bf16). --score NAME picks methods. Our
times include the rotation; F.scaled_dot_product_attention and flash-attn get rotated inputs and
compute plain attention. The floor is the rate of a square matrix product for the (query, key) pairs
that a method computes, 4 * head_dim operations each, 3.5 times that with the backward. "no window"
is our own kernel computing plain attention; "SDPA, masked" sees the keys of a block (LEX) through a
dense mask. The two-score formula in eager PyTorch and FlexAttention's composition compute ReRoPE.

Then ReRoPE with sinks, a cap or a sliding window over the same call "without": sinks may add 5% and
a cap 12%; a sliding window of 1,024 at 16,384 tokens may take 1.15 of its share of the pairs.

On a GPU the targets of ReRoPE are 1.03 forward and 1.04 backward of our own kernel without a window
at 8k tokens, 1.015 at 32k, and never slower than two flash-attention calls and a merge. A100: 0.95
of FlashAttention-2 forward, 0.85 backward; H100: 450 TFLOP/s forward, 300 backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from compare import compare, error_of_tail, matmul_floor, trained, with_backward
from harness import Call, Report, arguments, device, memory
from peers import attention_peers, dense_rerope, flex_rerope, sdpa
from scaling import scaling
from shapes import BLOCK, CHUNK, HEAD_DIM, HEADS_K, HEADS_Q, LOCAL, LONGER, SEQLEN, WINDOW
from torch import Tensor

from extrope_kernels import RopeFreqs, apply_rope_qk, methods, rope_attention, scores
from extrope_kernels.testing import attention_backends

HEADS = 8  # on a CPU; on a GPU those of shapes.py
TAIL = 16  # queries whose error is measured
OWN = ("no window",)  # a yardstick that is our own kernel
MOST_TRAINED = 32_768  # tokens: the gradients of longer ones do not fit into 24 GB
CAP = 50.0  # Gemma 2's
SCALED = "float32, 2 heads on 1, head_dim 64"
BARS = (  # head_dim, key heads, dtype: ReRoPE's time over SDPA's, at most, forward and training
    (64, 2, torch.float32, 0.85, 0.85),
    (128, 2, torch.float32, 0.92, 0.95),
    (64, 8, torch.float32, 1.05, 1.05),
    (128, 8, torch.float32, 1.05, 1.05),
    (64, 2, torch.bfloat16, 0.75, 0.75),
    (128, 2, torch.bfloat16, 0.75, 0.75),
)


def sized(tokens: int, seqlen: int) -> int:
    """Return a window or block, shorter for the short sequences of --quick."""
    return tokens if seqlen >= 2048 else max(tokens * seqlen // SEQLEN, 4)


def _yarn(head_dim: int) -> Tensor:
    """Return YaRN's divisors of frequencies at four times 4,096 tokens."""
    yarn = methods.yarn(head_dim, factor=4.0, original_max_position_embeddings=4096)
    return methods.rope(head_dim).inv_freq / yarn.inv_freq


def score_of(name: str, seqlen: int, head_dim: int) -> scores.Score | None:
    """Return a score method with its measured parameters."""
    window, chunk, block = (sized(n, seqlen) for n in (WINDOW, CHUNK, BLOCK))
    local = sized(LOCAL if device() == "cuda" else 256, seqlen)
    return {
        "plain": lambda: None,
        "rerope": lambda: scores.rerope(window),
        "leaky_rerope": lambda: scores.leaky_rerope(window, 4.0),
        "self_extend": lambda: scores.self_extend(window, 4),
        "dual_chunk": lambda: scores.dual_chunk(chunk, local),
        "blockwise_causal": lambda: scores.blockwise_causal(block),
        "string": lambda: scores.string(seqlen // 2, window),
        "dpe": lambda: scores.dpe(window, [2, 8, 2, 8, 32, 32, 32, 4], head_dim // 2),
        "far_frequencies": lambda: scores.far_frequencies(window, _yarn(head_dim)),
    }[name]()


MEASURED = ("rerope", "dual_chunk", "blockwise_causal")  # unless --score asks for others
NAMES = ("plain", *scores.SCORES)


# -------------------------------------------------------------------------------------------------
# Shared with bench_decode.py and `make gpu`


def make_inputs(seqlen: int, heads_k: int, head_dim: int, dtype: torch.dtype, heads: int = HEADS):
    """Make q, k and v (1, seqlen, heads, head_dim), not rotated."""
    shapes = [(1, seqlen, count, head_dim) for count in (heads, heads_k, heads_k)]
    return [torch.randn(shape, device=device()).to(dtype) for shape in shapes]


def frequencies(head_dim: int) -> RopeFreqs:
    return methods.rope(head_dim).to(device())


def backends() -> dict[str, str | None]:
    """Return the `backend` of each implementation; None is the default."""
    if device() == "cpu":
        return {"cpu": None}
    return {name: name for name in attention_backends() if name != "reference"}


def plain_peers(q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs) -> dict[str, Call | str]:
    """Return other libraries' plain causal attention, over rotated inputs."""
    rotated = [*apply_rope_qk(q, k, freqs), v]
    return {**sdpa(*rotated), **attention_peers(*rotated)}


def exact_tail(score, q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs, **options) -> Tensor:
    """Compute the last queries in float64, a key head at a time for long sequences."""
    group = q.shape[2] // k.shape[2]
    options["backend"] = "reference"
    parts = [
        rope_attention(*(x.double() for x in heads), freqs, score, **options)
        for heads in zip(q[:, -TAIL:].split(group, 2), k.split(1, 2), v.split(1, 2))
    ]
    return torch.cat(parts, dim=2)


# -------------------------------------------------------------------------------------------------
# Score methods


class Case(NamedTuple):
    """Sizes of one row, and its bars; training: None for no backward."""

    seqlen: int
    heads: int
    heads_k: int
    head_dim: int
    dtype: torch.dtype
    forward: dict[str, float] | None = None
    training: dict[str, float] | None = None
    about: str = ""


def cases(name: str, quick: bool) -> Iterator[Case]:
    """Return a method's measured sizes; on a GPU those of models."""
    if device() == "cuda" and not quick:
        gpu = HEADS_Q, HEADS_K, HEAD_DIM, torch.bfloat16
        for seqlen in dict.fromkeys((SEQLEN, *(n for n, _ in LONGER))):
            forward = {"no window": 1.03 if seqlen < 32_768 else 1.015}
            training = {"no window": 1.04} if seqlen <= MOST_TRAINED else None
            if name == "rerope" or seqlen == SEQLEN:
                yield Case(seqlen, *gpu, forward, training)
        return
    seqlen, amx = 64 if quick else SEQLEN, torch.cpu._is_amx_tile_supported()
    for head_dim, heads_k, dtype, *bars in BARS:
        forward, training = (
            {"SDPA": bar, "SDPA, keys repeated": bar, "no window": 1.03} for bar in bars
        )
        sizes = seqlen, HEADS, heads_k, head_dim, dtype
        if dtype == torch.bfloat16 and not amx:
            training = None  # elsewhere PyTorch's own takes minutes
        if name == "rerope":
            yield Case(*sizes, forward, training)
        elif heads_k < HEADS and (head_dim, dtype) != (64, torch.bfloat16):
            yield Case(*sizes, None, {} if dtype == torch.float32 else None)


def seen(seqlen: int, half: int) -> Tensor:
    """Return the mask (seqlen, seqlen) of keys that queries see in blocks of 2 * half."""
    i = torch.arange(seqlen)
    return (i <= i[:, None]) & (i >= (i[:, None] // half - 1) * half)


def others(name: str, seqlen: int) -> Callable[..., dict[str, Call | str]]:
    """Return other implementations of a method, from q, k, v and frequencies."""
    if name == "rerope":
        return lambda *x: flex_rerope(*x, window=sized(WINDOW, seqlen))
    if name == "blockwise_causal" and device() == "cpu":
        mask = seen(seqlen, sized(BLOCK, seqlen) // 2)

        def masked(q, k, v, freqs):
            calls = sdpa(*apply_rope_qk(q, k, freqs), v, mask=mask)
            return {key.replace("SDPA", "SDPA, masked"): call for key, call in calls.items()}

        return masked
    return lambda *x: {}


def pairs_of(name: str, seqlen: int) -> float:
    """Count the (query, key) pairs that a head computes."""
    if name != "blockwise_causal":
        return seqlen**2 / 2
    half = sized(BLOCK, seqlen) // 2
    return sum(i + 1 - max((i // half - 1) * half, 0) for i in range(seqlen))


def bench(report: Report, name: str, case: Case, more: Callable | None = None) -> None:
    """Time forward, and forward with backward, beside plain causal attention."""
    sizes = f"{case.heads}/{case.heads_k} x {case.head_dim}"
    titles = [f"{name}, {part} {sizes}{case.about}" for part in ("forward", "training")]
    wanted = [report.wants(f"{title} {str(case.dtype)[6:]}") for title in titles]
    if not any(wanted):
        return
    qkv = make_inputs(case.seqlen, case.heads_k, case.head_dim, case.dtype, case.heads)
    one, freqs, score = (
        [x[:, :1] for x in qkv],
        frequencies(case.head_dim),
        score_of(name, case.seqlen, case.head_dim),
    )
    error = error_of_tail([exact_tail(score, *qkv, freqs)])
    flops = 4 * case.heads * pairs_of(name, case.seqlen) * case.head_dim
    for backend, argument in backends().items():

        def ours(inputs=qkv, argument=argument):
            return rope_attention(*inputs, freqs, score, backend=argument)

        def unwindowed(argument=argument):
            return rope_attention(*qkv, freqs, backend=argument)

        if device() == "cuda":
            unwindowed.leaves = qkv
        row = {"dtype": case.dtype, "shape": f"{case.seqlen} x {sizes}", "backend": backend}
        beside = {"no window": unwindowed, **plain_peers(*qkv, freqs)}
        if wanted[0]:
            same = (more or others(name, case.seqlen))(*qkv, freqs)
            with torch.no_grad():
                compare(report, titles[0], {"extrope": ours, **same}, yardsticks=beside,
                        floor=matmul_floor(flops, case.dtype), error=error, bars=case.forward,
                        few={"extrope": functools.partial(ours, one)}, own=OWN, **row)  # fmt: skip
        if wanted[1] and case.training is not None:
            ours.leaves = qkv
            compare(report, titles[1], trained({"extrope": ours}), yardsticks=trained(beside),
                    floor=matmul_floor(3.5 * flops, case.dtype), bars=case.training, own=OWN,
                    **row)  # fmt: skip


def bench_two_scores(report: Report, seqlen: int) -> None:
    """Time the formula of ReRoPE's paper, with N x N scores twice, at a length that it can bear."""
    window = sized(WINDOW, seqlen)

    def two_scores(q, k, v, freqs):
        compiled = torch.compile(dense_rerope, dynamic=False)
        return {"two scores, eager": lambda: dense_rerope(q, k, v, freqs, window),
                "two scores, compiled": lambda: compiled(q, k, v, freqs, window)}  # fmt: skip

    bench(report, "rerope", Case(seqlen, HEADS, 2, 64, torch.float32), two_scores)


# -------------------------------------------------------------------------------------------------
# Options of the softmax


class Option(NamedTuple):
    given: dict
    seqlen: int
    bar: float
    pairs: float  # that a head computes


def options(seqlen: int, window: int) -> dict[str, Option]:
    sinks = torch.randn(HEADS, device=device())
    causal, near = seqlen**2 / 2, 2 * seqlen * window - window**2 / 2
    return {
        "sinks": Option({"sinks": sinks}, seqlen, 1.05, causal),
        "softcap": Option({"softcap": CAP}, seqlen, 1.12, causal),
        "sliding window": Option(
            {"sliding_window": window}, 2 * seqlen, 1.15 * near / (4 * causal), near
        ),
    }


def bench_option(
    report: Report, name: str, option: Option, head_dim: int, dtype: torch.dtype
) -> None:
    q, k, v = make_inputs(option.seqlen, 2, head_dim, dtype)
    score, freqs = score_of("rerope", option.seqlen, head_dim), frequencies(head_dim)
    tensors = {key: x for key, x in option.given.items() if isinstance(x, Tensor)}
    wide = option.given | {key: x.double() for key, x in tensors.items()}
    tail = q[:, -TAIL:].double(), k.double(), v.double()
    exact = rope_attention(*tail, freqs, score, backend="reference", **wide)
    for backend, argument in backends().items():
        calls = [
            functools.partial(rope_attention, q, k, v, freqs, score, backend=argument, **given)
            for given in (option.given, {})
        ]
        for work, part in ((1, "forward"), (3.5, "training")):
            case = f"options, {part} {name}"
            if not report.wants(f"{case} {head_dim} {str(dtype)[6:]}"):
                continue
            if part == "training":
                leaves = [[q, k, v, *tensors.values()], [q, k, v]]
                calls = [with_backward(call, of) for call, of in zip(calls, leaves)]
            with torch.set_grad_enabled(part == "training"):
                compare(
                    report, case, {"extrope": calls[0]}, yardsticks={"without": calls[1]},
                    own=("without",), bars={"without": option.bar},
                    error=error_of_tail([exact]) if part == "forward" else None,
                    floor=matmul_floor(4 * HEADS * option.pairs * head_dim * work, dtype),
                    dtype=dtype, backend=backend, shape=f"{option.seqlen} x {HEADS}/2 x {head_dim}",
                )  # fmt: skip


# -------------------------------------------------------------------------------------------------


def by_length(seqlen: int) -> dict[str, Call]:
    """Return ours and, while a few N x N scores fit into memory, the two-score formula."""
    inputs, freqs = make_inputs(seqlen, 1, 64, torch.float32, heads=2), frequencies(64)
    score = scores.rerope(WINDOW)
    calls: dict[str, Call] = {"rerope": lambda: rope_attention(*inputs, freqs, score)}
    bytes_of_scores = 6 * 2 * 4  # copies, heads, float32
    if bytes_of_scores * seqlen**2 < memory():
        calls["two scores, eager"] = lambda: dense_rerope(*inputs, freqs, WINDOW)
    return calls


def main(argv: list[str] | None = None) -> None:
    def add(parser) -> None:
        parser.add_argument("--score", action="append", choices=NAMES, help="default: three")

    args = arguments(__doc__, argv, add)
    torch.manual_seed(0)
    report, asked = Report("attention", args, window=WINDOW), args.score or MEASURED
    for name in asked:
        for case in cases(name, args.quick):
            bench(report, name, case)
    if "rerope" in asked:
        bench_two_scores(report, 32 if args.quick else 2048)
        seqlen, window = (64, 16) if args.quick else (SEQLEN, WINDOW)
        for name, option in options(seqlen, window).items():
            for dtype in (torch.float32, torch.bfloat16):
                for head_dim in (64,) if args.quick else (64, 128):
                    bench_option(report, name, option, head_dim, dtype)
    report.save()
    if "rerope" in asked:
        scaling("attention", by_length, args, about=f"ReRoPE, {SCALED}, window {WINDOW}")


if __name__ == "__main__":
    main()
