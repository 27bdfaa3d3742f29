"""The ops as PyTorch sees them: schemas, fakes, torch.compile, gradients that do not exist."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_oracle import SCORES, Case, make

from extrope_kernels import rerope_attention_with_kvcache, scores
from extrope_kernels.testing import device

SUFFIX = {None: "", "cpu": "", "triton": "_triton"}
SCORE = {
    "rerope": scores.rerope(6),
    "leaky_rerope": scores.rerope(6, 2.5),
    "dual_chunk": scores.dual_chunk(9, 2),
    "xpos": scores.blockwise_causal(16),
}


def arguments(case: Case, score: str):
    """The tensors of a call without new keys, those after k and v, and the options."""
    inputs = make(replace(case, **SCORES[score]))
    names = ("cache_seqlens", "block_table", "cache_leftpad")
    rope_args = [inputs.freqs.inv_freq, *(inputs.call.get(name) for name in names)]
    rope_args.append(inputs.freqs.log_decay)
    caches = (inputs.k_cache.nan_to_num(), inputs.v_cache.nan_to_num())
    known = SCORE[score]
    options = {"starts": known.starts, "granularity": known.granularity}
    options |= {"maps": known.stored_maps, "interleaved": case.interleaved}
    return inputs.q, caches, rope_args, options


EVERYTHING = {"page_size": 4, "leftpad": (1, 2), "dtype": torch.float16, "interleaved": True}


@pytest.mark.parametrize("score", SCORE)
@pytest.mark.parametrize("more", ({}, EVERYTHING), ids=("plain", "everything"))
def test_opcheck(score, more, backend):
    q, caches, rope_args, options = arguments(Case((12, 3), 2, **more), score)
    decode = getattr(torch.ops.extrope, f"decode{SUFFIX[backend]}")
    append = getattr(torch.ops.extrope, f"append{SUFFIX[backend]}")
    k = torch.randn(2, 2, 2, 32, device=device()).to(q.dtype)
    given = {"log_n": 4.0, "attention_factor": 1.1, "softmax_scale": 0.3} if more else {}
    torch.library.opcheck(decode, (q, *caches, None, None, *rope_args), {**options, **given})
    rope_args[1] = rope_args[1] - 2
    torch.library.opcheck(decode, (q, *caches, k, k + 1, *rope_args), {**options, **given})
    stored = {"stored": options["maps"][-5:], "interleaved": options["interleaved"]}
    torch.library.opcheck(append, (*caches, k, k + 1, *rope_args), stored)


@pytest.mark.parametrize("score", SCORE)
def test_append_then_decode_is_decode_with_new_keys(score, backend):
    q, caches, rope_args, options = arguments(Case((12, 3), 2, dtype=torch.float16), score)
    decode = getattr(torch.ops.extrope, f"decode{SUFFIX[backend]}")
    append = getattr(torch.ops.extrope, f"append{SUFFIX[backend]}")
    k, v = (torch.randn(2, 2, 2, 32, device=device()).half() for _ in range(2))
    apart = [x.clone() for x in caches]
    before = [rope_args[0], rope_args[1] - 2, *rope_args[2:]]
    append(*apart, k, v, *before, stored=options["maps"][-5:])
    outs = decode(q, *apart, None, None, *rope_args, **options)
    together = decode(q, *caches, k, v, *before, **options)
    for one, other in zip((*outs, *apart), (*together, *caches)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("score", SCORE)
def test_compile_in_one_graph(score, backend):
    inputs = make(Case((12, 3), **SCORES[score]))
    k, v = (torch.randn(2, 1, 2, 32, device=device()) for _ in range(2))

    def step(q, k_cache, v_cache, k, v, seqlens):
        call = {**inputs.call, "k": k, "v": v, "cache_seqlens": seqlens}
        return replace(inputs, q=q * 2, k_cache=k_cache, v_cache=v_cache, call=call).run(backend)

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        caches = inputs.k_cache.clone(), inputs.v_cache.clone()
        out, lse = run(inputs.q, *caches, k, v, inputs.call["cache_seqlens"])
        results.append((out, lse, *(x.nan_to_num(7.0) for x in caches)))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_no_gradient_is_recorded():
    inputs = make(Case((12, 3)))
    with torch.no_grad():
        out = rerope_attention_with_kvcache(
            inputs.q.clone().requires_grad_(), inputs.k_cache, inputs.v_cache, inputs.freqs,
            **inputs.parameters, **inputs.call,
        )  # fmt: skip
    assert not out.requires_grad


def test_default_backend_takes_float64():
    inputs = make(Case((12, 3), dtype=torch.float64))
    out, lse = inputs.run(None) if device() == "cpu" else inputs.run("reference")
    assert out.dtype == lse.dtype == torch.float64


def test_a_gradient_through_the_raw_op_fails_rather_than_vanish(backend):
    q, caches, rope_args, options = arguments(Case((12, 3)), "rerope")
    decode = getattr(torch.ops.extrope, f"decode{SUFFIX[backend]}")
    q = q.clone().requires_grad_()
    out, _ = decode(q, *caches, None, None, *rope_args, **options)
    with pytest.raises(NotImplementedError, match="decode: is for inference"):
        out.sum().backward()


def test_autograd_notices_what_is_appended(backend):
    """To a cache that it has saved; a step that appends nothing writes nothing."""
    inputs = make(Case((12, 3)))
    k, v = (torch.randn(2, 1, 2, 32, device=device()) for _ in range(2))

    def reads(**appended):
        caches = inputs.k_cache.clone(), inputs.v_cache.clone()
        weight = torch.ones((), device=device(), requires_grad=True)
        loss = sum((weight * x).sum() for x in caches)
        call = {**inputs.call, **appended}
        replace(inputs, k_cache=caches[0], v_cache=caches[1], call=call).run(backend)
        loss.backward()

    reads()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        reads(k=k, v=v)


def test_autograd_notices_what_the_raw_ops_append(backend):
    q, caches, rope_args, options = arguments(Case((12, 3)), "rerope")
    k, v = (torch.randn(2, 2, 2, 32, device=device()) for _ in range(2))
    ops, suffix = torch.ops.extrope, SUFFIX[backend]
    getattr(ops, f"decode{suffix}")(q, *caches, None, None, *rope_args, **options)
    assert [x._version for x in caches] == [0, 0]
    getattr(ops, f"append{suffix}")(*caches, k, v, *rope_args, stored=options["maps"][-5:])
    assert [x._version for x in caches] == [1, 1]
    with pytest.raises(RuntimeError, match="append: is for inference and has no gradient"):
        getattr(ops, f"append{suffix}")(
            *caches, k.requires_grad_(), v, *rope_args, stored=options["maps"][-5:]
        )
