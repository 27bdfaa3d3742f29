"""Caches in float8_e4m3fn, with a scale for each head of keys and of values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_oracle import SCORES, Case, check, make, quantized

from extrope_kernels import methods, rerope_attention_with_kvcache, rope_append_kvcache, scores
from extrope_kernels.testing import device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
BACKENDS = ("reference", "cpu")
CODES = torch.arange(256, dtype=torch.uint8).view(FP8)
ONE_TOKEN = Case((70, 9), heads_q=6, page_size=21, leftpad=(3, 25), fp8=True)
FEW = Case((37, 5, 0), 4, heads_q=6, fp8=True)
CHUNK = Case((170, 60), 132, page_size=16, fp8=True)  # tiles, on a CPU


@pytest.fixture(params=BACKENDS)
def fp8_backend(request):
    if device() != "cpu":
        pytest.skip("Triton's kernels refuse caches in fp8")
    return request.param


def same_codes(x, y):
    """The same numbers, or both NaN."""
    both_nan = x.float().isnan() & y.float().isnan()
    return ((x.view(torch.uint8) == y.view(torch.uint8)) | both_nan).all()


@pytest.mark.parametrize("case", (ONE_TOKEN, FEW, CHUNK), ids=("one token", "few", "chunk"))
@pytest.mark.parametrize("score", SCORES)
def test_every_score_method(score, case, fp8_backend):
    """As exact as on the cache that it stands for: it is read without an error."""
    check(replace(case, **SCORES[score]), fp8_backend)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", (ONE_TOKEN, FEW, CHUNK), ids=("one token", "few", "chunk"))
def test_dtypes_and_softmax_options(case, dtype, fp8_backend):
    options = {"sinks": True, "softcap": 2.0, "sliding_window": 50, "query_scale": True}
    case = replace(case, dtype=dtype, head_dim_v=24, interleaved=True, **options)
    check(replace(case, **SCORES["leaky_rerope"]), fp8_backend)


def one_key(code_rows, v_rows, tokens, dtype, k_scale, v_scale, backend):
    """Every sequence has one key, which its last token sees."""
    q = torch.zeros(len(code_rows), tokens, 1, 256, dtype=dtype)
    q[torch.arange(len(code_rows)), -1, 0, torch.arange(len(code_rows)) % 256] = 1.0
    out, lse = rerope_attention_with_kvcache(
        q, code_rows[:, None, None], v_rows[:, None, None], methods.rope(256), cache_seqlens=1,
        window=4, softmax_scale=1.0, return_lse=True, backend=backend,
        k_scale=torch.tensor([k_scale]), v_scale=torch.tensor([v_scale]),
    )  # fmt: skip
    return out[:, -1, 0], lse[:, 0, -1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", (1, 256))
def test_every_code_is_read_as_torch_reads_it(tokens, dtype, fp8_backend):
    finite = CODES.float().nan_to_num().to(FP8)
    rows = finite.expand(8, -1)
    out, _ = one_key(rows, rows, tokens, dtype, 1.0, 0.25, fp8_backend)
    assert torch.equal(out, (finite.float() * 0.25).to(dtype).expand_as(out))
    out, _ = one_key(rows, CODES.expand(8, -1), tokens, dtype, 1.0, 1.0, fp8_backend)
    assert torch.equal(out.isnan(), CODES.float().isnan().expand_as(out))
    if tokens == 1:  # the score of one dim: that key
        rows = finite.expand(256, -1)
        _, lse = one_key(rows, rows, 1, dtype, 0.5, 1.0, fp8_backend)
        torch.testing.assert_close(lse, finite.float() * 0.5)


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
        rerope_attention_with_kvcache(q, *caches[:2], freqs, k=x, v=x, window=4, **where)
        rope_append_kvcache(None, x, x, *caches[2:], None, **where)
        assert all(same_codes(cache, want) for cache in caches)


@pytest.mark.parametrize("score", ("rerope", "leaky_rerope", "xpos"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_as_into_a_wider_cache_that_is_rounded_then(score, dtype, fp8_backend):
    """Packed, with padding, between slots in use."""
    case = replace(ONE_TOKEN, **SCORES[score], dtype=dtype, fp8=False)
    wide, inputs = make(case), make(replace(case, fp8=True))
    scale = {name: inputs.call[name] for name in ("k_scale", "v_scale")}
    counts = torch.tensor([0, 5, 8], dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(10, n, 32, generator=generator).to(dtype) for n in (6, 2, 2))
    new = {"k": k, "v": v, "cu_seqlens_q": counts}
    new["cache_seqlens"] = inputs.call["cache_seqlens"] - torch.tensor([5, 3], dtype=torch.int32)
    for run in (wide, inputs):
        run.call.update(new)
        replace(run, q=q).run(fp8_backend)
    for name, of in (("k_cache", "k_scale"), ("v_cache", "v_scale")):
        assert same_codes(getattr(inputs, name), quantized(getattr(wide, name), scale[of]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", (None, scores.rerope(9), scores.rerope(9, 4.0)))
def test_the_fused_step(score, dtype, fp8_backend):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(7, n, 32, generator=generator).to(dtype) for n in (4, 2, 2))
    slots = torch.tensor([3, -1, 40, 41, 7, 0, 12])
    scale = torch.tensor([0.01, 0.02])
    call = {"slot_mapping": slots, "positions": torch.arange(7) + 90, "score": score,
            "k_norm_weight": torch.linspace(0.5, 2.0, 32), "backend": fp8_backend}  # fmt: skip
    wide = [torch.zeros(3, 16, 2, 32, dtype=dtype) for _ in "kv"]
    cache = [x.to(FP8) for x in wide]
    want = rope_append_kvcache(q, k, v, *wide, methods.rope(32), **call)
    got = rope_append_kvcache(
        q, k, v, *cache, methods.rope(32), **call, k_scale=scale, v_scale=scale
    )
    assert torch.equal(got, want)
    assert all(same_codes(x, quantized(y, scale)) for x, y in zip(cache, wide))


def decode_call(cache, **scales):
    q, freqs = torch.zeros(1, 1, 4, 32, device=cache.device), methods.rope(32).to(cache.device)
    rerope_attention_with_kvcache(q, cache, cache, freqs, cache_seqlens=3, window=4, **scales)


def append_call(cache, **scales):
    x = torch.zeros(1, 1, 2, 32, device=cache.device)
    rope_append_kvcache(None, x, x, cache, cache.clone(), None, cache_seqlens=3, **scales)


@pytest.mark.parametrize("call", (decode_call, append_call))
def test_refusals(call):
    cache, scale = torch.zeros(1, 8, 2, 32), torch.ones(2)
    wrong = [
        (cache.to(FP8), {}, "k_cache in torch.float8_e4m3fn needs k_scale and v_scale, (heads_k,) "
         "float32, got none"),
        (cache.to(FP8), {"k_scale": scale}, "needs k_scale and v_scale, (heads_k,) float32, got k"),
        (cache, {"k_scale": scale, "v_scale": scale}, "k_scale and v_scale are for caches in "
         "torch.float8_e4m3fn, got k_cache in torch.float32"),
        (cache.to(FP8), {"k_scale": torch.ones(3), "v_scale": scale}, "k_scale must be contiguous "
         "float32 (2,) on cpu, got torch.float32 (3,) on cpu"),
        (cache.to(FP8), {"k_scale": scale, "v_scale": scale.double()}, "v_scale must be contiguous "
         "float32 (2,) on cpu, got torch.float64 (2,) on cpu"),
        (cache.to(torch.float8_e5m2), {"k_scale": scale, "v_scale": scale}, "k_cache must be "),
    ]  # fmt: skip
    for own, scales, message in wrong:
        with pytest.raises(ValueError) as refused:
            call(own, **scales)
        assert message in str(refused.value)
    with pytest.raises(TypeError, match="k_scale must be a Tensor, got float"):
        call(cache.to(FP8), k_scale=1.0, v_scale=scale)


@pytest.mark.parametrize("call", (decode_call, append_call))
def test_triton_refuses_in_a_line(call, backend):
    """And so does a GPU, whose kernels are Triton's."""
    if backend != "triton":
        pytest.skip("takes such caches")
    scales = {"k_scale": torch.ones(2, device=device()), "v_scale": torch.ones(2, device=device())}
    cache = torch.zeros(1, 8, 2, 32, device=device()).to(FP8)
    with pytest.raises(
        NotImplementedError, match=r"Triton's kernels take no cache in torch.float8"
    ):
        call(cache, **scales, backend=backend)
