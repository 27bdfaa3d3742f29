"""Attention on the CPU about the borders of its tiles and blocks, above all in bfloat16.

By AMX or AVX512_BF16 where the processor has them, and by the narrower ones beside them. Where it
has neither, the same cases check what runs there.
"""

import functools
import math

import pytest
import torch
from support.attention_oracle import (
    attend,
    check,
    check_both,
    check_gradients,
    frequencies,
    make_qkv,
)
from support.score_examples import EXAMPLES, dual_chunk, example, rerope

from extrope_kernels import scores
from extrope_kernels.testing import attention_backends, device

pytestmark = pytest.mark.skipif(
    device() != "cpu" or "cpu" not in attention_backends(), reason="about the CPU's kernels"
)
BF16, F32 = torch.bfloat16, torch.float32
of_rerope = functools.partial(example, scores.leaky_rerope, rerope, factor=math.inf)


def most_thorough(values, kept):
    return [pytest.param(x, marks=() if x in kept else pytest.mark.thorough) for x in values]


@pytest.mark.parametrize(
    "window", most_thorough([127, 128, 191, 192, 193, 383, 384, 385], kept=(193,))
)
def test_windows_around_tiles_of_384_rows_and_heads_and_192_keys(window):
    tensors = make_qkv(seqlen_q=389, heads_q=2, head_dim=16)
    check_both("cpu", of_rerope(window=window), tensors, with_lse=False)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("heads_q", [1, 4])
@pytest.mark.parametrize(
    "window",
    most_thorough([1, 7, 8, 9, 31, 32, 33, 47, 48, 49, 63, 64, 65, 161], kept=(8, 33)),
)
def test_windows_around_blocks_of_4_8_or_32_keys(window, heads_q, dtype):
    """Where some rows of a block of keys are near and others far, or on neither side."""
    tensors = make_qkv(1, 131, 165, heads_q, 1, 16, dtype)
    check("cpu", of_rerope(window=window), tensors)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("chunk, local", [(3, 1), (7, 0), (8, 1), (33, 2), (31, 0), (70, 6)])
def test_three_regions_in_a_block_of_keys(chunk, local, dtype):
    made = example(scores.dual_chunk, dual_chunk, chunk_size=chunk, local_window=local)
    check("cpu", made, make_qkv(1, 150, None, 4, 2, 16, dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_key_counts_once_for_any_window(dtype):
    """Logits of 0, and values that name their key."""
    n = 96
    q, k, _ = make_qkv(1, n, None, 2, 1, n, dtype)
    v, seen, freqs = torch.eye(n).to(dtype)[None, :, None], torch.ones(n, n).tril(), frequencies(n)
    for window in range(1, n + 1):
        out, lse = attend(of_rerope(window=window), 0 * q, k, v, freqs, "cpu")
        assert torch.allclose(lse.exp(), seen.sum(1).expand_as(lse), rtol=1e-5), window
        want = seen / seen.sum(1, keepdim=True)
        assert torch.allclose(out[0].float(), want[:, None].expand(n, 2, n), rtol=2.0**-7), window


@pytest.mark.parametrize("heads_q, seqlen, window", [(4, 517, 31), (4, 517, 257), (1, 515, 513)])
def test_windows_around_tiles_of_1024_rows_and_heads(heads_q, seqlen, window):
    check(
        "cpu", of_rerope(window=window, factor=4.0), make_qkv(1, seqlen, None, heads_q, 1, 16, BF16)
    )


def test_more_rows_than_a_tile():
    check("cpu", of_rerope(window=300, factor=4.0), make_qkv(1, 1100, None, 1, 1, 8, BF16))


@pytest.mark.parametrize("rising", [True, False])
def test_a_maximum_that_moves_far(rising):
    """Scores grow, or shrink, by tens from one block of keys to the next."""
    q, k, v = make_qkv(1, 300, None, 2, 1, 32, BF16)
    growth = torch.linspace(0.0, 40.0, 300)[None, :, None, None]
    q = torch.ones_like(q)
    k = (k + (growth if rising else -growth)).to(BF16)
    check("cpu", of_rerope(window=300, factor=4.0), (q, k, v))


@pytest.mark.parametrize("growth", [2.0**10, 2.0**14, 2.0**18])
def test_logits_past_the_whole_numbers_of_float32(growth):
    """Up to 2**42: a row has the value of its largest logit, and that as its lse."""
    q, k, v = make_qkv(1, 65, None, 2, 1, 64, BF16)
    given = ((growth * q).to(BF16), (growth * k).to(BF16), v, frequencies(64))
    (out, lse), want = (attend(of_rerope(window=9), *given, at) for at in ("cpu", "reference"))
    assert torch.allclose(out.float(), want[0].float(), rtol=2.0**-7, atol=2.0**-7)
    assert torch.allclose(lse, want[1], rtol=2.0**-20)


def test_keys_that_no_query_sees_may_be_infinite_in_other_blocks():
    q, k, v = make_qkv(1, 96, None, 1, 1, 32, BF16)
    made, freqs = of_rerope(window=200), frequencies(32)
    whole, _ = attend(made, q[:, :32], k[:, :32], v[:, :32], freqs, "cpu")
    v[:, 64:] = torch.inf
    assert torch.equal(attend(made, q, k, v, freqs, "cpu")[0][:, :32], whole)


@pytest.mark.parametrize("heads_q, seqlen, window", [(4, 261, 31), (4, 261, 129), (1, 515, 513)])
def test_gradients_around_tiles_of_512_rows_and_heads_and_128_keys(heads_q, seqlen, window):
    tensors = make_qkv(1, seqlen, None, heads_q, 1, 16, BF16)
    check_gradients("cpu", of_rerope(window=window), tensors, with_lse=False)


@pytest.mark.parametrize("head_dim, head_dim_v", [(8, 40), (72, 8), (160, 64)])
def test_gradients_of_head_dims_that_fill_no_tile(head_dim, head_dim_v):
    tensors = make_qkv(2, 75, None, 3, 1, head_dim, BF16, head_dim_v)
    check_gradients("cpu", of_rerope(window=20, factor=4.0), tensors)


@pytest.mark.parametrize(
    "name, options",
    [
        ("leaky_rerope", {"interleaved": True}),
        ("leaky_rerope", {"log_n": 8, "softmax_scale": 0.3}),
        ("self_extend", {}),
    ],
    ids=str,
)
def test_gradients_with_options(name, options):
    freqs, tensors = (
        frequencies(64, rotary_dim=48, attention_factor=1.3),
        make_qkv(1, 140, None, 2, 2, 64, BF16),
    )
    check_gradients("cpu", EXAMPLES[name], tensors, freqs, with_lse=False, **options)


def test_products_without_amx(run_narrower):
    """As AMD's processors multiply."""
    tests = "of_512 or of_head_dims"
    run_narrower("avx512_bf16", "tests/attention/test_attention_bf16.py", "-k", tests)


@pytest.mark.thorough
@pytest.mark.parametrize("narrower", ["avx512", "avx512_bf16"])
def test_narrower_instructions_on_a_wider_processor(narrower, run_narrower):
    chosen = "of_1024 or of_512 or moves or of_head_dims or (strided and cpu and bfloat16)"
    files = [f"tests/attention/test_attention{ending}.py" for ending in ("", "_bf16")]
    run_narrower(narrower, *files, "-k", chosen)
