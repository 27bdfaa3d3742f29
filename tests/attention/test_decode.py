"""Attention over a key/value cache against its definition in float64, for every score method."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from decode_oracle import SCORES, Case, check, exact, index, make, same_dtype
from score_examples import blockwise_causal, dual_chunk, example, rerope, self_extend, string

from extrope_kernels import methods, rope_attention, rope_attention_with_kvcache, scores
from extrope_kernels.testing import assert_within_budget, device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAKY = SCORES["leaky_rerope"]
# Both pairings, and every dtype with one of them.
PAIRINGS = ((DTYPES[0], False), (DTYPES[0], True), (DTYPES[1], True), (DTYPES[2], False))


def of_rerope(window, factor=math.inf):
    return example(scores.rerope, rerope, window=window, factor=factor)


def of_chunks(chunk_size, local_window):
    return example(scores.dual_chunk, dual_chunk, chunk_size=chunk_size, local_window=local_window)


def of_blocks(block_size):
    return example(scores.blockwise_causal, blockwise_causal, block_size=block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_one_token(score, dtype, fast_backend):
    check(Case((29, 1, 7), dtype=dtype, **SCORES[score]), fast_backend)


@pytest.mark.parametrize("score", SCORES)
def test_reference_in_float64(score):
    for seqlen_q in (1, 5):
        inputs = make(Case((29, 1, 7, 0), seqlen_q, dtype=torch.float64, **SCORES[score]))
        for got, want in zip(inputs.run("reference"), exact(inputs)):
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seqlen_q", (2, 3, 16, 37))
@pytest.mark.parametrize("score", SCORES)
def test_several_tokens(score, seqlen_q, fast_backend):
    """Some sequences are shorter than seqlen_q: their first rows see no key; one is empty."""
    check(Case((37, 5, 0, 40), seqlen_q, **SCORES[score]), fast_backend)


@pytest.mark.parametrize("score", SCORES)
def test_left_padding_pages_and_groups(score, fast_backend):
    """Of an empty sequence too."""
    case = Case((70, 9, 0), 4, heads_q=6, page_size=21, leftpad=(3, 25, 30), dtype=torch.float16)
    check(replace(case, **SCORES[score]), fast_backend)


@pytest.mark.parametrize("size", (2, 64, 66, 130))
@pytest.mark.parametrize("seqlen_q", (1, 70))
def test_blocks_of_positions_about_blocks_of_keys(size, seqlen_q, fast_backend):
    """Chunks and half blocks shorter and longer than what the kernels work on at once."""
    for made in (of_chunks(size + size // 2, size // 2), of_blocks(2 * size)):
        check(Case((300, 211), seqlen_q, heads_q=8, example=made), fast_backend)


# Shapes


@pytest.mark.parametrize("window", (1, 2, 7, 66, 67, 68, 1000))
@pytest.mark.parametrize("factor", (math.inf, 4.0))
def test_windows_about_the_length(window, factor, fast_backend):
    check(Case((67,), example=of_rerope(window, factor)), fast_backend)


@pytest.mark.parametrize("length", (1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 255, 256, 257))
def test_lengths_about_tiles_and_parts(length, fast_backend):
    check(Case((length,), example=of_rerope(31), dtype=torch.float16), fast_backend)


@pytest.mark.parametrize("heads_q, heads_k", ((1, 1), (2, 1), (3, 1), (6, 2), (7, 7), (24, 2)))
def test_groups(heads_q, heads_k, fast_backend):
    check(Case((41, 19), heads_q=heads_q, heads_k=heads_k), fast_backend)


@pytest.mark.parametrize("dtype, interleaved", PAIRINGS)
@pytest.mark.parametrize(
    "head_dim, rotary_dim, rotary_offset",
    (
        *((8, 8, 0), (16, 2, 8), (24, 24, 0), (40, 6, 34), (64, 64, 0), (80, 32, 0), (96, 96, 0)),
        *((128, 128, 0), (192, 64, 128), (256, 64, 0)),
    ),
)
def test_dims(head_dim, rotary_dim, rotary_offset, interleaved, dtype, fast_backend):
    dims = {"head_dim": head_dim, "rotary_dim": rotary_dim, "rotary_offset": rotary_offset}
    case = Case((21, 6), **dims, interleaved=interleaved)
    check(replace(case, dtype=dtype, **LEAKY), fast_backend)


def test_several_blocks_of_rows_and_splits_of_keys(fast_backend):
    check(Case((300,), 40, heads_q=4, heads_k=1, example=of_rerope(50, 3.0)), fast_backend)


@pytest.mark.parametrize("page_size", (1, 16, 21))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_in_any_order(page_size, dtype, fast_backend):
    check(Case((70, 9, 33), page_size=page_size, dtype=dtype), fast_backend)
    case = Case((70, 9), 4, page_size=page_size, dtype=dtype, leftpad=(3, 25), **LEAKY)
    check(case, fast_backend)


def test_scales(fast_backend):
    case = Case((90, 8), 3, log_n=16, softmax_scale=0.3, attention_factor=1.2, rotary_dim=24)
    check(case, fast_backend)
    check(replace(case, freqs_per_sequence=True, **LEAKY), fast_backend)


@pytest.mark.parametrize("layout", ("heads first", "fused", "gap"))
def test_strides(layout, fast_backend):
    case = Case((45, 20), 2)
    inputs = make(case)

    def restride(x):
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "fused":  # q, k and v in one row
            return torch.cat((x, x + 1, x - 1), dim=2)[:, :, : x.shape[2]]
        return torch.cat((x, x), dim=3)[..., : x.shape[3]]

    strided = replace(
        inputs, **{n: restride(getattr(inputs, n)) for n in ("q", "k_cache", "v_cache")}
    )
    check(case, fast_backend, strided)


def test_one_sequence_s_integers_have_any_stride(fast_backend):
    """As positions[:, -1] of a batch of one: to PyTorch they are contiguous."""
    inputs = make(Case((20,), page_size=32, leftpad=(2,)))
    call = {n: x for n, x in inputs.call.items() if isinstance(x, torch.Tensor)}
    apart = {n: x.repeat_interleave(3, -1)[..., ::3] for n, x in call.items()}
    assert len(apart) == 3 and all(x.stride(-1) == 3 for x in apart.values())
    for got, want in zip(inputs.run(fast_backend, **apart), inputs.run(fast_backend)):
        assert torch.equal(got, want)


def test_nothing_to_do(fast_backend):
    for shape in ((0, 1, 4, 32), (2, 0, 4, 32)):
        cache = torch.zeros(shape[0], 3, 2, 32, device=device())
        q = torch.zeros(shape, device=device())
        freqs = methods.rope(32).to(device())
        out, lse = rope_attention_with_kvcache(
            q, cache, cache, freqs, cache_seqlens=0, return_lse=True, backend=fast_backend
        )
        assert out.shape == shape and lse.shape == (shape[0], 4, shape[1])


@pytest.mark.parametrize("bits", (0x7FC00001, 0x7FFFFFFF, -1), ids=hex)
def test_nan_stays_nan_whatever_its_bits(bits, fast_backend):
    inputs = make(Case((20, 9)))
    inputs.k_cache[0, 19, :, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out, lse = inputs.run(fast_backend)
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


@pytest.mark.parametrize("named", [None, "reference"])
def test_a_table_of_a_cache_without_pages(named):
    q, cache = (torch.ones(n, 4, 2, 32, device=device()) for n in (1, 0))
    table = torch.full((1, 2), -1, dtype=torch.int32, device=device())
    out = rope_attention_with_kvcache(
        q, cache, cache, methods.rope(32).to(device()), cache_seqlens=0, block_table=table,
        backend=named,
    )  # fmt: skip
    assert not out.any()


# Numbers


MILLION = {
    "rerope": of_rerope(64),
    "plain": of_rerope(64, 1.0),
    "leaky": of_rerope(64, 4.0),
    "self_extend": example(scores.self_extend, self_extend, window=64, factor=8),
    "dual_chunk": of_chunks(90, 20),
    "blockwise_causal": of_blocks(4096),
    "string": example(scores.string, string, shift=500, window=128),
}


@pytest.mark.parametrize("score", MILLION)
def test_a_million_positions_cost_no_accuracy(score, fast_backend):
    """Most pages are one page, whose values are 0: the output is that of the last 1000 keys."""
    if fast_backend == "triton" and device() == "cpu":
        pytest.skip("a million keys take the interpreter minutes; test_decode_triton.py has angles")
    page_size, pages = 1000, 1001
    table = torch.zeros(1, pages, dtype=torch.int32, device=device())
    table[0, -1] = 1
    sizes = {"heads_q": 1, "heads_k": 1, "head_dim": 8, "rotary_dim": 8}
    case = Case((page_size - 7,), example=MILLION[score], **sizes)
    inputs = make(case)
    k, v = (torch.randn(2, page_size, 1, 8, device=device()) for _ in range(2))
    v[0] = 0.0
    v[1] *= 1e3
    seqlens = torch.full((1,), 1_000_993, dtype=torch.int32, device=device())
    call = {**inputs.call, "block_table": table, "cache_seqlens": seqlens}
    inputs = replace(inputs, k_cache=k, v_cache=v, call=call)
    out, lse = inputs.run(fast_backend)
    want_out, want_lse = exact(inputs)
    assert (out.double() - want_out).abs().max() < 1e-5 * want_out.abs().max()
    assert (lse.double() - want_lse).abs().max() < 1e-5


# Writing


@pytest.mark.parametrize("score", SCORES)
def test_prompt_chunks_and_single_steps_agree(score, fast_backend):
    """Through the cache in one call, in chunks and token by token: each as exact as the formula."""
    total = 23
    inputs = make(Case((total, total), heads_q=2, heads_k=1, **SCORES[score]))
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, total, heads, 32, generator=generator).to(device()) for heads in (2, 1, 1)
    )
    j = torch.arange(total, dtype=torch.float64, device=device())
    stored = torch.stack([inputs.store(x, j, inputs.freqs.inv_freq) for x in k.double()])
    for chunks in ([23], [9, 1, 13], [1] * 23):
        k_cache, v_cache = (torch.full_like(inputs.k_cache, torch.nan) for _ in range(2))
        caching = replace(inputs, k_cache=k_cache, v_cache=v_cache)
        done, outs = 0, []
        for size in chunks:
            now = slice(done, done + size)
            new = {"k": k[:, now], "v": v[:, now], "cache_seqlens": done}
            outs.append(caching.run(fast_backend, q=q[:, now], **new)[0])
            done += size
        assert (k_cache[:, :total].double() - stored).abs().max() < 1e-6
        assert torch.equal(v_cache[:, :total], v)
        assert k_cache[:, total:].isnan().all() and v_cache[:, total:].isnan().all()
        whole = replace(caching, q=q)
        assert_within_budget("out", torch.cat(outs, 1), same_dtype(whole)[0], exact(whole)[0])
    wide = (x.double() for x in (q, k, v))
    uncached = rope_attention(*wide, inputs.freqs, inputs.example.score, backend="reference")
    assert_within_budget("out", torch.cat(outs, 1), same_dtype(whole)[0], uncached)


@pytest.mark.parametrize("dtype, interleaved", PAIRINGS[1:])
@pytest.mark.parametrize("score", SCORES)
def test_append_with_padding_and_pages(score, interleaved, dtype, fast_backend):
    """New keys go behind those of their sequence, wherever its pages are, and nowhere else."""
    case = Case((11, 4), page_size=5, leftpad=(2, 7), rotary_dim=24, rotary_offset=6, dtype=dtype)
    case = replace(case, interleaved=interleaved, **SCORES[score])
    inputs = make(case)
    k, v = torch.randn(2, 3, 2, 32), torch.randn(2, 3, 2, 32)
    k, v = k.to(device(), dtype), v.to(device(), dtype)
    before = inputs.call["cache_seqlens"] - 3
    slots = [index(inputs, b, range(end - 3, end)) for b, end in enumerate((13, 11))]
    k_cache, v_cache = inputs.k_cache.clone(), inputs.v_cache.clone()
    for where in slots:
        k_cache[where], v_cache[where] = torch.nan, torch.nan
    given = {"q": inputs.q.expand(-1, 3, -1, -1), "k_cache": k_cache, "v_cache": v_cache}
    out, _ = inputs.run(fast_backend, **given, k=k, v=v, cache_seqlens=before)
    for b, where in enumerate(slots):
        j = torch.arange(3, device=device()).double() + case.lengths[b] - 3
        want = inputs.store(k[b].double(), j, inputs.freqs.inv_freq)
        ulp = torch.finfo(dtype).eps * want.abs().max()
        assert (k_cache[where].double() - want).abs().max() <= ulp
        assert torch.equal(v_cache[where], v[b])
        k_cache[where], v_cache[where] = inputs.k_cache[where], inputs.v_cache[where]
    assert torch.equal(k_cache.nan_to_num(7.0), inputs.k_cache.nan_to_num(7.0))
    assert torch.equal(v_cache.nan_to_num(7.0), inputs.v_cache.nan_to_num(7.0))
    assert out.isfinite().all()


# -------------------------------------------------------------------------------------------------
# Long chunks of queries: on a CPU they run in the attention's tiles. 132 tokens of 2 query heads
# for each head of keys; one sequence is empty, one shorter.

CHUNK = Case((170, 60, 0), 132, page_size=21, leftpad=(3, 25, 0))
SOFTMAX = {"sinks": True, "softcap": 2.0, "sliding_window": 90, "query_scale": True, "log_n": 16}


@pytest.mark.parametrize("score", SCORES)
def test_long_chunks(score):
    check(replace(CHUNK, **SCORES[score]), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", (None, 16))
def test_long_chunks_with_softmax_options(page_size, dtype):
    case = replace(CHUNK, dtype=dtype, page_size=page_size, head_dim_v=24, **SOFTMAX)
    case = replace(case, rotary_dim=20, rotary_offset=12, interleaved=page_size is None)
    check(replace(case, freqs_per_sequence=True, **LEAKY), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_without_a_cache(dtype):
    """ReRoPE's cache holds keys as they came."""
    inputs = make(Case((170,), 132, page_size=16, dtype=dtype))
    where = inputs.call["block_table"][0].long()
    k, v = (x[where].flatten(0, 1)[None, :170] for x in (inputs.k_cache, inputs.v_cache))
    want = rope_attention(
        inputs.q, k, v, inputs.freqs, inputs.example.score, return_lse=True, backend="cpu"
    )
    assert all(torch.equal(x, y) for x, y in zip(inputs.run("cpu"), want))


def test_chunks_and_single_tokens_have_the_bits_that_each_has_alone():
    """Of a mixed batch, with padding behind it, for any number of threads."""
    counts = (140, 1, 0, 3, 129, 1)
    inputs = make(Case(tuple(n + 50 for n in counts), page_size=16, heads_q=4, **SOFTMAX))
    generator = torch.Generator().manual_seed(3)
    total = sum(counts) + 2
    q = torch.randn(total, 4, 32, generator=generator)
    scale = 0.5 + torch.rand(total, generator=generator)
    ends = torch.tensor((0, *counts)).cumsum(0).int()

    def run(ends, rows, tokens):
        own = {n: inputs.call[n][rows] for n in ("cache_seqlens", "block_table")}
        own |= {"q": q[tokens], "query_scale": scale[tokens], "cu_seqlens_q": ends}
        return inputs.run("cpu", **own)

    out, lse = run(ends, slice(None), slice(None))
    assert not out[-2:].any() and (lse[:, -2:] == -torch.inf).all()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for b, (begin, end) in enumerate(pairwise(ends.tolist())):
            alone = torch.tensor([0, end - begin], dtype=torch.int32)
            want, want_lse = run(alone, slice(b, b + 1), slice(begin, end))
            assert torch.equal(out[begin:end], want) and torch.equal(lse[:, begin:end], want_lse)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.thorough
@pytest.mark.parametrize("narrower", ("baseline", "avx2"))
def test_narrower_instructions(narrower, run_narrower):
    tests = "cpu and (one_token or several_tokens or groups or test_dims) or long_chunks"
    files = [f"tests/attention/test_decode{ending}.py" for ending in ("", "_fp8")]
    run_narrower(narrower, *files, "-k", tests)
