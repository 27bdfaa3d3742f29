"""One token over a long cache, ReRoPE, against plain attention: python bench/bench_decode.py

32768 cached tokens, 8 query heads on 2, window 1024, over the caches of many layers one after
another. The floor is a copy of the cache's bytes, halved: they are read once. "no window" is our
own plain attention over rotated keys; SDPA gets its best cache, heads first, and is measured with
its groups as rows too. Then the step over a cache in float8_e4m3fn beside one over bfloat16.

On a GPU: 32 heads on 8 of 128 in bf16, two sequences over a paged cache, window 4096, 32k and 128k
tokens; flash-attn's and FlashInfer's attentions over a cache are there too. The target is 1.05 of
plain split-KV attention at 32k to 128k tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from attention import OWN, SCALED, backends, exact_tail, frequencies, make_inputs
from compare import Floor, compare, error_of_tail
from flash_peers import Paged, decode_peers
from harness import Call, Report, arguments, device
from layers import by_layer, layers_of
from scaling import scaling
from shapes import BATCH, HEAD_DIM, HEADS_K, HEADS_Q, KEYS, KEYS_WINDOW, PAGE_SIZE
from torch import Tensor

from extrope_kernels import apply_rope, rerope_attention
from extrope_kernels import rerope_attention_with_kvcache as decode

WINDOW = 1024  # on a CPU
LENGTHS = (KEYS, 131_072)  # on a GPU


def sdpa_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    packed = q.view(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[-1])
    attend, layers = F.scaled_dot_product_attention, layers_of(k, v)
    return {
        "SDPA": by_layer(functools.partial(attend, q, enable_gqa=True), layers),
        "SDPA, groups as rows": by_layer(functools.partial(attend, packed), layers),
    }


@torch.no_grad()
def bench(report: Report, head_dim: int, dtype: torch.dtype) -> None:
    case = f"decode 8/2 x {head_dim}"
    if not report.wants(f"{case} {str(dtype)[6:]}"):
        return
    cached = 64 if report.args.quick else KEYS
    q, k, v = make_inputs(cached, 2, head_dim, dtype)
    q, freqs, stored = q[:, -1:], frequencies(head_dim), apply_rope(k, frequencies(head_dim))
    exact = exact_tail(functools.partial(rerope_attention, window=WINDOW), q, k, v, freqs)
    few = [x[:, :64].clone() for x in (k, v)]

    def ours(backend, k, v, factor=float("inf")):
        return decode(q, k, v, freqs, cache_seqlens=k.shape[1], window=WINDOW, factor=factor,
                      backend=backend)  # fmt: skip

    rotated, layers = apply_rope(q, freqs, positions=cached - 1), layers_of(k, v)
    for name, backend in decode_backends().items():
        unwindowed = functools.partial(ours, backend, factor=1.0)
        compare(
            report,
            case,
            {"extrope": by_layer(functools.partial(ours, backend), layers)},
            yardsticks={
                "no window": by_layer(unwindowed, layers_of(stored, v)),
                **sdpa_calls(rotated, stored, v),
            },
            few={"extrope": functools.partial(ours, backend, *few)},
            bars={"no window": 1.15, "SDPA": 1.15, "SDPA, groups as rows": 1.15},
            error=error_of_tail([exact]),
            dtype=dtype,
            shape=f"1 on {cached} x 8/2 x {head_dim}",
            backend=name,
            floor=reading_of(layers),
            own=OWN,
        )


@torch.no_grad()
def bench_fp8(report: Report, head_dim: int) -> None:
    """Half the bytes, for the time that widening them takes."""
    case, dtype = f"decode 8/2 x {head_dim}, fp8 cache", torch.bfloat16
    if not report.wants(f"{case} {str(dtype)[6:]}"):
        return
    cached = 64 if report.args.quick else KEYS
    q, k, v = make_inputs(cached, 2, head_dim, dtype)
    q, scale = q[:, -1:], torch.full((2,), 0.01)
    of_e4m3 = layers_of(*((x / 0.01).to(torch.float8_e4m3fn) for x in (k, v)))

    step = functools.partial(
        decode, q, freqs=frequencies(head_dim), cache_seqlens=cached, window=WINDOW
    )

    def step_of_e4m3(k: Tensor, v: Tensor) -> Tensor:
        return step(k_cache=k, v_cache=v, k_scale=scale, v_scale=scale)

    compare(
        report,
        case,
        {"extrope": by_layer(step_of_e4m3, of_e4m3)},
        yardsticks={
            "bfloat16 cache": by_layer(lambda k, v: step(k_cache=k, v_cache=v), layers_of(k, v))
        },
        bars={"bfloat16 cache": 1.0},
        dtype=dtype,
        shape=f"1 on {cached} x 8/2 x {head_dim}",
        backend="cpu",
        floor=reading_of(of_e4m3),
        own=("bfloat16 cache",),
    )


@torch.no_grad()
def bench_paged(report: Report, keys: int) -> None:
    """Two sequences of so many tokens, as models have them."""
    sizes = f"{HEADS_Q}/{HEADS_K} x {HEAD_DIM}"
    case, dtype = f"decode {sizes}, paged", torch.bfloat16
    if not report.wants(f"{case} {str(dtype)[6:]}"):
        return
    freqs = frequencies(HEAD_DIM)
    raw, rotated = caches(keys, dtype)
    k, v = raw.contiguous()
    attend = functools.partial(rerope_attention, window=KEYS_WINDOW)
    exact = exact_tail(attend, raw.q, k, v, freqs)
    del k, v
    plain = {**sdpa_calls(rotated.q, *rotated.contiguous()), **decode_peers(rotated)}
    for name, backend in decode_backends().items():
        ours = functools.partial(decode_paged, freqs=freqs, window=KEYS_WINDOW, backend=backend)
        compare(
            report,
            case,
            {"extrope": ours(raw)},
            yardsticks={"no window": ours(replace(rotated, q=raw.q), factor=1.0), **plain},
            bars={"no window": 1.15, **dict.fromkeys(plain, 1.05)},
            error=error_of_tail([exact]),
            dtype=dtype,
            shape=f"{BATCH} on {keys} x {sizes}",
            backend=name,
            floor=reading_of([(raw.k, raw.v)]),
            own=OWN,
        )


def caches(keys: int, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> tuple[Paged, Paged]:
    """q and pages as they are, and both rotated; the pages in no order."""
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


def decode_paged(cache: Paged, **options) -> Call:
    """Lengths lie on the device, as a server has them."""
    call = functools.partial(decode, cache.q, cache.k, cache.v, **options)
    return functools.partial(call, cache_seqlens=cache.seqlens, block_table=cache.block_table)


def decode_backends() -> dict[str, str | None]:
    return {name: backend for name, backend in backends().items() if name != "flash_attn"}


def reading_of(layers: Sequence[Sequence[Tensor]]) -> Floor:
    into = [torch.empty_like(x) for x in layers[0]]

    def read(k: Tensor, v: Tensor) -> None:
        into[0].copy_(k), into[1].copy_(v)

    return Floor(by_layer(read, layers), 0.5)


def by_length(seqlen: int) -> Call:
    q, k, v = make_inputs(seqlen, 1, 64, torch.float32, heads=2)
    q, freqs = q[:, -1:], frequencies(64)
    return lambda: decode(q, k, v, freqs, cache_seqlens=seqlen, window=WINDOW)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    report = Report("decode", args, window=WINDOW if device() == "cpu" else KEYS_WINDOW)
    if device() == "cuda" and not args.quick:
        for keys in LENGTHS:
            bench_paged(report, keys)
    else:
        for head_dim in (64, 128):
            for dtype in (torch.float32, torch.bfloat16):
                bench(report, head_dim, dtype)
            if device() == "cpu":
                bench_fp8(report, head_dim)
    report.save()
    scaling("decode", by_length, args, about=f"one token, {SCALED}, window {WINDOW}")


if __name__ == "__main__":
    main()
