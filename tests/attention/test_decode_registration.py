"""The op as PyTorch sees it: schema, fakes, torch.compile, gradients that do not exist."""

from __future__ import annotations

import pytest
import torch
from decode_oracle import SCORES, Case, make

from extrope_kernels.ops.attention import make_call
from extrope_kernels.testing import device

SOME = ("rerope", "leaky_rerope", "dual_chunk", "xpos", "no score")


def arguments(case: dict, score: str, **options):
    """The op's arguments of a call without new keys."""
    inputs = make(Case((12, 3), 2, **case, **SCORES[score]))
    call = make_call(inputs.freqs, inputs.example.score, keys_stored=True, **options)
    caches = (inputs.k_cache.nan_to_num(), inputs.v_cache.nan_to_num())
    names = ("cache_seqlens", "block_table", "cache_leftpad", "k_scale", "v_scale")
    cached = [inputs.call.get(name) for name in names]
    return [inputs.q, *caches, None, None, *call.tensors[:6], *cached], call.options


def op(backend: str):
    return torch.ops.extrope.decode_triton if backend == "triton" else torch.ops.extrope.decode


EVERYTHING = {"page_size": 4, "leftpad": (1, 2), "dtype": torch.float16, "rotary_dim": 16}
CASES = {
    "plain": ({}, {}),
    "everything": (
        EVERYTHING,
        {"interleaved": True, "rotary_offset": 8, "log_n": 4.0, "softmax_scale": 0.3},
    ),
}


@pytest.mark.parametrize("score", SOME)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(score, name, fast_backend):
    case, options = CASES[name]
    args, options_of_op = arguments(case, score, **options)
    torch.library.opcheck(op(fast_backend).default, tuple(args), options_of_op)
    k = torch.randn(2, 2, 2, 32, device=device()).to(args[0].dtype)
    args[3:5] = k, k + 1
    args[11] = args[11] - 2
    torch.library.opcheck(op(fast_backend).default, tuple(args), options_of_op)


@pytest.mark.parametrize("score", ("leaky_rerope", "no score"))
def test_compile_in_one_graph(score, fast_backend):
    inputs = make(Case((12, 3), rotary_dim=16, rotary_offset=8, **SCORES[score]))
    k, v = (torch.randn(2, 1, 2, 32, device=device()) for _ in range(2))

    def step(q, k_cache, v_cache, k, v, seqlens):
        caches = {"k_cache": k_cache, "v_cache": v_cache}
        return inputs.run(fast_backend, q=q * 2, **caches, k=k, v=v, cache_seqlens=seqlens)

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
        out, _ = inputs.run(q=inputs.q.clone().requires_grad_())
    assert not out.requires_grad


def test_default_backend_takes_float64():
    out, lse = make(Case((12, 3), dtype=torch.float64)).run(
        None if device() == "cpu" else "reference"
    )
    assert out.dtype == lse.dtype == torch.float64


def test_a_gradient_through_the_raw_op_fails_rather_than_vanish(fast_backend):
    args, options_of_op = arguments({}, "rerope")
    args[0] = args[0].clone().requires_grad_()
    out, _ = op(fast_backend)(*args, **options_of_op)
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
