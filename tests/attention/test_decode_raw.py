"""A cache of raw keys: read by any frequencies, at any position."""

from __future__ import annotations

import pytest
import torch
from decode_oracle import SCORES, Case, check

from extrope_kernels import (
    methods,
    rope_append_kvcache,
    rope_attention,
    rope_attention_with_kvcache,
    scores,
)
from extrope_kernels.testing import device

DYNAMIC = {
    "dynamic_ntk": lambda n: methods.dynamic_ntk(
        32, factor=2.0, seq_len=n, max_position_embeddings=16
    ),
    "dynamic_yarn": lambda n: methods.dynamic_yarn(
        32, seq_len=n, original_max_position_embeddings=16
    ),
}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("score", [name for name in SCORES if name != "xpos"])
def test_every_score_method(score, seqlen_q, fp8, any_backend):
    case = Case((37, 3, 0, 70), seqlen_q, raw=True, freqs_per_sequence=True, page_size=16, fp8=fp8)
    check(Case(**{**vars(case), **SCORES[score]}), any_backend)


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


def test_append_without_frequencies(any_backend):
    """It writes what attention does."""
    k, v = torch.randn(2, 1, 3, 2, 32, device=device()).unbind()
    written = torch.full((4, 1, 8, 2, 32), torch.nan, device=device()).unbind()
    rope_append_kvcache(None, k, v, *written[:2], None, cache_seqlens=2, backend=any_backend)
    freqs, q = methods.rope(32).to(device()), torch.randn(1, 3, 4, 32, device=device())
    caches = [x.nan_to_num() for x in written[2:]]
    rope_attention_with_kvcache(
        q, *caches, freqs, scores.string(4, 2), cache_seqlens=2, k=k, v=v, stored="raw",
        backend=any_backend,
    )  # fmt: skip
    for got, want in zip(caches, written[:2], strict=True):
        assert torch.equal(got, want.nan_to_num())


def test_another_word_is_refused():
    q, cache = torch.zeros(1, 1, 2, 32), torch.zeros(1, 8, 2, 32)
    with pytest.raises(ValueError, match=r"rerope: stored must be None or 'raw', got 'raws'"):
        rope_attention_with_kvcache(
            q, cache, cache, methods.rope(32), scores.rerope(4), cache_seqlens=3, stored="raws"
        )
