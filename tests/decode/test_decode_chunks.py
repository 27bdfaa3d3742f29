"""Long chunks of queries over a cache: on a CPU they run in the attention's tiles."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from decode_oracle import SCORES, Case, check, make

from extrope_kernels import rerope_attention, rerope_attention_with_kvcache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 132 tokens of 2 query heads for each head of keys: tiles. One sequence is empty, one shorter.
CHUNK = Case((170, 60, 0), 132, page_size=21, leftpad=(3, 25, 0))
SOFTMAX = {"sinks": True, "softcap": 2.0, "sliding_window": 90, "query_scale": True, "log_n": 16}


@pytest.mark.parametrize("score", SCORES)
def test_every_score_method(score):
    check(replace(CHUNK, **SCORES[score]), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", (None, 16))
def test_dtypes_pages_and_softmax_options(page_size, dtype):
    case = replace(CHUNK, dtype=dtype, page_size=page_size, head_dim_v=24, **SOFTMAX)
    check(replace(case, freqs_per_sequence=True, **SCORES["leaky_rerope"]), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_without_a_cache(dtype):
    """ReRoPE's cache holds keys as they came."""
    inputs = make(Case((170,), 132, page_size=16, dtype=dtype))
    where = inputs.call["block_table"][0].long()
    k, v = (x[where].flatten(0, 1)[None, :170] for x in (inputs.k_cache, inputs.v_cache))
    want = rerope_attention(
        inputs.q, k, v, inputs.freqs, **inputs.parameters, return_lse=True, backend="cpu"
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
    cu_seqlens = torch.tensor((0, *counts)).cumsum(0).int()

    def run(q, cu_seqlens, rows, tokens):
        own = {n: inputs.call[n][rows] for n in ("cache_seqlens", "block_table")}
        return rerope_attention_with_kvcache(
            q[tokens], inputs.k_cache, inputs.v_cache, inputs.freqs, cu_seqlens_q=cu_seqlens,
            return_lse=True, backend="cpu", **inputs.parameters,
            **{**inputs.call, **own, "query_scale": scale[tokens]},
        )  # fmt: skip

    out, lse = run(q, cu_seqlens, slice(None), slice(None))
    assert not out[-2:].any() and (lse[:, -2:] == -torch.inf).all()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for b, (begin, end) in enumerate(pairwise(cu_seqlens)):
            tokens = slice(begin, end)
            alone = torch.tensor([0, end - begin], dtype=torch.int32)
            want, want_lse = run(q, alone, slice(b, b + 1), tokens)
            assert torch.equal(out[tokens], want) and torch.equal(lse[:, tokens], want_lse)
    finally:
        torch.set_num_threads(threads)
