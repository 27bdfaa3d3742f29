"""LEX's blockwise causal attention against the dense masked formula and the authors' masks."""

import pytest
import torch
from attention_oracle import (
    both_orders,
    check_outputs,
    closed_form,
    frequencies,
    make_qkv,
    plain_formula,
    worse,
)
from score_examples import blockwise_causal

from extrope_kernels import blockwise_causal_attention, rerope_attention, scores
from extrope_kernels.methods import RopeFreqs, xpos
from extrope_kernels.ops._shared.attention_call import score_options
from extrope_kernels.testing import assert_within_budget, device

# bca_visibility_T12_block4 of the authors' code: may query i (a row) see key j?
VISIBLE = [
    "100000000000",
    "110000000000",
    "111000000000",
    "111100000000",
    "001110000000",
    "001111000000",
    "000011100000",
    "000011110000",
    "000000111000",
    "000000111100",
    "000000001110",
    "000000001111",
]


def decaying(head_dim: int, **options) -> RopeFreqs:
    freqs = xpos(head_dim, **options)
    return RopeFreqs(freqs.inv_freq.to(device()), log_decay=freqs.log_decay.to(device()))


def test_the_authors_visibility(any_backend):
    n = len(VISIBLE)
    zeros, v = torch.zeros(1, n, 1, 16), torch.eye(n, 16)[None, :, None]
    tensors = [x.to(device()) for x in (zeros, zeros, v)]
    out = blockwise_causal_attention(*tensors, frequencies(16), block_size=4, backend=any_backend)
    want = torch.tensor([[int(bit) for bit in row] for row in VISIBLE], device=device())
    assert torch.equal((out[0, :, 0, :n] > 0).int(), want.int())
    assert torch.equal(want.sum(1).cpu(), torch.tensor([1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 3, 4]))


@pytest.mark.parametrize("method", [frequencies, decaying])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (53, 53), (6, 53), (1, 40), (9, 4)])
@pytest.mark.parametrize("block_size", [2, 8, 34, 106, 108])
def test_the_dense_masked_formula(block_size, seqlen_q, seqlen_k, method, any_backend):
    q, k, v = make_qkv(1, seqlen_q, seqlen_k, 4, 2)
    freqs, relative = method(32), blockwise_causal(seqlen_q, seqlen_k, block_size)
    found = blockwise_causal_attention(
        q, k, v, freqs, block_size=block_size, backend=any_backend, return_lse=True
    )
    wanted = closed_form(q, k, v, relative, freqs)
    plain = both_orders(q, k, v, relative, freqs, wanted)
    check_outputs(any_backend, q, found, plain, wanted)


@pytest.mark.parametrize("block_size", [8, 34])
def test_gradients(block_size, any_backend):
    tensors, freqs = make_qkv(1, 53, None, 4, 2), decaying(32)
    dout, relative = torch.randn_like(tensors[0]), blockwise_causal(53, 53, block_size)

    def gradients(function, dtype=torch.float32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        return torch.autograd.grad(function(*leaves), leaves, dout.to(dtype))

    exact = gradients(lambda *x: closed_form(*x, relative, freqs)[0], torch.float64)
    orders = [
        gradients(lambda *x: plain_formula(*x, relative, freqs)[0]),
        gradients(lambda *x: plain_formula(*x, relative, freqs, scale_first=True)[0]),
    ]
    found = gradients(
        lambda *x: blockwise_causal_attention(*x, freqs, block_size=block_size, backend=any_backend)
    )
    for name, got, plain, want in zip(("dq", "dk", "dv"), found, worse(exact, *orders), exact):
        assert_within_budget(name, got, plain, want)


def test_a_block_as_long_as_the_sequence_is_causal_attention(any_backend):
    q, k, v = make_qkv(1, 30, None, 2, 1)
    out = blockwise_causal_attention(q, k, v, frequencies(32), block_size=60, backend=any_backend)
    want = rerope_attention(q, k, v, frequencies(32), window=30, backend=any_backend)
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_finite_where_released_xpos_overflows(dtype, any_backend):
    """Amplitudes of absolute positions overflow fp32 after 512 * log(2**128) / log(3.5) tokens."""
    q, k, v = make_qkv(1, 300, None, 1, 1, 8, dtype)
    freqs = decaying(8, scale_base=1)
    out = blockwise_causal_attention(q, k, v, freqs, block_size=8, backend=any_backend)
    exact, _ = closed_form(q, k, v, blockwise_causal(300, 300, 8), freqs)
    assert out.isfinite().all()
    assert (out - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("block_size", [0, -2, 7])
def test_block_size_is_even(block_size):
    q, k, v = make_qkv(1, 5)
    with pytest.raises(ValueError, match=f"blockwise_causal_attention: block_size .*{block_size}"):
        blockwise_causal_attention(q, k, v, frequencies(32), block_size=block_size)


def test_the_op_is_registered_whole():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 13, None, 2, 1))
    freqs = decaying(32)
    op = torch.ops.extrope.attention_fwd.default
    options = score_options(scores.blockwise_causal(6))
    torch.library.opcheck(op, (q, k, v, freqs.inv_freq, None, freqs.log_decay), options)
