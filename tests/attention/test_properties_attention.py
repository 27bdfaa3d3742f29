"""Generated calls, without and with a cache, against definitions; parts merged to the whole."""

from __future__ import annotations

import attention_oracle as oracle
import decode_oracle
import rounding as rounding_of
import torch
from attention_cases import INF, Case, caches, cases, rounding
from generated import LOW, backends, generated, randn, seeds
from hypothesis import strategies as st
from rounding import norm
from test_merge import parts_and_whole

from extrope_kernels import merge_attention
from extrope_kernels.testing import assert_within_budget, attention_backends

BACKENDS = backends([name for name in attention_backends() if name != "flash_attn"])


@generated(case=cases(), backend=BACKENDS)
def test_forward(case, backend):
    before = [x.clone() for x in case.tensors]
    out, lse = case.run(*case.tensors, backend=backend)
    q, _, v = case.tensors
    assert out.shape == (*q.shape[:-1], v.shape[-1]) and out.dtype == q.dtype
    assert all(torch.equal(x, y) for x, y in zip(case.tensors, before))
    lse = lse.transpose(-1, -2)
    for q, k, v, own_out, own_lse, freqs, known in case.sequences(out, lse[..., None]):
        relative = case.seen(q.shape[1], k.shape[1])
        exact, exact_lse = oracle.closed_form(q, k, v, relative, freqs, **known)
        plain, plain_lse = oracle.plain_formula(q, k, v, relative, freqs, **known)
        error = rounding(case, q, k, freqs)
        noise = error.weight(k.shape[1]) * norm(v)
        assert_within_budget("out", own_out, plain, exact, noise=noise)
        own_lse = own_lse[..., 0].transpose(1, 2)
        seen = exact_lse > -INF
        assert torch.equal(own_lse > -INF, seen)
        found = (own_lse[seen], plain_lse[seen].to(own_lse.dtype), exact_lse[seen])
        assert_within_budget("lse", *found, noise=error.logit)


@generated(case=cases((torch.float32, torch.float16)), backend=BACKENDS, seed=seeds())
def test_gradients(case, backend, seed):
    q, _, v = case.tensors
    dout = randn(seed, *q.shape[:-1], v.shape[-1], dtype=q.dtype)
    leaves = [x.detach().clone().requires_grad_() for x in case.tensors]
    grads = torch.autograd.grad(case.run(*leaves, backend=backend)[0], leaves, dout)
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(grads, leaves))
    owned = Case(**{**vars(case), "tensors": (*case.tensors, *grads, dout)})
    for q, k, v, dq, dk, dv, own_dout, freqs, known in owned.sequences():
        relative = case.seen(q.shape[1], k.shape[1])
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        out, _ = oracle.closed_form(*wide, relative, freqs, **known)
        exact = torch.autograd.grad(out, wide, own_dout.double())
        weight = rounding(case, q, k, freqs).weight(k.shape[1])
        scale = rounding(case, q, k, freqs).logit_scale
        score = 2 * norm(own_dout) * norm(v) * scale
        rows = q.shape[1] * q.shape[2] / k.shape[2]  # how many queries add to one key
        noise = (weight * score * norm(k), weight * score * norm(q) * rows,
                 weight * norm(own_dout) * rows)  # fmt: skip
        for name, got, want, own in zip(("dq", "dk", "dv"), (dq, dk, dv), exact, noise):
            assert_within_budget(name, got, want.to(got.dtype), want, noise=own)


@generated(case=caches(), backend=BACKENDS)
def test_cache(case, backend):
    inputs = decode_oracle.make(case)
    noise = rounding_of.of_cache(case, inputs, inputs.k_cache, inputs.v_cache)
    decode_oracle.check(case, backend, inputs, noise)


@generated(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    shape=st.tuples(*[st.integers(0, 4)] * 3, st.sampled_from((1, 3, 8))),
    packed=st.booleans(),
    dtype=st.sampled_from(LOW),
    seed=seeds(),
)
def test_merge(sizes, shape, packed, dtype, seed):
    """Attention over parts of the keys, merged, is attention over all of them."""
    outs, lses, (out, lse) = parts_and_whole(sizes, shape[packed:], seed)
    merged, merged_lse = merge_attention(outs, lses)
    seen = lse > -INF
    assert torch.equal(merged_lse > -INF, seen)
    torch.testing.assert_close(merged_lse[seen], lse[seen])
    per_row = seen.transpose(-1, -2)
    torch.testing.assert_close(merged[per_row], out[per_row])
    assert not merged[~per_row].any()
    low = merge_attention([x.nan_to_num().to(dtype) for x in outs], [x.float() for x in lses])
    exact = merge_attention([x.nan_to_num().to(dtype).double() for x in outs],
                            [x.float().double() for x in lses])  # fmt: skip
    assert_within_budget("out", low[0], exact[0].to(dtype), exact[0])
