"""The attention ops as PyTorch sees them: opcheck, torch.compile, torch.func, what is saved."""

import math

import pytest
import torch
from attention_oracle import frequencies, make_qkv

from extrope_kernels import apply_rope_qk, dual_chunk_attention, rerope_attention, scores
from extrope_kernels.methods import RopeFreqs
from extrope_kernels.ops._shared.attention_call import score_options

OPS = torch.ops.extrope
CASES = {
    "rerope": scores.rerope(6),
    "leaky_rerope": scores.leaky_rerope(6, 4.0),
    "self_extend": scores.self_extend(6, 2),
    "dual_chunk": scores.dual_chunk(8, 3),
    "blockwise_causal": scores.blockwise_causal(8),
    "string": scores.string(9, 2),
}


def op_cases():
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 13, None, 4, 2))
    packed = [x.detach()[0] for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, 5, 13], dtype=torch.int32, device=q.device)
    theta = frequencies(32).inv_freq
    decay = -torch.rand_like(theta) / 100
    yield (q, k, v, theta), score_options(scores.rerope(4))
    slow = score_options(scores.leaky_rerope(4, 4.0))
    yield (q, k[:, :9], v[:, :9], theta, None, decay), {**slow, "log_n": 3.0}
    stored = score_options(scores.self_extend(4, 2), stored=True)
    yield (*packed, theta, cu_seqlens), {**stored, "interleaved": True}
    yield (q, k, v, theta), score_options(scores.dual_chunk(6, 1))


@pytest.mark.parametrize("case", range(4))
def test_opcheck(case):
    args, options = list(op_cases())[case]
    torch.library.opcheck(OPS.attention_fwd.default, args, options)


@pytest.mark.parametrize("case", range(4))
def test_opcheck_backward(case):
    args, options = list(op_cases())[case]
    args = [x.detach() if x is not None else None for x in args]
    out, lse = OPS.attention_fwd(*args, **options)
    args = (torch.randn_like(out), torch.randn_like(lse), *args[:3], out, lse, *args[3:])
    torch.library.opcheck(OPS.attention_bwd.default, args, options)


@pytest.mark.parametrize("named", [None, "reference"])
def test_compile_is_one_graph(named):
    q, k, v = make_qkv(1, 37, None, 4, 2)
    freqs = frequencies(32)

    def loss(q, k, v):
        near = rerope_attention(q, k, v, freqs, window=8, factor=4.0, log_n=16, backend=named)
        chunks = dual_chunk_attention(q, k, v, freqs, chunk_size=9, local_window=2, backend=named)
        return (near * chunks).sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    # Of the reference inductor would compile PyTorch's own operations, for a minute.
    compiler = "aot_eager" if named == "reference" else "inductor"
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    for _ in range(2):
        got = torch.autograd.grad(compiled(*leaves), leaves)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        leaves = [x[:, :29].clone().requires_grad_() for x in leaves]
        want = torch.autograd.grad(loss(*leaves), leaves)


def test_compile_takes_a_factor_that_changes():
    q, k, v = make_qkv(1, 11, None, 2, 1)
    freqs = frequencies(32)

    def attend(q, k, v, factor):
        return rerope_attention(q, k, v, freqs, window=3, factor=factor)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for factor in (2.0, 4.0, math.inf):
        assert torch.equal(compiled(q, k, v, factor), attend(q, k, v, factor))


def test_compiled_autograd():
    """Which compiles a backward whose forward ran as it is."""
    freqs = frequencies(32)
    leaves = [x.requires_grad_() for x in make_qkv(1, 11, None, 2, 1)]

    def loss(window):
        q, k = apply_rope_qk(*leaves[:2], freqs, positions=window)
        return rerope_attention(q, k, leaves[2], freqs, window=window).square().sum()

    for window in (3, 5):  # of the op's options, which are no tensors
        want = torch.autograd.grad(loss(window), leaves)
        whole = torch.compile(backend="eager", fullgraph=True)
        with torch._dynamo.compiled_autograd._enable(whole):
            loss(window).backward()
        for leaf, expected in zip(leaves, want):
            assert torch.equal(leaf.grad, expected)
            leaf.grad = None


def test_torch_func_grad():
    q, k, v = make_qkv(1, 11, None, 2, 1)
    freqs = frequencies(32)

    def loss(q, k, v):
        return rerope_attention(q, k, v, freqs, window=3).square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v), want):
        assert torch.equal(a, b)


def test_vmap_is_a_loop():
    q, k, v = make_qkv(3, 11, None, 2, 1)
    freqs = frequencies(32)

    def one(q, k, v):
        return rerope_attention(q[None], k[None], v[None], freqs, window=3)[0]

    want = rerope_attention(q, k, v, freqs, window=3)
    torch.testing.assert_close(torch.func.vmap(one)(q, k, v), want, atol=1e-6, rtol=0)


def test_only_raw_tensors_out_and_lse_are_saved():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 64, None, 4, 2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = rerope_attention(q, k, v, frequencies(32), window=8, return_lse=True)
    floats = [x for x in saved if x.numel() > 16]
    assert {x.data_ptr() for x in floats} == {x.data_ptr() for x in (q, k, v, out, lse)}


def test_double_backward_points_to_the_reference():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 9, None, 2, 1))
    out = rerope_attention(q, k, v, frequencies(32), window=3)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"attention: .*backend='reference'"):
        torch.autograd.grad(dq.sum(), k)


def test_frequencies_have_a_gradient_in_the_reference_only():
    q, k, v = make_qkv(1, 9, None, 2, 1)
    freqs = RopeFreqs(frequencies(32).inv_freq.requires_grad_())
    with pytest.raises(ValueError, match=r"inv_freq .*backend='reference'"):
        rerope_attention(q, k, v, freqs, window=3)
    out = rerope_attention(q, k, v, freqs, window=3, backend="reference")
    assert torch.autograd.grad(out.sum(), freqs.inv_freq)[0].abs().sum() > 0


@pytest.mark.parametrize("name", CASES)
def test_stored_keys_give_the_same(name):
    """The op takes keys as a cache holds them, rotated by the score's map."""
    q, k, v = make_qkv(1, 21, None, 2, 1)
    theta, score = frequencies(32).inv_freq, CASES[name]
    kept = OPS.rope_fwd(k, None, theta, score.stored(torch.arange(21, device=q.device)))[0]
    want = OPS.attention_fwd(q, k, v, theta, **score_options(score))[0]
    got = OPS.attention_fwd(q, kept, v, theta, **score_options(score, stored=True))[0]
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
