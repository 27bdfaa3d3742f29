"""What gradients alone have: rows without keys, the reference's own backward.

Those of every score method and option are in test_attention.py.
"""

import math

import pytest
import torch
from support.attention_oracle import attend, frequencies, make_qkv
from support.score_examples import EXAMPLES, Example, rerope
from torch import Tensor

from extrope_kernels import rope_attention, scores
from extrope_kernels.methods import RopeFreqs, xpos
from extrope_kernels.ops.attention import AttentionCall, reference
from extrope_kernels.testing import assert_within_budget, device

INF = math.inf


def test_a_row_without_keys_or_a_sink(any_backend):
    """-inf switches a sink off: it has no part in a row, and no gradient of it."""
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 4, 2))
    sinks = torch.tensor([-INF, 0.3], device=device(), requires_grad=True)
    out, lse = attend(EXAMPLES["rerope"], q, k, v, frequencies(32), any_backend, sinks=sinks)
    assert torch.equal(lse[0, 0, :2], lse.new_full((2,), -INF)) and not out[0, :2].any()
    grads = torch.autograd.grad(out.sum(), (q, k, v, sinks))
    assert all(x.isfinite().all() for x in grads) and grads[3][0] == 0


@pytest.mark.skipif(device() != "cpu", reason="other backends keep lse to another base")
@pytest.mark.parametrize("softcap", [3.0, 20.0, 50.0])
def test_a_capped_logit_is_that_of_the_forward(softcap):
    """A row with one key has a probability of 1, exactly, if the backward finds lse's own bits."""
    q, k, v = make_qkv(64, 1, heads_q=2, heads_k=2)
    v.requires_grad_()
    out = rope_attention(4 * q, k, v, frequencies(32), softcap=softcap, backend="cpu")
    dout = torch.randn_like(out)
    assert torch.equal(*torch.autograd.grad(out, v, dout), dout)


def test_gradients_of_values_whose_heads_have_like_gradients(fast_backend):
    """As exact as the sum of each head by itself: not one chain over tokens and heads."""
    q, k, v = make_qkv(1, 500, None, 8, 1, 64)
    dout = torch.randn_like(q[:, :, :1]).expand_as(q)

    def of_values(dtype, backend):
        leaf = v.to(dtype).requires_grad_()
        out = rope_attention(q.to(dtype), k.to(dtype), leaf, frequencies(64), backend=backend)
        return torch.autograd.grad(out, leaf, dout.to(dtype))[0]

    exact = of_values(torch.float64, "reference")
    assert_within_budget(
        "dv", of_values(v.dtype, fast_backend), of_values(v.dtype, "reference"), exact
    )


def test_keys_of_no_query_heads(any_backend):
    q = torch.empty(1, 20, 0, 16, device=device(), requires_grad=True)
    k, v = torch.randn(2, 1, 20, 2, 16, device=device()).unbind()
    k, v = k.requires_grad_(), v.requires_grad_()
    out, _ = attend(EXAMPLES["rerope"], q, k, v, frequencies(16), any_backend)
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(grad, torch.zeros_like(grad))


def grad_of_frequencies(backend, score, dtype, start: int, **options) -> Tensor:
    """Return that of rows whose queries and keys begin at `start`, (pairs,) float64."""
    q, k, v = (x.to(dtype) for x in make_qkv(2, 40, None, 4, 2, 32))
    if "cu_seqlens" in options:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    inv_freq = frequencies(32).inv_freq.double().requires_grad_()
    starts = {"q_start": start, "k_start": start} if start else {}
    freqs = RopeFreqs(inv_freq, attention_factor=1.2)
    out = rope_attention(q, k, v, freqs, score, backend=backend, **starts, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return torch.autograd.grad(out, inv_freq, dout)[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "score",
    [None, scores.rerope(8), scores.leaky_rerope(8, 2.0)],
    ids=["rope", "rerope", "leaky"],
)
def test_the_gradient_of_frequencies_does_not_know_the_start(any_backend, score, dtype, packed):
    """Only distances count: any start has the gradient of start 0, and its error."""
    options = {}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 13, 40, 80], dtype=torch.int32, device=device())
    exact = grad_of_frequencies("reference", score, torch.float64, 0, **options)
    least = (grad_of_frequencies(any_backend, score, dtype, 0, **options) - exact).norm()
    for start in (4096, 2**20):
        found = grad_of_frequencies(any_backend, score, dtype, start, **options)
        assert (found - exact).norm() <= 2 * least, start


# -------------------------------------------------------------------------------------------------
# The reference: finite differences, and its own backward against autograd


@pytest.mark.parametrize("name", EXAMPLES)
def test_finite_differences(name):
    tensors = [x.double().requires_grad_() for x in make_qkv(1, 11, None, 2, 1, 2)]
    inv_freq = frequencies(2).inv_freq.double().requires_grad_()

    def run(q, k, v, inv_freq):
        freqs = RopeFreqs(inv_freq, attention_factor=1.2)
        return attend(EXAMPLES[name], q, k, v, freqs, "reference", log_n=3)

    assert torch.autograd.gradcheck(run, (*tensors, inv_freq), fast_mode=True)
    if name in ("leaky_rerope", "self_extend"):
        tensors = [x[:, :4].detach().requires_grad_() for x in tensors]
        assert torch.autograd.gradgradcheck(run, (*tensors, inv_freq), fast_mode=True)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


SOFTMAX = {"softcap": 0.5, "sliding_window": 5, "softmax_scale": 0.7}
BEFORE = {"q_start": ints(0, 7), "k_start": ints(6, 0)}  # rows without keys
CALLS = {
    "plain": {},
    **{name: {name: value} for name, value in SOFTMAX.items()},
    "sinks": {"sinks": doubles(4)},
    "query_scale": {"query_scale": torch.rand(2, 9) + 0.5},
    "rows without keys": {**BEFORE, "softcap": 0.5},
    "all": {**SOFTMAX, "sinks": doubles(4), "query_scale": doubles(9), **BEFORE},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "score", (scores.leaky_rerope(3, 2.0), scores.dual_chunk(5, 1)), ids=lambda score: score.name
)
def test_the_reference_s_own_backward(name, score, packed):
    if packed and name not in ("plain", *SOFTMAX, "sinks"):
        pytest.skip("of a batch")
    options = CALLS[name] | ({"cu_seqlens": ints(0, 4, 4, 11)} if packed else {})
    call = AttentionCall(
        frequencies(8).inv_freq.cpu(), score=score, attention_factor=1.2, **options
    )
    leading_q, leading_k = ((11,), (11,)) if packed else ((2, 9), (2, 11))
    shapes = (*leading_q, 4, 8), (*leading_k, 2, 8), (*leading_k, 2, 6)
    qkv = [doubles(*shape).requires_grad_() for shape in shapes]
    out, lse = reference.forward(*qkv, call)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse).where(lse.isfinite(), 0.0)
    expected = torch.autograd.grad((out, lse), qkv, (dout, dlse))
    given = [x.detach() for x in (*qkv, out, lse)]
    for got, want in zip(reference.backward(dout, dlse, *given, call), expected):
        torch.testing.assert_close(got, want)
    assert all(x.isfinite().all() for x in reference.backward(dout, None, *given, call))


# An infinite amplitude, or angle, of keys that a region does not hold met a gradient of 0.
FAR = {
    "no far keys": (scores.string(40_000, 128), torch.float32, xpos(16)),
    "a small factor": (scores.leaky_rerope(4, 1 / 2000), torch.float16, xpos(16)),
    "a huge window": (scores.rerope(2**53), torch.float16, xpos(16)),
    "a huge chunk": (scores.dual_chunk(2**52, 0), torch.float16, frequencies(16)),
}


@pytest.mark.parametrize("name", FAR)
def test_regions_without_keys_have_finite_gradients(name):
    score, dtype, freqs = FAR[name]
    tokens = 4 if dtype == torch.float16 else 16
    tensors, found = make_qkv(1, tokens, head_dim=16, dtype=dtype), []
    dout = torch.randn_like(tensors[0])
    for backend, of in ((None, dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [x.to(of).requires_grad_() for x in tensors]
        out, _ = attend(Example(score, rerope), *leaves, freqs.to(device()), backend)
        found.append((out, *torch.autograd.grad(out, leaves, dout.to(of))))
    for one, got, near, exact in zip(("out", "dq", "dk", "dv"), *found):
        assert got.isfinite().all()
        assert_within_budget(one, got, near, exact)
