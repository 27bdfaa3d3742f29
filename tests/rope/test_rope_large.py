"""Results that are too large for the caches: the CPU kernels write them past those."""

import pytest
import torch

from extrope_kernels import apply_rope_qk, methods

MOST_KEPT = 24 << 20  # bytes: csrc/cpu/runtime/caches.h


@pytest.mark.parametrize("norm", ["none", "each head", "all heads"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_its_parts(dtype, head_dim, interleaved, norm):
    heads, part = (5, 2), 3000
    tokens = MOST_KEPT // (sum(heads) * head_dim * dtype.itemsize) + part + 7
    q, k = (torch.randn(1, tokens, n, head_dim).to(dtype) for n in heads)
    options = {"interleaved": interleaved, "backend": "cpu"}
    if norm != "none":
        weights = (torch.rand(n * head_dim if norm == "all heads" else head_dim) for n in heads)
        options |= dict(zip(("q_norm_weight", "k_norm_weight"), weights))
    freqs = methods.rope(head_dim)
    whole = apply_rope_qk(q, k, freqs, **options)
    for first in range(0, tokens, part):
        positions = torch.arange(first, min(first + part, tokens))
        parts = (x[:, first : first + part] for x in (q, k))
        rotated = apply_rope_qk(*parts, freqs, positions=positions, **options)
        for x, y in zip(whole, rotated):
            assert torch.equal(x[:, first : first + part], y)
