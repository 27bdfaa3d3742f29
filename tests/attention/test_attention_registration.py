"""The attention ops as PyTorch sees them: torch.compile, torch.func, what is saved."""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import replace

import pytest
import torch
from support.attention_oracle import frequencies, make_qkv
from support.decode_oracle import Case, make
from support.score_examples import EXAMPLES
from torch._subclasses.fake_tensor import FakeTensorMode

from extrope_kernels import (
    apply_rope_qk,
    methods,
    rope_attention,
    rope_attention_with_kvcache,
    scores,
)
from extrope_kernels.methods import RopeFreqs
from extrope_kernels.ops._torch.library import op_of
from extrope_kernels.ops.attention import AttentionCall, make_call
from extrope_kernels.ops.attention.call import read_call
from extrope_kernels.scores import FIRST_KEY
from extrope_kernels.testing import device

OPS = torch.ops.extrope
THETA, FREQS = frequencies(32).inv_freq, frequencies(32)
call_of = functools.partial(make_call, FREQS)


def test_both_functions_share_options():
    """Names, order and defaults of what both take."""
    first, second = (
        inspect.signature(x).parameters for x in (rope_attention, rope_attention_with_kvcache)
    )
    shared = [name for name in first if name in second and name not in "qkv"]
    assert [name for name in second if name in shared] == shared
    defaults = [{name: each[name].default for name in shared} for each in (first, second)]
    assert defaults[0] == defaults[1]
    alone = {"q_start", "k_start", "cu_seqlens"}
    assert {*first} - {*second} == alone and len(shared) == 13
    assert all(x.kind is x.KEYWORD_ONLY for n, x in first.items() if n in shared[2:])


@pytest.mark.parametrize("named", ["triton", "flash_attn"])
def test_a_named_backend_runs_ops_of_its_own(named):
    for name in ("attention_fwd", "attention_bwd"):
        assert op_of(name, named) is getattr(OPS, f"{name}_{named}")


def calls() -> dict[str, AttentionCall]:
    cu_seqlens = torch.tensor([0, 5, 13], dtype=torch.int32, device=THETA.device)
    decaying = RopeFreqs(THETA, log_decay=-torch.rand_like(THETA) / 100)
    return {
        "rerope": call_of(scores.rerope(4)),
        "shorter keys": make_call(decaying, scores.leaky_rerope(4, 4.0), softmax_scale=0.5),
        "in their place": make_call(
            frequencies(16), scores.leaky_rerope(4, 4.0), rotary_offset=10, interleaved=True
        ),
        "packed": call_of(
            scores.self_extend(4, 2), rotated="k", cu_seqlens=cu_seqlens, interleaved=True
        ),
        "dual_chunk": call_of(scores.dual_chunk(6, 1), softcap=2.0, sliding_window=7),
    }


def test_tensors_without_values_are_not_read():
    q, k, v = make_qkv(1, 5, None, 2, 1)
    freqs = methods.xpos(32).to(q.device)
    with FakeTensorMode() as mode:
        given = (q, k, v, freqs.inv_freq, freqs.log_decay)
        q, k, v, inv_freq, log_decay = (mode.from_tensor(x) for x in given)
        freqs = replace(freqs, inv_freq=inv_freq, log_decay=log_decay)
        assert rope_attention(q, k, v, freqs).shape == q.shape


@pytest.mark.parametrize("name", calls())
def test_a_call_survives_its_op(name):
    """All that tensors and options tell of it; the score's own name is not an op's business."""
    call = calls()[name]
    found = read_call(call.tensors, call.options)
    assert found.options == call.options and found.stored == call.stored
    assert found.regions == call.regions and found.granularity == call.granularity
    numbers = [x for column in found.options.values() if isinstance(column, list) for x in column]
    assert all(math.isfinite(x) for x in numbers), "serialised graphs have no infinity"


@pytest.mark.parametrize(
    "named, compiler",
    [
        (None, "aot_eager"),
        pytest.param(None, "inductor", marks=pytest.mark.thorough),
        # Of the reference inductor would compile PyTorch's own operations, for a minute.
        pytest.param("reference", "aot_eager", marks=pytest.mark.thorough),
    ],
)
def test_compile_is_one_graph(named, compiler):
    leaves = [x.requires_grad_() for x in make_qkv(1, 37, None, 4, 2)]

    def loss(q, k, v):
        by = {"rotary_offset": 8, "log_n": 16, "backend": named}
        return (
            rope_attention(q, k, v, frequencies(16), scores.dual_chunk(9, 2), **by).square().sum()
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    for tokens in (37, 29):
        part = [x[:, :tokens].detach().clone().requires_grad_() for x in leaves]
        want = torch.autograd.grad(loss(*part), part)
        for a, b in zip(torch.autograd.grad(compiled(*part), part), want):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_named_backend_that_cannot_run_is_refused_in_a_graph_too():
    q, k, v = make_qkv(1, 5, None, 2, 1)

    def attend(q):
        return rope_attention(q, k, v, FREQS, backend="cudnn")

    def decode(q):
        return rope_attention_with_kvcache(q, k, v, FREQS, cache_seqlens=5, backend="flash_attn")

    for run in (attend, decode):
        with pytest.raises(ValueError, match="backend must be None or one of"):
            torch.compile(run, backend="eager")(q)


def test_compile_takes_a_factor_that_changes():
    q, k, v = make_qkv(1, 11, None, 2, 1)

    def attend(q, k, v, factor):
        return rope_attention(q, k, v, FREQS, scores.leaky_rerope(3, factor))

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for factor in (2.0, 4.0, math.inf):
        assert torch.equal(compiled(q, k, v, factor), attend(q, k, v, factor))


def test_compiled_autograd():
    """Which compiles a backward whose forward ran as it is."""
    leaves = [x.requires_grad_() for x in make_qkv(1, 11, None, 2, 1)]

    def loss(window):
        q, k = apply_rope_qk(*leaves[:2], FREQS, positions=window)
        return rope_attention(q, k, leaves[2], FREQS, scores.rerope(window)).square().sum()

    for window in (3, 5):  # of the op's options, which are no tensors
        want = torch.autograd.grad(loss(window), leaves)
        whole = torch.compile(backend="eager", fullgraph=True)
        with torch._dynamo.compiled_autograd._enable(whole):
            loss(window).backward()
        for leaf, expected in zip(leaves, want):
            assert torch.equal(leaf.grad, expected)
            leaf.grad = None


def test_torch_func():
    q, k, v = make_qkv(3, 11, None, 2, 1)

    def attend(q, k, v):
        return rope_attention(q, k, v, FREQS, scores.rerope(3))

    def loss(q, k, v):
        return attend(q, k, v).square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v), want):
        assert torch.equal(a, b)
    one = torch.func.vmap(lambda *x: attend(*(y[None] for y in x))[0])(q, k, v)
    torch.testing.assert_close(one, attend(q, k, v), atol=1e-6, rtol=0)


def test_only_raw_tensors_out_and_lse_are_saved():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 64, None, 4, 2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = rope_attention(q, k, v, FREQS, scores.rerope(8), return_lse=True)
    floats = [x for x in saved if x.numel() > 16]
    assert {x.data_ptr() for x in floats} == {x.data_ptr() for x in (q, k, v, out, lse)}


def test_what_has_a_gradient_in_the_reference_only():
    """Derivatives of derivatives, and of temperatures."""
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 9, None, 2, 1))
    out = rope_attention(q, k, v, FREQS, scores.rerope(3))
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"attention: .*backend='reference'"):
        torch.autograd.grad(dq.sum(), k)
    given = {"query_scale": torch.ones(9, device=q.device).requires_grad_()}
    with pytest.raises(ValueError, match=r"query_scale .*backend='reference'"):
        rope_attention(q, k, v, FREQS, scores.rerope(3), **given)
    out = rope_attention(q, k, v, FREQS, scores.rerope(3), **given, backend="reference")
    assert torch.autograd.grad(out.sum(), given["query_scale"])[0].abs().sum() > 0


@pytest.mark.parametrize("named", [None, "reference"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_stored_keys_give_the_same(name, named):
    """Keys as a cache holds them, rotated to where the score says."""
    q, k, v = make_qkv(1, 21, None, 2, 1)
    score = EXAMPLES[name].score
    kept = OPS.rope_fwd(k, None, THETA, score.stored(torch.arange(21, device=q.device)))[0]
    want = rope_attention(q, k, v, FREQS, score, backend=named)
    got = rope_attention(q, kept, v, FREQS, score, rotated="k", backend=named)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("cached", [False, True])
def test_log_n_is_as_exact_as_float64(cached):
    """Multiply q by max(1, ln(i + 1) / ln 16), or let log_n do it."""
    q = torch.randn(1, 100, 2, 16, dtype=torch.float64)
    freqs, positions = methods.rope(16), torch.arange(100).double()
    scale = scores.query_scale.log_n(positions, 16, dtype=torch.float64)[:, None, None]

    def run(queries, **options):
        if not cached:
            return rope_attention(queries, q, q, freqs, scores.rerope(30), **options)
        cache = {"cache_seqlens": 100, **options}
        return rope_attention_with_kvcache(queries, q, q, freqs, scores.rerope(30), **cache)

    torch.testing.assert_close(run(q, log_n=16), run(q * scale), atol=1e-14, rtol=1e-14)


# -------------------------------------------------------------------------------------------------
# Which keys and queries of two blocks of a sequence meet


@pytest.mark.parametrize("granularity, start", [(1, FIRST_KEY), (1, -7), (8, -8), (8, 0)])
@pytest.mark.parametrize("window", [None, 1, 5, 13])
def test_which_queries_and_keys_meet(granularity, start, window):
    tokens, region = 40, scores.Region(start, scores.base.SAME, scores.base.SAME)
    score = scores.Score("test", (region,), granularity)
    call = AttentionCall(THETA, score=score, sliding_window=window)
    seen = {
        query: [
            key
            for key in range(query + 1)
            if key >= query // granularity * granularity + start
            and (window is None or query - key < window)
        ]
        for query in range(tokens)
    }
    for query, keys in seen.items():
        assert max(call.first_key(query), 0) == keys[0]
    for end in range(1, tokens):
        last = max(query for query, keys in seen.items() if keys[0] < end)
        assert min(call.queries_end(end), tokens) == last + 1


# -------------------------------------------------------------------------------------------------
# With a cache: no gradient, and autograd knows what is written


def test_no_gradient_is_recorded():
    inputs = make(Case((12, 3)))
    with torch.no_grad():
        out, _ = inputs.run(q=inputs.q.clone().requires_grad_())
    assert not out.requires_grad


def test_default_backend_takes_float64():
    out, lse = make(Case((12, 3), dtype=torch.float64)).run(
        None if device() == "cpu" else "reference"
    )
    assert out.dtype == lse.dtype == torch.float64


def test_a_gradient_through_the_raw_op_fails_rather_than_vanish(fast_backend):
    inputs = make(Case((12, 3)))
    call = make_call(inputs.freqs, inputs.example.score, rotated="k")
    caches = inputs.k_cache.nan_to_num(), inputs.v_cache.nan_to_num()
    tensors = (*call.tensors[:6], inputs.call["cache_seqlens"], *[None] * 4)
    op = OPS.decode_triton if fast_backend == "triton" else OPS.decode
    q = inputs.q.clone().requires_grad_()
    out, _ = op(q, *caches, None, None, *tensors, **call.options)
    with pytest.raises(NotImplementedError, match="decode: is for inference"):
        out.sum().backward()


def test_autograd_notices_what_is_appended(fast_backend):
    """To a cache that it has saved; a step that appends nothing writes nothing."""
    inputs = make(Case((12, 3)))
    k, v = (torch.randn(2, 1, 2, 32, device=device()) for _ in range(2))

    def reads(**appended):
        caches = {name: getattr(inputs, name).clone() for name in ("k_cache", "v_cache")}
        weight = torch.ones((), device=device(), requires_grad=True)
        loss = sum((weight * x).sum() for x in caches.values())
        inputs.run(fast_backend, **caches, **appended)
        loss.backward()

    reads()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        reads(k=k, v=v)
