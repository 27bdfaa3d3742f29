"""What is worked out once for each layout of a call's tensors."""

from __future__ import annotations

import pytest
import torch

from extrope_kernels import methods, rope_attention
from extrope_kernels.ops._torch import layouts


@pytest.fixture(autouse=True)
def nothing_known():
    layouts.forget()
    yield
    layouts.forget()


def test_layouts_differ_by_all_but_data():
    x = torch.zeros(4, 6)
    others = (x.t(), x[:2], x.bfloat16(), x.to("meta"), x[:, ::2], None)
    assert layouts.layout_key(x, None) == layouts.layout_key(torch.ones(4, 6), None)
    assert len({layouts.layout_key(x), *map(layouts.layout_key, others)}) == 7


def test_work_is_done_once_and_again_after_it_failed():
    calls = []

    def make(value):
        calls.append(value)
        if value < 0:
            raise ValueError("negative")
        return None

    for value in (1, 1, 2, 1):
        assert layouts.cached_by_layout(make, value, value) is None
    for _ in range(2):
        with pytest.raises(ValueError, match="negative"):
            layouts.cached_by_layout(make, -1, -1)
    assert calls == [1, 2, -1, -1]


def test_a_refused_call_is_refused_again():
    q, freqs = torch.zeros(1, 3, 2, 16), methods.rope(16)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"v must be \(batch 1, seqlen_k 3, heads_k 2, head_dim_v\) to go with k",
        ):
            rope_attention(q, q, q[:, :2], freqs)
    assert rope_attention(q, q, q, freqs).shape == q.shape
