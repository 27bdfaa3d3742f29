"""Attention over a key/value cache against its definition in float64, for every score method."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.attention_oracle import closed_form
from support.decode_oracle import SCORES, Case, by_formula, check, in_rows, make
from support.score_examples import (
    blockwise_causal,
    dual_chunk,
    example,
    example_of,
    rerope,
    self_extend,
    string,
)

from extrope_kernels import methods, rope_attention, rope_attention_with_kvcache, scores
from extrope_kernels.scores import FIRST_KEY, PositionMap, Region, Score
from extrope_kernels.scores.base import SAME
from extrope_kernels.testing import device

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LEAKY = SCORES["leaky_rerope"]["example"]
SOFTMAX = {"sinks": True, "softcap": 2.0, "sliding_window": 29, "query_scale": True, "log_n": 16}


def of_rerope(window, factor=math.inf):
    return example(scores.leaky_rerope, rerope, window=window, factor=factor)


def of_chunks(chunk_size, local_window):
    return example(scores.dual_chunk, dual_chunk, chunk_size=chunk_size, local_window=local_window)


def of_blocks(block_size):
    return example(scores.blockwise_causal, blockwise_causal, block_size=block_size)


# Some sequences are shorter than seqlen_q, so that their first rows see no key; some are empty.
PADDED = {"page_size": 21, "leftpad": (3, 25, 30), "heads_q": 6}
# On a CPU so many queries run in the tiles of the attention.
CHUNK = Case((170, 60, 0), 132, page_size=21, leftpad=(3, 25, 0))
KINDS = {
    "one token": Case((29, 1, 7)),
    "one token of 16 bits": Case((29, 1, 7), dtype=BF16),
    "several tokens": Case((37, 5, 0, 40), 3),
    "many tokens": Case((37, 5, 0, 40), 37),
    "padded pages": Case((70, 9, 0), 4, **PADDED, dtype=F16),
    "options": Case((37, 3, 0, 70), 5, **SOFTMAX, softmax_scale=0.3),
    "appended": Case((11, 4), 3, appended=True, page_size=5, leftpad=(2, 7), rotary_dim=24,
                     rotary_offset=6, interleaved=True, dtype=BF16),
    "packed": Case((14, 3, 0, 42, 9), counts=(5, 1, 0, 33, 1), tail=2, appended=True),
    "packed, with options": Case((14, 3, 9, 42, 1), counts=(5, 1, 0, 33, 1), page_size=16,
                                 dtype=F16, appended=True, **SOFTMAX),
    "fp8": Case((70, 9), 4, fp8=True, page_size=21, leftpad=(3, 25), heads_q=6),
    "raw": Case((37, 3, 0, 70), 5, raw=True, freqs_per_sequence=True, page_size=16),
    "raw, in fp8": Case((37, 3, 0, 70), raw=True, freqs_per_sequence=True, fp8=True),
    "own positions": Case((37, 5, 9, 70), 5, own=True, freqs_per_head=True, page_size=16,
                          attention_factor=1.2),
    "own positions, packed": Case((14, 3, 9, 42, 9), counts=(5, 1, 2, 33, 1), tail=2, own=True,
                                  appended=True, rotary_dim=24, rotary_offset=6, interleaved=True,
                                  dtype=F16),
    "own positions, in fp8": Case((37, 9, 70), own=True, rotary_dim=20, rotary_offset=12, fp8=True),
}  # fmt: skip


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_score_method(kind, score, any_backend):
    if (KINDS[kind].raw or KINDS[kind].own) and score == "xpos":
        pytest.skip("its amplitudes are stored")
    check(replace(KINDS[kind], **SCORES[score]), any_backend)


@pytest.mark.parametrize("fp8", (False, True))
@pytest.mark.parametrize("score", SCORES)
def test_long_chunks(score, fp8):
    check(replace(CHUNK, fp8=fp8, **SCORES[score]), "cpu")


# A model's own cache: every dtype and layout of its rows, by queries that fill no tile and some.
OWN_ROWS = {
    **{str(x)[6:]: {"dtype": x} for x in (F32, BF16, F16)},
    **{f"{str(x)[6:]} by fp8": {"dtype": x, "fp8": True} for x in (F32, BF16, F16)},
}
OWN_SHAPES = {
    "1 token of 2 heads": Case((1, 33, 300), heads_q=2, heads_k=2),
    "1 token of 2 heads by 1": Case((1, 33, 300), heads_q=2, heads_k=1, head_dim=128,
                                    rotary_dim=64, rotary_offset=64),
    "7 tokens of 6 heads by 2": Case((7, 40, 300), 7, heads_q=6, rotary_dim=20, rotary_offset=4,
                                     page_size=16, appended=True),
    "7 tokens of 6 heads by 1": Case((9, 300), 7, heads_q=6, heads_k=1, head_dim=64, rotary_dim=64,
                                     attention_factor=1.2),
}  # fmt: skip
OWN_SCORES = ("no score", "rerope", "leaky_rerope", "self_extend", "dual_chunk", "string")


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("score", OWN_SCORES)
@pytest.mark.parametrize("rows", OWN_ROWS)
@pytest.mark.parametrize("shape", OWN_SHAPES)
def test_own_positions(shape, rows, score, interleaved):
    case = replace(OWN_SHAPES[shape], own=True, interleaved=interleaved)
    check(replace(case, **OWN_ROWS[rows], **SCORES[score]), "cpu")


@pytest.mark.parametrize("score", SCORES)
def test_reference_in_float64(score):
    for seqlen_q in (1, 5):
        inputs = make(Case((29, 1, 7, 0), seqlen_q, dtype=torch.float64, **SCORES[score]))
        found = in_rows(inputs, *inputs.run("reference"))
        for got, want in zip(found, by_formula(closed_form, inputs, torch.float64)):
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# Keys are rotated on by no whole number of steps.
FRACTIONS = example_of(Score(
    "fractions",
    (Region(FIRST_KEY, SAME, PositionMap(divisor=0.7)), Region(-6, SAME, SAME)),
    stored=PositionMap(divisor=2.0, floor=True),
))  # fmt: skip


def dims(head_dim, rotary_dim, rotary_offset, head_dim_v=None):
    return {"head_dim": head_dim, "rotary_dim": rotary_dim, "rotary_offset": rotary_offset,
            "head_dim_v": head_dim_v, "example": LEAKY}  # fmt: skip


CASES = {
    **{f"a window of {w}": Case((67,), example=of_rerope(w, f))
       for w, f in ((1, 4.0), (2, math.inf), (66, 4.0), (67, math.inf), (68, 4.0))},
    **{f"{n} keys": Case((n,), example=of_rerope(31), dtype=F16)
       for n in (1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 255, 256, 257)},
    **{f"{q} heads for {k}": Case((41, 19), heads_q=q, heads_k=k)
       for q, k in ((1, 1), (2, 1), (3, 1), (6, 2), (7, 7), (24, 2))},
    **{f"{name} about blocks of keys, {size}, {new} tokens":
       Case((300, 211), new, heads_q=8, example=made)
       for size, new in ((2, 70), (64, 1), (66, 70), (130, 1)) for name, made in
       (("chunks", of_chunks(size + size // 2, size // 2)), ("blocks", of_blocks(2 * size)))},
    "8 dims": Case((21, 6), **dims(8, 8, 0)),
    "2 of 16": Case((21, 6), **dims(16, 2, 8), interleaved=True),
    "24 dims": Case((21, 6), **dims(24, 24, 0, 8), dtype=F16, page_size=16),
    "6 of 40": Case((21, 6), **dims(40, 6, 34, 64), dtype=F16, page_size=16),
    "64 dims": Case((21, 6), 5, **dims(64, 64, 0), dtype=BF16, interleaved=True),
    "32 of 80": Case((21, 6), **dims(80, 32, 0)),
    "96 dims": Case((21, 6), **dims(96, 96, 0), dtype=BF16, interleaved=True),
    "128 dims": Case((21, 6), **dims(128, 128, 0), dtype=F16),
    "64 of 192, as in latent attention": Case((70, 9), 5, **dims(192, 64, 128, 128), dtype=BF16),
    "64 of 256": Case((21, 6), **dims(256, 64, 0)),
    "several blocks of rows": Case((300,), 40, heads_k=1, example=of_rerope(50, 3.0)),
    "pages of a slot": Case((70, 9, 33), page_size=1, dtype=BF16),
    "pages of 16": Case((70, 9), 4, page_size=16, leftpad=(3, 25), example=LEAKY),
    "scales": Case((90, 8), 3, log_n=16, softmax_scale=0.3, attention_factor=1.2, rotary_dim=24,
                   freqs_per_sequence=True, example=LEAKY),
    "rotated on by fractions": Case((70, 9), 2, example=FRACTIONS),
    "a window of one": Case((70, 9, 0), 4, sliding_window=1, dtype=F16, **PADDED),
    "sinks": Case((70, 9), 4, sinks=True, dtype=BF16, head_dim=64, example=LEAKY),
    "a cap": Case((70, 9), 4, softcap=1.5, dtype=F16, head_dim=64, example=LEAKY),
    "temperatures": Case((70, 9), 4, query_scale=True, dtype=BF16, head_dim=64, example=LEAKY),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_shapes_and_options(name, fast_backend):
    check(CASES[name], fast_backend)


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("page_size", (None, 16))
def test_long_chunks_with_softmax_options(page_size, dtype):
    case = replace(CHUNK, dtype=dtype, page_size=page_size, head_dim_v=24, **SOFTMAX)
    case = replace(case, sliding_window=90, interleaved=page_size is None)
    case = replace(case, rotary_dim=20, rotary_offset=12, example=LEAKY)
    check(replace(case, freqs_per_sequence=True), "cpu")


@pytest.mark.parametrize("head_dim", [264, 512])
def test_wide_heads(head_dim, any_backend):
    if any_backend == "triton":
        pytest.skip("its kernels take a head_dim up to 256")
    inputs = make(case := Case((70, 9), 2, head_dim=head_dim, rotary_dim=head_dim))
    # A sum of head_dim products is off by half an eps of |q| |k| for each; a weight by twice that.
    largest = [x.nan_to_num().norm(dim=-1).max().item() for x in (inputs.q, inputs.k_cache)]
    logit = head_dim / 2 * torch.finfo(torch.float32).eps * largest[0] * largest[1] / head_dim**0.5
    of_values = inputs.v_cache.nan_to_num().abs().max().item()
    check(case, any_backend, inputs, noise=(2 * logit * of_values, logit))


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


MILLION = {
    "rerope": of_rerope(64),
    "plain": of_rerope(64, 1.0),
    "leaky": of_rerope(64, 4.0),
    "self_extend": example(scores.self_extend, self_extend, window=64, factor=8),
    "dual_chunk": of_chunks(90, 20),
    "blockwise_causal": of_blocks(4096),
    "string": example(scores.string, string, shift=500, window=128),
}


QUICK = ("leaky", "dual_chunk")


@pytest.mark.parametrize(
    "score", [pytest.param(x, marks=() if x in QUICK else pytest.mark.thorough) for x in MILLION]
)
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
    out, lse = in_rows(inputs, *inputs.run(fast_backend))
    want_out, want_lse = by_formula(closed_form, inputs, torch.float64)
    assert (out.double() - want_out).abs().max() < 1e-5 * want_out.abs().max()
    assert (lse.double() - want_lse).abs().max() < 1e-5


DYNAMIC = {
    "dynamic_ntk": lambda n: methods.dynamic_ntk(
        32, factor=2.0, seq_len=n, max_position_embeddings=16
    ),
    "dynamic_yarn": lambda n: methods.dynamic_yarn(
        32, seq_len=n, original_max_position_embeddings=16
    ),
}


@pytest.mark.parametrize("score", [None, scores.rerope(9)], ids=["plain", "rerope"])
@pytest.mark.parametrize("method", DYNAMIC)
def test_frequencies_follow_the_length(method, score, any_backend):
    """Every step is as attention without a cache, by the frequencies of its length."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 40, h, 32, generator=generator).to(device()) for h in (4, 2, 2))
    k_cache, v_cache = (x.new_full((1, 48, 2, 32), torch.nan) for x in (k, v))
    for begin, end in ((0, 13), (13, 14), (14, 33), (33, 34), (34, 40)):
        freqs = DYNAMIC[method](end).to(device())
        got = rope_attention_with_kvcache(
            q[:, begin:end], k_cache, v_cache, freqs, score, cache_seqlens=begin,
            k=k[:, begin:end], v=v[:, begin:end], backend=any_backend, stored="raw",
        )  # fmt: skip
        want = rope_attention(
            q[:, begin:end].double(), k[:, :end].double(), v[:, :end].double(), freqs, score
        )
        torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=0)
    assert torch.equal(k_cache[:, :40], k)


# -------------------------------------------------------------------------------------------------
# Which bits


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
def test_same_bits_as_without_a_cache(dtype):
    """ReRoPE's cache holds keys as they came."""
    inputs = make(Case((170,), 132, page_size=16, dtype=dtype))
    where = inputs.call["block_table"][0].long()
    k, v = (x[where].flatten(0, 1)[None, :170] for x in (inputs.k_cache, inputs.v_cache))
    want = rope_attention(
        inputs.q, k, v, inputs.freqs, inputs.example.score, return_lse=True, backend="cpu"
    )
    assert all(torch.equal(x, y) for x, y in zip(inputs.run("cpu"), want))


def test_lengths_and_boundaries_in_int64():
    """Python's default: as int32, which kernels take."""
    inputs = make(Case((40, 9), counts=(3, 1), appended=True))
    long = {n: inputs.call[n].long() for n in ("cache_seqlens", "cu_seqlens_q")}
    caches = {n: getattr(inputs, n).clone() for n in ("k_cache", "v_cache")}
    assert all(torch.equal(x, y) for x, y in zip(inputs.run(**long, **caches), inputs.run()))


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


# -------------------------------------------------------------------------------------------------
# What is not finite, not read, not contiguous


def test_pages_that_a_window_has_left_are_not_looked_at(any_backend):
    """An engine gives them to others, who may write anything into them."""
    q, k, cache = (
        torch.randn(shape, device=device())
        for shape in ((1, 2, 4, 32), (1, 2, 2, 32), (2, 6, 8, 2, 32))
    )
    where = {"cache_seqlens": 40, "k": k, "v": k, "sliding_window": 9}
    where |= {"block_table": torch.arange(6, dtype=torch.int32, device=device())[None]}
    method = (methods.rope(32).to(device()), scores.rerope(4))
    want = rope_attention_with_kvcache(q, *cache.clone(), *method, **where, backend="reference")
    cache[:, :4] = torch.nan
    got = rope_attention_with_kvcache(q, *cache, *method, **where, backend=any_backend)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_sinks_that_are_not_finite(value, any_backend):
    """Of one head, with keys to see: the others are as they are."""
    inputs = make(Case((70, 3), 2, sinks=True))
    inputs.call["sinks"][1] = value
    out, lse = inputs.run(any_backend)
    want, want_lse = inputs.run("reference")
    torch.testing.assert_close(lse, want_lse, equal_nan=True)
    torch.testing.assert_close(out, want, equal_nan=True)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("where", ("q", "k_cache"))
def test_a_cap_bounds_infinite_logits_and_keeps_nan(where, value, any_backend):
    inputs = make(Case((70, 3), 2, softcap=2.0))
    getattr(inputs, where)[0, 1, 1, -1] = value
    out, lse = inputs.run(any_backend)
    want, want_lse = inputs.run("reference")
    torch.testing.assert_close(lse, want_lse, equal_nan=True)
    assert torch.equal(out.isfinite(), want.isfinite())


NEGATED = torch.complex(torch.zeros(4), -torch.arange(4.0)).conj().imag  # lazily, by a bit


@pytest.mark.parametrize(
    "sinks", [torch.randn(4, 2)[:, 0], torch.tensor([1.5]).expand(4), NEGATED], ids=range(3)
)
def test_sinks_of_any_strides(sinks, any_backend):
    q, (k, v) = torch.randn(2, 1, 4, 32), torch.randn(2, 2, 9, 2, 32)
    q, k, v, sinks = (x.to(device()) for x in (q, k, v, sinks))
    options = {"freqs": methods.rope(32).to(device()), "cache_seqlens": 9, "backend": any_backend}
    got, want = (
        rope_attention_with_kvcache(q, k, v, sinks=x, **options)
        for x in (sinks, sinks.clone().resolve_neg().contiguous())
    )
    assert torch.equal(got, want)


@pytest.mark.thorough
@pytest.mark.parametrize("narrower", ("baseline", "avx2"))
def test_narrower_instructions(narrower, run_narrower):
    tests = "every_score_method or shapes_and_options"
    files = [f"tests/decode/test_decode{ending}.py" for ending in ("", "_fp8")]
    run_narrower(narrower, *files, "-k", f"cpu and ({tests}) or long_chunks or own_positions")
