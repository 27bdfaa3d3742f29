"""Attention in bfloat16 on the CPU: by AMX or AVX512_BF16 where the processor has them, and by the
narrower ones beside them. Where it has neither, the same cases check what runs there.
"""

import pytest
import torch
from attention_gradients import check_rerope
from attention_oracle import both_orders, closed_form, frequencies, make_qkv
from score_examples import rerope

from extrope_kernels import rerope_attention
from extrope_kernels.testing import assert_within_budget, attention_backends, device

pytestmark = pytest.mark.skipif(
    device() != "cpu" or "cpu" not in attention_backends(), reason="about the CPU's kernels"
)
BF16 = torch.bfloat16


def check(q, k, v, window, **options):
    """Compare out and lse with the closed form, within the error budget."""
    freqs = frequencies(q.shape[-1])
    relative = rerope(q.shape[1], k.shape[1], window, 4.0)
    exact = closed_form(q, k, v, relative, freqs)
    plain = both_orders(q, k, v, relative, freqs, exact)
    found = rerope_attention(
        q, k, v, freqs, window=window, factor=4.0, return_lse=True, backend="cpu", **options
    )
    for name, got, same_dtype, want in zip(("out", "lse"), found, plain, exact):
        assert_within_budget(name, got, same_dtype, want)


@pytest.mark.parametrize("window", [31, 257, 513])
@pytest.mark.parametrize("heads_q, seqlen", [(4, 517), (1, 515)])
def test_around_tiles_of_1024_rows_and_heads_and_steps_of_256_keys(heads_q, seqlen, window):
    check(*make_qkv(1, seqlen, None, heads_q, 1, 16, BF16), window)


def test_more_rows_than_a_tile():
    check(*make_qkv(1, 1100, None, 1, 1, 8, BF16), 300)


@pytest.mark.parametrize("rising", [True, False])
def test_a_maximum_that_moves_far(rising):
    """Scores grow, or shrink, by tens from one block of keys to the next."""
    q, k, v = make_qkv(1, 300, None, 2, 1, 32, BF16)
    growth = torch.linspace(0.0, 40.0, 300)[None, :, None, None]
    q = torch.ones_like(q)
    check(q, (k + (growth if rising else -growth)).to(BF16), v, 300)


def test_keys_that_no_query_sees_may_be_infinite_in_other_blocks():
    q, k, v = make_qkv(1, 96, None, 1, 1, 32, BF16)
    options = {"window": 200, "backend": "cpu"}
    whole = rerope_attention(q[:, :32], k[:, :32], v[:, :32], frequencies(32), **options)
    v[:, 64:] = torch.inf
    assert torch.equal(rerope_attention(q, k, v, frequencies(32), **options)[:, :32], whole)


def test_same_bits_for_any_number_of_threads():
    q, k, v = make_qkv(2, 700, None, 4, 2, 64, BF16)
    options = {"window": 100, "return_lse": True, "backend": "cpu"}
    first = rerope_attention(q, k, v, frequencies(64), **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = rerope_attention(q, k, v, frequencies(64), **options)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("window", [31, 129, 513])
@pytest.mark.parametrize("heads_q, seqlen", [(4, 261), (1, 515)])
def test_gradients_around_tiles_of_512_rows_and_heads_and_128_keys(heads_q, seqlen, window):
    check_rerope("cpu", make_qkv(1, seqlen, None, heads_q, 1, 16, BF16), frequencies(16), window)


@pytest.mark.parametrize("head_dim, head_dim_v", [(8, 40), (72, 8), (160, 64)])
def test_gradients_of_head_dims_that_fill_no_tile(head_dim, head_dim_v):
    tensors = make_qkv(2, 75, None, 3, 1, head_dim, BF16, head_dim_v)
    check_rerope("cpu", tensors, frequencies(head_dim), 20, 4.0, with_lse=True)


@pytest.mark.parametrize(
    "changes",
    [{"interleaved": True}, {"log_n": 8, "softmax_scale": 0.3}, {"grouped": True}],
    ids=str,
)
def test_gradients_with_options(changes):
    freqs = frequencies(64, rotary_dim=48, attention_factor=1.3)
    check_rerope("cpu", make_qkv(1, 140, None, 2, 2, 64, BF16), freqs, 33, 3.0, **changes)


def test_gradients_are_the_same_bits_for_any_number_of_threads():
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 700, None, 4, 2, 64, BF16))

    def found():
        out = rerope_attention(q, k, v, frequencies(64), window=100, backend="cpu")
        return torch.autograd.grad(out.sum(), (q, k, v))

    first, threads = found(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = found()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("narrower", ["avx512", "avx512_bf16"])
def test_narrower_instructions_on_a_wider_processor(narrower, run_narrower):
    chosen = "around_tiles or moves or of_head_dims or (strided and cpu and bfloat16)"
    run_narrower(
        narrower,
        "tests/attention/test_attention_bf16.py",
        "tests/attention/test_rerope.py",
        "-k",
        chosen,
    )
