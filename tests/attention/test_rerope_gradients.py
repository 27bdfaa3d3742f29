"""Gradients of ReRoPE and dual chunk attention, on every backend, against float64."""

from itertools import pairwise

import pytest
import torch
from attention_gradients import FLOAT, INF, check, check_rerope, compare, gradients
from attention_oracle import frequencies, make_qkv
from score_examples import EXAMPLES, dual_chunk, rerope
from torch.autograd import gradcheck, gradgradcheck

from extrope_kernels import dual_chunk_attention, rerope_attention
from extrope_kernels.methods import RopeFreqs
from extrope_kernels.testing import device

LOW = (FLOAT, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("factor", [1 / 16, 1.0, 4.0, INF])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 66, 67])
def test_windows_and_factors(window, factor, any_backend):
    check_rerope(any_backend, make_qkv(seqlen_q=67), frequencies(32), window, factor)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 128, 256])
def test_head_dims(head_dim, dtype, any_backend):
    tensors = make_qkv(seqlen_q=37, head_dim=head_dim, dtype=dtype)
    check_rerope(any_backend, tensors, frequencies(head_dim), 11, 4.0)


@pytest.mark.parametrize("heads_q, heads_k", [(1, 1), (3, 1), (4, 2), (9, 3)])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (53, 53), (5, 40), (40, 7)])
def test_heads_and_lengths(seqlen_q, seqlen_k, heads_q, heads_k, any_backend):
    tensors = make_qkv(2, seqlen_q, seqlen_k, heads_q, heads_k)
    check_rerope(any_backend, tensors, frequencies(32), 7, 4.0)


@pytest.mark.skipif(
    device() != "cpu", reason="about the CPU's tiles: 384 rows and heads x 192 keys"
)
@pytest.mark.parametrize("window", [128, 191, 192, 193, 384])
def test_windows_around_the_tiles_of_the_cpu(window):
    check_rerope("cpu", make_qkv(1, 389, None, 2, 1, 16), frequencies(16), window)


@pytest.mark.parametrize(
    "changes",
    [
        {"softmax_scale": 0.3, "log_n": 8},
        {"interleaved": True},
        {"with_lse": True},
        {"grouped": True, "log_n": 5, "with_lse": True},
    ],
    ids=str,
)
def test_options(changes, any_backend):
    freqs = frequencies(32, rotary_dim=16, attention_factor=1.3)
    check_rerope(any_backend, make_qkv(1, 29, None, 2, 1), freqs, 6, 3.0, **changes)


@pytest.mark.parametrize("chunk_size, local_window", [(12, 2), (40, 8), (7, 0)])
def test_dual_chunk(chunk_size, local_window, any_backend):
    freqs, tensors = frequencies(32), make_qkv(1, 45, None, 4, 2)
    check(
        lambda *x: dual_chunk_attention(
            *x, freqs, chunk_size=chunk_size, local_window=local_window, backend=any_backend,
            return_lse=True,
        ),
        dual_chunk(45, 45, chunk_size, local_window), tensors, freqs,
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [(5, 0, 17, 1, 33), (0, 0, 3), (64, 65)], ids=str)
def test_packed_is_a_loop_over_sequences(lengths, any_backend):
    tensors = [x[0] for x in make_qkv(1, sum(lengths), None, 4, 2)]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=tensors[0].device)
    freqs, dout = frequencies(32), torch.randn_like(tensors[0])
    found = gradients(
        lambda *x: rerope_attention(
            *x, freqs, window=6, factor=4.0, cu_seqlens=cu_seqlens, backend=any_backend,
            return_lse=True,
        ),
        tensors, dout,
    )  # fmt: skip
    for first, last in pairwise(bounds):
        own = [[x[None, first:last] for x in them] for them in (found, tensors, [dout])]
        compare(*own[:2], rerope(last - first, last - first, 6, 4.0), freqs, own[2][0])


def test_strided_gradient_and_views(any_backend):
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for x in make_qkv(2, 23, None, 4, 2)
    )
    out = rerope_attention(q, k, v, frequencies(32), window=5, backend=any_backend)
    summed = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)  # strides all zero
    dense = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(summed, dense))


def test_bitwise_equal_across_repeats(fast_backend):
    interpreted = fast_backend == "triton" and device() == "cpu"
    tensors = make_qkv(2, 150 if not interpreted else 40, None, 6, 2, 64)
    dout = torch.randn_like(tensors[0])

    def once():
        return gradients(
            lambda *x: rerope_attention(
                *x, frequencies(64), window=37, return_lse=True, backend=fast_backend
            ),
            tensors, dout,
        )  # fmt: skip

    first = once()
    for _ in range(100 if not interpreted else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, once()))


# -------------------------------------------------------------------------------------------------
# The reference: finite differences


def reference(q, k, v, inv_freq, **options):
    freqs = RopeFreqs(inv_freq, attention_factor=1.2)
    return rerope_attention(q, k, v, freqs, backend="reference", return_lse=True, **options)


@pytest.mark.parametrize("factor, grouped", [(INF, False), (3.0, False), (0.5, False), (2.0, True)])
def test_the_reference_by_finite_differences(factor, grouped):
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 7, None, 2, 1, 8, torch.float64))
    inv_freq = frequencies(8).inv_freq.double().requires_grad_()
    options = {"window": 2, "factor": factor, "grouped": grouped, "log_n": 3}
    assert gradcheck(lambda *x: reference(*x, **options), (q, k, v, inv_freq))
    assert gradgradcheck(lambda *x: reference(*x, **options), (q, k, v, inv_freq))


def test_the_reference_gives_rows_without_keys_no_gradient():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 5, 2, 1, 1, 8, torch.float64))
    inv_freq = frequencies(8).inv_freq.double()
    out, _ = reference(q, k, v, inv_freq, window=1)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :3] == 0).all() and (out[:, :3] == 0).all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_score_method(name, dtype, fast_backend):
    example = EXAMPLES[name]
    tensors = make_qkv(2, 45, None, 4, 2, 32, dtype)
    freqs = frequencies(32)

    def fused(q, k, v):
        options = {**example.parameters, "return_lse": True, "backend": fast_backend}
        return example.attention(q, k, v, freqs, **options)

    check(fused, example.relative(45, 45, **example.parameters), tensors, freqs, with_lse=True)


def test_a_row_without_keys_or_a_sink(any_backend):
    """-inf switches a sink off: it has no part in a row, and no gradient of it."""
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 4, 2))
    sinks = torch.tensor([-INF, 0.3], device=device(), requires_grad=True)
    out, lse = rerope_attention(
        q, k, v, frequencies(32), window=3, sinks=sinks, return_lse=True, backend=any_backend
    )
    assert torch.equal(lse[0, 0, :2], lse.new_full((2,), -INF)) and not out[0, :2].any()
    grads = torch.autograd.grad(out.sum(), (q, k, v, sinks))
    assert all(x.isfinite().all() for x in grads) and grads[3][0] == 0


def test_keys_of_no_query_heads(any_backend):
    q = torch.empty(1, 20, 0, 16, device=device(), requires_grad=True)
    k, v = torch.randn(2, 1, 20, 2, 16, device=device()).unbind()
    k, v = k.requires_grad_(), v.requires_grad_()
    out = rerope_attention(q, k, v, frequencies(16), window=4, backend=any_backend)
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(grad, torch.zeros_like(grad))
