"""The small kernels beside Triton's scans: what they prepare, and products of rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from extrope_kernels import head_permutations, permuteformer_attention
from extrope_kernels.testing import device


def prepared(decay, cu_seqlens, part):
    from extrope_kernels.ops.linear_attention.triton.prepare import BLOCK, prepare_kernel

    rates = None if decay is None else decay.new_empty(decay.shape, dtype=torch.float32)
    starts = None if cu_seqlens is None else torch.empty_like(cu_seqlens)
    stride, heads = (0, 0) if decay is None else (decay.stride(0), decay.shape[0])
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    given = (decay, rates, cu_seqlens, starts, stride, heads, sequences)
    prepare_kernel[(1,)](*given, part, BLOCK, num_warps=1)
    return rates, starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads, step", [(1, 1), (7, 3), (300, 1)])
def test_logarithms_are_rounded_once(dtype, heads, step):
    """A unit of float32 off at most, also near 1, where distances multiply it."""
    decay = 1 - torch.logspace(-7, -0.01, heads * step, dtype=torch.float64)
    decay = decay.to(device(), dtype)[::step]
    found, starts = prepared(decay, None, 48)
    want = decay.double().log2().float()
    assert starts is None
    torch.testing.assert_close(found, want, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("sequences", [1, 5, 128, 129, 300])
def test_parts_before_each_sequence(sequences):
    generator = torch.Generator().manual_seed(sequences)
    lengths = torch.randint(0, 200, (sequences,), generator=generator)
    lengths[::3] = 0
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device())
    rates, found = prepared(None, boundaries, 48)
    want = torch.nn.functional.pad(((lengths + 47) // 48).cumsum(0), (1, 0)).int()
    assert rates is None and torch.equal(found.cpu(), want)


@pytest.mark.parametrize(
    "batch, seqlen, heads, dim", [(2, 37, 3, 16), (1, 1, 1, 200), (2, 0, 2, 8)]
)
def test_products_of_rows(batch, seqlen, heads, dim):
    from extrope_kernels.ops.linear_attention.triton import row_dots

    generator = torch.Generator().manual_seed(dim)
    x, y = torch.randn(2, batch, heads, seqlen, dim + 3, generator=generator).to(device())
    x, y = (x.transpose(1, 2)[..., 3:] for x in (x, y))
    found = row_dots(x, y, False)
    want = torch.linalg.vecdot(x.double(), y.double()).transpose(1, 2)
    assert found.is_contiguous() and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)
    if seqlen and batch == 1:
        assert torch.equal(row_dots(x[0], y[0], True), found[0])


def test_decay_of_any_strides():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, n, 16, generator=generator).to(device()) for n in (4, 2, 2))
    permutations = head_permutations(2, 16).to(device())
    decay = torch.tensor([0.5, 0.1, 0.9, 0.1, 1.0, 0.1, 0.99, 0.1]).to(device())[::2]
    options = {"permutations": permutations, "backend": "triton"}
    found = permuteformer_attention(q, k, v, decay=decay, **options)
    same = permuteformer_attention(q, k, v, decay=decay.contiguous(), **options)
    assert torch.equal(found, same)


def test_what_is_wrong_with_a_layout_is_told_each_time():
    """Checks are made once for each layout that passes them."""
    q, k = torch.randn(1, 5, 4, 16).to(device()), torch.randn(1, 5, 3, 16).to(device())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"linear_attn: k's heads must divide q's 4"):
            torch.ops.extrope.linear_attn_fwd_triton(q, k, k)
        with pytest.raises(ValueError, match=r"linear_attn: head_dim must be at most 256"):
            torch.ops.extrope.linear_attn_fwd_triton(*[x.repeat(1, 1, 1, 17) for x in (q, q, q)])
