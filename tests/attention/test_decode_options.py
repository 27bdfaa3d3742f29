"""What models add to attention, over a cache: caps, sinks, temperatures, packed queries."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from decode_oracle import SCORES, Case, check, make
from rope_oracle import INTERPRETED
from score_examples import EXAMPLES

from extrope_kernels import methods, rope_attention_with_kvcache, scores
from extrope_kernels.testing import attention_backends, device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SWITCHES = {
    "sinks": {"sinks": True},
    "softcap": {"softcap": 1.5},
    "sliding_window": {"sliding_window": 13},
    "sliding_window of one": {"sliding_window": 1},
    "query_scale": {"query_scale": True},
    "all": {
        "sinks": True,
        "softcap": 2.0,
        "sliding_window": 29,
        "query_scale": True,
        "log_n": 16,
        "softmax_scale": 0.3,
    },
}


@pytest.mark.parametrize("seqlen_q", (1, 5))
@pytest.mark.parametrize("switch", ["sliding_window", "all"])
@pytest.mark.parametrize("score", EXAMPLES)
def test_every_score_method(score, switch, seqlen_q, any_backend):
    """One sequence is empty, one shorter than the queries."""
    check(Case((37, 3, 0, 70), seqlen_q, **SCORES[score], **SWITCHES[switch]), any_backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("switch", SWITCHES)
def test_dtypes_pages_and_padding(switch, dtype, any_backend):
    case = Case((70, 9), 4, heads_q=6, head_dim=64, page_size=21, leftpad=(3, 25), dtype=dtype)
    check(replace(case, **SWITCHES[switch], **SCORES["leaky_rerope"]), any_backend)


@pytest.mark.parametrize("name", [x for x in attention_backends() if x != "flash_attn"])
def test_pages_that_a_window_has_left_are_not_looked_at(name):
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
    got = rope_attention_with_kvcache(q, *cache, *method, **where, backend=name)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "head_dim, head_dim_v, dtype", [(32, 8, DTYPES[0]), (40, 64, DTYPES[2]), (192, 128, DTYPES[1])]
)
def test_another_head_dim_of_values(head_dim, head_dim_v, dtype, any_backend):
    for seqlen_q in (1, 5):
        case = Case((70, 9), seqlen_q, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
        check(replace(case, page_size=16, **SCORES["dual_chunk"]), any_backend)


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


def packed_call(counts, switch, dtype=torch.float32, page_size=16, tail=0):
    """A cache, packed queries and new tokens, and where each sequence's own are among them."""
    lengths = tuple(n + 9 for n in counts)
    case = Case(lengths, 1, page_size=page_size, dtype=dtype, **SWITCHES[switch])
    inputs = make(case)
    total = sum(counts) + tail
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device(), dtype)

    q, k = randn(total, case.heads_q, case.head_dim), randn(total, case.heads_k, case.head_dim)
    v = randn(total, case.heads_k, inputs.v_cache.shape[-1])
    call = dict(inputs.call)
    if "query_scale" in call:
        call["query_scale"] = (0.5 + torch.rand(total, generator=generator)).to(device())
    cu_seqlens = torch.tensor((0, *counts)).cumsum(0).int().to(device())
    call["cache_seqlens"] = torch.full((len(counts),), 9, dtype=torch.int32, device=device())
    return inputs, q, k, v, call, cu_seqlens


@pytest.mark.parametrize(
    "switch, dtype, page_size",
    [
        ("sinks", DTYPES[0], 16),
        ("sliding_window", DTYPES[2], 16),
        ("all", DTYPES[0], 16),
        ("all", DTYPES[1], 16),
        ("all", DTYPES[0], None),
    ],
)
def test_packed_queries(switch, dtype, page_size, any_backend):
    """Chunks and single tokens in one call, as each sequence by itself; one has no query."""
    counts = (5, 1, 0, 33, 1)
    inputs, q, k, v, call, cu_seqlens = packed_call(counts, switch, dtype, page_size, tail=2)
    caches = {name: getattr(inputs, name).clone() for name in ("k_cache", "v_cache")}
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens}
    out, lse = inputs.run(any_backend, **caches, **call, **given)
    assert out.shape == (*q.shape[:-1], v.shape[-1]) and lse.shape == (q.shape[1], q.shape[0])
    assert not out[sum(counts) :].any() and (lse[:, sum(counts) :] == -torch.inf).all()
    apart = {name: getattr(inputs, name).clone() for name in caches}
    for b, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        own = {n: call[n][b : b + 1] for n in ("cache_seqlens", "block_table") if n in call}
        own |= {n: x if page_size else x[b : b + 1] for n, x in apart.items()}
        if "query_scale" in call:
            own["query_scale"] = call["query_scale"][None, begin:end]
        own |= {n: given[n][None, begin:end] for n in "qkv"}
        want, want_lse = inputs.run(any_backend, **{**call, **own})
        torch.testing.assert_close(out[begin:end], want[0])
        torch.testing.assert_close(lse[:, begin:end], want_lse[0])
    for name, x in caches.items():
        torch.testing.assert_close(x, apart[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("boundaries", [(1, 3, 6), (0, 4, 3), (0, 3, 7)], ids=str)
@pytest.mark.parametrize("named", [None, "reference"])
def test_wrong_boundaries(boundaries, named):
    if not INTERPRETED:
        pytest.skip("values on a GPU are not looked at")
    inputs, q, k, v, call, _ = packed_call((3, 3), "sinks")
    ends = torch.tensor(boundaries, dtype=torch.int32, device=device())
    with pytest.raises(ValueError) as refused:
        inputs.run(named, **call, q=q, k=k, v=v, cu_seqlens_q=ends)
    message = f"cu_seqlens_q must rise from 0 to q's 6 tokens at most, got {list(boundaries)}"
    assert str(refused.value) == f"rerope: {message}"


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
