"""Maps of pairs and frequencies of heads: appends, nothing to do, and calls that are refused.

What attention reads of such a cache and writes into it is in test_pair_maps.py.
"""

from __future__ import annotations

import pytest
import torch
from support.attention_oracle import make_qkv
from test_pair_maps import BASE, MADE, PAIRS, drawn, frequencies, stretched

from extrope_kernels import (
    RopeFreqs,
    methods,
    rope_append_kvcache,
    rope_attention,
    rope_attention_with_kvcache,
    scores,
)
from extrope_kernels.ops.attention import make_call
from extrope_kernels.testing import device


@pytest.mark.parametrize("score", [stretched(1 + drawn(PAIRS)), scores.string(6, 2)])
def test_append_takes_frequencies_of_heads(score, any_backend):
    """Those of k's heads: queries, which have more, are not rotated."""
    freqs = frequencies(2)
    q, k, v = make_qkv(2, 5, 5, 4, 2, 32)
    caches = torch.zeros(4, 2, 9, 2, 32, device=device()).unbind()
    given = {"freqs": freqs, "score": score, "cache_seqlens": 3, "backend": any_backend}
    assert torch.equal(rope_append_kvcache(q, k, v, *caches[:2], **given), q)
    rope_attention_with_kvcache(q, *caches[2:], k=k, v=v, **given)
    for got, want in zip(caches[:2], caches[2:]):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_raw_cache_in_a_graph():
    score = MADE["factors"].example.score
    q, k, v = make_qkv(2, 3, 40, 4, 2, 32)
    lengths = torch.tensor((37, 12), dtype=torch.int32, device=device())

    def step(q, k, v, cache_seqlens):
        given = {"cache_seqlens": cache_seqlens, "stored": "raw"}
        return rope_attention_with_kvcache(q, k, v, BASE, score, **given)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, lengths), step(q, k, v, lengths))


def test_an_append_in_a_graph():
    score = MADE["groups"].example.score
    q, k, v = make_qkv(2, 1, 1, 4, 2, 32)
    lengths = torch.tensor((3, 7), dtype=torch.int32, device=device())

    def step(q, k, v, k_cache, v_cache, cache_seqlens):
        given = {"score": score, "cache_seqlens": cache_seqlens}
        return rope_append_kvcache(q, k, v, k_cache, v_cache, BASE, **given)

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        caches = [torch.zeros(2, 9, 2, 32, device=device()) for _ in range(2)]
        found.append([run(q, k, v, *caches, lengths), *caches])
    assert all(map(torch.equal, *found)) and all(x.any() for x in found[0])


def test_nothing_to_do(any_backend):
    score = MADE["groups"].example.score
    for batch, seqlen_q, seqlen_k in ((0, 3, 3), (2, 0, 5), (2, 0, 0), (1, 4, 0)):
        q, k, v = (
            torch.zeros(batch, n, heads, 32, device=device(), requires_grad=True)
            for n, heads in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2))
        )
        out = rope_attention(q, k, v, BASE, score, backend=any_backend)
        assert out.shape == q.shape and not out.any()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert not any(x.any() for x in grads)
    for batch, seqlen_q in ((0, 1), (2, 0)):
        q = torch.zeros(batch, seqlen_q, 4, 32, device=device())
        cache = torch.zeros(batch, 8, 2, 32, device=device())
        given = {"cache_seqlens": 3, "backend": any_backend}
        out = rope_attention_with_kvcache(q, cache, cache, BASE, score, **given)
        assert out.shape == q.shape


def test_a_table_that_no_map_names(any_backend):
    """It changes nothing: regions without keys are left out, and their maps with them."""
    q, k, v = make_qkv(1, 9, 9, 4, 2, 32)
    call = make_call(BASE, None)
    table = make_call(BASE, stretched(1 + drawn(PAIRS))).pair_maps
    name = {"reference": "attention_fwd", "cpu": "attention_fwd"}.get(any_backend)
    op = getattr(torch.ops.extrope, name or f"attention_fwd_{any_backend}")
    outs = [
        op(q, k, v, *call._replace(pair_maps=x).tensors, **call.options)[0] for x in (None, table)
    ]
    assert torch.equal(*outs)


FACTORS = 1 + drawn(PAIRS)
BAD = [
    ({"score": stretched(FACTORS[1:])}, r"pair_maps must be \(maps, 2, pairs 14\)"),
    ({"freqs": methods.xpos(2 * PAIRS)}, "got maps of pairs"),
    ({"freqs": RopeFreqs(torch.ones(1, 3, PAIRS))}, "inv_freq must be"),
    ({"freqs": RopeFreqs(torch.ones(1, 4, PAIRS))}, "inv_freq must be"),
    ({"freqs": RopeFreqs(torch.ones(3, 2, PAIRS))}, "inv_freq must be"),
    ({"freqs": RopeFreqs(torch.ones(1, 1, 2, PAIRS))}, "inv_freq must be"),
]  # fmt: skip


def test_a_cache_refuses_axes():
    """It takes no positions that could be given with them."""
    q, k, v = make_qkv(2, 9, 9, 4, 2, 32)
    freqs = methods.with_sections(methods.rope(2 * PAIRS), [4, 5, 5]).to(device())
    with pytest.raises(ValueError, match=r"kvcache: freqs must have no axes \(mRoPE\), got some"):
        rope_attention_with_kvcache(q, k, v, freqs, cache_seqlens=9)


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_refused(changes, message, any_backend):
    q, k, v = make_qkv(2, 9, 9, 4, 2, 32)
    call = {"freqs": BASE, "score": stretched(FACTORS), **changes}
    call["freqs"] = call["freqs"].to(device())
    with pytest.raises(ValueError, match=f"^other_frequencies: .*{message}"):
        rope_attention(q, k, v, **call, backend=any_backend)
    if call["freqs"].log_decay is None:
        with pytest.raises(ValueError, match=f"^other_frequencies: .*{message}"):
            rope_attention_with_kvcache(q, k, v, **call, cache_seqlens=9, backend=any_backend)


def test_the_op_refuses(any_backend):
    """What the public functions never make: no table, another dtype, rows that are not there."""
    q, k, v = make_qkv(2, 9, 9, 4, 2, 32)
    call = make_call(BASE, stretched(FACTORS))
    suffix = f"_{any_backend}" if any_backend == "triton" else ""
    op = getattr(torch.ops.extrope, f"attention_fwd{suffix}")
    table = call.pair_maps
    for wrong, message in (
        (None, "pair_maps"),
        (table[:1], "maps name row 1 of 1 in pair_maps"),
        (table.float(), "float64"),
        (table[:, :1], "pair_maps must be|maps of pairs must be"),
        (table[0], "pair_maps must be|maps of pairs must be|maps name row"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            op(q, k, v, *call._replace(pair_maps=wrong).tensors, **call.options)
