"""ReRoPE over a cache, against plain attention: python bench/bench_decode.py

One token on 32768 in the cache, 8 query heads on 2, window 1024, over the caches of many layers one
after another. The floor is a copy of the cache's bytes, halved: they are read once. "no window" is
our own plain attention over rotated keys; SDPA gets its best cache, heads first, and is measured
with its groups as rows too. Then the step over a cache in fp8, over raw keys, and over keys that a
model rotated to their own positions, which ReRoPE moves on.

A server's batches, on a paged cache: a chunk of 1,024 tokens at the end of 8,192, through pages of
16 to 256 slots, may take 1.05 of the same call on a contiguous cache, and of the attention without
one; the chunk and 16 single tokens in one call may take 1.1 of both parts alone.

On a GPU: 32 heads on 8 of 128 in bf16, two sequences over a paged cache, window 4096, 32k and 128k
tokens; flash-attn's and FlashInfer's attentions over a cache are there too. The target is 1.05 of
plain split-KV attention at 32k to 128k tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from bench_attention import HEADS, OWN, backends, exact_tail, frequencies, make_inputs
from compare import Floor, by_layer, compare, error_of_tail, layers_of, matmul_floor
from harness import NAN, Call, Report, arguments, device
from peers import Paged, decode_peers
from shapes import BATCH, HEAD_DIM, HEADS_K, HEADS_Q, KEYS, KEYS_WINDOW, PAGE_SIZE
from torch import Tensor

from extrope_kernels import apply_rope, rope_attention, scores
from extrope_kernels import rope_attention_with_kvcache as decode

WINDOW = 1024  # on a CPU
LENGTHS = (KEYS, 131_072)  # on a GPU
PAGES, MIXED_PAGE = (16, 64, 128, 256), 128
SCALE = 0.01  # of a cache in fp8


def sdpa_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    packed = q.view(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[-1])
    attend, layers = F.scaled_dot_product_attention, layers_of(k, v)
    return {
        "SDPA": by_layer(partial(attend, q, enable_gqa=True), layers),
        "SDPA, groups as rows": by_layer(partial(attend, packed), layers),
    }


def reading_of(*cache: Tensor) -> Floor:
    """Return half a copy, from layers of its own: beside it ours would find its keys just read."""
    into = [torch.empty_like(x) for x in cache]

    def read(k: Tensor, v: Tensor) -> None:
        into[0].copy_(k), into[1].copy_(v)

    return Floor(by_layer(read, layers_of(*cache)), 0.5)


# -------------------------------------------------------------------------------------------------
# One token, on a CPU


def bench_token(report: Report, head_dim: int, dtype: torch.dtype) -> None:
    case = f"decode 8/2 x {head_dim}"
    if not report.wants(case, dtype):
        return
    cached = 64 if report.args.quick else KEYS
    q, k, v = make_inputs(cached, 2, head_dim, dtype)
    q, freqs, score = q[:, -1:], frequencies(head_dim), scores.rerope(WINDOW)
    rotated = apply_rope(q, freqs, positions=cached - 1)
    stored = apply_rope(k, freqs)

    def step(score: scores.Score | None, k: Tensor, v: Tensor) -> Tensor:
        return decode(q, k, v, freqs, score, cache_seqlens=k.shape[1])

    plain = by_layer(partial(step, None), layers_of(stored, v))
    few = partial(step, score, k[:, :64].clone(), v[:, :64].clone())
    compare(
        report, case, {"extrope": by_layer(partial(step, score), layers_of(k, v))},
        yardsticks={"no window": plain, **sdpa_calls(rotated, stored, v)}, few={"extrope": few},
        bars={"no window": 1.15, "SDPA": 1.15, "SDPA, groups as rows": 1.15},
        error=error_of_tail([exact_tail(score, q, k, v, freqs)]),
        dtype=dtype, shape=f"1 on {cached} x 8/2 x {head_dim}", backend="cpu",
        floor=reading_of(k, v), own=OWN,
    )  # fmt: skip


def narrowed(how: dict, cache: Sequence[Tensor]) -> tuple[dict, Sequence[Tensor]]:
    """Return a step's options and its cache in fp8: half the bytes, which take time to widen."""
    scales = dict.fromkeys(("k_scale", "v_scale"), torch.full((2,), SCALE))
    return how | scales, [(x / SCALE).to(torch.float8_e4m3fn) for x in cache]


def bench_forms(
    report: Report, case: str, head_dim: int, cached: int, bar: float = NAN,
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Time a step over another form of cache, beside the usual one: see `case`."""
    of_raw, own_places = "raw" in case, "own positions" in case
    other = "stored rotated" if of_raw or own_places else "bfloat16 cache"
    case = f"decode 8/2 x {head_dim}, {case}"
    if not report.wants(case, dtype):
        return
    cached = 64 if report.args.quick else cached
    q, k, v = make_inputs(cached, 2, head_dim, dtype)
    freqs = frequencies(head_dim)
    ours = theirs = {"score": scores.rerope(WINDOW)}, (k, v)
    if of_raw:  # keys that plain RoPE rotates at every step
        ours, theirs = ({"stored": "raw"}, (k, v)), ({}, (apply_rope(k, freqs), v))
    if own_places:  # what keys hold changes no time
        ours = {"score": scores.rerope(WINDOW), "rotated": "qk"}, (k, v)
    if "fp8" in case:
        ours, theirs = narrowed(*ours), narrowed(*theirs) if of_raw else theirs
    step = partial(decode, q[:, -1:], freqs=freqs, cache_seqlens=cached)
    calls = [by_layer(partial(step, **how), layers_of(*cache)) for how, cache in (ours, theirs)]
    compare(
        report, case, {"extrope": calls[0]}, yardsticks={other: calls[1]},
        bars={other: bar}, own=(other,), floor=reading_of(*ours[1]),
        dtype=dtype, shape=f"1 on {cached} x 8/2 x {head_dim}", backend="cpu",
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# On a GPU


def caches(keys: int, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> tuple[Paged, Paged]:
    """Make q and pages not rotated, and both rotated; the pages in random order."""
    pages = BATCH * keys // PAGE_SIZE
    shapes = [(BATCH, 1, HEADS_Q, head_dim), *[(pages, PAGE_SIZE, HEADS_K, head_dim)] * 2]
    q, k, v = (torch.randn(shape, device=device(), dtype=dtype) for shape in shapes)
    table = torch.randperm(pages, device=device(), dtype=torch.int32).view(BATCH, -1)
    freqs = frequencies(head_dim)
    first = torch.empty(pages, dtype=torch.int64, device=device())
    first[table.long()] = torch.arange(table.shape[1], device=device()) * PAGE_SIZE
    raw = Paged(q, k, v, table)
    k = apply_rope(k, freqs, positions=first[:, None] + torch.arange(PAGE_SIZE, device=device()))
    return raw, Paged(apply_rope(q, freqs, positions=keys - 1), k, v, table)


def decode_paged(cache: Paged, score: scores.Score | None, backend: str) -> Call:
    """Decode over pages, with lengths on the device as in a server."""
    return partial(
        decode, cache.q, cache.k, cache.v, frequencies(cache.q.shape[-1]), score,
        cache_seqlens=cache.seqlens, block_table=cache.block_table, backend=backend,
    )  # fmt: skip


def bench_paged(report: Report, keys: int) -> None:
    """Time two sequences of `keys` tokens, at sizes of models."""
    sizes = f"{HEADS_Q}/{HEADS_K} x {HEAD_DIM}"
    case, dtype = f"decode {sizes}, paged", torch.bfloat16
    if not report.wants(case, dtype):
        return
    score, (raw, rotated) = scores.rerope(KEYS_WINDOW), caches(keys, dtype)
    exact = exact_tail(score, raw.q, *raw.contiguous(), frequencies(HEAD_DIM))
    plain = {**sdpa_calls(rotated.q, *rotated.contiguous()), **decode_peers(rotated)}
    for name in (name for name in backends() if name != "flash_attn"):
        unwindowed = decode_paged(replace(rotated, q=raw.q), None, name)
        compare(
            report, case, {"extrope": decode_paged(raw, score, name)},
            yardsticks={"no window": unwindowed, **plain},
            bars={"no window": 1.15, **dict.fromkeys(plain, 1.05)},
            error=error_of_tail([exact]), own=OWN,
            dtype=dtype, shape=f"{BATCH} on {keys} x {sizes}", backend=name,
            floor=reading_of(raw.k, raw.v),
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Batches of a server


def floor_of_chunk(chunk: int, dtype: torch.dtype) -> Floor:
    pairs = chunk * (8 * chunk - chunk / 2)
    return matmul_floor(4 * HEADS * 128 * pairs, dtype)


def bench_chunk(report: Report, chunk: int, page_size: int, dtype: torch.dtype) -> None:
    case, keys = f"chunk, pages of {page_size}", 8 * chunk
    if not report.wants(case, dtype):
        return
    q, k, v = make_inputs(keys, 2, 128, dtype)
    q, freqs, score = q[:, -chunk:], frequencies(128), scores.rerope(WINDOW)
    table = torch.randperm(keys // page_size, device=device()).int()[None]
    pages = [x.view(-1, page_size, *x.shape[2:])[table[0].argsort()] for x in (k, v)]
    lengths = torch.tensor([keys], dtype=torch.int32, device=device())
    over = partial(decode, freqs=freqs, score=score, cache_seqlens=lengths)
    others = {
        "contiguous cache": partial(over, q, k, v),
        "no cache": partial(rope_attention, q, k, v, freqs, score),
    }
    compare(
        report, case, {"extrope": partial(over, q, *pages, block_table=table)},
        yardsticks=others, own=others, bars=dict.fromkeys(others, 1.05),
        shape=f"{chunk} on {keys} x {HEADS}/2 x 128",
        dtype=dtype, floor=floor_of_chunk(chunk, dtype),
    )  # fmt: skip


def bench_mixed(report: Report, chunk: int, dtype: torch.dtype) -> None:
    case = "chunk and single tokens"
    if not report.wants(case, dtype):
        return
    counts, lengths = [chunk] + [1] * 16, [8 * chunk, *(2 * chunk * n for n in range(1, 17))]
    used = torch.tensor([-(-length // MIXED_PAGE) for length in lengths])
    order, ends = torch.randperm(int(used.sum())).int(), used.cumsum(0)
    table = torch.zeros(len(lengths), int(used.max()), dtype=torch.int32)
    for row, end, count in zip(table, ends, used):
        row[:count] = order[end - count : end]
    shape = len(order), MIXED_PAGE, 2, 128
    caches = [torch.randn(shape, device=device()).to(dtype) for _ in "kv"]
    q = torch.randn(sum(counts), HEADS, 128, device=device()).to(dtype)
    rows = torch.tensor([0, *counts]).cumsum(0).int()

    def part(begin: int, end: int) -> Call:
        """Compute the sequences begin..end-1 in one call."""
        own = (table[begin:end], torch.tensor(lengths[begin:end]).int(),
               rows[begin : end + 1] - rows[begin])  # fmt: skip
        blocks, seqlens, cu_seqlens = (x.to(device()) for x in own)
        return partial(
            decode, q[rows[begin] : rows[end]], *caches, frequencies(128), scores.rerope(WINDOW),
            cache_seqlens=seqlens, block_table=blocks, cu_seqlens_q=cu_seqlens,
        )  # fmt: skip

    first, singles = part(0, 1), part(1, len(counts))
    compare(
        report, case, {"extrope": part(0, len(counts))},
        yardsticks={"its parts alone": lambda: (first(), singles())},
        bars={"its parts alone": 1.1}, own=("its parts alone",),
        shape=f"{chunk} + 16 x 1", dtype=dtype, floor=floor_of_chunk(chunk, dtype),
    )  # fmt: skip


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    report = Report("decode", args, window=WINDOW if device() == "cpu" else KEYS_WINDOW)
    dtypes, chunk = (torch.float32, torch.bfloat16), 64 if args.quick else 1024
    if device() == "cuda":
        for keys in (PAGE_SIZE * 4,) if args.quick else LENGTHS:
            bench_paged(report, keys)
    else:
        for head_dim in (64, 128):
            for dtype in dtypes:
                bench_token(report, head_dim, dtype)
            bench_forms(report, "fp8 cache", head_dim, KEYS, bar=1.0)
        for cached in (2048, 8192, 32768):
            for case in ("raw keys", "raw keys, fp8 cache"):
                bench_forms(report, f"{case}, {cached}", 128, cached)
        for cached in (4096, 32768):
            for dtype in dtypes:
                bench_forms(report, f"own positions, {cached}", 64, cached, dtype=dtype)
    for dtype in dtypes:
        for page_size in PAGES:
            bench_chunk(report, chunk, page_size, dtype)
        bench_mixed(report, chunk, dtype)
    report.save()


if __name__ == "__main__":
    main()
