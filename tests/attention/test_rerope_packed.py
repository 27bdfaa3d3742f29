"""Sequences of their own lengths and frequencies are a loop over them."""

from itertools import pairwise

import pytest
import torch
from attention_oracle import both_orders, closed_form, frequencies, make_qkv
from score_examples import rerope
from test_rerope import INF, call

from extrope_kernels.methods import RopeFreqs
from extrope_kernels.testing import assert_within_budget, device


@pytest.mark.parametrize("factor, grouped", [(INF, False), (4.0, False), (3.0, True)])
@pytest.mark.parametrize("lengths", [(7,), (5, 0, 17, 1, 33), (0, 0, 3), (64, 65)], ids=str)
def test_packed_is_a_loop_over_sequences(lengths, factor, grouped, any_backend):
    tensors = [x[0] for x in make_qkv(1, sum(lengths), None, 4, 2)]
    check_packed(any_backend, tensors, lengths, frequencies(32), 6, factor, grouped, log_n=4)


def test_frequencies_of_each_packed_sequence(any_backend):
    tensors = [x[0] for x in make_qkv(1, 20, None, 2, 1)]
    scales = torch.tensor([[1.0], [0.5]], device=device())
    freqs = RopeFreqs(frequencies(32).inv_freq * scales)
    check_packed(any_backend, tensors, (8, 12), freqs, 4)


def check_packed(backend, tensors, lengths, freqs, window, factor=INF, grouped=False, **known):
    """Compare every sequence with the closed form, within the error budget."""
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(bounds, device=device())
    options = {"window": window, "factor": factor, "grouped": grouped, "return_lse": True}
    out, lse = call(*tensors, freqs, backend, cu_seqlens=cu_seqlens, **options, **known)
    assert out.shape == tensors[0].shape and lse.shape == (out.shape[1], bounds[-1])
    again = call(*tensors, freqs, backend, cu_seqlens=cu_seqlens.int(), **options, **known)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    for row, (first, last) in enumerate(pairwise(bounds)):
        part = [x[None, first:last] for x in tensors]
        own = freqs if freqs.inv_freq.dim() == 1 else RopeFreqs(freqs.inv_freq[row])
        relative = rerope(last - first, last - first, window, factor, grouped)
        wanted = closed_form(*part, relative, own, **known)
        plain = both_orders(*part, relative, own, wanted, **known)
        for name, got, same_dtype, exact in (
            ("out", out[None, first:last], plain[0], wanted[0]),
            ("lse", lse[None, :, first:last], plain[1], wanted[1]),
        ):
            assert_within_budget(name, got, same_dtype, exact)


def test_one_token_behind_an_empty_sequence(any_backend):
    """Has frequencies and starts of its own sequence, not those of the first."""
    q, k, v = (x[0] for x in make_qkv(1, 1, None, 2, 1))
    inv_freq = frequencies(32).inv_freq * torch.tensor([[1.0], [0.5]], device=q.device)
    cu_seqlens = torch.tensor([0, 0, 1], device=q.device)
    starts = [torch.tensor(at, dtype=torch.int32, device=q.device) for at in ((3, 40), (3, 37))]
    options = {"window": 8, "return_lse": True}
    lse = [
        call(q, k, v, RopeFreqs(inv_freq), any_backend, cu_seqlens=cu_seqlens, q_start=starts[0],
             k_start=starts[1], **options)[1],
        call(q, k, v, RopeFreqs(inv_freq[1]), any_backend, q_start=40, k_start=37,
             cu_seqlens=torch.tensor([0, 1], device=q.device), **options)[1],
    ]  # fmt: skip
    torch.testing.assert_close(*lse)


def test_starts_that_share_memory(any_backend):
    """Of queries and keys, views of one tensor: what they hold counts, not where it lies."""
    q, k, v = make_qkv(2, 20, None, 2, 1)
    starts = torch.tensor([9, 5], dtype=torch.int32, device=q.device)
    for given in ((starts[:1], starts), (starts, starts[:1])):
        shared, own = (
            call(q, k, v, frequencies(32), any_backend, window=4, q_start=of_q, k_start=of_k)
            for of_q, of_k in (given, [x.clone() for x in given])
        )
        assert torch.equal(shared, own)


def test_frequencies_of_each_batch_row(any_backend):
    q, k, v = make_qkv(2, 20, None, 2, 1)
    inv_freq = frequencies(32).inv_freq * torch.tensor([[1.0], [0.5]], device=q.device)
    out = call(q, k, v, RopeFreqs(inv_freq), any_backend, window=4)
    for row in range(2):
        part = [x[row : row + 1] for x in (q, k, v)]
        one = call(*part, RopeFreqs(inv_freq[row]), any_backend, window=4)
        assert torch.equal(out[row : row + 1], one)
