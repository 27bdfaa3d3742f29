"""One token over a long cache, ReRoPE, against plain attention: python bench/bench_decode.py

32768 cached tokens, 8 query heads on 2, window 1024. The floor is a copy of the cache's bytes,
halved: they are read once. "no window" is our own plain attention over rotated keys; SDPA gets its
best cache, heads first, and is measured with its groups as rows too.

On a GPU the target is 1.05 of plain split-KV attention at 32k to 128k tokens.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from attention import SCALED, backends, frequencies, make_inputs
from compare import Floor, compare, error_of_tail
from harness import Call, Report, arguments
from scaling import scaling
from torch import Tensor

from extrope_kernels import apply_rope, rerope_attention
from extrope_kernels import rerope_attention_with_kvcache as decode

WINDOW = 1024


def sdpa_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    packed = q.view(1, k.shape[1], q.shape[1] // k.shape[1], q.shape[-1])
    attend = F.scaled_dot_product_attention
    return {"SDPA": lambda: attend(q, k, v, enable_gqa=True),
            "SDPA, groups as rows": lambda: attend(packed, k, v)}  # fmt: skip


@torch.no_grad()
def bench(report: Report, head_dim: int, dtype: torch.dtype) -> None:
    case = f"decode 8/2 x {head_dim}"
    if not report.wants(f"{case} {str(dtype)[6:]}"):
        return
    cached = 64 if report.args.quick else 32768
    q, k, v = make_inputs(cached, 2, head_dim, dtype)
    q, freqs, stored = q[:, -1:], frequencies(head_dim), apply_rope(k, frequencies(head_dim))
    into = torch.empty_like(k), torch.empty_like(v)
    floor = Floor(lambda: (into[0].copy_(k), into[1].copy_(v)), 0.5)
    exact = rerope_attention(
        q.double(), k.double(), v.double(), freqs, window=WINDOW, backend="reference"
    )
    few = [x[:, :64].clone() for x in (k, v)]

    def ours(backend, k=k, v=v, factor=float("inf")):
        return decode(q, k, v, freqs, cache_seqlens=k.shape[1], window=WINDOW, factor=factor,
                      backend=backend)  # fmt: skip

    rotated = apply_rope(q, freqs, positions=cached - 1)
    for name, backend in backends().items():
        if name == "flash_attn":
            continue
        unwindowed = functools.partial(ours, backend, stored, factor=1.0)
        compare(
            report,
            case,
            {"extrope": functools.partial(ours, backend)},
            yardsticks={"no window": unwindowed, **sdpa_calls(rotated, stored, v)},
            few={"extrope": functools.partial(ours, backend, *few)},
            bars={"no window": 1.15, "SDPA": 1.15, "SDPA, groups as rows": 1.15},
            error=error_of_tail([exact]),
            dtype=dtype,
            shape=f"1 on {cached} x 8/2 x {head_dim}",
            backend=name,
            floor=floor,
        )


def by_length(seqlen: int) -> Call:
    q, k, v = make_inputs(seqlen, 1, 64, torch.float32, heads=2)
    q, freqs = q[:, -1:], frequencies(64)
    return lambda: decode(q, k, v, freqs, cache_seqlens=seqlen, window=WINDOW)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    report = Report("decode", args, window=WINDOW)
    for head_dim in (64, 128):
        for dtype in (torch.float32, torch.bfloat16):
            bench(report, head_dim, dtype)
    report.save()
    scaling("decode", by_length, args, about=f"one token, {SCALED}, window {WINDOW}")


if __name__ == "__main__":
    main()
