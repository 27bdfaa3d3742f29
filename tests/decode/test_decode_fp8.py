"""Caches in float8_e4m3fn, with a scale for each head of keys and of values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.decode_oracle import SCORES, Case, make, quantized

from extrope_kernels import methods, rope_append_kvcache, rope_attention_with_kvcache, scores
from extrope_kernels.testing import available_backends, device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
CODES = torch.arange(256, dtype=torch.uint8).view(FP8)


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=pytest.mark.thorough)])
def fp8_backend(request):
    if request.param not in ("reference", *available_backends()):
        pytest.skip(f"{request.param} cannot run here")
    return request.param


def same_codes(x, y):
    """The same numbers, or both NaN."""
    both_nan = x.float().isnan() & y.float().isnan()
    return ((x.view(torch.uint8) == y.view(torch.uint8)) | both_nan).all()


def one_key(q, code_rows, v_rows, k_scale, v_scale, backend):
    """Every sequence has one key, which its last token sees."""
    out, lse = rope_attention_with_kvcache(
        q, code_rows[:, None, None], v_rows[:, None, None], methods.rope(256).to(device()),
        scores.rerope(4), cache_seqlens=1, softmax_scale=1.0, return_lse=True, backend=backend,
        k_scale=torch.tensor([k_scale], device=device()),
        v_scale=torch.tensor([v_scale], device=device()),
    )  # fmt: skip
    return out[:, -1, 0], lse[..., -1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", (1, 256))
def test_every_code_is_read_as_torch_reads_it(tokens, dtype, fp8_backend):
    codes = CODES.to(device())
    finite = codes.float().nan_to_num().to(FP8)
    rows = finite.expand(1 if fp8_backend == "triton" else 8, -1)
    q = torch.zeros(len(rows), tokens, 1, 256, dtype=dtype, device=device())
    q[:, -1, 0, 0] = 1.0
    out, _ = one_key(q, rows, rows, 1.0, 0.25, fp8_backend)
    assert torch.equal(out, (finite.float() * 0.25).to(dtype).expand_as(out))
    out, _ = one_key(q, rows, codes.expand_as(rows), 1.0, 1.0, fp8_backend)
    assert torch.equal(out.isnan(), codes.float().isnan().expand_as(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_a_score(dtype, fp8_backend):
    """Of a head whose query is one in the code's dim."""
    codes = CODES.to(device())
    q = torch.eye(256, dtype=dtype, device=device())[None, None]
    finite = codes.float().nan_to_num().to(FP8)[None]
    _, lse = one_key(q, finite, finite, 0.5, 1.0, fp8_backend)
    # Triton's kernels round a query with its scale, log2(e) here.
    rounding = torch.finfo(dtype).eps if fp8_backend == "triton" else None
    same = {"rtol": rounding, "atol": 0.0} if rounding else {}
    torch.testing.assert_close(lse, finite.float() * 0.5, **same)
    # The others read NaN too, if times zero.
    _, lse = one_key(q, codes[None], finite, 0.5, 1.0, fp8_backend)
    assert lse.isnan().all()


def hard_numbers():
    """Every finite code, the middles between two, what is next to these, and what is too large."""
    codes = CODES.float()[CODES.float().isfinite()].sort().values
    middles = (codes[1:] + codes[:-1]) / 2
    near = [x.nextafter(torch.tensor(to)) for x in (codes, middles) for to in (-1e9, 1e9)]
    large = torch.tensor([463.9, 464.0, 464.1, 480.0, 1e4, 6e4, torch.inf])
    all_of_them = torch.cat((codes, middles, *near, large, -large, torch.tensor([torch.nan, -0.0])))
    return torch.cat((all_of_them, torch.zeros(-len(all_of_them) % 64))).view(1, -1, 2, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writing_rounds_to_nearest_even_and_saturates(dtype, fp8_backend):
    x = hard_numbers().to(dtype)
    for scales in (torch.ones(2), torch.tensor([0.37, 2.1])):
        want = quantized(x, scales)
        caches = [torch.zeros_like(want) for _ in "kvkv"]
        where = {"cache_seqlens": 0, "k_scale": scales, "v_scale": scales, "backend": fp8_backend}
        q, freqs = torch.ones_like(x), methods.rope(32)
        rope_attention_with_kvcache(q, *caches[:2], freqs, scores.rerope(4), k=x, v=x, **where)
        rope_append_kvcache(None, x, x, *caches[2:], None, **where)
        assert all(same_codes(cache, want) for cache in caches)


@pytest.mark.parametrize("score", ("rerope", "leaky_rerope", "xpos"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_as_into_a_wider_cache_that_is_rounded_then(score, dtype, fp8_backend):
    """Packed, with padding, between slots in use."""
    case = Case((70, 9), heads_q=6, page_size=21, leftpad=(3, 25), dtype=dtype, **SCORES[score])
    case = replace(case, rotary_dim=16, rotary_offset=14)
    wide, inputs = make(case), make(replace(case, fp8=True))
    scale = {name: inputs.call[name] for name in ("k_scale", "v_scale")}
    counts = torch.tensor([0, 5, 8], dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(10, n, 32, generator=generator).to(dtype) for n in (6, 2, 2))
    new = {"k": k, "v": v, "cu_seqlens_q": counts}
    new["cache_seqlens"] = inputs.call["cache_seqlens"] - torch.tensor([5, 3], dtype=torch.int32)
    for cached in (wide, inputs):
        cached.run(fp8_backend, q=q, **new)
    for name, of in (("k_cache", "k_scale"), ("v_cache", "v_scale")):
        assert same_codes(getattr(inputs, name), quantized(getattr(wide, name), scale[of]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", (None, scores.rerope(9), scores.leaky_rerope(9, 4.0)))
def test_the_fused_step(score, dtype, fp8_backend):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(7, n, 32, generator=generator).to(dtype) for n in (4, 2, 2))
    slots = torch.tensor([3, -1, 40, 41, 7, 0, 12])
    scale = torch.tensor([0.01, 0.02])
    call = {"slot_mapping": slots, "positions": torch.arange(7) + 90, "score": score,
            "backend": fp8_backend, "rotary_offset": 16}  # fmt: skip
    wide = [torch.zeros(3, 16, 2, 32, dtype=dtype) for _ in "kv"]
    cache = [x.to(FP8) for x in wide]
    want = rope_append_kvcache(q, k, v, *wide, methods.rope(16), **call)
    got = rope_append_kvcache(
        q, k, v, *cache, methods.rope(16), **call, k_scale=scale, v_scale=scale
    )
    assert torch.equal(got, want)
    assert all(same_codes(x, quantized(y, scale)) for x, y in zip(cache, wide))
