"""A package of AOTInductor: it loads, and gives what its module gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from extrope_kernels import (
    apply_rope_qk,
    head_permutations,
    methods,
    permuteformer_attention,
    rope_attention,
    scores,
)
from extrope_kernels.testing import attention_backends

pytestmark = pytest.mark.skipif("cpu" not in attention_backends(), reason="packages call C++")
YARN = methods.yarn(16, factor=4.0, original_max_position_embeddings=32)


class Attention(nn.Module):
    """Every op of a model, with and without what can be left out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", YARN.inv_freq)
        self.register_buffer("permutations", head_permutations(2, 16))
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 16))

    def forward(self, q, k):
        norms = {"q_norm_weight": self.weight, "k_norm_weight": self.weight}
        permuted = {"permutations": self.permutations}
        return [
            *apply_rope_qk(q, k, YARN),
            *apply_rope_qk(q, k, YARN, positions=5),
            *apply_rope_qk(q, k, YARN, **norms),
            *torch.ops.extrope.rope_fwd(q, k, self.inv_freq),
            rope_attention(q, k, k, YARN, scores.rerope(window=7)),
            rope_attention(q, k, k, YARN, scores.self_extend(window=8, factor=4)),
            permuteformer_attention(q, k, k, **permuted),
            permuteformer_attention(q, k, k, positions=5, **permuted),
        ]


@pytest.mark.thorough
@torch.no_grad()
def test_packages_agree(tmp_path):
    module, (q, k) = Attention(), (torch.randn(1, 23, heads, 16) for heads in (4, 2))
    exported = torch.export.export(module, (q, k))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "a.pt2"))
    for got, want in zip(torch._inductor.aoti_load_package(path)(q, k), module(q, k), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
