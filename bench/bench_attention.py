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

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product
from typing import NamedTuple

import torch
from compare import by_name, compare, error_of_tail, matmul_floor, trained, why_not
from harness import Call, Calls, Report, Row, arguments, device, memory, name_of
from peers import attention_peers, dense_rerope, flex_rerope, sdpa
from scaling import scaling
from shapes import BLOCK, CHUNK, HEAD_DIM, HEADS_K, HEADS_Q, LENGTHS, LOCAL, SEQLEN, WINDOW
from torch import Tensor

from extrope_kernels import RopeFreqs, apply_rope_qk, methods, rope_attention, scores
from extrope_kernels.testing import attention_backends

HEADS = 8  # on a CPU; on a GPU those of shapes.py
TAIL = 16  # queries whose error is measured
OWN = ("no window", "without")  # yardsticks that are our own kernels
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
    }[name]()


MEASURED = ("rerope", "dual_chunk", "blockwise_causal")  # unless --score asks for others
NAMES = ("plain", *scores.SCORES)
backends = partial(by_name, attention_backends)


# -------------------------------------------------------------------------------------------------
# Shared with bench_decode.py


def make_inputs(seqlen: int, heads_k: int, head_dim: int, dtype: torch.dtype, heads: int = HEADS):
    """Make q, k and v (1, seqlen, heads, head_dim), not rotated."""
    shapes = [(1, seqlen, count, head_dim) for count in (heads, heads_k, heads_k)]
    return [torch.randn(shape, device=device()).to(dtype) for shape in shapes]


def frequencies(head_dim: int) -> RopeFreqs:
    return methods.rope(head_dim).to(device())


def exact_tail(score, q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs, sinks=None, **options):
    """Compute the last queries in float64, a key head at a time for long sequences."""
    heads_k, options["backend"] = k.shape[2], "reference"
    parts = []
    for i, heads in enumerate(zip(q[:, -TAIL:].chunk(heads_k, 2), k.split(1, 2), v.split(1, 2))):
        own = {} if sinks is None else {"sinks": sinks.chunk(heads_k)[i].double()}
        doubles = (x.double() for x in heads)
        parts.append(rope_attention(*doubles, freqs, score, **own, **options))
    return torch.cat(parts, dim=2)


# -------------------------------------------------------------------------------------------------
# Score methods


class Case(NamedTuple):
    """A call of one size, timed forward, and with its backward if `training` has bars for it.

    title: with a place for the part. given: options of the softmax. bars: by the others' names.
    """

    title: str
    score: scores.Score | None
    seqlen: int
    heads: int
    heads_k: int
    head_dim: int
    dtype: torch.dtype
    pairs: float  # (query, key) that a head computes
    forward: dict[str, float]
    training: dict[str, float] | None = None
    given: dict = {}  # noqa: RUF012
    others: Callable[..., Calls] = lambda *qkv_and_freqs: {}  # of the same results


def cases(name: str, quick: bool) -> Iterator[Case]:
    """Return a method's measured sizes; on a GPU those of models."""

    def case(seqlen, heads, heads_k, head_dim, dtype, forward, training) -> Case:
        title = f"{name}, {{}} {heads}/{heads_k} x {head_dim}"
        sizes = seqlen, heads, heads_k, head_dim, dtype, pairs_of(name, seqlen)
        score = score_of(name, seqlen, head_dim)
        return Case(title, score, *sizes, forward, training, others=others(name, seqlen))

    if device() == "cuda" and not quick:
        for seqlen in LENGTHS:
            forward = {"no window": 1.03 if seqlen < 32_768 else 1.015}
            training = {"no window": 1.04} if seqlen <= MOST_TRAINED else None
            if name == "rerope" or seqlen == SEQLEN:
                yield case(seqlen, HEADS_Q, HEADS_K, HEAD_DIM, torch.bfloat16, forward, training)
        return
    seqlen, amx = 64 if quick else SEQLEN, torch.cpu._is_amx_tile_supported()
    for head_dim, heads_k, dtype, *bars in BARS:
        forward, training = (
            {"SDPA": bar, "SDPA, keys repeated": bar, "no window": 1.03} for bar in bars
        )
        sizes = seqlen, HEADS, heads_k, head_dim, dtype
        if name == "rerope":  # without AMX, training by PyTorch's own takes minutes
            yield case(*sizes, forward, training if amx or dtype == torch.float32 else None)
        elif heads_k < HEADS and (head_dim, dtype) != (64, torch.bfloat16):
            yield case(*sizes, {}, {} if dtype == torch.float32 else None)


def others(name: str, seqlen: int) -> Callable[..., Calls]:
    """Return other implementations of a method, from q, k, v and frequencies."""
    if name == "rerope":
        return partial(flex_rerope, window=sized(WINDOW, seqlen))
    if name == "blockwise_causal" and device() == "cpu":
        i, half = torch.arange(seqlen), sized(BLOCK, seqlen) // 2
        mask = (i <= i[:, None]) & (i >= (i[:, None] // half - 1) * half)  # (queries, keys)

        def masked(q, k, v, freqs):
            calls = sdpa(*apply_rope_qk(q, k, freqs), v, mask=mask)
            return {key.replace("SDPA", "SDPA, masked"): call for key, call in calls.items()}

        return masked
    return lambda *qkv_and_freqs: {}


def pairs_of(name: str, seqlen: int) -> float:
    """Count the (query, key) pairs that a head computes."""
    if name != "blockwise_causal":
        return seqlen**2 / 2
    half = sized(BLOCK, seqlen) // 2
    return sum(i + 1 - max((i // half - 1) * half, 0) for i in range(seqlen))


def two_scores(seqlen: int) -> Case:
    """Return ReRoPE beside its paper's formula, with N x N logits twice, where memory bears it."""
    window = sized(WINDOW, seqlen)

    def formula(q, k, v, freqs):
        compiled = torch.compile(dense_rerope, dynamic=False)
        return {"two scores, eager": lambda: dense_rerope(q, k, v, freqs, window),
                "two scores, compiled": lambda: compiled(q, k, v, freqs, window)}  # fmt: skip

    sizes = seqlen, HEADS, 2, 64, torch.float32, seqlen**2 / 2
    return Case("rerope, {} 8/2 x 64", scores.rerope(window), *sizes, {}, others=formula)


def options(quick: bool) -> Iterator[Case]:
    """Return ReRoPE with options of the softmax."""
    seqlen, window = (64, 16) if quick else (SEQLEN, WINDOW)
    causal, near = seqlen**2 / 2, 2 * seqlen * window - window**2 / 2
    sinks = torch.randn(HEADS, device=device())
    for name, given, tokens, bar, pairs in (
        ("sinks", {"sinks": sinks}, seqlen, 1.05, causal),
        ("softcap", {"softcap": CAP}, seqlen, 1.12, causal),
        ("sliding window", {"sliding_window": window}, 2 * seqlen, 0.2875 * near / causal, near),
    ):
        dims = (64,) if quick else (64, 128)
        for dtype, head_dim in product((torch.float32, torch.bfloat16), dims):
            sizes = tokens, HEADS, 2, head_dim, dtype, pairs
            score, bars = score_of("rerope", tokens, head_dim), {"without": bar}
            yield Case(f"options, {{}} {name}", score, *sizes, bars, bars, given)


def bench(report: Report, case: Case) -> None:
    """Time a case beside plain causal attention, or beside itself without its options."""
    titles = [case.title.format(part) for part in ("forward", "training")]
    if not any(report.wants(title, case.dtype) for title in titles):
        return
    qkv = make_inputs(case.seqlen, case.heads_k, case.head_dim, case.dtype, case.heads)
    freqs = frequencies(case.head_dim)
    error = error_of_tail([exact_tail(case.score, *qkv, freqs, **case.given)])
    flops = 4 * case.heads * case.pairs * case.head_dim
    shape = f"{case.seqlen} x {case.heads}/{case.heads_k} x {case.head_dim}"
    for backend, argument in backends().items():
        ours, without, plain = (
            partial(rope_attention, *qkv, freqs, score, backend=argument, **given)
            for score, given in ((case.score, case.given), (case.score, {}), (None, {}))
        )
        ours.leaves = [*qkv, *(x for x in case.given.values() if isinstance(x, Tensor))]
        without.leaves = qkv
        if device() == "cuda":
            plain.leaves = qkv
        first = partial(rope_attention, *(x[:, :1] for x in qkv), freqs, case.score, **case.given)
        beside = {"without": without}
        if not case.given:
            rotated = [*apply_rope_qk(*qkv[:2], freqs), qkv[2]]
            beside = {"no window": plain, **sdpa(*rotated), **attention_peers(*rotated)}
        row = {"dtype": case.dtype, "shape": shape, "backend": backend, "own": OWN}
        if backend == "flash_attn" and (refused := why_not(ours)):  # it takes no float32, no LEX
            name = name_of(case.dtype)
            report.add(Row(titles[0], "extrope", name, shape, backend, absent=refused))
            continue
        if report.wants(titles[0], case.dtype):
            with torch.no_grad():
                compare(report, titles[0], {"extrope": ours, **case.others(*qkv, freqs)},
                        yardsticks=beside, floor=matmul_floor(flops, case.dtype), error=error,
                        bars=case.forward, few={"extrope": partial(first, backend=argument)},
                        **row)  # fmt: skip
        if report.wants(titles[1], case.dtype) and case.training is not None:
            compare(report, titles[1], trained({"extrope": ours}), yardsticks=trained(beside),
                    floor=matmul_floor(3.5 * flops, case.dtype), bars=case.training,
                    **row)  # fmt: skip


def by_length(seqlen: int) -> dict[str, Call]:
    """Return ours and, while a few N x N logits fit into memory, the two-score formula."""
    inputs, freqs = make_inputs(seqlen, 1, 64, torch.float32, heads=2), frequencies(64)
    score = scores.rerope(WINDOW)
    calls: dict[str, Call] = {"rerope": lambda: rope_attention(*inputs, freqs, score)}
    bytes_of_logits = 6 * 2 * 4  # copies, heads, float32
    if bytes_of_logits * seqlen**2 < memory():
        calls["two scores, eager"] = lambda: dense_rerope(*inputs, freqs, WINDOW)
    return calls


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv, NAMES)
    report, asked = Report("attention", args, window=WINDOW), args.score or MEASURED
    every = [cases(name, args.quick) for name in asked]
    if "rerope" in asked:
        every += [[two_scores(32 if args.quick else 2048)], options(args.quick)]
    for case in chain.from_iterable(every):
        bench(report, case)
    report.save()
    if "rerope" in asked:
        scaling("attention", by_length, args, about=f"ReRoPE, {SCALED}, window {WINDOW}")


if __name__ == "__main__":
    main()
