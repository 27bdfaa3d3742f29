"""The ops as PyTorch sees them: schemas, fakes, torch.compile, gradients that do not exist."""

from __future__ import annotations

import math

import pytest
import torch
from decode_oracle import Case, make

from extrope_kernels.ops.attention.kvcache import rerope_attention_with_kvcache
from extrope_kernels.testing import device

SUFFIX = {None: "", "cpu": "", "triton": "_triton"}


def arguments(case: Case):
    inputs = make(case)
    names = ("cache_seqlens", "block_table", "cache_leftpad")
    place = [inputs.freqs.inv_freq, *(inputs.call.get(name) for name in names)]
    frame = {"window": case.window, "grouped": case.grouped, "interleaved": case.interleaved}
    if not math.isinf(case.factor):
        frame["factor"] = case.factor
    return inputs, place, frame


CASES = (
    Case((12, 3)),
    Case((12, 3), 2, factor=4.0, page_size=4, leftpad=(1, 2), dtype=torch.float16, log_n=4.0),
)


@pytest.mark.parametrize("case", CASES, ids=("plain", "everything"))
def test_opcheck(case, backend):
    inputs, place, frame = arguments(case)
    decode = getattr(torch.ops.extrope, f"rerope_attn_decode{SUFFIX[backend]}")
    options = {"log_n": case.log_n, "attention_factor": 1.1}
    torch.library.opcheck(
        decode, (inputs.q, inputs.k_cache.nan_to_num(), inputs.v_cache.nan_to_num(), *place),
        {**frame, **options},
    )  # fmt: skip
    append = getattr(torch.ops.extrope, f"rerope_attn_append{SUFFIX[backend]}")
    k = torch.randn(2, 1, 2, 32, device=device()).to(case.dtype)
    caches = (inputs.k_cache.nan_to_num(), inputs.v_cache.nan_to_num())
    torch.library.opcheck(append, (*caches, k, k + 1, *place), frame)


def test_compile_in_one_graph(backend):
    case = Case((12, 3), factor=4.0)
    inputs = make(case)
    k, v = (torch.randn(2, 1, 2, 32, device=device()) for _ in range(2))

    def step(q, k_cache, v_cache, k, v, seqlens):
        return rerope_attention_with_kvcache(
            q * 2, k_cache, v_cache, inputs.freqs, k=k, v=v, cache_seqlens=seqlens,
            window=8, factor=4.0, backend=backend, return_lse=True,
        )  # fmt: skip

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
            **inputs.call,
        )  # fmt: skip
    assert not out.requires_grad


def test_default_backend_takes_float64():
    inputs = make(Case((12, 3), dtype=torch.float64))
    out, lse = inputs.run(None) if device() == "cpu" else inputs.run("reference")
    assert out.dtype == lse.dtype == torch.float64


def test_a_gradient_through_the_raw_op_fails_rather_than_vanish(backend):
    inputs, place, frame = arguments(Case((12, 3)))
    decode = getattr(torch.ops.extrope, f"rerope_attn_decode{SUFFIX[backend]}")
    q = inputs.q.clone().requires_grad_()
    out, _ = decode(q, inputs.k_cache.nan_to_num(), inputs.v_cache.nan_to_num(), *place, **frame)
    with pytest.raises(NotImplementedError, match="with_kvcache is for inference"):
        out.sum().backward()
