"""Rounding to bf16: denormals stay what they are, which AVX512_BF16's conversions would make 0."""

import pytest
import torch

from extrope_kernels import apply_rope_qk, methods

# Every denormal, and normal numbers beside them in the same vector.
CODES = torch.arange(-160, 160, dtype=torch.int16)
CODES = torch.where(CODES < 0, -CODES - 2**15, CODES).to(torch.int16)  # sign and magnitude


def rows(head_dim):
    """(1, 1, 5, head_dim): at position 0, where a rotation changes nothing."""
    count = 5 * head_dim
    return CODES.repeat(-(-count // CODES.numel()))[:count].view(torch.bfloat16).view(1, 1, 5, -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [32, 34, 64, 96, 128])
def test_denormals_stay(head_dim, interleaved):
    q = rows(head_dim)
    freqs = methods.rope(head_dim)
    for out in apply_rope_qk(q, q[:, :, :1], freqs, interleaved=interleaved, backend="cpu"):
        assert torch.equal(out.view(torch.int16), q[:, :, : out.shape[2]].view(torch.int16))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [32, 34, 64, 96, 128])
def test_denormals_stay_after_a_norm(head_dim, interleaved):
    weights = rows(head_dim)[0, 0]
    ones = torch.ones(1, 1, 1, head_dim, dtype=torch.bfloat16)
    for weight in weights:
        options = {"q_norm_weight": weight, "norm_eps": 1e-12, "interleaved": interleaved}
        out, _ = apply_rope_qk(ones, ones, methods.rope(head_dim), backend="cpu", **options)
        assert torch.equal(out.view(torch.int16).flatten(), weight.view(torch.int16))
